"""Per-unit gradients against a one-by-one loop and against Opacus."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable

import pytest
import torch
from opacus import GradSampleModule
from torch import Tensor

from dpalign.algorithms.base import unit_means
from dpalign.gradients import PerUnitGradients
from dpalign.models import AdapterConfig, Policy
from dpalign.models.policy import Rollouts
from tiny import VOCABULARY, tiny_policy

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook")  # Opacus's
UNITS = 4
ONE_ROW_EACH = torch.arange(UNITS)
GROUPS = torch.tensor([2, 0, 2, 1, 0, 2])  # in no order; unit 3 has no rows
Gradients = Callable[[Policy, Rollouts, Tensor], Tensor]


def adapted_policy(kind: str, dtype: torch.dtype = torch.float32, checkpointing: str | None = None) -> Policy:
    """LoRA on all linear layers and a value head, all random; activations recomputed in one of two ways."""
    policy = tiny_policy(kind, dtype)
    policy.add_adapter("stage", AdapterConfig(r=2, target_modules="all-linear"))
    policy.add_value_head()
    torch.manual_seed(1)
    for p in policy.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    if checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        if checkpointing == "reentrant":
            policy.model.enable_input_require_grads()
        policy.train()  # transformers recomputes only in training mode
    return policy


def some_rollouts(rows: int, seed: int = 2) -> Rollouts:
    """Left-padded prompts of 1 to 5 tokens, completions of 1 to 6."""
    torch.manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (rows, 11))
    attention, inside = torch.ones_like(ids), torch.ones(rows, 6)
    for row in range(rows):
        attention[row, : row % 5] = 0
        inside[row, 1 + (3 * row) % 6 :] = 0
    attention[:, 5:] = inside.long()
    return Rollouts(ids, attention, inside)


def row_losses(policy: Policy, rollouts: Rollouts) -> Tensor:
    """A policy and value loss whose weight differs from token to token."""
    logprobs, values = policy.completion_logprobs(rollouts)
    weights = torch.linspace(-1, 2, logprobs.shape[1])
    return (rollouts.completion_mask * (-weights * logprobs + 0.5 * (values - weights) ** 2)).sum(1)


def trainable(policy: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in policy.parameters() if p.requires_grad]


def ours(policy: Policy, rollouts: Rollouts, row_unit: Tensor) -> Tensor:
    """`(units, trainables)` from one backward pass."""
    gradients = PerUnitGradients(policy)
    with gradients.collect(row_unit, UNITS):
        unit_means(row_losses(policy, rollouts), row_unit, UNITS).sum().backward()
    return torch.cat([g.flatten(1) for g in gradients.grads()], 1)


def one_by_one(policy: Policy, rollouts: Rollouts, row_unit: Tensor) -> Tensor:
    """The same from one ordinary backward pass per unit."""
    rows_of = []
    for unit in range(UNITS):
        policy.zero_grad()
        rows = (row_unit == unit).nonzero().squeeze(1)
        if len(rows):
            row_losses(policy, rollouts[rows]).mean().backward()
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainable(policy)]
        rows_of.append(torch.cat([p.flatten() for p in parts]))
    return torch.stack(rows_of)


def opacus(policy: Policy, rollouts: Rollouts, row_unit: Tensor) -> Tensor:
    """The same from Opacus, which knows rows only."""
    wrapped = GradSampleModule(policy, batch_first=True, loss_reduction="sum", strict=False)
    wrapped.train()  # Opacus captures in training mode only
    (row_losses(policy, rollouts) / row_unit.bincount()[row_unit]).sum().backward()
    samples = torch.cat([p.grad_sample.flatten(1) for p in trainable(wrapped)], 1)
    return samples.new_zeros(UNITS, samples.shape[1]).index_add_(0, row_unit, samples)


def units_swapped(policy: Policy, rollouts: Rollouts, row_unit: Tensor) -> Tensor:
    return ours(policy, rollouts, row_unit)[[1, 0, 2, 3]]


def averaged(policy: Policy, rollouts: Rollouts, row_unit: Tensor) -> Tensor:
    return ours(policy, rollouts, row_unit).mean(0).expand(UNITS, -1)


def error(gradients: Gradients, truth: Gradients, policy: Policy, row_unit: Tensor, seed: int = 2) -> float:
    """Largest error of a unit's gradient relative to the largest true norm."""
    rollouts = some_rollouts(len(row_unit), seed)
    expected = truth(copy.deepcopy(policy), rollouts, row_unit)
    assert expected.shape[1] == sum(p.numel() for p in trainable(policy))
    difference = gradients(policy, rollouts, row_unit) - expected
    return float(difference.norm(dim=1).max() / expected.norm(dim=1).max())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("row_unit", [ONE_ROW_EACH, GROUPS])
@pytest.mark.parametrize("truth", [one_by_one, opacus])
@pytest.mark.parametrize("checkpointing", [None, "reentrant", "not reentrant"])
def test_equal_to_the_loop_and_to_opacus(kind, row_unit, truth, checkpointing):
    """LoRA on Conv1D and Linear bases and the value head, with and without activation checkpointing."""
    policy = adapted_policy(kind)
    rollouts = some_rollouts(len(row_unit))
    expected = truth(policy, rollouts, row_unit)
    found = ours(adapted_policy(kind, checkpointing=checkpointing), rollouts, row_unit)
    assert float((found - expected).norm(dim=1).max() / expected.norm(dim=1).max()) < 1e-5


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("row_unit", [ONE_ROW_EACH, GROUPS])
@pytest.mark.parametrize("truth", [one_by_one, opacus])
def test_equal_on_a_bfloat16_base(kind, row_unit, truth):
    """To float32's rounding on most rollouts. On others a difference of 1e-7 in an adapter flips a rounding of the base
    in bfloat16, by 2^-8, which moves a gradient by a few times that."""
    errors = [error(ours, truth, adapted_policy(kind, torch.bfloat16), row_unit, seed) for seed in range(7)]
    assert statistics.median(errors) < 1e-5 and max(errors) < 2**-5


@pytest.mark.parametrize("mutant", [units_swapped, averaged])
def test_the_comparison_finds_wrong_gradients(mutant):
    assert error(mutant, one_by_one, adapted_policy("gpt2"), ONE_ROW_EACH) > 2**-4


@pytest.mark.parametrize(("checkpointing", "times"), [(None, 1), ("reentrant", 2), ("not reentrant", 2)])
def test_checkpointing_recomputes(checkpointing, times, monkeypatch):
    """What is compared above under checkpointing is really computed twice (the value head once)."""
    calls = 0
    rows_of = PerUnitGradients.rows_of

    def counted(self, parameter):
        nonlocal calls
        calls += 1
        return rows_of(self, parameter)

    monkeypatch.setattr(PerUnitGradients, "rows_of", counted)
    policy = adapted_policy("gpt2", checkpointing=checkpointing)
    in_layers = sum("lora" in name for name, p in policy.named_parameters() if p.requires_grad)
    ours(policy, some_rollouts(UNITS), ONE_ROW_EACH)
    assert calls == times * in_layers + 2
