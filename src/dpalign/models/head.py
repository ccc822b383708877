"""Numbers that are read off logits, a few positions at a time: no tensor of (rows, positions, vocabulary).

A position's number (the log-probability of a token, say) depends on the state at that position alone. So its gradient
can be taken while the position's logits are there, and kept in their place: it is as long as the state. The backward
pass multiplies it with what arrives, and nothing is computed twice. A head that is trained itself needs the logits in
the backward pass, and computes them again.

Libraries fuse this for one weight and plain cross-entropy. torch's `linear_cross_entropy` rounds log-probabilities of a
bfloat16 model to bfloat16 and computes all logits twice; Liger's kernels need a GPU. Neither takes an adapter on the
head, a scale behind it, or tokens that must not be drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

AT_ONCE = 2**26  # bytes of float32 logits that are held together
# From states `(rows, positions, hidden)`, and which positions of all these are: `(rows, positions)` numbers.
Numbers: TypeAlias = Callable[[Tensor, slice], Tensor]


def held_together(logits: int) -> int:
    """How many of what has so many logits each (a position of some rows, a row of some positions) are held together.

    Public numbers alone decide: shapes, and the constant.
    """
    return max(1, AT_ONCE // (4 * max(1, logits)))


def by_position(numbers: Numbers, states: Tensor, at_once: int, *, is_trained: bool) -> Tensor:
    """`numbers` of all `(rows, positions, hidden)` states, `at_once` positions at a time: `(rows, positions)`.

    Args:
        numbers: of which each depends on the state at its own position alone.
        is_trained: whether it has weights that need a gradient, too.
    """
    count = states.shape[1]
    parts = [slice(start, min(count, start + at_once)) for start in range(0, count, at_once)]
    if is_trained and torch.is_grad_enabled():
        again = partial(checkpoint, numbers, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([again(states[:, part], part) for part in parts], 1)
    found: Tensor = _ByPosition.apply(states, numbers, parts)  # type: ignore[no-untyped-call]
    return found


class _ByPosition(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, numbers: Numbers, parts: list[slice]) -> Tensor:
        slopes = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        found = []
        for part in parts:
            with torch.set_grad_enabled(slopes is not None):
                here = states[:, part].detach().requires_grad_(slopes is not None)
                number = numbers(here, part)
                if slopes is not None:
                    slopes[:, part] = torch.autograd.grad(number.sum(), here)[0]
            found.append(number.detach())
        ctx.save_for_backward(slopes)
        return torch.cat(found, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, arriving: Tensor) -> tuple[Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        return (arriving.unsqueeze(2) * slopes).to(slopes.dtype), None, None


class Head:
    """What a causal model does with the last states of its body: the head, and a cap or scale that may stand behind it.

    transformers has no name for that, so it is always the whole model that is called: the body's answer is taken from
    it, and given to it again in parts.
    """

    def __init__(self, causal: PreTrainedModel) -> None:
        self.causal: Any = causal

    @property
    def is_trained(self) -> bool:
        """Whether anything but the body needs a gradient, or a weight of the body that the head has, too."""
        others = [child for child in self.causal.children() if child is not self.causal.base_model]
        return any(p.requires_grad for child in others for p in child.parameters())

    def states(self, **inputs: Any) -> Tensor:
        """`(rows, length, hidden)` of the body: what the head reads."""
        said: list[Any] = []

        def keep(body: Any, arguments: Any, output: Any) -> Any:
            said.append(output)
            return type(output)(last_hidden_state=output.last_hidden_state[:, -1:])  # the head is asked later

        handle = self.causal.base_model.register_forward_hook(keep)
        try:
            self.causal(**inputs)
        finally:
            handle.remove()
        (answer,) = said
        self._kind = type(answer)
        states: Tensor = answer.last_hidden_state
        return states

    def logits(self, states: Tensor) -> Tensor:
        """`(rows, positions, vocabulary)` of `(rows, positions, hidden)`, in the model's dtype."""
        ids = torch.zeros(states.shape[:2], dtype=torch.int64, device=states.device)
        with self._told(states):
            logits: Tensor = self.causal(input_ids=ids, use_cache=False).logits
        return logits

    @contextmanager
    def _told(self, states: Tensor) -> Iterator[None]:
        body, kind = self.causal.base_model, self._kind
        own = vars(body).get("forward")  # accelerate puts one of its own there
        body.forward = lambda *arguments, **options: kind(last_hidden_state=states)
        try:
            yield
        finally:
            del body.forward
            if own is not None:
                body.forward = own
