"""Drawing the next token inside `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from ..privacy.entropy import SystemEntropy
from .head import held_together

BLOCK = 128  # entries of the vocabulary
BELOW_ONE = 1 - 2.0**-52  # times anything in float64 is less than that


class Dealt(SystemEntropy):
    """Uniforms that were drawn before, one array a step: a row's own, whichever rows it is computed with."""

    def __init__(self, steps: list[np.ndarray]) -> None:
        self._steps = iter(steps)

    def uniforms(self, count: int) -> np.ndarray:
        return next(self._steps)


def uniforms_of(coins: Sequence[SystemEntropy], steps: int) -> list[np.ndarray]:
    """`(rows,)` uniforms for each step, from every row's own coins; of neighbours who share theirs, together."""
    groups = [(owner, len(list(same))) for owner, same in groupby(coins)]
    return [np.concatenate([np.empty(0), *(own.uniforms(count) for own, count in groups)]) for _ in range(steps)]


class NoStopBefore(LogitsProcessor):
    """Makes stopping impossible until a sequence is `length` tokens long, in place: `generate` hands on a copy.

    transformers' `min_new_tokens` copies the logits of the whole vocabulary twice at every token.
    """

    def __init__(self, length: int, stop_ids: list[int]) -> None:
        self.length, self.stop_ids = length, stop_ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] < self.length:
            scores[:, self.stop_ids] = -torch.inf
        return scores


class DrawToken(LogitsProcessor):
    """Draws every row's token and leaves only it possible; to be the last processor of a greedy `generate`.

    One float64 uniform a row is looked up in the cumulated probabilities. The law is that of
    `torch.multinomial`, which draws one exponential for every entry of the vocabulary: on a CPU that is
    more than a quarter of the time of sampling from a small model. A row whose logits are not finite gets
    some token, and does not stop the others.

    Args:
        entropy: where the uniforms come from; None is torch's global generator, whose seed on a CPU has only
            32 bits: good for reproducible evaluation, not for coins that have to be secret.
    """

    def __init__(self, entropy: SystemEntropy | None = None) -> None:
        self.entropy = entropy

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`(rows, vocabulary)` logits to the same shape: 0 for the drawn token, -inf for all others."""
        points = self._uniforms(scores)
        at_once = held_together(scores.shape[-1])
        parts = [slice(start, start + at_once) for start in range(0, len(scores), at_once)]
        tokens = torch.cat([_drawn(scores[part], points[part]) for part in parts])
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens, 0.0)

    def _uniforms(self, scores: Tensor) -> Tensor:
        """`(rows, 1)` float64 in [0, 1)."""
        rows = len(scores)
        if self.entropy is None:
            return torch.rand(rows, 1, dtype=torch.float64, device=scores.device)
        return 1.0 - torch.from_numpy(self.entropy.uniforms(rows)).view(rows, 1).to(scores.device)


def _drawn(scores: Tensor, points: Tensor) -> Tensor:
    """`(rows, 1)` tokens: the first whose cumulated probability exceeds the point, so never one of probability 0.

    It is looked up among the sums of `BLOCK` neighbours, then among these: all of them cumulated take several times
    as long to write as the softmax takes.
    """
    probabilities = scores.float().softmax(-1)
    vocabulary = probabilities.shape[-1]
    whole = vocabulary // BLOCK
    sums = probabilities[:, : whole * BLOCK].view(len(scores), whole, BLOCK).sum(-1)
    rest = probabilities[:, whole * BLOCK :].sum(-1, keepdim=True)
    block, points = _first_above(torch.cat([sums, rest], 1), points)
    tokens = block * BLOCK + torch.arange(BLOCK, device=scores.device)
    own = probabilities.gather(1, tokens.clamp(max=vocabulary - 1)).masked_fill(tokens >= vocabulary, 0.0)
    within, _ = _first_above(own, points)
    return (block * BLOCK + within).clamp(max=vocabulary - 1)


def _first_above(masses: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """`(rows, 1)` each: the first of `(rows, entries)` up to which lies more than that share of all, and never one that
    has nothing; and which share of its own lies below the point, float64 in [0, 1)."""
    masses = masses.nan_to_num(0.0).double()
    cumulated = masses.cumsum(-1)
    point = points.clamp(0.0, BELOW_ONE) * cumulated[:, -1:]
    first = torch.searchsorted(cumulated, point, right=True).clamp(max=masses.shape[-1] - 1)
    own = masses.gather(1, first)
    return first, ((point - cumulated.gather(1, first) + own) / own).nan_to_num(0.0)
