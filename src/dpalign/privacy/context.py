"""What a private step computes in: its own arithmetic, whatever the caller has switched on around it.

Autocast rounds a clipped gradient to more than C, a float64 default makes other adapters, anomaly mode turns one
record's NaN into an exception, inference mode has no gradients, and reduced float32 precision changes every norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

# Kernels of attention: those that are deterministic and take a mask. cuDNN's and CUDA's flash kernels are neither.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@contextmanager
def own_context() -> Iterator[None]:
    """Within the block: gradients on, autocast off, float32 by default and in full precision, on the CPU by default.

    Also off: anomaly and inference mode. CUDA's kernels are the deterministic ones where there are any. Everything is
    put back as it was. Blocks may be nested.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # turns gradients on, too
        stack.enter_context(torch.autograd.set_detect_anomaly(False))
        for kind in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_default_dtype())
        if torch.get_default_device().type != "cpu":  # a device context slows every call down
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(_full_precision())
        stack.enter_context(_deterministic())
        stack.enter_context(sdpa_kernel(KERNELS))
        yield


@contextmanager
def _default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Float32 products are not rounded to tf32 or bfloat16."""
    backends = torch.backends
    owners: list[Any] = [backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv, backends.mkldnn.conv]  # type: ignore[attr-defined]
    before = [owner.fp32_precision for owner in owners]
    try:
        by_name = torch.get_float32_matmul_precision()
    except RuntimeError:  # set backend by backend: there is no name for it
        by_name = None
    torch.set_float32_matmul_precision("highest")
    for owner in owners:
        owner.fp32_precision = "ieee"
    try:
        yield
    finally:
        if by_name is not None:
            torch.set_float32_matmul_precision(by_name)
        for owner, precision in zip(owners, before, strict=True):
            owner.fp32_precision = precision


@contextmanager
def _deterministic() -> Iterator[None]:
    """Sums in an order of their own, not that of a GPU's threads; a CPU's kernels have one without being asked."""
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(torch.cuda.is_available(), warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
