"""The loop that every algorithm runs in, private or on text that is no one's, and its checkpoints."""

from .loop import Follower, Stage, StepReport
from .own_text import OwnTextStage
from .plan import StagePlan, plan_stage
from .world import ALONE, World, joined

__all__ = [
    "ALONE",
    "Follower",
    "OwnTextStage",
    "Stage",
    "StagePlan",
    "StepReport",
    "World",
    "joined",
    "plan_stage",
]
