"""Loading what others wrote: whatever is wrong with a file is one sentence, and nothing is filled up at random."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerBase

from ..errors import DPAlignError
from ..files import is_missing
from ..launched import place
from ..printable import printable
from ..settings.models import TINY_REVIEW_LM
from .kernels import keep_apart
from .sharded import is_placeholder
from .whole import recognise

T = TypeVar("T")
# Above every model there is: a damaged configuration would otherwise build layers for hours.
LARGEST = {
    "num_hidden_layers": 2_000,
    "hidden_size": 1_000_000,
    "intermediate_size": 10_000_000,
    "vocab_size": 10_000_000,
}


def device_of(name: str) -> str:
    """The device that a setting means; `auto` is a GPU if there is one.

    Raises:
        DPAlignError: no such device, or not here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError):
        raise DPAlignError(f"device {name!r} is not auto, cpu, cuda or cuda:NUMBER.") from None
    if device.type not in ("cpu", "cuda"):
        raise DPAlignError(f"device {name!r} is not auto, cpu, cuda or cuda:NUMBER.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DPAlignError(f"device {name!r}: torch finds {torch.cuda.device_count()} GPUs here; use auto or cpu.")
    if device.index is not None and place().size > 1:
        raise DPAlignError(f"device {name!r} is one GPU for {place().size} processes: with cuda each takes its own.")
    return name


def loaded(what: str, name: str, load: Callable[[], T], hint: str = "") -> T:
    """What `load()` returns.

    Args:
        what: is loaded, for the message: `a model and tokenizer`. hint: what to do, at its end.

    Raises:
        DPAlignError: whatever the libraries raise on damaged or foreign files; no record is among them.
    """
    if is_missing(name):
        raise DPAlignError(f"cannot load {what} from {name!r}: there is no such folder.")
    if name != TINY_REVIEW_LM and not Path(name).exists():
        hint = f"; there is no such folder here either{hint}"
    try:
        return load()
    except DPAlignError:
        raise
    except Exception as error:
        reason = ((str(error).splitlines() or [""])[0] or type(error).__name__).removesuffix(".")
        raise DPAlignError(f"cannot load {what} from {name!r}: {printable(reason, longest=500)}{hint}") from None


def check_configuration(path: str, trust_remote_code: bool) -> None:
    """Refuses sizes that no model has, before anything is built.

    Raises:
        DPAlignError: which; or what else is wrong with the configuration, as `loaded` says it.
    """
    config: Any = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    for name, most in LARGEST.items():
        value = getattr(text, name, None)
        if isinstance(value, int | float) and not 1 <= value <= most:
            raise DPAlignError(f"the configuration in {path} says {name} {value:g}, which no model has.")


def refuse_missing(name: str, missing: Iterable[str]) -> None:
    """Raises DPAlignError for weights that no file holds: transformers would fill them at random."""
    missing = sorted(missing)
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise DPAlignError(
            f"{name!r} has no weights for {shown}: they would be random, stay so, and not be in the release; copy the "
            "model again, or use one that was trained as what it is loaded as."
        )


def check_weights(model: nn.Module, what: str = "the model") -> None:
    """Raises DPAlignError for weights that are NaN or infinite."""
    for name, p in model.named_parameters():
        if not p.is_meta and not is_placeholder(p) and not bool(torch.isfinite(p.detach()).all()):
            raise DPAlignError(f"{what} has weights that are NaN or infinite ({name}): copy it again.")


def check_tokenizer(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives the tokenizer a padding token, and refuses one that cannot be used with the model.

    Raises:
        DPAlignError: neither padding nor EOS, or special tokens that the model has no embedding for.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise DPAlignError("the tokenizer has neither a padding token nor EOS: give it one of them.")
        tokenizer.pad_token = tokenizer.eos_token
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        check_ids([getattr(tokenizer, name)], embedding_rows(model))


def embedding_rows(model: Any) -> int:
    """How many token ids the model has an embedding for."""
    return int(model.get_input_embeddings().weight.shape[0])


def positions_of(config: Any) -> int | None:
    """How many positions a model can hold; None where its configuration names no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_ids(ids: Iterable[int | None], rows: int) -> None:
    """Raises DPAlignError for a token id that the model has no embedding for."""
    largest = max((i for i in ids if i is not None), default=0)
    if largest >= rows:
        raise DPAlignError(f"the tokenizer gives token {largest} and the model has embeddings for {rows} only")


def load_adapter(base: Any, folder: str, **options: Any) -> Any:
    """A release's adapter on its base, frozen, under the name `earlier`.

    Raises:
        DPAlignError: damaged files, weights that are missing, or not finite.
    """
    model: Any = loaded(
        "an adapter", folder, lambda: PeftModel.from_pretrained(base, folder, adapter_name="earlier", **options)
    )
    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
        saved = set(file.keys())
    expected = {name.replace(".earlier.", ".") for name, _ in model.named_parameters() if ".lora_" in name}
    refuse_missing(folder, expected - saved)
    check_weights(model, f"the release {folder}")
    keep_apart(model)
    recognise(model, "earlier")
    model.peft_config["earlier"].base_model_name_or_path = base.name_or_path  # where it lies, however it is called
    return model


def check_targets(model: Any, targets: list[str] | str | None, layers: list[int] | None) -> None:
    """Refuses layers that the model does not have: peft passes over those of several that it does not find.

    Raises:
        DPAlignError: which of target_modules or layers is not there.
    """
    names = [name.removeprefix("base_model.model.") for name, _ in model.named_modules()]
    if isinstance(targets, list):
        absent = [t for t in targets if not any(n == t or n.endswith(f".{t}") for n in names)]
        if absent or not targets:
            raise DPAlignError(
                f"adapter.target_modules: the model has no layer {', '.join(absent) or '(none is named)'}."
            )
    elif targets is not None and targets != "all-linear":
        try:
            found = any(re.fullmatch(targets, name) for name in names)
        except re.error as error:
            raise DPAlignError(f"adapter.target_modules {targets!r} is no pattern: {error}.") from None
        if not found:
            raise DPAlignError(f"adapter.target_modules {targets!r} fits no layer of the model.")
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    beyond = [layer for layer in layers or [] if count is not None and layer >= count]
    if beyond or layers == []:
        raise DPAlignError(f"adapter.layers {layers}: the model has layers 0 to {(count or 1) - 1}.")
