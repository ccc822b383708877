"""Holds a policy to what its stage started from, on texts that this has written: no record is read.

A reward knows nothing of what was learned before it, and a policy that climbs it forgets. Here the divergence from the
model that the stage started from is measured on that model's own texts, where the KL penalty of the rewards is measured
on the policy's: what only the policy has forgotten to write counts as well. Its gradient joins the noised one, so it is
post-processing of releases.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..models import Policy
from ..models.generation import write_texts
from ..models.head import held_together
from ..models.policy import Rollouts
from ..settings.rollouts import MOST_ROWS, CompletionConfig

TEXTS = 1024  # that are written, once a stage
AT_ONCE = 128  # of them an update reads, in turn


class Anchor:
    """The texts of one stage. The same seed writes the same ones, so whoever resumes has them again."""

    def __init__(self, config: CompletionConfig) -> None:
        self.config = config
        self._texts: Rollouts | None = None

    def add_gradient(self, policy: Policy, step: int) -> None:
        """Adds `sft_coefficient` times the gradient of the mean divergence to what the trainables have."""
        config, texts = self.config, self._written(policy)
        count = len(texts.input_ids)
        rows = [(step * AT_ONCE + place) % count for place in range(min(AT_ONCE, count))]
        tokens = float(texts.completion_mask[rows].sum())
        size = min(config.micro_batch_size, held_together(texts.completion_mask.shape[1] * policy.vocabulary))
        for start in range(0, len(rows), size):
            part = texts[rows[start : start + size]]
            loss = config.sft_coefficient * divergences(policy, part, config.temperature).sum() / tokens
            loss.backward()  # type: ignore[no-untyped-call]

    def _written(self, policy: Policy) -> Rollouts:
        if self._texts is None:
            config = self.config
            devices = [policy.device] if policy.device.type == "cuda" else []
            with torch.random.fork_rng(devices), policy.reference():
                torch.manual_seed(config.seed)
                lengths = config.prompt_tokens, config.max_completion_length, config.positions
                self._texts = write_texts(policy, TEXTS, *lengths, config.temperature, MOST_ROWS)
        return self._texts


def divergences(policy: Policy, texts: Rollouts, temperature: float) -> Tensor:
    """`(rows,)` nats: KL(started from || policy) of the next token, summed over a text's own tokens.

    The whole law of each token is compared, not the one that was drawn: at the start the gradient is exactly zero.
    """
    with torch.no_grad(), policy.reference():
        expected = _law(policy, texts, temperature)
    each = (expected.exp() * (expected - _law(policy, texts, temperature))).sum(-1)
    return (each * texts.completion_mask).sum(1)


def _law(policy: Policy, texts: Rollouts, temperature: float) -> Tensor:
    """`(rows, completion, vocabulary)` log-probabilities of the next token."""
    width = texts.completion_mask.shape[1]
    logits, _ = policy(texts.input_ids[:, :-1], texts.attention_mask[:, :-1], width)
    return torch.log_softmax(logits / temperature, -1)
