"""Whole weight matrices that are trained as LoRA of full rank, with one of the two factors the identity.

What plain peft loads is then an ordinary adapter, the base stays what it was, and a reference model is still the stack
without its newest adapter. Such a layer computes with the sum of its weights, in one product.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn

from ..errors import DPAlignError
from ..gradients import UnitLinear
from .sharded import is_placeholder


class WholeLinear(Linear):
    """peft's adapted layer, with adapters of full rank among its own.

    whole: which matrix holds such an adapter's weight, `(out, in)`; the other one is the identity.
    """

    whole: dict[str, str]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = [a for a in self.active_adapters if a in self.lora_A]
        if self.disable_adapters or self.merged or not any(a in self.whole for a in active):
            out: Tensor = super().forward(x, *args, **kwargs)
            return out
        out = self._with_whole([a for a in active if a in self.whole], x)
        for adapter in active:
            if adapter not in self.whole:
                out = out + self.lora_B[adapter](self.lora_A[adapter](x)) * self.scaling[adapter]
        return out

    def _with_whole(self, adapters: list[str], x: Tensor) -> Tensor:
        base: Any = self.get_base_layer()
        x = x.contiguous()  # as the base's own hook has it, of an output layer
        weight = base.weight.T if self.fan_in_fan_out else base.weight
        for adapter in adapters:
            weight = weight + self.holder(adapter).weight
        newest = self.holder(adapters[-1])  # no other one is trained
        collector = _collector(newest) if newest.weight.requires_grad and torch.is_grad_enabled() else None
        if collector is not None:
            out: Tensor = collector.product(x, weight.detach(), base.bias, newest.weight)
            return out
        return nn.functional.linear(x, weight, base.bias)

    def holder(self, adapter: str) -> nn.Linear:
        """The matrix that holds an adapter's weight."""
        matrices: nn.ModuleDict = getattr(self, self.whole[adapter])
        found = matrices[adapter]
        assert isinstance(found, nn.Linear)
        return found

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging an adapter adds to the base's weight, in its layout."""
        if adapter not in self.whole:
            delta: Tensor = super().get_delta_weight(adapter)
            return delta
        weight = self.holder(adapter).weight
        return weight.T if self.fan_in_fan_out else weight

    def delete_adapter(self, adapter_name: str) -> None:
        self.whole.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def as_one(self, adapters: list[str]) -> tuple[Tensor, Tensor]:
        """Adapters as one of scale 1: A `(rank, in)` and B `(out, rank)`, one of them the identity."""
        parts = [self.get_delta_weight(adapter) for adapter in adapters]
        weight = sum(part.T if self.fan_in_fan_out else part for part in parts)
        assert isinstance(weight, Tensor)
        return _factors(weight)


def _collector(module: nn.Module) -> Any:
    """That which collects gradients of units just now, if there is one."""
    collector = module._collector if isinstance(module, UnitLinear) else None
    return collector if collector is not None and collector.row_unit is not None else None


def widen(model: PeftModel, adapter: str) -> tuple[str, ...]:
    """Makes a new adapter's matrices whole ones, zero at first; the names of the matrices that are to be trained.

    Raises:
        DPAlignError: a layer's weights are not float32: a step is too small to be seen in fewer bits.
    """
    trained = []
    for name, layer in _adapted(model, adapter):
        weight = layer.get_base_layer().weight
        if not isinstance(layer, Linear) or weight.dtype != torch.float32 or is_placeholder(weight):
            raise DPAlignError(
                f"adapter.kind full trains whole weights, and {name} is held in {str(weight.dtype)[6:]}, or in parts: "
                "set model.dtype to float32, without quantization or sharding, or adapter.kind to lora."
            )
        _put(layer, adapter, *_factors(torch.zeros(_shape(layer), device=weight.device)))
        trained.append(f"{name}.{_holding(layer)}")
    return tuple(trained)


def recognise(model: PeftModel, adapter: str) -> None:
    """Has a loaded adapter's layers compute with whole weights where that is what they are."""
    for _, layer in _adapted(model, adapter):
        a, b = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
        weight = layer.get_base_layer().weight
        if type(layer) is not Linear or layer.scaling[adapter] != 1:
            continue
        if weight.dtype != a.dtype or is_placeholder(weight):  # the sum has to be one of float32, and to be here
            continue
        identity = torch.eye(min(_shape(layer)), dtype=a.dtype, device=a.device)
        if torch.equal(b if _holding(layer) == "lora_A" else a, identity):
            _put(layer, adapter, a, b)


def _adapted(model: PeftModel, adapter: str) -> list[tuple[str, Any]]:
    """The layers that have an adapter, by name."""
    found: list[tuple[str, Any]] = list(model.get_base_model().named_modules())
    return [(name, layer) for name, layer in found if isinstance(layer, LoraLayer) and adapter in layer.lora_A]


def _shape(layer: Any) -> tuple[int, int]:
    return layer.out_features, layer.in_features


def _holding(layer: Any) -> str:
    """Which matrix holds a layer's whole weight: the one beside the smaller identity."""
    return "lora_A" if layer.out_features <= layer.in_features else "lora_B"


def _factors(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight `(out, in)` as A `(rank, in)` and B `(out, rank)`, of which one is the identity."""
    identity = torch.eye(min(weight.shape), dtype=weight.dtype, device=weight.device)
    return (weight, identity) if weight.shape[0] <= weight.shape[1] else (identity, weight)


def _put(layer: Any, adapter: str, a: Tensor, b: Tensor) -> None:
    for matrices, weight in ((layer.lora_A, a), (layer.lora_B, b)):
        matrix = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
        matrix.weight.data = weight.clone()
        matrices[adapter] = matrix.requires_grad_(False)
    layer.r[adapter] = layer.lora_alpha[adapter] = len(a)
    layer.scaling[adapter] = 1.0
    if not isinstance(layer, WholeLinear):
        layer.__class__, layer.whole = WholeLinear, {}
    layer.whole[adapter] = _holding(layer)
    layer.holder(adapter).is_whole = True
