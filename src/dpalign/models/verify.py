"""What was written is what was trained: plain transformers and peft load it, and give the same logits on public ids.

Both are computed in float32 (half-precision weights are widened, which is exact), so that what remains is rounding.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import DPAlignError
from ..files import write_json
from ..printable import printable
from . import plain_logits
from .quantized import rounds_activations
from .sharded import is_placeholder, shards_of
from .stack import AdapterStack

# Of the largest logit: float32 rounds at 6e-8, and ranks that are concatenated are summed in another order.
TOLERANCE = 1e-4
IN_8_BITS = 2e-2  # there the last bit may move a feature by one step of 127
ROWS, LENGTH = 4, 16


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """Within the block half-precision weights are float32; they are put back, not rounded back."""
    weights = [p for p in model.parameters() if not is_placeholder(p)]
    narrow = [(p, p.data) for p in weights if p.dtype in (torch.float16, torch.bfloat16)]
    layers: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "compute_dtype", None), torch.dtype)]
    shards = next((found for module in model.modules() if (found := shards_of(module)) is not None), None)
    computing = [(layer, layer.compute_dtype) for layer in layers]  # of 4 bits, which are widened to that
    try:
        for parameter, data in narrow:
            parameter.data = data.float()
        for module, _ in computing:
            module.compute_dtype = torch.float32
        with shards.widened() if shards is not None else nullcontext():
            yield
    finally:
        for parameter, data in narrow:
            parameter.data = data
        for module, dtype in computing:
            module.compute_dtype = dtype


def probe_ids(stack: AdapterStack) -> Tensor:
    """`(ROWS, length)` ids from all over the vocabulary, the same in every run; they read no record."""
    config = stack.model.config.get_text_config()
    length = min(LENGTH, getattr(config, "max_position_embeddings", None) or LENGTH)
    ids = torch.randint(0, config.vocab_size, (ROWS, length), generator=torch.Generator().manual_seed(0))
    for padding in {stack.tokenizer.pad_token_id, config.pad_token_id} - {None}:
        ids[:, -1][ids[:, -1] == padding] = (padding + 1) % config.vocab_size  # a classifier looks for the last token
    return ids


@torch.no_grad()
def probe_logits(model: Any, ids: Tensor, layers: list[int] | None = None) -> Tensor:
    """Logits of each row by itself, on the CPU; or the mean hidden states of some layers."""
    with widened(model):
        batches = [ids[row : row + 1].to(model.device) for row in range(len(ids))]
        rows = [plain_logits.said(model, row, layers or []) for row in batches]
    return torch.cat(rows).float().cpu()


def check_release(stack: AdapterStack, folder: Path, base_model: str) -> None:
    """Loads the adapter in `folder` on its base by plain peft, in a process of its own, and compares.

    Raises:
        DPAlignError: it is not what was trained, or cannot be loaded.
    """
    request = plain_request(stack, base_model) | {"adapter": str(folder)}
    check_logits(stack, in_fresh_process(request, probe_ids(stack)), f"base {base_model!r}")


def check_merged(stack: AdapterStack, folder: Path) -> None:
    """Loads full weights by plain transformers, in a process of its own, and compares them with the adapters on theirs.

    Raises:
        DPAlignError: they are not the same, or cannot be loaded.
    """
    request = plain_request(stack, str(folder)) | {"quantization": {}}
    check_logits(stack, in_fresh_process(request, probe_ids(stack)), "merged")


def plain_request(stack: AdapterStack, folder: str) -> dict[str, Any]:
    """What `plain_logits` needs to load a folder in the stack's dtype and on its device."""
    base = stack.model.get_base_model() if isinstance(stack.model, PeftModel) else stack.model
    return {
        "base": folder,
        "adapter": None,
        "auto_class": stack.auto_class.__name__,
        "options": stack.auto_options,
        "dtype": str(base.dtype).removeprefix("torch."),
        "device": str(stack.device) if stack.shards is None else "cpu",  # one GPU may not hold it
        "trust_remote_code": type(base).__module__.startswith("transformers_modules"),
        "quantization": stack.quantization,
        "layers": stack.layers_read,
    }


def in_fresh_process(request: dict[str, Any], ids: Tensor) -> Tensor:
    """`plain_logits.logits` of a request, where nothing that this process has done to the libraries can help.

    Raises:
        DPAlignError: it cannot be loaded; with the library's last line.
    """
    with tempfile.TemporaryDirectory(prefix="dpalign-check-") as name:
        folder = Path(name)
        write_json(folder / "request.json", request)
        save_file({"ids": ids}, folder / "ids.safetensors")
        command = [sys.executable, "-P", plain_logits.__file__, name]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
            raise DPAlignError(
                "nothing was released: plain transformers and peft cannot load it in a process of its own: "
                f"{printable(last)}"
            )
        return load_file(folder / "logits.safetensors")["logits"]


def check_logits(stack: AdapterStack, found: Tensor, where: str) -> None:
    """Raises DPAlignError if logits of `probe_ids` are not those of the trained model."""
    expected = probe_logits(stack.model, probe_ids(stack), stack.layers_read)
    tolerance = IN_8_BITS if rounds_activations(stack.model) else TOLERANCE
    off, most = float((found - expected).abs().max()), tolerance * max(1.0, float(expected.abs().max()))
    if not off <= most:
        raise DPAlignError(
            f"nothing was released: loaded by plain transformers and peft ({where}), its logits are {off:.3g} away "
            f"from the trained model's, and rounding explains {most:.1g}. Is the base what it was when the run began?"
        )
