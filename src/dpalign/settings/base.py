"""What the settings of all stages have: the budget, what is drawn, and the optimiser."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ..domains import COUNT, LENGTH, SEEDS, STEPS, within
from ..errors import DPAlignError
from .models import AdapterConfig

NOT_HERE = {  # why adapter.init_a cannot be so in some stages
    "synthetic_gradient": "is for stages that sample completions: what people wrote has no gradient before it is read",
    "activations": "is for policies that learn from texts or pairs (sft, dpo)",
}


@dataclass(frozen=True)
class Schedule:
    """What a stage draws, but for the noise: `steps` Poisson samples, `passes` releases of each, `minibatches` at once.

    metrics_noise_ratio: noise of the metrics block as a multiple of the gradients'; 0 for no such block.
    """

    sampling_rate: float
    steps: int
    passes: int = 1
    minibatches: int = 1
    metrics_noise_ratio: float = 0.0


@dataclass(kw_only=True)
class StageConfig(ABC):
    """The budget of one stage."""

    target_epsilon: float | None = within(None, "(0, 1000]", or_inf=True)
    target_delta: float | None = within(None, "(0, 1)")
    noise_multiplier: float | None = within(None, "[0, 100000]")

    def validate(self) -> None:
        """Raises DPAlignError for a setting that cannot be."""

    def as_section(self) -> StageConfig:
        """What a recipe holds of these settings; a trainer's have more.

        Raises:
            DPAlignError: one is given that belongs elsewhere in a recipe.
        """
        return self

    @property
    def draws(self) -> bool:
        """Whether it reads private units; otherwise it is a post-processing of releases and of what is public."""
        return True

    @property
    def has_bounded_sensitivity(self) -> bool:
        """Whether one unit can move what is released by a known amount only."""
        return True

    @abstractmethod
    def schedule(self, stage: str, units: float) -> Schedule:
        """What is drawn from `units` declared units.

        Raises:
            DPAlignError: there are too few of them.
        """


@dataclass(kw_only=True)
class TrainingConfig(StageConfig):
    """Settings of one private stage.

    Args:
        expected_batch_size: units expected in a Poisson sample; sampling rate = this / units of the stage.
        max_steps: number of samples drawn; default: from num_train_epochs.
        num_train_epochs: expected number of times a unit is drawn.
        micro_batch_size: rows per forward and backward pass: a text is one, a pair two, a prompt `num_generations`. The
            rows of one pair or prompt stay together; a unit with more rows takes several passes, before its clip.
            Memory only: no effect on the result, but that the model's own text (its prompts, `init_a`) is drawn so many
            rows at a time, and so is other text of the same kind.
        learning_rate: peak learning rate of AdamW.
        lr_scheduler_type: `constant`, `linear` or `cosine` (the last two decay to 0).
        warmup_steps: steps of linear warm-up.
        weight_decay: AdamW's.
        adam_beta1: AdamW's.
        adam_beta2: AdamW's.
        adam_epsilon: AdamW's.
        adam_noise_correction: subtract the variance of the privacy noise from Adam's second moment (DP-AdamBC).
        adam_noise_floor: smallest denominator after that, as a multiple of the noise's standard deviation.
        max_grad_norm: C, the bound on one unit's gradient.
        clipping: `automatic` scales every unit's gradient to nearly C, `flat` scales only larger ones down,
            `none` is for runs without privacy.
        clipping_gamma: constant of automatic clipping: g -> C g / (|g| + gamma).
        target_epsilon: epsilon of the stage, or inf for no privacy; default: the recipe's.
        target_delta: delta of the stage; default: the recipe's, else min(1e-5, 1/(10 units)).
        noise_multiplier: sigma instead of target_epsilon; the epsilon that follows is reported.
        metrics_noise_ratio: noise on the training metrics as a multiple of sigma; 0 releases no metrics.
        max_length: most tokens of one record.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        save_steps: steps between checkpoints.
        logging_steps: steps between progress updates of the logs.
        eval_steps: measure on the records that are declared public before the first step, every so many steps, and
            after the last one: evaluations.jsonl. Changes nothing that is trained; default: when the run ends.
        seed: seed of the initial weights; sampling and noise never use it.
        insecure_seed: makes sampling, noise and rollouts reproducible for debugging. NOT PRIVATE.
        adapter: the LoRA adapter that the stage trains.
    """

    inits: ClassVar[tuple[str, ...]] = ("random",)  # of adapter.init_a, in this stage

    expected_batch_size: int = within(512, COUNT)
    max_steps: int | None = within(None, STEPS)
    num_train_epochs: float = within(1.0, "(0, 10000]")
    micro_batch_size: int = within(32, "[1, 65536]")
    learning_rate: float = within(3e-4, "[0, 1000]")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = within(0, "[0, 1000000]")
    weight_decay: float = within(0.0, "[0, 1000]")
    adam_beta1: float = within(0.9, "[0, 1)")
    adam_beta2: float = within(0.999, "[0, 1)")
    adam_epsilon: float = within(1e-8, "(0, 1]")
    adam_noise_correction: bool = False
    adam_noise_floor: float = within(0.1, "(0, 1000]")
    max_grad_norm: float = within(1.0, "[1e-9, 1e9]")
    clipping: Literal["automatic", "flat", "none"] = "automatic"
    clipping_gamma: float = within(0.01, "[0, 1e9]")
    metrics_noise_ratio: float = within(10.0, "[0, 1e6]")
    max_length: int = within(128, LENGTH)
    gradient_checkpointing: bool = False
    save_steps: int = within(1, STEPS)
    logging_steps: int = within(1, STEPS)
    eval_steps: int | None = within(None, STEPS)
    seed: int = within(0, SEEDS)
    insecure_seed: int | None = within(None, SEEDS)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)

    @property
    def has_bounded_sensitivity(self) -> bool:
        return self.clipping != "none"

    @property
    def passes(self) -> int:
        """Releases per Poisson sample (T_PPO)."""
        return 1

    @property
    def minibatches(self) -> int:
        """Poisson samples that are drawn together (K)."""
        return 1

    def validate(self) -> None:
        """Raises DPAlignError for a setting that cannot be."""
        if self.adapter.init_a not in self.inits:
            given, here = self.adapter.init_a, " or ".join(self.inits)
            raise DPAlignError(f"init_a {given} {NOT_HERE[given]}; here it may be {here}.")
        plain = AdapterConfig(**{name: getattr(self.adapter, name) for name in ("kind", "target_modules", "layers")})
        if self.adapter.kind == "full" and self.adapter != plain:
            unused = {name: getattr(plain, name) for name, v in vars(self.adapter).items() if v != getattr(plain, name)}
            raise DPAlignError(
                f"adapter.kind full trains whole weights, which have no {', '.join(unused)}: leave that out, or set "
                f"what a recipe has to {', '.join(f'{name} {value}' for name, value in unused.items())}."
            )

    def schedule(self, stage: str, units: float) -> Schedule:
        if self.expected_batch_size > units:
            raise DPAlignError(
                f"expected_batch_size {self.expected_batch_size} is larger than the {units:g} units of stage {stage}: "
                "a Poisson sample cannot expect more units than there are."
            )
        rate = self.expected_batch_size / units
        steps = self.max_steps or max(1, math.ceil(self.num_train_epochs / rate))
        steps = math.ceil(steps / self.minibatches) * self.minibatches
        return Schedule(rate, steps, self.passes, self.minibatches, self.metrics_noise_ratio)
