"""AdamW whose second moment forgets the noise that was added on purpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class DPAdamBC(torch.optim.Optimizer):
    """Adam with the bias of private noise subtracted from the second moment (Tang et al. 2024, arXiv 2312.14334).

    The noise on a released gradient has the known variance Phi = (sigma C / B)^2, which Adam's second moment
    estimates along with the gradient's. The update is m / sqrt(max(v - Phi, floor^2)).

    Args:
        noise_deviation: sqrt(Phi), as planned (after an interruption the noise is larger, and the correction partial).
        floor: smallest denominator, as a multiple of it; the difference is a noisy estimate, and small ones
            must not blow an update up.
        The others are AdamW's; with Phi = 0 the update is AdamW's.
    """

    def __init__(
        self,
        params: list[nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        noise_deviation: float,
        floor: float,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.noise_deviation, self.floor = noise_deviation, floor

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One update; `closure` is not supported, for a second evaluation would be a second release."""
        if closure is not None:
            raise ValueError("a closure would evaluate the gradient again")
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
                steps = float(state["step"])
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                first = state["exp_avg"] / (1 - beta1**steps)
                second = state["exp_avg_sq"] / (1 - beta2**steps) - self.noise_deviation**2
                lowest = (self.floor * self.noise_deviation) ** 2
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.addcdiv_(first, second.clamp(min=lowest).sqrt() + group["eps"], value=-group["lr"])
        return None
