"""Per-unit gradients from an ordinary backward pass, without hooks.

Every trainable `nn.Linear` computes with its own view of the weight for each unit: a leaf
`weight.expand(units, ...)`, indexed by row -> unit and used through `bmm`. Backward then leaves one
gradient per unit in the leaf, with the rows of one unit already summed and reused or tied layers
added up, and no aggregate gradient exists at all. The leaves are made before the forward pass and
read after the backward pass, so both kinds of activation checkpointing are exact.

Of a weight that is trained whole there is no such leaf, which would be as large as the model for every unit: its layer
notes what enters it and the slope of what leaves it, and the mechanism sums their products (`privacy/products.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import DPAlignError
from ..privacy.mechanism import UnitGradients
from ..privacy.products import Factors, Products


class UnitLinear(nn.Linear):
    """`nn.Linear` that, inside `PerUnitGradients.collect`, uses one weight view per unit."""

    _collector: PerUnitGradients | None = None
    is_whole = False  # its weight is a whole layer's, which computes with it: see `PerUnitGradients.product`

    def forward(self, x: Tensor) -> Tensor:
        collector = self._collector
        if collector is None or collector.row_unit is None:
            return super().forward(x)
        if x.dim() < 2 or x.shape[0] != collector.row_unit.shape[0]:
            raise DPAlignError(
                f"a trainable layer received {tuple(x.shape)} where the first dimension must be the "
                f"{collector.row_unit.shape[0]} rows of the micro-batch: layers that mix rows (packing, experts) "
                "have no per-unit gradient."
            )
        rows = x.reshape(x.shape[0], -1, x.shape[-1])  # (rows, positions, in)
        weight = collector.rows_of(self.weight).transpose(1, 2)  # (rows, in, out)
        if self.bias is None:
            out = torch.bmm(rows, weight)
        else:
            out = torch.baddbmm(collector.rows_of(self.bias).unsqueeze(1), rows, weight)
        return out.reshape(*x.shape[:-1], out.shape[-1])


class PerUnitGradients:
    """Collects one gradient per unit for every trainable parameter of `model`.

    Trainable `nn.Linear` modules are replaced by `UnitLinear` in place (same parameters, same names).

    Raises:
        DPAlignError: a trainable parameter belongs to any other kind of module; it is named.
    """

    _given: Tensor  # the unit of each row, until `grads`
    _identity: bool  # whether the rows of `collect` are its units, one each and in order

    def __init__(self, model: nn.Module) -> None:
        replaced: dict[int, UnitLinear] = {}
        for name, module in list(model.named_modules(remove_duplicate=False)):
            if type(module) is nn.Linear and any(p.requires_grad for p in module.parameters(recurse=False)):
                replaced.setdefault(id(module), _as_unit_linear(module))
                model.set_submodule(name, replaced[id(module)])
        for module in model.modules():
            if isinstance(module, UnitLinear):
                module._collector = self
        self.names: list[str] = []
        self.parameters: list[nn.Parameter] = []
        owners: dict[int, list[tuple[str, nn.Module]]] = {}
        for module_name, module in model.named_modules():
            for name, p in module.named_parameters(recurse=False):
                owners.setdefault(id(p), []).append((f"{module_name}.{name}", module))
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            strangers = [(n, m) for n, m in owners[id(p)] if not isinstance(m, UnitLinear)]
            if strangers:
                raise DPAlignError(
                    f"trainable parameter {strangers[0][0]} of a {type(strangers[0][1]).__name__} has no per-unit "
                    "gradient here: train only linear layers (LoRA, heads), or freeze it with requires_grad_(False)."
                )
            self.names.append(name)
            self.parameters.append(p)
        if not self.parameters:
            raise DPAlignError("the model has no trainable parameters: give it a LoRA adapter or a head.")
        self.whole = {id(m.weight) for m in model.modules() if isinstance(m, UnitLinear) and m.is_whole}
        self._model = model
        self.row_unit: Tensor | None = None
        self._leaves: dict[int, Tensor] = {}
        self._uses: dict[int, list[Factors]] = {}
        self._units = 0

    @contextmanager
    def collect(self, row_unit: Tensor, units: int) -> Iterator[None]:
        """Within the block, run forward and backward of one micro-batch; then call `grads`.

        Args:
            row_unit: `(rows,)` int64, the unit (0 <= unit < units) that each row belongs to.
            units: number of units in the micro-batch.

        Raises:
            DPAlignError: a parameter has become trainable since the collector was made.
        """
        self._refuse_new_trainables()
        leaves = [p for p in self.parameters if id(p) not in self.whole]
        self._leaves = {id(p): p.detach().expand(units, *p.shape).requires_grad_() for p in leaves}
        self._uses, self._units, self._given = {key: [] for key in self.whole}, units, row_unit
        self._identity = row_unit.shape[0] == units and bool((row_unit.cpu() == torch.arange(units)).all())
        self.row_unit = row_unit
        try:
            yield
        finally:
            self.row_unit = None

    def _refuse_new_trainables(self) -> None:
        known = {id(p) for p in self.parameters}
        for name, p in self._model.named_parameters():
            if p.requires_grad and id(p) not in known:
                raise DPAlignError(f"{name} became trainable after training began: its gradient would not be clipped.")

    def rows_of(self, parameter: Tensor) -> Tensor:
        """`(rows, *shape)`: each row's view of the parameter.

        Raises:
            DPAlignError: outside of `collect`, where no row belongs to a unit.
        """
        if self.row_unit is None:
            raise DPAlignError("a row has its own view of a parameter inside PerUnitGradients.collect only.")
        leaf = self._leaves.get(id(parameter))
        if leaf is None:  # a frozen bias beside a trainable weight
            return parameter.expand(self.row_unit.shape[0], *parameter.shape)
        return leaf if self._identity else leaf.index_select(0, self.row_unit)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, parameter: nn.Parameter) -> Tensor:
        """`x @ weight.T + bias` of a layer whose whole weight is trained, as `parameter`, which is part of `weight`.

        Raises:
            DPAlignError: `x` has another number of rows than the micro-batch.
        """
        if self.row_unit is None or x.dim() < 2 or x.shape[0] != self.row_unit.shape[0]:
            raise DPAlignError(
                f"a trainable layer received {tuple(x.shape)} where the first dimension must be the rows of the "
                "micro-batch: layers that mix rows (packing, experts) have no per-unit gradient."
            )
        out: Tensor = _Noted.apply(x, weight, bias, parameter, self._uses[id(parameter)])  # type: ignore[no-untyped-call]
        return out

    def _products(self, parameter: nn.Parameter) -> Products:
        """Of each unit its rows of every use of the weight, one below the other."""
        rows_of: list[list[int]] = [[] for _ in range(self._units)]
        for row, unit in enumerate(self._given.tolist()):
            rows_of[unit].append(row)
        units: list[list[Factors]] = [[] for _ in range(self._units)]
        for inputs, slopes in self._uses.pop(id(parameter)):
            for unit, rows in zip(units, rows_of, strict=True):
                unit += [Factors(_positions(inputs[row]), _positions(slopes[row])) for row in rows]
        return Products(parameter.shape, units)

    def grads(self) -> list[UnitGradients]:
        """One `(units, *shape)` tensor, or `Products` for one, per trainable parameter, in the order of `parameters`.

        Raises:
            DPAlignError: a parameter took no part in the loss, or was used outside its layer.
        """
        grads: list[UnitGradients] = []
        for name, p in zip(self.names, self.parameters, strict=True):
            if p.grad is not None:
                p.grad = None
                raise DPAlignError(
                    f"{name} was used outside its layer's forward, so part of its gradient is not per unit: "
                    "this model cannot be trained privately with that layer trainable."
                )
            grad: UnitGradients | None
            if id(p) in self.whole:
                grad = self._products(p) if self._uses[id(p)] else None
            else:
                grad = self._leaves[id(p)].grad
            if grad is None:
                raise DPAlignError(f"{name} took no part in the loss: freeze it, or use it.")
            grads.append(grad)
        self._leaves = {}
        return grads


def _positions(row: Tensor) -> Tensor:
    return row.reshape(-1, row.shape[-1])


class _Noted(torch.autograd.Function):
    """A linear layer that notes its factors in the backward pass; the parameter gets no gradient of its own."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, parameter: Tensor, uses: list[Factors]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.uses = uses
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        x, weight = ctx.saved_tensors
        ctx.uses.append(Factors(x.detach(), slopes.detach()))
        return (slopes @ weight if ctx.needs_input_grad[0] else None), None, None, None, None


def _as_unit_linear(linear: nn.Linear) -> UnitLinear:
    out = UnitLinear.__new__(UnitLinear)
    out.__dict__ = linear.__dict__
    return out
