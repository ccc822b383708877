"""This process samples: `Policy.sample`, on the weights that are trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..models import Policy
from ..models.policy import Rollouts
from ..privacy.entropy import SystemEntropy
from ..settings.rollouts import MOST_ROWS, SamplingConfig
from .base import Generator

CACHE = 2**31  # bytes of keys and values that a half-precision model may hold for more rows than a micro-batch


class Local(Generator):
    """Needs no push: there are no other weights."""

    def push(self, policy: Policy) -> None:
        pass

    def sample(
        self, policy: Policy, ids: Tensor, mask: Tensor, config: SamplingConfig, coins: Sequence[SystemEntropy] | None
    ) -> Rollouts:
        return policy.sample(
            ids,
            mask,
            config.max_completion_length,
            min_new_tokens=config.min_completion_length,
            temperature=config.temperature,
            coins=coins,
            rows_at_once=sampled_at_once(policy, config, is_public=coins is None),
        )

    @torch.no_grad()
    def logprobs(self, policy: Policy, rows: list[list[int]]) -> list[Tensor]:
        width = max(map(len, rows))
        ids, mask = policy.encode_prompts(rows, width)
        said = policy.logprobs(ids[:, :-1], mask[:, :-1], ids[:, 1:])[0].float().cpu()
        return [said[number, width - len(row) :] for number, row in enumerate(rows)]


def sampled_at_once(policy: Policy, config: SamplingConfig, *, is_public: bool) -> int:
    """Rows that are sampled together, by public numbers alone: a micro-batch of a half-precision model whose cache of
    more rows would be large, because it is chosen where memory is short; else as many as make it fast.

    is_public: whether nobody's rounding matters, so that the last rows need no company.
    """
    at_once = MOST_ROWS if is_public else config.sampled_at_once
    dtype, shape = policy.model.dtype, policy.model.config.get_text_config()
    if dtype == torch.float32:
        return at_once
    layers, width = getattr(shape, "num_hidden_layers", None), getattr(shape, "hidden_size", None)
    if layers is None or width is None:
        return config.micro_batch_size
    cache = at_once * config.positions * layers * 2 * width * dtype.itemsize  # keys and values, at most
    return at_once if cache <= CACHE else config.micro_batch_size
