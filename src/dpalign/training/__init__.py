"""The one loop that every algorithm runs in, and its checkpoints."""

from .loop import Stage, StepReport
from .plan import StagePlan, plan_stage

__all__ = ["Stage", "StagePlan", "StepReport", "plan_stage"]
