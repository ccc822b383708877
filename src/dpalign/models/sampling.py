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


class DrawToken(LogitsProcessor):
    """Draws every row's token and leaves only it possible; to be the last processor of a greedy `generate`.

    One uniform a row is looked up in the cumulated probabilities (float64). The law is that of
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
        at_once = held_together(2 * scores.shape[-1])  # rows, whose numbers are float64
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
    """`(rows, 1)` tokens: the first whose cumulated probability exceeds the point, so never one of probability 0."""
    cumulated = scores.float().softmax(-1).nan_to_num(0.0).cumsum(-1, dtype=torch.float64)
    point = points * cumulated[:, -1:]
    return torch.searchsorted(cumulated, point, right=True).clamp(max=scores.shape[-1] - 1)
