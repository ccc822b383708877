"""A frozen base in 4 or 8 bits, by bitsandbytes; adapters and heads stay float32 (QLoRA).

4-bit weights are widened block by block before an ordinary product, so that rows stay apart. LLM.int8 takes features in
which any row has an outlier out of its 8-bit product, for all rows: with such a threshold one record changes another's
gradient, so only the threshold 0 is allowed, with which each token is rounded by itself.
"""

from __future__ import annotations

import copy
import logging
from importlib.util import find_spec
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import BitsAndBytesConfig

from ..errors import DPAlignError

PACKAGE = "bitsandbytes"
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4_double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "fp4_double": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
}  # by the names that the setting `quantization` has, what transformers calls them
FOUR_BITS, EIGHT_BITS = "Linear4bit", "Linear8bitLt"  # bitsandbytes' layers, also peft's around them
COUPLES = (
    "with an outlier threshold, a feature in which one record has an outlier is computed in another way for all the "
    "records of a micro-batch: llm_int8_threshold=0.0 rounds each token by itself"
)


def settings_of(kind: str, dtype: str) -> dict[str, Any]:
    """What `BitsAndBytesConfig` is made of; nothing for `none`.

    Raises:
        DPAlignError: bitsandbytes is not installed.
    """
    if kind == "none":
        return {}
    if find_spec(PACKAGE) is None:
        raise DPAlignError(f"quantization {kind} needs the package {PACKAGE}: pip install 'dpalign[quantized]'.")
    logging.getLogger(PACKAGE).setLevel(logging.ERROR)  # int8 warns at every product that it is one
    found = KINDS[kind]
    return found | {"bnb_4bit_compute_dtype": dtype} if "load_in_4bit" in found else found


def kind_of(config: Any, dtype: str) -> str:
    """The name that a `quantization_config` has here; `none` without one.

    dtype: of the model's other weights, in which it computes.

    Raises:
        DPAlignError: it cannot be honoured, or would couple records.
    """
    if config is None:
        return "none"
    if isinstance(config, dict) and config.get("quant_method", PACKAGE) == PACKAGE:
        config = _made({k: v for k, v in config.items() if not k.startswith(("_", "quant_method"))})
    if not isinstance(config, BitsAndBytesConfig):
        raise DPAlignError(
            f"quantization_config {type(config).__name__}: only transformers' BitsAndBytesConfig is read here."
        )
    if config.load_in_8bit and config.llm_int8_threshold:
        raise DPAlignError(f"llm_int8_threshold={config.llm_int8_threshold}: {COUPLES}.")
    for kind, settings in KINDS.items():
        wanted = _made(settings)
        if config.load_in_4bit:
            wanted.bnb_4bit_compute_dtype = getattr(torch, dtype)
        others = [name for name, v in vars(wanted).items() if getattr(config, name) != v and name != "quant_method"]
        if not others:
            return kind
        if others == ["bnb_4bit_compute_dtype"]:
            raise DPAlignError(
                f"bnb_4bit_compute_dtype {config.bnb_4bit_compute_dtype} and a model in {dtype}: give both the same."
            )
    plain = vars(_made({}))
    given = [f"{name}={v!r}" for name, v in vars(config).items() if plain.get(name) != v and name not in _HONOURED]
    raise DPAlignError(
        f"quantization_config: {', '.join(given) or 'neither load_in_4bit nor load_in_8bit'} cannot be honoured: use "
        "load_in_4bit with bnb_4bit_quant_type and bnb_4bit_use_double_quant, or load_in_8bit with "
        "llm_int8_threshold=0.0."
    )


_HONOURED = {"_load_in_4bit", "_load_in_8bit", "llm_int8_threshold"}
_HONOURED |= {"bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype"}


def quantization_config(kind: str, dtype: str) -> BitsAndBytesConfig | None:
    """transformers' configuration for a kind; None for `none`.

    Raises:
        DPAlignError: bitsandbytes is not installed.
    """
    settings = settings_of(kind, dtype)
    return _made(settings) if settings else None


def _made(settings: dict[str, Any]) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(**settings)  # type: ignore[no-untyped-call]


def is_quantized(model: nn.Module) -> bool:
    return any(type(module).__name__ in (FOUR_BITS, EIGHT_BITS) for module in model.modules())


def rounds_activations(model: nn.Module) -> bool:
    """Whether each token's features are rounded to 8 bits, so that a last bit may move them by a whole step."""
    return any(type(module).__name__ == EIGHT_BITS for module in model.modules())


def as_python(settings: dict[str, Any]) -> str:
    """What a reader types to load a base in this way; nothing for one that is not quantised."""
    given = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    return f", quantization_config=BitsAndBytesConfig({given})" if settings else ""


def copied(body: nn.Module) -> nn.Module:
    """Layers of their own, without adapters, on the same frozen weights: of quantised ones a state dict is not all."""
    tensors: list[Any] = [*body.parameters(), *body.buffers()]
    for module in body.modules():
        if type(module).__name__ == EIGHT_BITS and hasattr(module, "state"):
            tensors += [value for value in vars(module.state).values() if torch.is_tensor(value)]
    copy_of = copy.deepcopy(body, {id(tensor): tensor for tensor in tensors})
    for name, module in list(copy_of.named_modules()):
        if isinstance(module, LoraLayer):
            copy_of.set_submodule(name, module.get_base_layer())
    return copy_of


def prepare(model: nn.Module) -> None:
    """Refuses quantised layers that couple records, and has the others compute the same with and without a gradient.

    Raises:
        DPAlignError: which layer.
    """
    for name, module in model.named_modules():
        layer: Any = module
        if type(module).__name__ == FOUR_BITS and hasattr(module, "support_avx512bf16_for_cpu"):
            # It would repack the weights at the first pass without a gradient, and then have none.
            layer.support_avx512bf16_for_cpu = False
        state = getattr(module, "state", None) if type(module).__name__ == EIGHT_BITS else None
        if state is not None and (state.threshold or state.has_fp16_weights):
            raise DPAlignError(f"{name} is quantised by LLM.int8: {COUPLES}.")


def is_adapted_linear(layer: object) -> bool:
    """Whether a layer of peft is a LoRA around a quantised linear layer."""
    return type(layer).__name__ in (FOUR_BITS, EIGHT_BITS) and type(layer).__module__ == "peft.tuners.lora.bnb"
