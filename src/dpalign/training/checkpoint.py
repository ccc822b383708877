"""Checkpoints: safetensors and JSON with checksums, written to a new folder and renamed into place."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import DPAlignError
from ..files import dumps, replace_folder
from ..models import AdapterStack

KEEP = 2
ADAM = {"step", "exp_avg", "exp_avg_sq"}  # what it keeps of a parameter


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Writes `folder/step-<step>` and removes all but the newest checkpoints."""
    target = folder / f"step-{step:08d}"
    with replace_folder(target) as temporary:
        try:
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary / "tensors.safetensors")
        except SafetensorError as error:
            raise OSError(f"safetensors: {error}") from None
        digest = hashlib.sha256((temporary / "tensors.safetensors").read_bytes()).hexdigest()
        (temporary / "state.json").write_text(dumps({**state, "step": step, "sha256": digest}), encoding="utf-8")
    for old in sorted(folder.glob("step-*"))[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)


def load_newest(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and state of the newest checkpoint, or None if there is none.

    Raises:
        DPAlignError: it is corrupt; falling back to an older one is left to the user, because the steps
            since then have been spent.
    """
    found = sorted(folder.glob("step-*"))
    if not found:
        return None
    newest = found[-1]
    try:
        state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
        data = (newest / "tensors.safetensors").read_bytes()
        if hashlib.sha256(data).hexdigest() != state["sha256"] or not _is_whole(state, newest.name):
            raise ValueError("checksum")
        return load_file(newest / "tensors.safetensors"), state
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError, SafetensorError):
        raise DPAlignError(
            f"checkpoint {newest} is corrupt: delete that folder to go on from the one before it; the steps since "
            "then stay spent and are counted again."
        ) from None


def _is_whole(state: Any, name: str) -> bool:
    """Whether a state is what a stage has saved under this name."""
    texts, algorithm, step = (state["fingerprint"], state["config_hash"]), state["algorithm"], state["step"]
    return (
        type(step) is int
        and name == f"step-{step:08d}"
        and all(isinstance(text, str) for text in texts)
        and isinstance(algorithm, dict)
        and all(isinstance(number, int | float) and math.isfinite(number) for number in algorithm.values())
    )


def is_finished(folder: Path) -> bool:
    """Whether a stage's folder holds its last checkpoint."""
    return any((folder / "final").glob("step-*"))


def model_tensors(model: AdapterStack) -> dict[str, Tensor]:
    """What the stage trains, as named tensors."""
    return {f"model/{name}": tensor for name, tensor in model.stage_state().items()}


def load_model(model: AdapterStack, tensors: dict[str, Tensor], folder: Path) -> None:
    """Puts `model_tensors` back.

    Raises:
        DPAlignError: they are of another model; names the folder.
    """
    for name, value in model.stage_state().items():
        saved = tensors.get(f"model/{name}")
        if saved is None or (saved.shape, saved.dtype) != (value.shape, value.dtype):
            raise DPAlignError(f"the checkpoint in {folder} has no fitting {name}: it is of another model.")
        value.copy_(saved)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """Adam's state as named tensors."""
    out = {}
    for name, p in zip(names, optimizer.param_groups[0]["params"], strict=True):
        for key, value in optimizer.state.get(p, {}).items():
            out[f"optimizer/{name}/{key}"] = torch.as_tensor(value)
    return out


def load_optimizer(
    optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, Tensor], folder: Path
) -> None:
    """Puts `optimizer_tensors` back.

    Raises:
        DPAlignError: they are of another optimizer or model; names the folder.
    """
    needed = ADAM if "betas" in optimizer.defaults else set()
    states = []
    for name, p in zip(names, optimizer.param_groups[0]["params"], strict=True):
        prefix = f"optimizer/{name}/"
        states.append({k.removeprefix(prefix): v.clone() for k, v in tensors.items() if k.startswith(prefix)})
        if not all(_fits(k, v, p) for k, v in states[-1].items()) or states[-1].keys() != states[0].keys():
            raise DPAlignError(f"the checkpoint in {folder} has no fitting state of {name}: it is of another stage.")
    if any(state and not needed <= state.keys() for state in states):
        raise DPAlignError(f"the checkpoint in {folder} lacks {' or '.join(sorted(needed))} of its optimizer.")
    for state, p in zip(states, optimizer.param_groups[0]["params"], strict=True):
        optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in state.items()}


def _fits(key: str, value: Tensor, parameter: Tensor) -> bool:
    if key == "step":
        return value.numel() == 1 and value.dtype in (torch.float32, torch.int64) and float(value) >= 0
    return (value.shape, value.dtype) == (parameter.shape, parameter.dtype)
