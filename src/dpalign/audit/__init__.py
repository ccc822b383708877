"""Looking for faults in the guarantee from outside: the step, one run with ghosts, and the trained model."""

from .found import Audit, Bound
from .ghosts import Canaries, Seen, Subject
from .stage import audit_stage

__all__ = ["Audit", "Bound", "Canaries", "Seen", "Subject", "audit_stage"]
