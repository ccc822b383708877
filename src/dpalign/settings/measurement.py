"""Settings of the noisy measurement."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Schedule, StageConfig
from .rollouts import SamplingConfig


@dataclass(kw_only=True)
class MeasurementConfig(StageConfig):
    """One noisy measurement on held-out private units at the end of a run. Records have `prompt`, or `text`.

    Args:
        target_epsilon: epsilon of the measurement; default: the recipe's (its units are in no other stage).
        target_delta: the recipe's.
        noise_multiplier: sigma instead of target_epsilon.
        sampling: how prompts are cut, completed and scored; default: as the recipe's stage that samples does.
    """

    sampling: SamplingConfig | None = None

    def schedule(self, stage: str, units: float) -> Schedule:
        return Schedule(sampling_rate=1.0, steps=1)
