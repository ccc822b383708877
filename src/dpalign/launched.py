"""Where this process stands among those that a launcher (`torchrun`, `accelerate launch`) has started together."""

from __future__ import annotations

import os
from dataclasses import dataclass

from .errors import DPAlignError

# What `accelerate launch` can be told and a run does not do, by the variable that says so.
NOT_DONE = {
    "ACCELERATE_USE_FSDP": "FSDP: the recipe's model.sharding says what each process holds",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed: the recipe's model.sharding says what each process holds",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM: the recipe's model.sharding says what each process holds",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "its parallelism configuration: there is model.sharding alone",
    "ACCELERATE_MIXED_PRECISION": "its mixed precision: the recipe's model.dtype says what the base computes in",
    "ACCELERATE_DYNAMO_BACKEND": "its torch.compile backend: nothing is compiled",
}


@dataclass(frozen=True)
class Place:
    """rank: of `size` processes on all machines, from 0. local: of those on this machine, from 0."""

    rank: int = 0
    size: int = 1
    local: int = 0


def place() -> Place:
    """As the launcher's environment says it; one process alone where there is none.

    Raises:
        DPAlignError: the environment says no place.
    """
    told = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if told["RANK"] is None or told["WORLD_SIZE"] is None:
        return Place()
    try:
        found = Place(int(told["RANK"]), int(told["WORLD_SIZE"]), int(told["LOCAL_RANK"] or 0))
    except ValueError:
        found = Place(-1)
    if not 0 <= found.rank < found.size or found.local < 0:
        said = ", ".join(f"{name} {value!r}" for name, value in told.items())
        raise DPAlignError(f"the environment's {said} is no place among processes: start them with torchrun.")
    return found


def check_launcher() -> None:
    """Refuses what `accelerate launch` was asked for and no run does.

    Raises:
        DPAlignError: what, and what holds instead.
    """
    for name, what in NOT_DONE.items():
        if os.environ.get(name, "no").lower() not in ("no", "false", ""):
            refused = DPAlignError(
                f"accelerate was told to use {what}; leave that out of its configuration (accelerate launch --help)."
            )
            refused.said_elsewhere = place().rank > 0
            raise refused
