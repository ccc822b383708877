"""Input directions for a frozen LoRA A, from the policy gradient on synthetic prompts.

Privacy noise grows with the number of trained weights, so it pays to train few good ones. A policy can
tell which: it writes prompts itself, completes them, and the public reward's gradient with respect
to each adapted weight, decomposed by SVD, gives the input directions along which reward can move
(in the spirit of LoRA-GA, Wang et al. 2024, and of public gradient subspaces, Zhou et al. 2021).
No record is read: the policy is public or a DP release, so this is post-processing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from ..errors import DPAlignError
from ..models import Policy
from ..models.generation import Prompt, padded, write_prompts
from ..models.policy import Rollouts


def align_inputs(
    policy: Policy,
    score: Callable[[list[Prompt], Rollouts, Policy], Tensor],
    *,
    rows: int,
    prompt_tokens: int,
    max_new_tokens: int,
    min_new_tokens: int,
    micro_batch_size: int,
) -> None:
    """Sets every A of the newest adapter to the leading right singular vectors of the synthetic gradient.

    Args:
        policy: with the newest adapter added; its B is still zero.
        score: the public reward of rollouts, `(rows,)`, NaN where there is none.
        rows: synthetic rollouts to estimate the gradient from; the prompts have `prompt_tokens` tokens after BOS.
    """
    prompts = write_prompts(policy, rows, prompt_tokens, micro_batch_size)
    rollouts = policy.sample(
        *padded(policy, prompts), max_new_tokens, min_new_tokens=min_new_tokens, rows_at_once=micro_batch_size
    )
    scores = score(prompts, rollouts, policy).to(policy.device)
    scores = torch.where(scores.isnan(), scores.nanmean(), scores)
    advantages = scores - scores.mean()  # synthetic rows may share statistics: no unit is among them

    layers: list[Any] = [m for m in policy.modules() if isinstance(m, LoraLayer) and policy.adapters[-1] in m.lora_A]
    weights = [layer.get_base_layer().weight for layer in layers]
    trained = [p for p in policy.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for i in range(0, rows, micro_batch_size):
            rows_here = slice(i, i + micro_batch_size)
            logprobs, _ = policy.completion_logprobs(rollouts[rows_here], min_new_tokens)
            (-(advantages[rows_here] * logprobs.sum(1)).sum() / rows).backward()  # type: ignore[no-untyped-call]
        for layer, weight in zip(layers, weights, strict=True):
            if weight.grad is None:
                raise DPAlignError(
                    "an adapted layer took no part in the loss, so init_a synthetic_gradient has no gradient for it: "
                    "leave it out of adapter.target_modules."
                )
            gradient = weight.grad.float().T if layer.fan_in_fan_out else weight.grad.float()  # (out, in)
            a = layer.lora_A[policy.adapters[-1]].weight
            a.data.copy_(leading_inputs(gradient, a.shape[0]))
    finally:
        for weight in weights:
            weight.grad = None
            weight.requires_grad_(False)
        for p in trained:
            p.requires_grad_(True)


def leading_inputs(gradient: Tensor, rank: int) -> Tensor:
    """`(rank, in)` orthonormal rows: the leading right singular vectors of an `(out, in)` gradient."""
    directions: Tensor = torch.linalg.svd(gradient, full_matrices=False).Vh
    return directions[:rank]
