"""Settings of the DP reward model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..domains import within
from .base import TrainingConfig
from .models import ModelConfig, TextFormat


@dataclass(kw_only=True)
class RewardModelConfig(TrainingConfig):
    """Settings of the DP reward model. Records have `chosen` and `rejected`, and perhaps `prompt`.

    Optional columns: `margin`, by how much the chosen text should score higher; `preference`, the probability that
    `chosen` is the better one (1 if missing, 0.5 for a tie).

    Args:
        model: another model than the one that is aligned, public or a release; its tokenizer may differ. Default:
            the run's SFT model with a new head.
        prepend_bos: put the tokenizer's BOS in front of every text.
        append_eos: put EOS behind every text, where the score is then read (unless EOS is also the padding token). A
            causal LM says little at EOS before it is trained to: measure before you use it.
        pooling: `last`: a text's score is its last token's; `mean`: the mean of its tokens' scores, for causal LMs.
        label_smoothing: probability that a judge meant the other text.
        ties: `half` learns that tied texts score alike; `skip` gives their units no gradient.
        center_rewards_coefficient: weight of the squared mean score of a pair, which keeps scores near 0 (Eisenstein
            et al. 2023).
        margin_range: declared upper end of the noised margin metric; it is clipped to +- this.
    """

    learning_rate: float = within(2e-4, "[0, 1000]")
    model: ModelConfig | None = None
    prepend_bos: bool = False
    append_eos: bool = False
    pooling: Literal["last", "mean"] = "last"
    label_smoothing: float = within(0.0, "[0, 0.5)")
    ties: Literal["half", "skip"] = "half"
    center_rewards_coefficient: float = within(0.0, "[0, 1e6]")
    margin_range: float = within(5.0, "(0, 1e6]")

    @property
    def text(self) -> TextFormat:
        """How the model reads a text."""
        return TextFormat(self.max_length, self.prepend_bos, self.append_eos, self.pooling)

    @property
    def scale_texts(self) -> int | None:
        """Self-written texts that its scale is taken from, where the stage has the policy write some anyway."""
        return None
