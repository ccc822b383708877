"""The optimiser of a stage: AdamW, or one whose second moment forgets the noise that was added on purpose."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..settings.base import TrainingConfig


def adam(parameters: list[nn.Parameter], config: TrainingConfig, deviation: float) -> torch.optim.Optimizer:
    """As a stage's settings say; `deviation` is the standard deviation of the noise on a gradient's coordinate."""
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    if not config.adam_noise_correction:
        return torch.optim.AdamW(parameters, **options)
    return DPAdamBC(parameters, **options, noise_deviation=deviation, floor=config.adam_noise_floor)


def share_of_rate(config: TrainingConfig, step: int, steps: int) -> float:
    """What the schedule leaves of the peak learning rate at a step of `steps`."""
    if step < config.warmup_steps:
        return float((step + 1) / config.warmup_steps)
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    if config.lr_scheduler_type == "linear":
        return float(1 - progress)
    return float(0.5 * (1 + math.cos(math.pi * progress))) if config.lr_scheduler_type == "cosine" else 1.0


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
