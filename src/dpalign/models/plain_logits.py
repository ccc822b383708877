"""Logits of a folder as anybody loads it: by transformers and peft alone, in a process of its own.

Run as a file, not as a module, so that nothing of dpalign is imported: `python -P plain_logits.py FOLDER`, where FOLDER
holds request.json and ids.safetensors; logits.safetensors is written beside them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch


def logits(request: dict[str, Any], ids: torch.Tensor) -> torch.Tensor:
    """Float32 logits of each row of `(rows, length)` ids by itself, on the CPU.

    Args:
        request: `base`: folder or name. `adapter`: folder, or None for the base alone. `auto_class` of transformers,
            with `options`; `dtype`, `device`, `trust_remote_code`; `quantization`: of BitsAndBytesConfig, or nothing;
            `layers`: whose mean hidden states are wanted instead of logits.
    """
    import transformers
    from peft import PeftModel

    options = dict(request["options"])
    if request.get("quantization"):
        settings = transformers.BitsAndBytesConfig(**request["quantization"])  # type: ignore[no-untyped-call]
        options |= {"quantization_config": settings, "device_map": {"": request["device"]}}
    model = getattr(transformers, request["auto_class"]).from_pretrained(
        request["base"],
        dtype=getattr(torch, request["dtype"]),
        trust_remote_code=request["trust_remote_code"],
        **options,
    )
    if not request.get("quantization"):
        model = model.to(request["device"])
    if request["adapter"] is not None:
        model = PeftModel.from_pretrained(model, request["adapter"])
    model = widened(model.eval())
    with torch.no_grad():
        batches = [ids[row : row + 1].to(model.device) for row in range(len(ids))]
        rows = [said(model, row, request.get("layers", [])) for row in batches]
    return torch.cat(rows).float().cpu()


def said(model: Any, row: torch.Tensor, layers: list[int]) -> torch.Tensor:
    """Logits of one row; or the mean hidden states of some layers, side by side."""
    found = model(input_ids=row, attention_mask=torch.ones_like(row), output_hidden_states=bool(layers))
    if not layers:
        logits: torch.Tensor = found.logits
        return logits
    return torch.cat([found.hidden_states[layer].mean(1) for layer in layers], 1)


def widened(model: Any) -> Any:
    """In float32, and what has 4 bits is widened to it before a product: nothing is rounded in between."""
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False
        if getattr(module, "compute_dtype", None) is not None:
            module.compute_dtype = torch.float32
    return torch.nn.Module.float(model)  # a quantised model's own refuses


def main(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    found = logits(request, load_file(folder / "ids.safetensors")["ids"])
    save_file({"logits": found.contiguous()}, folder / "logits.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
