"""Every trainable weight has a per-unit gradient, however often it is used; whatever has none is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from harness import sft, texts
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dpalign.algorithms.base import encode_units
from dpalign.errors import DPAlignError
from dpalign.gradients import PerUnitGradients
from dpalign.models import AdapterConfig
from tiny import dataset, tiny_policy

UNITS = 3


# 15 --------------------------------------------------------------------------------------------------------


class Reused(nn.Module):
    """One layer used three times, and another module that shares its weight but not its bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.core, self.twin = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 5)
        self.twin.weight = self.core.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        for _ in range(3):
            h = self.core(h).tanh()
        return self.twin(h).square().flatten(1).sum(1)


class SharedModule(nn.Module):
    """The same module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh()).square().flatten(1).sum(1)


class SharedAdapter(nn.Module):
    """GPT-2 whose two layers share one LoRA A matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = tiny_policy("gpt2").double()
        self.policy.add_adapter("stage", AdapterConfig(r=2))
        first, second = (m for n, m in self.policy.named_modules() if n.endswith("lora_A.stage"))
        second.weight = first.weight
        for p in self.policy.parameters():
            if p.requires_grad:
                p.data = 0.3 * torch.randn_like(p)

    def forward(self, x: Tensor) -> Tensor:
        ids = (x[:, :, 0] * 10).long() + 40
        return self.policy(ids, torch.ones_like(ids), ids.shape[1])[0].square().mean((1, 2))


class LastUseOnly(PerUnitGradients):
    """Forgets the gradient of earlier uses, as a hook that overwrites does."""

    def rows_of(self, parameter: Tensor) -> Tensor:
        self._leaves[id(parameter)] = parameter.detach().expand(UNITS, *parameter.shape).requires_grad_()
        return super().rows_of(parameter)


class ClipsUsesApart(PerUnitGradients):
    """Adds up the norms of the uses instead of their gradients: wrong as soon as uses cancel or align."""

    def rows_of(self, parameter: Tensor) -> Tensor:
        rows = super().rows_of(parameter)
        if rows.requires_grad:
            rows.register_hook(lambda g: g / g.norm())
        return rows


def error(collector: type[PerUnitGradients], model: nn.Module) -> float:
    """Relative distance of the collected gradients from one backward pass per unit."""
    torch.manual_seed(3)
    model = model.double()
    x = torch.randn(UNITS, 2, 4, dtype=torch.float64)
    parameters = [p for p in model.parameters() if p.requires_grad]
    brute = [torch.cat([g.flatten() for g in torch.autograd.grad(model(row[None]).sum(), parameters)]) for row in x]
    gradients = collector(model)
    with gradients.collect(torch.arange(UNITS), UNITS):
        model(x).sum().backward()
    found = torch.cat([g.flatten(1) for g in gradients.grads()], 1)
    return float((found - torch.stack(brute)).norm() / torch.stack(brute).norm())


@pytest.mark.parametrize("model", [Reused, SharedModule, SharedAdapter])
def test_tied_and_reused_layers_equal_brute_force(model: Callable[[], nn.Module]):
    """PRIVACY test 15: all uses of a weight add up to one gradient per unit."""
    assert error(PerUnitGradients, model()) < 1e-10
    assert error(LastUseOnly, model()) > 1e-2
    assert error(ClipsUsesApart, model()) > 1e-2


# 16 --------------------------------------------------------------------------------------------------------


class WithParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale


class UsedOutside(nn.Module):
    """The weight of a linear layer serves a second time, without the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) @ self.linear.weight


class NotUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class RowsFlattened(nn.Module):
    """Positions of all rows in one dimension, as expert layers see them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(0, 1)).view_as(x)


class TiedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


UNHANDLED = [
    lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)),
    lambda: nn.Sequential(nn.Linear(4, 4), Conv1D(4, 4)),
    lambda: nn.Sequential(nn.Linear(4, 4), nn.Bilinear(4, 4, 4)),
    WithParameter, TiedHead, UsedOutside, NotUsed, RowsFlattened,
]  # fmt: skip


class TakesAnything(PerUnitGradients):
    """Leaves out what it does not know, and says nothing."""

    def __init__(self, model: nn.Module) -> None:
        known = {id(p) for m in model.modules() if isinstance(m, nn.Linear) for p in m.parameters()}
        known -= {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        unknown = [p for p in model.parameters() if id(p) not in known]
        for p in unknown:
            p.requires_grad_(False)
        super().__init__(model)
        for p in unknown:
            p.requires_grad_(True)

    def rows_of(self, parameter: Tensor) -> Tensor:
        leaf = self._leaves.get(id(parameter))
        return super().rows_of(parameter) if leaf is None else leaf[: len(self.row_unit)]

    def _refuse_new_trainables(self) -> None:
        pass

    def grads(self) -> list[Tensor]:
        return [leaf.grad for leaf in self._leaves.values() if leaf.grad is not None]


def refuses(collector: type[PerUnitGradients], model: nn.Module) -> bool:
    """Whether the model is refused, at the latest when gradients would be read."""
    try:
        gradients = collector(model)
        x = torch.randn(UNITS, 2, 4)
        rows = len(x) if not isinstance(model, RowsFlattened) or collector is PerUnitGradients else 2 * len(x)
        with gradients.collect(torch.arange(rows), rows):
            (model(x) if not isinstance(model, nn.Sequential) else model[0](x)).sum().backward()
        gradients.grads()
    except DPAlignError:
        return True
    return False


@pytest.mark.parametrize("model", UNHANDLED)
def test_an_unhandled_trainable_raises(model: Callable[[], nn.Module]):
    """PRIVACY test 16: no trainable weight without a per-unit gradient, and none left out in silence."""
    assert refuses(PerUnitGradients, model())
    assert not refuses(TakesAnything, model())


def test_handled_trainables_do_not_raise():
    """PRIVACY test 16: the check can tell; linear layers, LoRA and a value head are accepted."""
    assert not refuses(PerUnitGradients, nn.Sequential(nn.Linear(4, 4)))


def test_an_unfrozen_embedding_or_norm_of_the_base_raises():
    """PRIVACY test 16 on the real models: what an adapter leaves trainable by mistake is named."""
    for kind, name in (("gpt2", "ln_f"), ("llama", "embed_tokens"), ("gpt2", "c_attn.base_layer")):
        policy = tiny_policy(kind)
        algorithm = sft()
        algorithm.setup(policy)
        encode_units(algorithm, policy, dataset(texts()).units)
        module = next(m for n, m in policy.named_modules() if n.endswith(name))
        module.requires_grad_(True)
        with pytest.raises(DPAlignError, match=name.split(".")[0]):
            PerUnitGradients(policy)
