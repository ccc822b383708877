"""Keys and values while completions are written: into room that is there. transformers copies all at each token."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """A `DynamicLayer` whose keys and values are the beginning of tensors with room for so many positions."""

    def __init__(self, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.room = room
        self._taken = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """`(rows, heads, positions, width)` each: those of all positions until now, of which these are the newest."""
        both = (key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(*both)
            # A position's heads lie side by side, as they come.
            self._all = [s.new_empty(len(s), self.room, s.shape[1], s.shape[3]).transpose(1, 2) for s in both]
        first, self._taken = self._taken, self._taken + key_states.shape[2]
        for room, states in zip(self._all, both, strict=True):
            room[:, :, first : self._taken] = states
        self.keys, self.values = (room[:, :, : self._taken] for room in self._all)
        return self.keys, self.values


def roomy_cache(model: PreTrainedModel | PeftModel, device: torch.device, room: int) -> DynamicCache | None:
    """An empty cache for `generate`, or None where transformers is to make its own: on a GPU, where it would wait for
    the device at each token if it were given one, and for a model whose layers keep anything else."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if device.type != "cpu" or base.config.is_encoder_decoder or not base._supports_default_dynamic_cache():
        return None
    cache = DynamicCache(config=base.config.get_text_config(decoder=True))
    if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    cache.layers = [RoomyLayer(room) for _ in cache.layers]
    return cache
