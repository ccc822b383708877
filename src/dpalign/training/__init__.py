"""The loop that every algorithm runs in, private or on text that is no one's, and its checkpoints."""

from .loop import Follower, Stage, StepReport
from .own_text import OwnTextStage
from .plan import StagePlan, plan_stage

__all__ = [
    "Follower",
    "OwnTextStage",
    "Stage",
    "StagePlan",
    "StepReport",
    "plan_stage",
]
