"""AdamW with the known variance of the privacy noise taken out."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, nn

from dpalign.algorithms import SFT, SFTConfig
from dpalign.errors import DPAlignError
from dpalign.models import AdapterConfig
from dpalign.privacy.ledger import Ledger
from dpalign.training import Stage
from dpalign.training.checkpoint import (
    load_model,
    load_newest,
    load_optimizer,
    model_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from dpalign.training.optimizer import DPAdamBC, share_of_rate
from tiny import dataset, tiny_policy, words

OPTIONS = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 0.01}


def corrected(parameters: list[nn.Parameter], deviation: float, floor: float = 0.1, **changes) -> DPAdamBC:
    return DPAdamBC(parameters, **OPTIONS | changes, noise_deviation=deviation, floor=floor)


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,))]


def run(optimizer: torch.optim.Optimizer, trained: list[nn.Parameter], steps: range) -> Tensor:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in trained:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in trained])


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_without_noise_it_is_adamw(weight_decay):
    ours, theirs = parameters(), parameters()
    found = run(corrected(ours, 0.0, weight_decay=weight_decay), ours, range(5))
    expected = run(torch.optim.AdamW(theirs, **OPTIONS | {"weight_decay": weight_decay}), theirs, range(5))
    assert torch.allclose(found, expected, atol=1e-6)
    other = parameters()
    assert (run(corrected(other, 0.5), other, range(5)) - expected).norm() > 1e-2


def test_the_variance_is_subtracted_worked_by_hand():
    weight = nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = corrected([weight], 3.0, lr=0.5, betas=(0.9, 0.99), eps=0.0, weight_decay=0.1, floor=0.5)
    weight.grad = torch.tensor([5.0, 3.1])
    optimizer.step()
    # After bias correction m = g and v = g^2. 25 - 9 = 16 gives 5 / 4; 9.61 - 9 is below the floor (0.5 * 3)^2 = 2.25.
    first = [0.95 - 0.5 * 5 / 4, 0.95 - 0.5 * 3.1 / 1.5]
    assert weight.tolist() == pytest.approx(first, rel=1e-5)
    weight.grad = torch.tensor([1.0, 8.0])
    optimizer.step()
    # m = (0.9 * 0.1 g1 + 0.1 g2) / 0.19 and v = (0.99 * 0.01 g1^2 + 0.01 g2^2) / 0.0199.
    m = [(0.09 * 5.0 + 0.1 * 1.0) / 0.19, (0.09 * 3.1 + 0.1 * 8.0) / 0.19]
    v = [(0.0099 * 25 + 0.01 * 1) / 0.0199 - 9, (0.0099 * 9.61 + 0.01 * 64) / 0.0199 - 9]
    assert v[0] > 2.25 and v[1] > 2.25
    assert weight.tolist() == pytest.approx(
        [0.95 * w - 0.5 * a / b**0.5 for w, a, b in zip(first, m, v, strict=True)], rel=1e-5
    )


def test_weights_without_a_gradient_stay_and_a_closure_is_refused():
    trained = parameters()
    optimizer = corrected(trained, 1.0)
    before = trained[1].clone()
    trained[0].grad = torch.ones_like(trained[0])
    optimizer.step()
    assert torch.equal(trained[1], before) and not optimizer.state[trained[1]]
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0.0)


SAVED = {"algorithm": {}, "fingerprint": "f", "config_hash": "c"}


@pytest.mark.parametrize("deviation", [0.0, 0.7])
def test_a_checkpoint_keeps_its_state(deviation, tmp_path):
    whole = parameters()
    expected = run(corrected(whole, deviation), whole, range(6))
    begun, names = parameters(), ["a", "b"]
    optimizer = corrected(begun, deviation)
    run(optimizer, begun, range(3))
    save_checkpoint(tmp_path, 3, optimizer_tensors(optimizer, names), SAVED)
    resumed = [nn.Parameter(p.detach().clone()) for p in begun]
    again = corrected(resumed, deviation)
    tensors, _ = load_newest(tmp_path)
    load_optimizer(again, names, tensors, tmp_path)
    assert torch.equal(run(again, resumed, range(3, 6)), expected)
    forgetful = [nn.Parameter(p.detach().clone()) for p in begun]
    assert not torch.allclose(run(corrected(forgetful, deviation), forgetful, range(3, 6)), expected)


@pytest.mark.parametrize("on", [False, True])
def test_the_loop_uses_it_where_it_is_asked_for(on, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(DPAdamBC, "step", lambda self: made.append((self.noise_deviation, self.floor)))
    config = SFTConfig(
        expected_batch_size=8, max_steps=1, max_length=8, noise_multiplier=1.5, max_grad_norm=0.4, adapter=AdapterConfig(r=2),
        adam_noise_correction=on, adam_noise_floor=0.3,
    )  # fmt: skip
    data = dataset([[{"id": f"r{i}", "text": words(6, i)}] for i in range(16)])
    Stage(tiny_policy("llama"), SFT(config), data, folder=tmp_path, run="run", ledger=Ledger(":memory:")).train()
    assert made == ([(pytest.approx(1.5 * 0.4 / 8), 0.3)] if on else [])


@pytest.mark.parametrize("change", [
    lambda t: t.pop("optimizer/a/exp_avg"), lambda t: [t.pop(f"optimizer/{n}/exp_avg_sq") for n in "ab"],
    lambda t: t.update({"optimizer/a/exp_avg": torch.zeros(7)}), lambda t: t.update({"optimizer/b/exp_avg": t["optimizer/b/exp_avg"].long()}),
    lambda t: t.update({"optimizer/a/step": torch.tensor(math.nan)}), lambda t: t.update({"optimizer/a/step": torch.zeros(2)}),
    lambda t: t.update({"optimizer/b/step": torch.tensor(True)}),
])  # fmt: skip
@pytest.mark.parametrize("kind", [corrected, lambda ps, deviation: torch.optim.AdamW(ps)])
def test_a_state_that_does_not_fit_is_refused_whole(change, kind, tmp_path):
    begun, names = parameters(), ["a", "b"]
    optimizer = kind(begun, 0.7)
    run(optimizer, begun, range(3))
    tensors = optimizer_tensors(optimizer, names)
    again = kind(parameters(), 0.7)
    change(tensors)
    with pytest.raises(DPAlignError, match=f"the checkpoint in {tmp_path}"):
        load_optimizer(again, names, tensors, tmp_path)
    assert not again.state
    load_optimizer(again, names, {}, tmp_path)  # saved before the first step


def test_a_model_is_not_loaded_from_another_dtype(tmp_path):
    model = tiny_policy("llama")
    model.add_adapter("sft", AdapterConfig(r=1))
    tensors = model_tensors(model)
    load_model(model, tensors, tmp_path)
    name = next(iter(tensors))
    with pytest.raises(DPAlignError, match="no fitting"):
        load_model(model, tensors | {name: tensors[name].half()}, tmp_path)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 10**400, "0.1", None])
def test_a_checkpoint_whose_state_is_no_number_is_refused(number, tmp_path):
    state = {"fingerprint": "f", "config_hash": "c", "algorithm": {"beta": 0.1}}
    save_checkpoint(tmp_path, 3, {}, state)
    assert load_newest(tmp_path)[1]["algorithm"] == {"beta": 0.1}
    (file,) = tmp_path.glob("*/state.json")
    whole = json.loads(file.read_text())
    file.write_text(json.dumps(whole | {"algorithm": {"beta": number}}))
    with pytest.raises(DPAlignError, match="is corrupt"):
        load_newest(tmp_path)


@pytest.mark.parametrize("name", ["fingerprint", "config_hash"])
def test_a_checkpoint_that_names_its_run_by_no_text_is_refused(name, tmp_path):
    save_checkpoint(tmp_path, 3, {}, SAVED)
    (file,) = tmp_path.glob("*/state.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: 7}))
    with pytest.raises(DPAlignError, match="is corrupt"):
        load_newest(tmp_path)


def test_the_cosine_falls_from_the_whole_rate_to_nothing():
    config = SFTConfig(warmup_steps=2, lr_scheduler_type="cosine")
    found = [share_of_rate(config, step, 10) for step in (0, 1, 2, 4, 6, 8, 10)]
    assert found == pytest.approx([0.5, 1.0, 1.0, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4, 0.0])
