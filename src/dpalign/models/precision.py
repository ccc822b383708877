"""What `dtype: auto` is: float32 or bfloat16, whichever a frozen base computes in faster here. Reads nothing private.

On a GPU it is bfloat16 where the card computes in it. On a CPU the two are tried: processor flags do not say what the
libraries do with them (one without bfloat16 instructions was six times slower in it, one with AMX three times faster),
and a virtual machine may hide or lack what they say. A small model is float32 anywhere, and the same everywhere: its
products are so small that bfloat16 gains nothing on them.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear
from transformers import AutoConfig

from ..settings.models import ModelConfig
from . import embedded
from .bases import base_path
from .loading import loaded

SMALL = 128  # hidden size below which a model is float32
ROWS, INPUTS, OUTPUTS = 128, 576, 1536  # of the layer that is tried: tokens, and SmolLM2-135M's
ROUNDS, SECONDS = 9, 0.3  # of trying, at most
CLEARLY = 1.05  # times as fast is what bfloat16 has to be


def settled(config: ModelConfig, device: str | torch.device) -> ModelConfig:
    """The same with a dtype that is named.

    Raises:
        DPAlignError: the model's configuration cannot be read.
    """
    return replace(config, dtype=faster_dtype(config, device)) if config.dtype == "auto" else config  # type: ignore[arg-type]


def faster_dtype(config: ModelConfig, device: str | torch.device) -> str:
    """`float32` or `bfloat16`, for a model on a device.

    Raises:
        DPAlignError: the model's configuration cannot be read.
    """
    if is_small(config):
        return "float32"
    if torch.device(device).type == "cuda":
        with torch.cuda.device(device):
            return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if bfloat16_speedup() > CLEARLY else "float32"


def is_small(config: ModelConfig) -> bool:
    """By its configuration's hidden size; a model that names none is not."""

    def read() -> Any:
        path = embedded.resolve(config.name_or_path)
        if (Path(path) / "adapter_config.json").exists():
            path = base_path(path)
        return AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)

    text = loaded("a model and tokenizer", config.name_or_path, read).get_text_config()
    return bool(getattr(text, "hidden_size", SMALL) < SMALL)


def bfloat16_speedup() -> float:
    """How many times as fast a CPU takes a frozen layer forward and back in bfloat16 as in float32, by medians.

    On one thread: several would wait for each other where other processes run, and tell of those. Takes less than half
    a second.
    """
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    try:
        tried = {dtype: _Layer(dtype) for dtype in (torch.float32, torch.bfloat16)}
        seconds: dict[torch.dtype, list[float]] = {dtype: [] for dtype in tried}
        end = time.perf_counter() + SECONDS
        for layer in tried.values():
            layer.seconds()  # kernels are chosen and compiled
        for _ in range(ROUNDS):
            for dtype, layer in tried.items():
                seconds[dtype].append(layer.seconds())
            if time.perf_counter() > end:
                break
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
    plain, half = (statistics.median(taken) for taken in seconds.values())
    return plain / half


class _Layer:
    """A frozen linear layer, and what it reads."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.weight = torch.randn(OUTPUTS, INPUTS).to(dtype)
        self.read = torch.randn(ROWS, INPUTS).to(dtype).requires_grad_(True)
        self.back = torch.randn(ROWS, OUTPUTS).to(dtype)

    def seconds(self) -> float:
        """Of one pass forward and back."""
        began = time.perf_counter()
        linear(self.read, self.weight).backward(self.back)  # type: ignore[no-untyped-call]
        self.read.grad = None
        return time.perf_counter() - began
