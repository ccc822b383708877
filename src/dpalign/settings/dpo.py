"""Settings of DP-DPO."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from ..domains import within
from .base import TrainingConfig
from .rollouts import CompletionConfig

OF_PAIRS = ("margin_range", "append_eos", "max_length")  # that records hold
SHARED = ("prepend_bos",)  # by both kinds of pairs


@dataclass(kw_only=True)
class DPOConfig(CompletionConfig):
    """Settings of DP-DPO. Records have `chosen` and `rejected`, and perhaps `prompt`.

    Optional columns: `margin`, by how much the reward of the chosen text should be higher (Amini et al. 2024);
    `preference`, the probability that `chosen` is the better one (1 if missing, 0.5 for a tie).

    Args:
        prompts: `private`: the pairs are those of the stage's records. `self_written`, and `public:PATH` (or `{public:
            PATH}`): the policy writes the pairs, for prompts that it writes too or that you declare public. The model
            that the stage started from completes each of them num_generations times, and the completion that `reward`
            scores highest is chosen over the one that it scores lowest. No record is read, nothing drawn or spent;
            expected_batch_size is then the prompts of an update, and max_grad_norm the clip of its gradient's norm.
        num_generations: completions per prompt; at least 2, of prompts that are no one's. Equal scores give no pair.
        beta: how much a log-ratio to the reference counts as reward; a larger one keeps the policy nearer to it.
        loss: `sigmoid`: the negative log-likelihood of the preference; `square`: the squared error of its probability,
            whose gradient is bounded however wrong the policy is (Square-chi-PO, arXiv 2505.21395, without its link).
        label_smoothing: probability that a judge meant the other text.
        max_length: most tokens of prompt and answer; what is longer is cut at its end. Of the records' pairs.
        prepend_bos: put the tokenizer's BOS in front of strings; a chat template writes its own.
        append_eos: end every answer that is a string and is not cut with EOS; a chat template ends its own.
        margin_range: declared upper end of the noised loss and margin metrics, which are clipped to it.
    """

    inits = ("random", "activations")
    of_private_prompts = (*CompletionConfig.of_private_prompts, *OF_PAIRS)
    of_other_prompts = tuple(
        f.name
        for f in fields(CompletionConfig)
        if f.name not in {"prompts", *SHARED, *(plain.name for plain in fields(TrainingConfig))}
    )

    learning_rate: float = within(1e-3, "[0, 1000]")
    num_generations: int = within(4, "[2, 1024]")
    beta: float = within(0.1, "(0, 1e6]")
    loss: Literal["sigmoid", "square"] = "sigmoid"
    label_smoothing: float = within(0.0, "[0, 0.5)")
    append_eos: bool = True
    margin_range: float = within(5.0, "(0, 1e6]")

    @property
    def samples(self) -> bool:
        return not self.draws
