"""Settings of DP-GRPO."""

from __future__ import annotations

from dataclasses import dataclass

from ..domains import shown, within
from ..errors import DPAlignError
from .rollouts import RolloutConfig

SCALES = {True: "group", False: "none"}  # as TRL reads them
OF_THE_BATCH = ("bnpo", "dapo")  # losses of TRL


@dataclass(kw_only=True)
class GRPOConfig(RolloutConfig):
    """Settings of DP-GRPO. Records have `prompt`, or `text` whose first tokens become the prompt.

    Args:
        num_generations: rollouts per prompt, at least 2; mean and standard deviation of their rewards standardise each.
        num_iterations: passes over one sample; each costs noise.
        num_mini_batches: K Poisson samples whose union is rolled out together; with 1 the first pass is on-policy.
        cliprange: clip of a token's probability ratio; `epsilon` in TRL, which is privacy's name here.
        cliprange_high: its upper end, above 1, where that is another one (`epsilon_high` in TRL); default: cliprange.
        beta: coefficient of the KL divergence from the model the stage started from: in the loss, token by token.
        scale_rewards: `group` divides a rollout's advantage by its group's standard deviation, `none` by nothing.
        loss_type: `dr_grpo` divides the sum over a completion's tokens by max_completion_length, `grpo` by its length.
    """

    num_generations: int = within(4, "[2, 1024]")
    num_iterations: int = within(1, "[1, 1000]")
    num_mini_batches: int = within(1, "[1, 1000]")
    cliprange: float = within(0.2, "(0, 1)")
    cliprange_high: float | None = within(None, "(0, 1000]")
    beta: float = within(0.04, "[0, 1e6]")
    scale_rewards: str | bool = "group"
    loss_type: str = "dr_grpo"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.scale_rewards, bool):
            self.scale_rewards = SCALES[self.scale_rewards]

    @property
    def passes(self) -> int:
        return self.num_iterations

    @property
    def minibatches(self) -> int:
        return self.num_mini_batches

    def validate(self) -> None:
        super().validate()
        if self.scale_rewards == "batch":
            raise DPAlignError(
                "scale_rewards batch divides by the standard deviation over all units, so that one of them would "
                "change the others' gradients: say group or none."
            )
        if self.scale_rewards not in SCALES.values():
            raise DPAlignError(f"scale_rewards {shown(self.scale_rewards)}: expected group or none.")
        if self.loss_type in OF_THE_BATCH:
            raise DPAlignError(
                f"loss_type {self.loss_type} divides by the tokens of all units, so that one of them would change the "
                "others' gradients: say dr_grpo (a constant length) or grpo (the completion's own)."
            )
        if self.loss_type not in ("dr_grpo", "grpo"):
            raise DPAlignError(f"loss_type {shown(self.loss_type)}: expected dr_grpo or grpo.")
