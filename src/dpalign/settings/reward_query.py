"""Settings of the reward from one query."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ..domains import check_settings, within
from ..errors import DPAlignError
from .base import Schedule
from .models import LAYERS
from .reward_model import RewardModelConfig
from .rewards import CONTRAST, JUDGE, MEAN, RewardConfig

OWN = {  # of the fields that it shares with the trained reward model
    "target_epsilon", "target_delta", "noise_multiplier", "model", "prepend_bos", "append_eos", "pooling", "max_length",
    "micro_batch_size", "seed", "insecure_seed", "directions", "shrinkage", "own_texts", "free",
}  # fmt: skip
FREE = ("vader", CONTRAST, JUDGE, "classifier")  # kinds of rewards that a release can name or hold


@dataclass(kw_only=True)
class RewardQueryConfig(RewardModelConfig):
    """Settings of the reward from one query. Records have `chosen` and `rejected`, and perhaps `prompt`, `preference`.

    One release over all units at once instead of steps over samples: nothing of it has to be tuned on private data.
    Fields of the trained reward model that mean nothing here (learning_rate, adapter, ...) are refused.

    Args:
        free: rewards that need nobody's data (sections of `reward`: vader, contrast, judge:MODEL, classifier:NAME). The
            query learns what people add to their mean, and its reward starts there: the more noise, the closer to it.
        directions: of the model's features, in which the reward is linear: the leading ones of what the policy writes
            itself. The noise grows with their square root, what can be learned with their number. Default: half as many
            as units over the noise multiplier, at least 8.
        shrinkage: every direction's variance is taken for this share of their mean larger: a small one trusts what the
            policy writes about small directions, a large one treats all alike.
        own_texts: that the policy writes before the first draw, to find the directions and their scales.
        pooling: what the features are: `layers`: means over the text in four layers of the upper half, and the last
            token in two; `last` or `mean`: what the classifier's head reads, so that plain peft loads the release.
    """

    free: list[dict[str, Any]] = field(default_factory=list)
    directions: int | None = within(None, "[1, 4096]")
    shrinkage: float = within(1.0, "[0.001, 1e6]")
    own_texts: int = within(512, "[2, 1000000]")
    pooling: Literal["last", "mean", "layers"] = LAYERS  # type: ignore[assignment]
    expected_batch_size: int = within(1, "[1, 1]")
    metrics_noise_ratio: float = within(0.0, "[0, 0]")

    def validate(self) -> None:
        super().validate()
        for f in fields(RewardQueryConfig):
            default = type(self).__dataclass_fields__[f.name]
            plain = default.default_factory() if callable(default.default_factory) else default.default
            if f.name not in OWN and getattr(self, f.name) != plain:
                raise DPAlignError(f"{f.name} means nothing for a reward from one query: leave it out.")
        if self.directions is not None and self.own_texts <= self.directions:
            raise DPAlignError(
                f"own_texts {self.own_texts} cannot show {self.directions} directions: let the policy write more texts."
            )

        self._check_free()

    def _check_free(self) -> None:
        if not self.free:
            return
        if self.pooling != LAYERS:
            raise DPAlignError(
                f"free rewards need pooling {LAYERS}: a classifier's head, which pooling {self.pooling} is, adds none."
            )
        mean = self.free_mean
        assert mean is not None
        check_settings(mean, "free")
        for number, part in enumerate(mean.parts, 1):
            if part.kind not in FREE:
                raise DPAlignError(
                    f"free reward {number}, {part.source!r}, cannot go into a release: use vader, contrast, "
                    "judge:MODEL or classifier:NAME."
                )

    @property
    def free_mean(self) -> RewardConfig | None:
        """The mean of the free rewards, if there are any; those that read tokens read as many as the query."""
        length = {"max_length": self.max_length}
        parts = [part if part.get("source") == "vader" else length | part for part in self.free]
        return RewardConfig(source=MEAN, of=parts) if parts else None

    @property
    def scale_texts(self) -> int:
        return self.own_texts

    def schedule(self, stage: str, units: float) -> Schedule:
        return Schedule(sampling_rate=1.0, steps=1)
