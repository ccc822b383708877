"""One command in several processes, as `torchrun` and `accelerate launch` start it."""

from __future__ import annotations

from ..errors import DPAlignError
from ..launched import Place
from . import TRAINING
from .train import AUDIT, COMPARE


def meet(where: Place, command: str, given: list[str]) -> bool:
    """Waits for the other processes; in any but the first one, does what that one says until the run ends.

    Returns:
        Whether this process is the first one, which carries the command out.

    Raises:
        DPAlignError: the command runs in one process.
    """
    why = ""
    if command not in TRAINING:
        why = f"dpalign {command} runs in one process: start it without torchrun or accelerate launch."
    elif COMPARE in given:
        why = f"{COMPARE} trains several runs one after the other, in one process: leave it out, or start it in one."
    elif AUDIT in given:
        why = f"{AUDIT} tries the run in one process: `dpalign audit RECIPE.yaml` does it by itself, before this run."
    if why:
        refused = DPAlignError(why)
        refused.said_elsewhere = where.rank > 0
        raise refused
    from ..world import joined

    world = joined()
    if not world.is_first:
        from ..following import follow

        follow(world)
    return world.is_first
