"""A model object that somebody else made: used only if it is what its folder holds, and never changed.

A release names its base by folder. Of an object whose weights are not the folder's, it would name the wrong one; and
of an object with adapters nobody knows what they were trained on.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import DPAlignError
from ..files import is_missing
from . import embedded

SAVE_IT = "save it and its tokenizer with save_pretrained, and pass that folder as the model"
# Fields of a configuration that change no logits, or that the release's user sets anew.
SILENT = {"_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "tokenizer_class"}
SILENT |= {"use_cache", "return_dict", "output_hidden_states", "output_attentions", "pad_token_id", "bos_token_id"}
SILENT |= {"eos_token_id", "num_labels", "id2label", "label2id", "problem_type", "finetuning_task"}
SILENT |= {"_attn_implementation", "_attn_implementation_internal", "attn_implementation"}


@dataclass(frozen=True)
class Given:
    """Objects to train with instead of what a folder holds: a model that holds the same, and a tokenizer."""

    model: PreTrainedModel | PeftModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def base(self) -> Any:
        """The model under the adapters."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model


def folder_of(model: Any) -> str:
    """The folder or hub name that a model object was loaded from.

    Raises:
        DPAlignError: it has adapters, or was not loaded.
    """
    if isinstance(model, PeftModel) or getattr(model, "_hf_peft_config_loaded", False):
        raise DPAlignError(
            "a model object with peft adapters does not say what they were trained on: pass the folder of the release "
            "(or of the public adapter) as the model, or the `model` of the trainer that trained it."
        )
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not isinstance(model, PreTrainedModel) or not name:
        raise DPAlignError(
            f"the model object ({type(model).__name__}) was not loaded from a folder, so that its release could not "
            f"name its base: {SAVE_IT}."
        )
    if is_missing(str(name)):
        raise DPAlignError(f"the model object was loaded from {name!r}, which is not there any more: {SAVE_IT}.")
    return str(name)


def take_weights(fresh: PreTrainedModel, given: Given, name: str, unheld: Collection[str]) -> None:
    """Lets a model that was loaded from the folder `name` share the frozen weights of the given object.

    fresh: gets the object's storage, device and stop ids; parameters stay its own, so that nothing done to them
    reaches the object. unheld: weights that the folder does not hold, which stay as they are.

    Raises:
        DPAlignError: the object is not what the folder holds.
    """
    theirs = given.base
    if type(fresh) is not type(theirs):
        raise _differs(name, f"it is a {type(theirs).__name__}, and the folder's a {type(fresh).__name__}")
    for field, value in _settings(fresh).items():
        if _settings(theirs).get(field) != value:
            raise _differs(name, f"its config has another {field}")
    here, there = fresh.state_dict(), _plain(theirs)
    if len(there) != len(here):
        raise _differs(name, f"it has {len(there)} weights, and the folder's model {len(here)}")
    for key, tensor in here.items():
        if key not in unheld and not _equal(tensor, there.get(key)):
            raise _differs(name, f"its {key} is another one")
    with torch.no_grad():
        for key, parameter in fresh.named_parameters(remove_duplicate=False):
            if key not in unheld:
                parameter.data = there[key].data
    fresh.to(theirs.device)  # type: ignore[arg-type]
    if hasattr(theirs, "generation_config"):
        fresh.generation_config = copy.deepcopy(theirs.generation_config)


def check_adapter(given: Given, folder: str) -> None:
    """Raises DPAlignError if the given object's adapter is not the one in `folder`."""
    if not isinstance(given.model, PeftModel):
        return
    saved = load_file(Path(folder) / "adapter_model.safetensors")
    theirs = get_peft_model_state_dict(given.model)
    if saved.keys() != theirs.keys() or not all(_equal(tensor, theirs[key]) for key, tensor in saved.items()):
        raise _differs(folder, "its adapter is another one")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase | None, name: str) -> None:
    """Refuses a tokenizer object beside a model's name, unless it reads texts as the folder's does.

    Raises:
        DPAlignError: it is another one, or the folder has none.
    """
    if tokenizer is None:
        return
    try:
        loaded = AutoTokenizer.from_pretrained(embedded.resolve(name))
    except (OSError, ValueError) as error:
        raise DPAlignError(f"cannot load a tokenizer from {name!r}: {str(error).splitlines()[0]}") from None
    if _reading(tokenizer) != _reading(loaded):
        raise DPAlignError(
            f"processing_class is not the tokenizer of {name!r}: leave it out, or save model and tokenizer together "
            "in one folder and pass that."
        )


def _reading(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    special = [getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk")]
    return [tokenizer.get_vocab(), special, getattr(tokenizer, "chat_template", None)]


def _differs(name: str, why: str) -> DPAlignError:
    return DPAlignError(f"the model object is not what {name!r} holds ({why}): {SAVE_IT}.")


def _settings(model: PreTrainedModel) -> dict[str, Any]:
    return {field: value for field, value in model.config.to_dict().items() if field not in SILENT}


def _plain(model: Any) -> dict[str, Tensor]:
    """Its weights by the names that they have without adapters, and without copies that are trained."""
    return {
        key.replace(".base_layer.", ".").replace(".original_module.", "."): tensor
        for key, tensor in model.state_dict().items()
        if ".lora_" not in key and ".modules_to_save." not in key
    }


def _equal(tensor: Tensor, other: Tensor | None) -> bool:
    if other is None or other.shape != tensor.shape or other.dtype != tensor.dtype:
        return False
    return torch.equal(tensor, other.to(tensor.device))
