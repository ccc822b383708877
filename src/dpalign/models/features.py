"""What the layers of a model say of a text: means of their hidden states over its tokens, and those of its last one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from .stack import AdapterStack


def body_of(stack: AdapterStack) -> Any:
    """The transformer under head and adapters; adapters that are on still count."""
    base = stack.model.get_base_model() if isinstance(stack.model, PeftModel) else stack.model
    return base.base_model


def layers_of(stack: AdapterStack) -> int:
    """Number of the last layer; the first is 1, and 0 are the embeddings."""
    return int(stack.model.config.get_text_config().num_hidden_layers)


def pooled_layers(stack: AdapterStack, ids: Tensor, mask: Tensor, layers: Sequence[int], counted: Tensor) -> Tensor:
    """`(rows, layers, width)` float32 means of hidden states over the tokens that `counted` marks.

    Args:
        ids, mask: `(rows, length)`, right-padded. layers: numbers of hidden states; the last is as the head reads it.
        counted: `(rows, length)`, 1 where a token counts; a row without one is zero.
    """
    found = body_of(stack)(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
    share = (counted / counted.sum(1, keepdim=True).clamp(min=1)).unsqueeze(2)
    return torch.stack([(found.hidden_states[layer].float() * share).sum(1) for layer in layers], 1)


MEANS, LASTS = (1 / 2, 2 / 3, 5 / 6, 1), (1 / 2, 5 / 6)  # depths; the upper half says most of what people judge


def maps_read(stack: AdapterStack) -> tuple[list[int], list[int]]:
    """Numbers of the layers whose mean is read, and of those whose last token is: each once."""
    count = layers_of(stack)
    means, lasts = (sorted({max(1, round(depth * count)) for depth in depths}) for depths in (MEANS, LASTS))
    return means, lasts


def maps_of(stack: AdapterStack, ids: Tensor, mask: Tensor) -> Tensor:
    """`(rows, maps, width)` float32: means over the tokens in some layers, and the last token in others.

    The first of several tokens does not count in a mean: attention makes a sink of it, whose length drowns the rest.

    Args:
        ids, mask: `(rows, length)`, right-padded; a row without a token has no mean (NaN).
    """
    means, lasts = maps_read(stack)
    found = body_of(stack)(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
    hidden = found.hidden_states
    tokens = mask.sum(1, keepdim=True)
    counted = mask.clone()
    counted[:, 0] = torch.where(tokens[:, 0] > 1, 0, counted[:, 0])
    share = (counted / counted.sum(1, keepdim=True)).unsqueeze(2)  # 0 / 0 of a row without a token
    last = (tokens - 1).clamp(min=0).unsqueeze(2)
    maps = [(hidden[layer].float() * share).sum(1) for layer in means]
    maps += [hidden[layer].float().take_along_dim(last, 1)[:, 0] for layer in lasts]
    return torch.stack(maps, 1)
