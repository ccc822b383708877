"""peft's `LoraConfig`, field by field: what becomes of each. A field is used or refused by name, never dropped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear, LoraLayer
from safetensors import SafetensorError, safe_open
from torch import nn

from ..domains import shown
from ..errors import DPAlignError
from ..printable import printable
from .quantized import is_adapted_linear

# used: honoured. told: says what the adapter is about and changes no number. default: anything but peft's default is
# refused. What is not in the table (of a newer peft) is refused unless it is empty.
Rule = Literal["used", "told", "default"]

# Of a configuration to train with, and of an adapter that was trained elsewhere and stays frozen.
FIELDS: dict[str, tuple[Rule, Rule]] = {
    "r": ("used", "used"),
    "lora_alpha": ("used", "used"),
    "target_modules": ("used", "used"),
    "layers_to_transform": ("used", "used"),
    "exclude_modules": ("default", "used"),
    "layers_pattern": ("default", "used"),
    "rank_pattern": ("default", "used"),
    "alpha_pattern": ("default", "used"),
    "use_rslora": ("default", "used"),
    "fan_in_fan_out": ("told", "told"),  # the layers themselves say it
    "lora_dropout": ("default", "told"),  # off where an adapter is frozen
    "init_lora_weights": ("default", "used"),  # see PLAIN_STARTS
    "task_type": ("told", "told"),
    "peft_type": ("told", "told"),
    "auto_mapping": ("told", "told"),
    "peft_version": ("told", "told"),
    "base_model_name_or_path": ("told", "used"),
    "inference_mode": ("told", "told"),
    "runtime_config": ("default", "told"),
    "revision": ("default", "default"),
    "bias": ("default", "default"),
    "modules_to_save": ("default", "default"),
    "megatron_config": ("default", "default"),
    "megatron_core": ("default", "default"),
    "trainable_token_indices": ("default", "default"),
    "loftq_config": ("default", "default"),
    "eva_config": ("default", "default"),
    "corda_config": ("default", "default"),
    "lora_ga_config": ("default", "default"),
    "use_dora": ("default", "default"),
    "velora_config": ("default", "default"),
    "alora_invocation_tokens": ("default", "default"),
    "use_qalora": ("default", "default"),
    "qalora_group_size": ("default", "default"),
    "monteclora_config": ("default", "default"),
    "layer_replication": ("default", "default"),
    "lora_bias": ("default", "default"),
    "target_parameters": ("default", "default"),
    "use_bdlora": ("default", "default"),
    "arrow_config": ("default", "default"),
    "kasa_config": ("default", "default"),
    "ensure_weight_tying": ("default", "default"),
}
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal")  # starts that leave the base's weights alone


def refused_fields(given: dict[str, Any], where: int) -> list[str]:
    """Fields of a LoraConfig that cannot be honoured, with their values; `where` is the column of FIELDS."""
    defaults = vars(LoraConfig())
    found = []
    for name, value in given.items():
        rule = FIELDS[name][where] if name in FIELDS else "default"
        if name == "init_lora_weights" and rule == "used":
            fine = value in PLAIN_STARTS
        else:
            fine = rule != "default" or value == defaults.get(name) or (not value and not defaults.get(name))
        if not fine:
            found.append(f"{name}={value!r}")
    return found


WHY_NOT = {
    "lora_dropout": "its coins would be shared by the rows of a micro-batch, and the noise regularises already",
    "modules_to_save": "whole layers would be trained; a reward model's head, score, is trained anyway",
}


def check_to_train(config: LoraConfig, has_head: bool = False) -> None:
    """Raises DPAlignError for anything but a plain LoRA to train.

    has_head: of a reward model, whose head is trained and saved anyway, whether or not `modules_to_save` names it.
    """
    given = dict(vars(config))
    if has_head and set(given.get("modules_to_save") or ()) == {"score"}:
        del given["modules_to_save"]
    found = refused_fields(given, 0)
    if found:
        why = [
            f"; {name}: {reason}" for name, reason in WHY_NOT.items() if any(f.startswith(f"{name}=") for f in found)
        ]
        raise DPAlignError(
            f"only plain LoRA is private here; {', '.join(found)} cannot be honoured: leave it at peft's default"
            f"{''.join(why)}."
        )


def check_adapter_folder(folder: str, has_head: bool) -> None:
    """Refuses an adapter of which a part would be used and then be missing in the release.

    has_head: a classifier's, whose own head may be saved beside the adapter.

    Raises:
        DPAlignError: it is no plain LoRA, or its files cannot be read.
    """
    try:
        given = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
        kind, ranks = given.get("peft_type"), {"": LoraConfig().r if "r" not in given else given["r"]}
        ranks |= given.get("rank_pattern") or {}
        heads = [f".{name}." for name in given.pop("modules_to_save", None) or []] if has_head else []
        with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
            names = list(file.keys())
            largest = max((max(file.get_slice(name).get_shape(), default=0) for name in names), default=0)
    except (OSError, ValueError, AttributeError, TypeError, RecursionError, SafetensorError):
        raise DPAlignError(
            f"the adapter in {folder} cannot be read: it needs adapter_config.json and adapter_model.safetensors."
        ) from None
    if kind != "LORA":
        raise DPAlignError(f"the adapter in {folder} is of peft's type {shown(kind)}, and only LoRA is read here.")
    if not all(isinstance(rank, int) and 0 < rank <= largest for rank in ranks.values()):  # peft would make room
        raise DPAlignError(f"the adapter in {folder} names ranks that its tensors do not have: copy it again.")
    found = refused_fields(given, 1)
    plain = [n for n in names if n.endswith((".lora_A.weight", ".lora_B.weight")) or any(h in n for h in heads)]
    found += [f"the tensor {name}" for name in names if name not in plain][:3]
    if found:
        raise DPAlignError(
            f"the adapter in {folder} is no plain LoRA: {printable(', '.join(found), longest=500)} would be used and "
            "then be missing in the release; merge it into its base with peft, save that, and pass that folder as the "
            "model."
        )


def check_layers(model: PeftModel, adapter: str) -> None:
    """Refuses an adapter on layers that are no linear ones, or whose weight another layer has too.

    A tied weight (an output layer that is the embedding) would change in both places when the adapter is merged, and
    in one when it is not.

    Raises:
        DPAlignError: it names the layer.
    """
    owners: dict[int, list[str]] = {}
    for name, module in model.get_base_model().named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name.removesuffix(".base_layer"))
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer) or adapter not in {**layer.lora_A, **layer.lora_embedding_A}:
            continue
        if not isinstance(layer, Linear) and not is_adapted_linear(layer):
            raise DPAlignError(f"target_modules: {name} is no linear layer, and only those are adapted here.")
        weight: nn.Parameter = layer.get_base_layer().weight  # type: ignore[assignment]
        others = [owner for owner in owners[id(weight)] if owner != name]
        if others:
            raise DPAlignError(
                f"target_modules: {name} has the same weight as {others[0]} (tied embeddings), which would change with "
                f"it: leave {name} out."
            )
