"""Settings of the reward from one query."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from ..domains import within
from ..errors import DPAlignError
from .base import Schedule
from .reward_model import RewardModelConfig

OWN = {  # of the fields that it shares with the trained reward model
    "target_epsilon", "target_delta", "noise_multiplier", "model", "prepend_bos", "append_eos", "pooling", "max_length",
    "micro_batch_size", "seed", "insecure_seed", "directions", "shrinkage", "own_texts",
}  # fmt: skip


@dataclass(kw_only=True)
class RewardQueryConfig(RewardModelConfig):
    """Settings of the reward from one query. Records have `chosen` and `rejected`, and perhaps `prompt`, `preference`.

    One release over all units at once instead of steps over samples: nothing of it has to be tuned on private data.
    Fields of the trained reward model that mean nothing here (learning_rate, adapter, ...) are refused.

    Args:
        directions: of the model's features, in which the reward is linear: the leading ones of what the policy writes
            itself. The noise grows with their square root, what can be learned with their number.
        shrinkage: every direction's variance is taken for this share of their mean larger: 0 trusts what the policy
            writes about small directions, a large one treats all alike.
        own_texts: that the policy writes before the first draw, to find the directions and their scales.
    """

    directions: int = within(32, "[1, 4096]")
    shrinkage: float = within(1.0, "[0, 1e6]")
    own_texts: int = within(512, "[2, 1000000]")
    pooling: Literal["last", "mean"] = "mean"
    expected_batch_size: int = within(1, "[1, 1]")
    metrics_noise_ratio: float = within(0.0, "[0, 0]")

    def validate(self) -> None:
        super().validate()
        for field in fields(RewardQueryConfig):
            default = type(self).__dataclass_fields__[field.name]
            plain = default.default_factory() if callable(default.default_factory) else default.default
            if field.name not in OWN and getattr(self, field.name) != plain:
                raise DPAlignError(f"{field.name} means nothing for a reward from one query: leave it out.")
        if self.own_texts <= self.directions:
            raise DPAlignError(
                f"own_texts {self.own_texts} cannot show {self.directions} directions: let the policy write more texts."
            )

    def schedule(self, stage: str, units: float) -> Schedule:
        return Schedule(sampling_rate=1.0, steps=1)
