"""What a model computes with: the same kernels on the same shapes, whatever the rows of a micro-batch hold.

transformers leaves the attention mask out when no row is padded, and groups tokens by the expert they are sent to: then
who shares a micro-batch chooses a kernel or the shape of a product, and with it everybody's rounding. torch computes
the last few numbers of a thread's share by another function than the rest: then the place in a micro-batch chooses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.activations import ACT2CLS, FastGELUActivation, NewGELUActivation, XIELUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ..errors import DPAlignError

NAME = "dpalign"
VECTORS = 64  # numbers, of the widest vectors that torch computes with, two at once
LEAST = 32768  # numbers of a thread's share: torch's GRAIN_SIZE
ACTIVATIONS: Any = tuple(
    {kind[0] if isinstance(kind, tuple) else kind for kind in ACT2CLS.values()} - {nn.PReLU, XIELUActivation}
)


def constant_kernels(model: PreTrainedModel) -> None:
    """Has a model compute with the functions below; what it computes stays the same but for rounding.

    Raises:
        DPAlignError: its experts cannot be computed so.
    """
    if model.config._attn_implementation != "eager":  # which always has its mask
        if not model._can_set_attn_implementation():
            raise DPAlignError(
                f"{type(model).__name__} chooses its attention kernel in a way of its own, so that a record's gradient "
                "would depend on who else is there: align another model."
            )
        model.set_attn_implementation(NAME)
    if any(hasattr(module, "num_experts") for module in model.modules()):
        if not model._can_set_experts_implementation():
            raise DPAlignError(
                f"{type(model).__name__} groups tokens of different records by expert in a way of its own, so that a "
                "record's gradient would depend on who else is there: align a model without experts."
            )
        model.set_experts_implementation(NAME)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.out_features == 1:
            module.register_forward_hook(_apart)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, ACTIVATIONS) and not isinstance(model.get_submodule(name.rpartition(".")[0]), Activation):
            eager = isinstance(module, NewGELUActivation | FastGELUActivation)  # GPT-2's, in eight passes over memory
            model.set_submodule(name, Activation(nn.GELU(approximate="tanh") if eager else module))
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is not None:
        head.register_forward_pre_hook(_contiguous)


def keep_apart(model: nn.Module) -> None:
    """The same for the adapted ones among such layers, whose sum closes the gap again."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and module.out_features == 1 and _apart not in module._forward_hooks.values():
            module.register_forward_hook(_apart)


class Activation(nn.Module):
    """A function of each number, of which on a CPU every thread computes whole vectors: zeros fill the last ones.

    What it calls has no hooks: they would see numbers, and not rows.
    """

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, inputs: Tensor) -> Tensor:
        count = inputs.numel()
        missing = missing_numbers(count, torch.get_num_threads()) if inputs.device.type == "cpu" else 0
        if missing == 0:
            found: Tensor = self.function.forward(inputs)
            return found
        whole: Tensor = self.function.forward(nn.functional.pad(inputs.reshape(-1), (0, missing)))
        return whole[:count].view(inputs.shape)


def missing_numbers(count: int, threads: int) -> int:
    """So many more than `count`, and torch gives every thread a multiple of `VECTORS`.

    Most functions have shares of at least `LEAST` numbers, GELU as many shares as threads.
    """
    whole = count
    while True:
        shares = max(1, min(threads, math.ceil(whole / LEAST)))
        step = VECTORS * math.lcm(shares, threads)
        whole = math.ceil(whole / step) * step
        if max(1, min(threads, math.ceil(whole / LEAST))) == shares:
            return whole - count


def _contiguous(head: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What the head reads, as one block: of every row's last state, which `generate` cuts out of the prompt's, torch
    makes a batch of products, and copies frozen bfloat16 weights for each of them."""
    return (arguments[0].contiguous(), *arguments[1:])


def chunks(rows: int, size: int) -> Iterator[tuple[list[int], int]]:
    """Row numbers in chunks of `size`, and how many of each count; the last chunk's other rows repeat its last one.

    A row's rounding depends on how many rows are computed together, but not on what the others hold.
    """
    for start in range(0, rows, size):
        chunk = list(range(start, min(rows, start + size)))
        yield chunk + [chunk[-1]] * (size - len(chunk)), len(chunk)


def _apart(gate: nn.Module, inputs: Any, one: Tensor) -> Tensor:
    """One number a position, with a gap behind each: a sigmoid then takes them one by one, the last like the first."""
    return torch.cat([one, one], -1)[..., :1]


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """torch's own; on a CPU in float32, but for single tokens: in half precision its backward pass is several times
    slower there. Whether there is one decides nothing, so that a model with and without gradients is the same."""
    if query.device.type != "cpu" or query.dtype not in (torch.bfloat16, torch.float16) or query.shape[2] == 1:
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    wide = mask.float() if mask is not None and mask.is_floating_point() else mask
    out, nothing = sdpa_attention_forward(module, query.float(), key.float(), value.float(), wide, **options)
    return out.to(query.dtype), nothing


def _mask(*args: Any, **options: Any) -> Tensor | None:
    """Never left out: with one, every row is computed by the same kernel."""
    return sdpa_mask(*args, **options | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


def _all_experts(experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Every expert on every token: on zeros, times zero, where the router did not choose it.

    Args:
        hidden: `(tokens, hidden)`. chosen, weights: `(tokens, k)`, the router's experts and their weights.
    """
    share = weights.new_zeros(len(hidden), experts.num_experts).scatter_add(1, chosen, weights)
    loop = type(experts).forward.__wrapped__  # over the experts that are chosen by any token
    out = torch.zeros_like(hidden)
    for number in range(experts.num_experts):
        here = share[:, number : number + 1]
        own = torch.where(here != 0, hidden, 0.0)
        out = out + loop(experts, own, torch.full_like(chosen[:, :1], number), here)
    return out


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
ALL_EXPERTS_FUNCTIONS.register(NAME, _all_experts)
