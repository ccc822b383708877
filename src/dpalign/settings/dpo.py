"""Settings of DP-DPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..domains import within
from ..errors import DPAlignError
from .base import TrainingConfig


@dataclass(kw_only=True)
class DPOConfig(TrainingConfig):
    """Settings of DP-DPO. Records have `chosen` and `rejected`, and perhaps `prompt`.

    Optional columns: `margin`, by how much the reward of the chosen text should be higher (Amini et al. 2024);
    `preference`, the probability that `chosen` is the better one (1 if missing, 0.5 for a tie).

    Args:
        beta: how much a log-ratio to the reference counts as reward; a larger one keeps the policy nearer to it.
        loss: `sigmoid`: the negative log-likelihood of the preference; `square`: the squared error of its probability,
            whose gradient is bounded however wrong the policy is (Square-chi-PO, arXiv 2505.21395, without its link).
        label_smoothing: probability that a judge meant the other text.
        max_length: most tokens of prompt and answer together; what is longer is cut at its end.
        prepend_bos: put the tokenizer's BOS in front of strings; a chat template writes its own.
        append_eos: end every answer that is a string and is not cut with EOS; a chat template ends its own.
        margin_range: declared upper end of the noised loss and margin metrics, which are clipped to it.
    """

    learning_rate: float = within(1e-3, "[0, 1000]")
    beta: float = within(0.1, "(0, 1e6]")
    loss: Literal["sigmoid", "square"] = "sigmoid"
    label_smoothing: float = within(0.0, "[0, 0.5)")
    prepend_bos: bool = False
    append_eos: bool = True
    margin_range: float = within(5.0, "(0, 1e6]")

    def validate(self) -> None:
        super().validate()
        if self.adapter.r < 1:
            raise DPAlignError("adapter.r 0 leaves the policy nothing to train: give it a rank of at least 1.")
