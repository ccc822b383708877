"""Rows of some units: the right ones, in the order asked for, also for a unit that comes twice or has none."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dpalign.algorithms import RLOO, Algorithm, PPOConfig, SamplingConfig
from dpalign.algorithms.base import Rows, micro_batches
from dpalign.algorithms.completions import sample
from dpalign.algorithms.rollouts import in_micro_batches
from dpalign.engines import local
from dpalign.models import AdapterConfig, RewardModel, TextFormat, head, kernels
from dpalign.privacy.entropy import SystemEntropy
from dpalign.training.loop import unit_gradients
from tiny import OTHERS, VOCABULARY, dataset, tiny_policy, words

sys.path.append(str(Path(__file__).with_name("privacy")))
from harness import dpo, grpo, offline, ppo, reward, rloo, run_stage, sft

ROWS = Rows(torch.tensor([0, 0, 2, 1, 2]), {"a": torch.tensor([10, 11, 12, 13, 14]), "b": torch.arange(10).view(5, 2)})


def test_of_worked_by_hand():
    found = ROWS.of([2, 0, 2])
    assert found.unit.tolist() == [0, 0, 1, 1, 2, 2]
    assert found.tensors["a"].tolist() == [12, 14, 10, 11, 12, 14]
    assert found.tensors["b"].tolist() == [[4, 5], [8, 9], [0, 1], [2, 3], [4, 5], [8, 9]]


def test_units_without_rows_keep_their_place():
    found = ROWS.of([7, 1])
    assert found.unit.tolist() == [1] and found.tensors["a"].tolist() == [13]
    for nothing in (ROWS.of([]), ROWS.of([5, 6])):
        assert nothing.unit.shape == (0,) and nothing.unit.dtype == torch.int64
        assert nothing.tensors["b"].shape == (0, 2)


def test_micro_batches_and_what_fills_them_worked_by_hand():
    rows = Rows(torch.tensor([0, 0, 2, 1, 2, 2, 4]), {"a": torch.arange(7)})  # unit 2 has three rows, and unit 3 none
    assert list(micro_batches(rows, [0, 1, 3, 4], 3, 3)) == [[0, 1, 3], [4]]  # no more than three units
    assert list(micro_batches(rows, [0, 1, 2, 4], 3, 2)) == [
        [0],
        [1],
        [2],
        [4],
    ]  # or two rows, but for a unit that has more
    assert list(micro_batches(rows, [], 3, 3)) == []
    found = ROWS.of([2, 0]).filled(7, 2, unit=5)
    assert found.unit.tolist() == [0, 0, 1, 1, 5, 5, 5] and found.tensors["a"].tolist() == [12, 14, 10, 11, 10, 11, 10]
    assert ROWS.of([2, 0]).filled(4, 2, unit=5).unit.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("size", "each", "examples"),
    [
        (32, 1, 32), (30, 1, 30), (64, 2, 32), (30, 4, 7), (32, 8, 4), (1, 2, 1), (8, 16, 1),  # at most so many rows
        (32, 3, 8), (32, 5, 8), (8, 3, 8), (24, 6, 4),  # and as many eights of rows as examples allow
    ],
)  # fmt: skip
def test_a_micro_batch_has_whole_examples_worked_by_hand(size, each, examples):
    made = rloo(micro_batch_size=size, num_generations=max(2, each))
    made.rows_per_example = each
    assert (made.examples_at_once, made.rows_at_once) == (examples, examples * each)


def test_a_person_with_many_rows_takes_several_passes_of_a_micro_batch():
    """Each has as many rows as any other, and the prompts' groups are whole in them."""
    seen = []

    class Watched(RLOO):
        def row_losses(self, policy, rows):
            groups = torch.stack([rows.tensors["prompt"], rows.unit], 1).unique_consecutive(dim=0, return_counts=True)
            seen.append((len(rows.unit), int(rows.unit.min()), set(groups[1].tolist())))
            return super().row_losses(policy, rows)

    one = {"id": "one", "prompt": "w3 w4", "score": 1.0}
    people = [[one], [{**one, "id": "many", "prompt": f"w5 w{i}"} for i in range(7)], [{**one, "id": "two"}] * 2]
    trace = run_stage(rloo(Watched, micro_batch_size=8, num_generations=4), dataset(people, 8))
    assert trace.contributions[0].norm(dim=1).min() > 0.1
    assert seen == [(8, 0, {4}), *[(8, 0, {4})] * 4, (8, 0, {4})]  # 4 rows and 4 that fill up; 28 and 4; 8


def test_rows_that_fill_a_micro_batch_up_add_exactly_zero(monkeypatch):
    """Whatever they hold: others move no bit of what is released, and of places without a unit the gradient is zero."""
    sums, of_nobody, filled = [], [], Rows.filled

    def others(self, size, example, unit):
        found = filled(self, size, example, unit)
        tensors = {name: tensor.clone() for name, tensor in found.tensors.items()}
        tensors["ids"][len(self.unit) :] = 7 + torch.arange(24) % 5  # of a text that nobody has
        tensors["learned"][len(self.unit) :] = 100.0
        return Rows(found.unit, tensors)

    def watched(*arguments):
        grads, means = unit_gradients(*arguments)
        of_nobody.append([g[int(arguments[3].unit.max()) + 1 :] for g in grads])
        return grads, means

    monkeypatch.setattr("dpalign.training.loop.unit_gradients", watched)
    for how in (filled, others):
        monkeypatch.setattr(Rows, "filled", how)
        trace = run_stage(sft(micro_batch_size=8, max_length=24), dataset([*FULL, *SHORT[:3]]), dtype=torch.float32)
        sums.append(trace.sums[0])
    assert torch.equal(*sums) and sums[0].norm() > 0.5
    assert [len(grads[0]) for grads in of_nobody] == [0, 6, 0, 6] and not any(g.any() for part in of_nobody for g in part)


def test_a_phase_is_sampled_in_equal_parts_of_public_size():
    config = PPOConfig(expected_batch_size=512, num_generations=1, micro_batch_size=32)
    assert config.sampled_at_once == 184  # (512 + 22.6) rows in 3 parts, in eights
    assert PPOConfig(expected_batch_size=8, micro_batch_size=4).sampled_at_once == 16
    assert PPOConfig(expected_batch_size=8, micro_batch_size=64).sampled_at_once == 64


def test_a_half_precision_model_samples_as_many_unless_their_cache_is_large(monkeypatch):
    config = PPOConfig(expected_batch_size=512, micro_batch_size=32, max_prompt_length=6, max_completion_length=16)
    half, full = tiny_policy("llama", torch.bfloat16), tiny_policy("llama")
    shape = half.model.config
    bytes_of_a_row = 2 * shape.num_hidden_layers * shape.hidden_size * 22 * 2  # keys and values of 22 positions
    for room, rows in ((184 * bytes_of_a_row, 184), (184 * bytes_of_a_row - 1, 32)):
        monkeypatch.setattr(local, "CACHE", room)
        assert local.sampled_at_once(half, config, is_public=False) == rows
        assert local.sampled_at_once(full, config, is_public=False) == 184
    assert local.sampled_at_once(full, config, is_public=True) == 256


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_half_precision_is_computed_in_float32_on_a_cpu(dtype, monkeypatch):
    """With and without gradients alike; single tokens, as in generation, as they come."""
    torch.manual_seed(0)
    layer = torch.nn.Module()
    q, k, v = (torch.randn(2, 2, 5, 16).to(dtype).requires_grad_() for _ in range(3))
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    out, _ = kernels._attention(layer, q, k, v, mask)
    exact = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
    assert out.dtype == dtype and torch.equal(out, exact.to(dtype).transpose(1, 2))
    with torch.no_grad():
        assert torch.equal(kernels._attention(layer, q, k, v, mask)[0], out)
    dtypes = []
    monkeypatch.setattr(
        kernels, "sdpa_attention_forward", lambda module, query, *how: [dtypes.append(query.dtype), (query, None)][1]
    )
    kernels._attention(layer, q[:, :, -1:], k, v, mask[:, :, -1:])
    kernels._attention(layer, q.float(), k.float(), v.float(), mask)
    assert dtypes == [dtype, torch.float32]


# Company -----------------------------------------------------------------------------------------------------

KINDS = ["gpt2", "llama", *OTHERS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICE = os.environ.get("DPALIGN_TEST_DEVICE", "cpu")
FULL = [[{"id": f"m{i}", "text": words(40, i), "prompt": words(8, i), "score": 3.0 * i}] for i in range(7)]
SHORT = [[{"id": f"s{i}", "text": "w1 w2", "prompt": "w3", "score": -1.0}] for i in range(6)]
ONE = [{"id": "x", "text": words(40, 50), "prompt": words(8, 50), "score": 2.0}]  # nothing of it is padding
for unit in (*FULL, *SHORT, ONE):
    unit[0] |= {"chosen": unit[0]["text"], "rejected": unit[0]["prompt"]}
PERSON = [{**ONE[0], "text": words(i + 3, i), "prompt": f"w5 w{i}"} for i in range(3)]
# Micro-batches are of 8 units: at the first or last place among others that fill their rows, in the last one, or alone.
COMPANIES = {"first": [ONE, *FULL], "end": [*FULL, ONE], "last": [*FULL, *SHORT[:2], ONE], "alone": [ONE]}
COMPANIES |= {
    "short": [*SHORT[:3], ONE, *SHORT[3:]],
    "persons": [PERSON, ONE, PERSON, *FULL],
    "far": [*FULL, PERSON, ONE],
}


def own_gradients(
    algorithm: Callable[..., Algorithm], kind: str, dtype: torch.dtype, **changes: int
) -> dict[str, torch.Tensor]:
    """The clipped gradient of unit `x`, by who is there."""
    found, adapter = {}, AdapterConfig(r=2, target_modules=["q_proj", "v_proj"] if kind in OTHERS else None)
    for name, units in COMPANIES.items():
        records = [[record | {"id": str(i)} for record in unit] for i, unit in enumerate(units)]
        made = algorithm(adapter=adapter, micro_batch_size=8, **changes)
        trace = run_stage(made, dataset(records, 16), kind=kind, dtype=dtype, device=DEVICE)
        found[name] = trace.contributions[0][units.index(ONE)]
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_who_shares_a_micro_batch_moves_no_bit_of_a_gradient(kind, dtype):
    # One position a row: then products are small enough for their rounding to depend on the number of rows here.
    cases = [(sft, {}), (sft, {"max_length": 2})]
    for algorithm, changes in cases + ([(ppo, {}), (dpo, {})] if kind in ("gpt2", "llama") else []):
        found = own_gradients(algorithm, kind, dtype, **changes)
        assert found["alone"].norm() > 0.01
        for name, gradient in found.items():
            assert torch.equal(gradient, found["alone"]), (algorithm.__name__, changes, name)


@pytest.mark.parametrize("algorithm", [rloo, grpo, offline, reward, partial(ppo, num_ppo_epochs=2, num_generations=2)])
def test_the_same_for_groups_pairs_and_kept_numbers(algorithm):
    found = own_gradients(algorithm, "llama", torch.bfloat16)
    assert found["alone"].norm() > 0.1 and all(torch.equal(g, found["alone"]) for g in found.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("algorithm", [sft, partial(ppo, min_completion_length=3), rloo])
def test_the_same_where_logits_are_taken_a_few_positions_at_a_time(algorithm, dtype, monkeypatch):
    monkeypatch.setattr(head, "AT_ONCE", 2 * 4 * 8 * VOCABULARY)  # two positions of eight rows
    found = own_gradients(algorithm, "gpt2", dtype)
    assert found["alone"].norm() > 0.01 and all(torch.equal(g, found["alone"]) for g in found.values())


class KnownCoins(SystemEntropy):
    """Every row has the same coins."""

    def __init__(self) -> None:
        self.step = 0

    def uniforms(self, count: int) -> np.ndarray:
        self.step += 1
        return np.full(count, 0.618 * self.step % 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_who_shares_a_micro_batch_moves_no_token_and_no_score(kind, dtype):
    policy = tiny_policy(kind, dtype)
    policy.to(DEVICE)
    scorer = RewardModel.from_policy(policy)
    head = torch.randn(scorer.head.weight.shape, generator=torch.Generator().manual_seed(1))
    scorer.head.weight.data = head.to(scorer.head.weight)
    for prompt_length, length in ((8, 12), (1, 1)):
        scorer.text = TextFormat(max_length=prompt_length + length)
        settings = SamplingConfig(
            max_prompt_length=prompt_length, max_completion_length=length, min_completion_length=length,
            micro_batch_size=8,
        )  # fmt: skip
        seen = []
        for units in COMPANIES.values():
            place, prompts = units.index(ONE), [policy.tokenizer(unit[0]["prompt"]).input_ids for unit in units]
            ids, mask = policy.encode_prompts([prompt[:prompt_length] for prompt in prompts], prompt_length)
            with torch.no_grad():
                rollouts = sample(policy, ids, mask, settings, [KnownCoins()] * len(ids))
                logprobs, _ = in_micro_batches(policy, rollouts, settings)
                scores = scorer.score([unit[0]["text"] for unit in units], rows_at_once=8)
            seen.append((rollouts.completion_ids[place], logprobs[place], scores[place]))
        assert all(torch.equal(a, b) for other in seen for a, b in zip(other, seen[0], strict=True))
        assert logprobs[place].sum() < 0 and scores[place] != 0


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 6, 7])
def test_no_place_is_computed_by_another_function_however_many_threads_there_are(threads):
    """Mutants: torch's functions themselves; shares of 32,768 numbers for GELU, too."""
    functions = (nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU(), nn.Sigmoid(), nn.Tanh())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for function, dtype, rows, width in product(functions, (torch.float32, torch.bfloat16), (8, 64), (100, 384, 3072)):
            inputs = 2 * torch.randn(1, 8, width, generator=torch.Generator().manual_seed(width)).to(dtype)
            given = inputs.expand(rows, 8, width).contiguous().requires_grad_()
            found = kernels.Activation(function)(given)
            found.sum().backward()
            assert torch.equal(found, found[:1].expand_as(found)), (function, dtype, rows, width)
            assert torch.equal(given.grad, given.grad[:1].expand_as(found)), (function, dtype, rows, width)
            assert torch.allclose(found.float(), function(inputs).float(), atol=1e-5 if dtype == torch.float32 else 0.02)
        for kind in ("gpt2", "llama"):
            policy = tiny_policy(kind)
            ids = torch.arange(3, 23).expand(1024, -1)
            logprobs, _ = policy.logprobs(ids[:, :-1], torch.ones_like(ids[:, :-1]), ids[:, 1:])
            assert torch.equal(logprobs, logprobs[:1].expand_as(logprobs)), kind
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
def test_every_activation_of_a_model_is_one_of_these(kind):
    policy = tiny_policy(kind)
    inside = {id(m.function) for m in policy.modules() if isinstance(m, kernels.Activation)}
    assert all(id(m) in inside for m in policy.modules() if isinstance(m, kernels.ACTIVATIONS))
    assert inside or kind not in ("gpt2", "llama")
