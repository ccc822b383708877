"""Drawing the next token inside `generate`."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor


class DrawToken(LogitsProcessor):
    """Draws every row's token and leaves only it possible; to be the last processor of a greedy `generate`.

    One uniform a row is looked up in the cumulated probabilities (float64). The law is that of
    `torch.multinomial`, which draws one exponential for every entry of the vocabulary: on a CPU that is
    more than a quarter of the time of sampling from a small model. A row whose logits are not finite gets
    some token, and does not stop the others.
    """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`(rows, vocabulary)` logits to the same shape: 0 for the drawn token, -inf for all others."""
        cumulated = scores.float().softmax(-1).nan_to_num(0.0).cumsum(-1, dtype=torch.float64)
        total = cumulated[:, -1:]
        point = torch.rand_like(total) * total
        # The first token whose cumulated probability exceeds the point: never one of probability 0.
        token = torch.searchsorted(cumulated, point, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)
