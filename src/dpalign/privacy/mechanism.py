"""Clip, sum, add Gaussian noise: the only door that private data goes through.

What is bounded: adding or removing one unit moves the sum of all trainable gradients together by at
most C in L2 norm, and the sum of the metrics block by at most 1. What is not bounded here: anything
that reaches the model by another way than `release`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import DPAlignError
from .entropy import SystemEntropy

Clipping = Literal["automatic", "flat", "none"]


@dataclass(frozen=True)
class MetricRange:
    """A metric's public, declared range; values outside are clipped to it."""

    name: str
    low: float
    high: float


class GaussianMechanism:
    """Accumulates clipped per-unit gradients over micro-batches and releases their noisy mean once.

    Args:
        shapes: shape of every trainable parameter, in a fixed order.
        max_grad_norm: C, the bound on one unit's joint gradient.
        noise_multiplier: sigma; the noise on the sum has standard deviation sigma * C.
        divisor: what the noisy sum is divided by, a constant (the expected batch size).
        clipping: "flat" scales by min(1, C/|g|); "automatic" by C/(|g| + gamma) (Bu et al. 2022,
            arXiv 2206.07136); "none" only without noise, for a non-private baseline.
        gamma: the stability constant of automatic clipping, in units of the gradient norm.
        metrics: declared ranges of the metrics block, possibly none.
        metrics_noise_multiplier: sigma_m of the metrics block.
    """

    def __init__(
        self,
        shapes: list[torch.Size],
        *,
        max_grad_norm: float,
        noise_multiplier: float,
        divisor: float,
        entropy: SystemEntropy,
        clipping: Clipping = "automatic",
        gamma: float = 0.01,
        metrics: tuple[MetricRange, ...] = (),
        metrics_noise_multiplier: float = math.inf,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if clipping == "none" and noise_multiplier > 0:
            raise DPAlignError("clipping 'none' has unbounded sensitivity: use 'automatic' or 'flat' with noise.")
        if clipping != "none" and not (0 < max_grad_norm < math.inf):
            raise DPAlignError(f"max_grad_norm {max_grad_norm} must be positive and finite.")
        if divisor <= 0:
            raise DPAlignError(f"the divisor {divisor} must be a positive constant.")
        self.max_grad_norm = max_grad_norm
        self.noise_multiplier = noise_multiplier
        self.divisor = divisor
        self.clipping = clipping
        self.gamma = gamma
        self.metrics = metrics
        self.metrics_noise_multiplier = metrics_noise_multiplier
        self._entropy = entropy
        self._sums = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self._metrics_sum = torch.zeros(len(metrics), dtype=torch.float64)

    def sensitivity(self) -> float:
        """L2 bound on what one unit moves the gradient sum by."""
        return math.inf if self.clipping == "none" else self.max_grad_norm

    def clip_factors(self, norms: Tensor) -> Tensor:
        """`(units,)` scale of each unit's gradient; 0 for a unit whose gradient is not finite."""
        if self.clipping == "none":
            factors = torch.ones_like(norms)
        elif self.clipping == "flat":
            factors = (self.max_grad_norm / norms.clamp(min=1e-30)).clamp(max=1.0)
        else:
            factors = self.max_grad_norm / (norms + self.gamma)
        return torch.where(torch.isfinite(norms), factors, torch.zeros_like(factors))

    def add(self, grads: list[Tensor], metrics: Tensor | None = None) -> None:
        """Clips and adds the gradients of some units; no unit may come twice between two releases.

        Args:
            grads: one `(units, *shape)` tensor per parameter, any floating dtype.
            metrics: `(units, len(self.metrics))` raw values, or None where none are released.
        """
        wide = [g.to(total.dtype) for g, total in zip(grads, self._sums, strict=True)]
        squares = torch.stack([g.flatten(1).square().sum(1) for g in wide]).sum(0)  # (units,)
        factors = self.clip_factors(squares.sqrt())
        keep = factors > 0
        every = bool(keep.all())
        for g, total in zip(wide, self._sums, strict=True):
            finite = g if every else torch.where(keep.view(-1, *[1] * (g.dim() - 1)), g, torch.zeros_like(g))
            total += torch.tensordot(factors, finite, dims=1)
        if metrics is not None:
            self.add_metrics(metrics)

    def add_metrics(self, metrics: Tensor) -> None:
        """Adds the `(units, len(self.metrics))` raw metrics of some units, where metrics are released."""
        if self.metrics:
            self._metrics_sum += self._scaled(metrics).sum(0)

    def release(self) -> tuple[list[Tensor], dict[str, float] | None]:
        """The noisy mean gradient, one tensor per parameter, and the noised metrics; then forgets the sums."""
        count = sum(total.numel() for total in self._sums)
        gradients: list[Tensor] = []
        noise = self._noise(count, self.noise_multiplier * self.max_grad_norm)
        start = 0
        for total in self._sums:
            part = noise[start : start + total.numel()].view_as(total).to(device=total.device, dtype=total.dtype)
            gradients.append((total + part) / self.divisor)
            start += total.numel()
            total.zero_()
        return gradients, self._release_metrics()

    def _release_metrics(self) -> dict[str, float] | None:
        if not self.metrics or math.isinf(self.metrics_noise_multiplier):
            self._metrics_sum.zero_()
            return None
        noisy = (self._metrics_sum + self._noise(len(self.metrics), self.metrics_noise_multiplier)) / self.divisor
        self._metrics_sum.zero_()
        noisy = noisy * math.sqrt(len(self.metrics))
        return {
            m.name: float((m.low + m.high) / 2 + value * (m.high - m.low) / 2)
            for m, value in zip(self.metrics, noisy.tolist(), strict=True)
        }

    def _scaled(self, values: Tensor) -> Tensor:
        # Every metric to [-1, 1], then 1/sqrt(k): the row's norm is at most 1 whatever the values are.
        low = torch.tensor([m.low for m in self.metrics], dtype=torch.float64)
        high = torch.tensor([m.high for m in self.metrics], dtype=torch.float64)
        middle, half = (low + high) / 2, (high - low) / 2
        clipped = values.detach().to("cpu", torch.float64).clamp(low, high)
        scaled = torch.nan_to_num((clipped - middle) / half, nan=0.0)
        return scaled / math.sqrt(len(self.metrics))

    def _noise(self, count: int, standard_deviation: float) -> Tensor:
        if standard_deviation == 0:
            return torch.zeros(count, dtype=torch.float64)
        return torch.from_numpy(self._entropy.normals(count)) * standard_deviation
