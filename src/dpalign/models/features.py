"""What the layers of a model say of a text: the mean of their hidden states over its tokens."""

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
