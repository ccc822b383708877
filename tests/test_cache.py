"""Completions are the same whether keys and values are copied at each token or written into room that is there."""

from __future__ import annotations

import pytest
import torch

from dpalign.models import AdapterConfig, policy
from dpalign.models.cache import RoomyLayer, roomy_cache
from dpalign.privacy.entropy import SeededEntropy
from test_gradients import trainable
from tiny import tiny_policy

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2_moe"])
@pytest.mark.parametrize("adapted", [False, True])
def test_completions_are_the_same(kind, adapted, monkeypatch):
    model = tiny_policy(kind)
    if adapted:
        model.add_adapter("stage", AdapterConfig(r=2, target_modules=None if kind == "gpt2" else ["q_proj", "v_proj"]))
        with torch.no_grad():
            for p in trainable(model):
                p.add_(0.1 * torch.randn_like(p))
    ids = torch.randint(4, 30, (5, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0  # a shorter prompt
    found = []
    for made in (roomy_cache, lambda *asked: None):
        monkeypatch.setattr(policy, "roomy_cache", made)
        coins = [SeededEntropy(row) for row in range(5)]
        found.append(model.sample(ids, mask, 9, min_new_tokens=4, coins=coins))
    ours, theirs = found
    assert torch.equal(ours.input_ids, theirs.input_ids) and torch.equal(ours.attention_mask, theirs.attention_mask)
    assert len({tuple(row) for row in ours.completion_ids.tolist()}) == 5
    cache = roomy_cache(model.model, CPU, 15)
    assert cache is not None and all(isinstance(layer, RoomyLayer) for layer in cache.layers)


def test_what_is_returned_is_what_was_given():
    layer, given = RoomyLayer(7), torch.randn(2, 3, 7, 4)
    for first, last in ((0, 4), (4, 5), (5, 7)):
        keys, values = layer.update(given[:, :, first:last], -given[:, :, first:last])
        assert torch.equal(keys, given[:, :, :last]) and torch.equal(values, -given[:, :, :last])
        assert layer.get_seq_length() == last and layer.get_mask_sizes(1) == (last + 1, 0)
    room = keys.untyped_storage().data_ptr()
    assert room == layer._all[0].untyped_storage().data_ptr()  # nothing was copied


def test_transformers_makes_its_own_elsewhere():
    model = tiny_policy("llama").model
    assert roomy_cache(model, torch.device("cuda"), 9) is None
    assert roomy_cache(tiny_policy("gemma2").model, CPU, 9) is None  # half of its layers keep a window
