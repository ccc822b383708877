"""The one loop every algorithm runs in: sample, journal, step, checkpoint, resume."""

from .loop import Stage, StagePlan, StepReport, plan_stage

__all__ = ["Stage", "StagePlan", "StepReport", "plan_stage"]
