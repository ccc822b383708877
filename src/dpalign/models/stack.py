"""A frozen base model with stacked LoRA adapters: what the policy and the reward model have in common.

Every stage adds one adapter. Adapters of earlier stages stay unmerged, active and frozen; the
reference model is the stack with its newest adapter off; the release is one LoRA that concatenates
all ranks on the original base, which is exact.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import DPAlignError
from ..settings.models import AdapterConfig, ModelConfig
from . import embedded
from .bases import base_path
from .kernels import constant_kernels, keep_apart
from .loading import check_configuration, check_tokenizer, check_weights, loaded
from .lora import check_adapter_folder, check_layers
from .objects import SAVE_IT, Given, check_adapter, take_weights
from .quantized import prepare, quantization_config
from .sharded import Shards, shard, shards_of
from .whole import WholeLinear, widen

RELEASE_ADAPTER = "default"


class AdapterStack(nn.Module):
    """See the module's docstring. `adapters` lists the stages' names, oldest first."""

    excluded: list[str] | None = None  # layers that no adapter may take
    task_type: str | None = None  # peft's name for the kind of model; it decides which wrapper peft puts around
    auto_class: Any  # of transformers, which loads the base
    auto_options: ClassVar[dict[str, Any]] = {}

    def __init__(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        if any(p.is_inference() for p in base.parameters()):
            raise DPAlignError(
                "the model was made under torch.inference_mode, so nothing can be trained on it: load it outside."
            )
        base.requires_grad_(False)
        base.eval()  # type: ignore[no-untyped-call]
        _without_dropout(base)
        _refuse_coupling(base)
        prepare(base)
        check_tokenizer(base, tokenizer)
        check_weights(base)
        self.model: Any = base  # a PreTrainedModel, and a PeftModel once there is an adapter
        self.tokenizer = tokenizer
        self.adapters: list[str] = []
        self._trained: tuple[str, ...] = ()  # matrices of the newest, or their names in their layers
        self.shards: Shards | None = shards_of(base)  # of a base that the processes of a run hold together
        self.quantization: dict[str, Any] = {}  # what its base was loaded with, for BitsAndBytesConfig
        constant_kernels(base)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    # Stages ------------------------------------------------------------------------------------------

    def add_adapter(self, name: str, config: AdapterConfig) -> None:
        """Adds a trainable adapter on top of the frozen earlier ones; it is zero, so nothing changes yet."""
        self._add(name, self._lora(config), whole=config.kind == "full")
        if config.kind == "lora":
            self._trained = () if config.r == 0 else ("lora_B",) if config.freeze_a else ("lora_A", "lora_B")
        self._activate(self.adapters)
        self.eval()

    def _lora(self, config: AdapterConfig) -> LoraConfig:
        targets = config.target_modules
        return LoraConfig(
            r=max(1, config.r),
            lora_alpha=config.lora_alpha if config.lora_alpha is not None else 2 * max(1, config.r),
            target_modules="all-linear" if config.kind == "full" and targets is None else targets,
            exclude_modules=self.excluded,
            layers_to_transform=config.layers,
            lora_dropout=0.0,
            bias="none",
            fan_in_fan_out=_fan_in_fan_out(self.model),
            task_type=self.task_type,
        )

    def _add(self, name: str, lora: LoraConfig, whole: bool = False) -> None:
        try:
            if isinstance(self.model, PeftModel):
                self.model.add_adapter(name, lora)
            else:
                self.model = get_peft_model(self.model, lora, adapter_name=name)
        except ValueError as error:
            raise DPAlignError(f"the adapter cannot be added: {str(error).splitlines()[0]}") from None
        check_layers(self.model, name)
        keep_apart(self.model)
        if whole:
            self._trained = widen(self.model, name)
        self.adapters.append(name)

    def checkpoint_activations(self, on: bool) -> None:
        """Recompute activations in the backward pass (exact: nothing here is random in training mode)."""
        if on:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()
        for module in self.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.training = on  # transformers recomputes only in training mode

    def finish_stage(self) -> None:
        """Freezes what the stage trained."""
        self.requires_grad_(False)

    def drop_newest(self) -> None:
        """Takes the newest adapter off again, as if it had never been added."""
        name = self.adapters.pop()
        if self.adapters:
            self.model.delete_adapter(name)
            self._activate(self.adapters, trainable=False)
        else:
            self.model = self.model.unload()
        self.requires_grad_(False)

    def heads(self) -> list[nn.Linear]:
        """Trainable layers beside the adapters; none here."""
        return []

    @property
    def layers_read(self) -> list[int]:
        """Hidden states that a release is read by instead of its logits; none here."""
        return []

    def stage_state(self) -> dict[str, Tensor]:
        """The tensors of the newest adapter and the heads by name, frozen A matrices included."""
        newest = f".{self.adapters[-1]}."
        heads = {id(p) for head in self.heads() for p in head.parameters()}
        return {n: p.detach() for n, p in self.named_parameters() if newest in n or id(p) in heads}

    def fingerprint(self) -> str:
        """SHA-256 of the adapters' weights."""
        digest = hashlib.sha256()
        for name, p in sorted(self.named_parameters()):
            if ".lora_" in name:
                digest.update(name.encode() + p.detach().cpu().float().numpy().tobytes())
        return digest.hexdigest()

    def copy_adapters(self, other: AdapterStack) -> None:
        """Takes over the adapters of a stack on the same body, frozen."""
        for name in other.adapters:
            whole = any(isinstance(m, WholeLinear) and name in m.whole for m in other.modules())
            self._add(name, replace(other.model.peft_config[name], task_type=self.task_type), whole)
        theirs = dict(other.named_parameters())
        with torch.no_grad():
            for name, p in self.named_parameters():
                if ".lora_" in name:
                    p.copy_(theirs[name])
        self._activate(self.adapters, trainable=False)
        self.eval()

    def _activate(self, adapters: list[str], trainable: bool = True) -> None:
        # peft turns gradients on for everything it activates: freeze all but the newest again.
        self.model.base_model.set_adapter(adapters, inference_mode=True)
        if trainable and adapters:
            newest = adapters[-1]
            for name, p in self.model.named_parameters():
                if f".{newest}." in name and any(f".{matrix}." in name for matrix in self._trained):
                    p.requires_grad_(True)

    @contextmanager
    def only(self, adapters: list[str]) -> Iterator[None]:
        """Within the block only `adapters` (a prefix of the stages) are on."""
        every = self.adapters
        with self._trainables_kept():
            try:
                self.adapters = adapters
                if adapters:
                    self.model.base_model.set_adapter(adapters, inference_mode=True)
                    yield
                elif every:
                    with self.model.disable_adapter():
                        yield
                else:
                    yield
            finally:
                self.adapters = every
                if every:
                    self.model.base_model.set_adapter(every, inference_mode=True)

    @contextmanager
    def _trainables_kept(self) -> Iterator[None]:
        # peft makes every adapter that it switches on trainable, the frozen ones of earlier stages too.
        trained = {n for n, p in self.named_parameters() if p.requires_grad}
        try:
            yield
        finally:
            for name, p in self.named_parameters():
                p.requires_grad_(name in trained)

    def reference(self) -> AbstractContextManager[None]:
        """Within the block the newest adapter is off: the model that the stage started from."""
        return self.only(self.adapters[:-1])

    def base(self) -> AbstractContextManager[None]:
        """Within the block all adapters are off: the original model."""
        return self.only([])

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Within the block a float32 base carries its adapters merged (generation is then plain and fast).

        The original weights are put back, not recomputed, so nothing drifts. A half-precision base stays
        unmerged: rounding would lose part of a small adapter. So does one that processes hold together.
        """
        if self.shards is not None:
            with self.shards.sampling():
                yield
            return
        layers: list[Any] = [m for m in self.modules() if isinstance(m, LoraLayer)]
        half = any(m.get_base_layer().weight.dtype != torch.float32 for m in layers)
        if not layers or half or layers[0].disable_adapters:
            yield
            return
        originals = [m.get_base_layer().weight.data for m in layers]
        try:
            with torch.no_grad(), self._trainables_kept(), self.model.disable_adapter():
                for layer, original in zip(layers, originals, strict=True):
                    delta = sum(layer.get_delta_weight(a) for a in layer.active_adapters if a in layer.lora_A)
                    layer.get_base_layer().weight.data = original + delta
                yield
        finally:
            for layer, original in zip(layers, originals, strict=True):
                layer.get_base_layer().weight.data = original

    # Release -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def concatenated(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Of each layer the adapters that are on as one, of scale 1: A `(ranks, in)` and B `(out, ranks)`, float32.

        Each layer has the ranks of its own stages' adapters; what it lacks to the most is zero, but beside whole
        weights.
        """
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for name, layer in self.model.base_model.model.named_modules() if self.adapters else ():
            stages = [a for a in self.adapters if a in layer.lora_A] if isinstance(layer, LoraLayer) else []
            if isinstance(layer, WholeLinear) and any(a in layer.whole for a in stages):
                down, up = layer.as_one(stages)
                found[name] = down.detach(), up.detach()
            elif stages:
                down = torch.cat([layer.lora_A[a].weight * layer.scaling[a] for a in stages])
                found[name] = down.detach(), torch.cat([layer.lora_B[a].weight for a in stages], 1).detach()
        if any(isinstance(m, WholeLinear) for m in self.modules()):
            return found
        rank = max((len(down) for down, _ in found.values()), default=0)
        pad = nn.functional.pad
        return {
            name: (pad(down, (0, 0, 0, rank - len(down))), pad(up, (0, rank - len(down))))
            for name, (down, up) in found.items()
        }

    def _one_adapter(self, layers: dict[str, tuple[Tensor, Tensor]]) -> LoraConfig:
        """What peft calls adapters that are concatenated; with the layers' full names: stages may adapt different ones,
        which peft's own concatenation refuses."""
        ranks = {name: len(down) for name, (down, _) in layers.items()}
        most = max(ranks.values())
        others = {name: rank for name, rank in ranks.items() if rank != most}
        return LoraConfig(
            r=most,
            lora_alpha=most,
            rank_pattern=others,
            alpha_pattern=dict(others),
            target_modules=list(layers),
            lora_dropout=0.0,
            bias="none",
            fan_in_fan_out=_fan_in_fan_out(self.model),
            task_type=self.task_type,
        )

    def write_adapter(self, folder: Path, base_model: str) -> None:
        """Writes the adapters that are on as one LoRA, as `save_adapter` does, and leaves the model as it is: for a
        process that loads it while this one trains."""
        layers = self.concatenated()
        config = self._one_adapter(layers)
        config.base_model_name_or_path = base_model
        config.save_pretrained(str(folder))
        tensors = {}
        for name, (down, up) in layers.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = down.contiguous().cpu()
            tensors[f"base_model.model.{name}.lora_B.weight"] = up.contiguous().cpu()
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    def save_adapter(self, folder: Path, base_model: str) -> None:
        """Writes all stages as one LoRA (safetensors) that plain peft loads on the original base, and the tokenizer."""
        layers = self.concatenated()
        config = self._one_adapter(layers)
        self.model.add_adapter(RELEASE_ADAPTER, config)
        try:
            modules = dict(self.model.base_model.model.named_modules())
            with torch.no_grad():
                for name, (down, up) in layers.items():
                    modules[name].lora_A[RELEASE_ADAPTER].weight.copy_(down)
                    modules[name].lora_B[RELEASE_ADAPTER].weight.copy_(up)
            self.model.peft_config[RELEASE_ADAPTER].base_model_name_or_path = base_model
            self.model.save_pretrained(
                folder, selected_adapters=[RELEASE_ADAPTER], safe_serialization=True, save_embedding_layers=False
            )
        finally:
            self.model.delete_adapter(RELEASE_ADAPTER)
            self._activate(self.adapters, trainable=False)
        (Path(folder) / "README.md").unlink(missing_ok=True)  # peft's template; the release writes its own card
        self.tokenizer.save_pretrained(folder)


def load_pretrained(
    auto_class: Any, config: ModelConfig, device: str | torch.device, given: Given | None = None, **options: Any
) -> tuple[Any, Any, str | None, list[str]]:
    """Base model, tokenizer, the folder of the release if `config` names one, and weights that no file holds.

    given: objects that hold the same; the base then shares their frozen weights.

    Raises:
        DPAlignError: the folder or dtype is wrong, or an object is not what the folder holds.
    """
    given = given or Given()
    path = embedded.resolve(config.name_or_path)
    dtype = getattr(torch, config.dtype, None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise DPAlignError(f"dtype {config.dtype!r} is not one of float32, bfloat16, float16.")
    adapter = None
    if (Path(path) / "adapter_config.json").exists():
        check_adapter_folder(path, has_head="num_labels" in options)
        adapter = release = path
        path = loaded("an adapter", path, lambda: base_path(release))
    if config.sharding != "none" and (config.quantization != "none" or given.model is not None):
        raise DPAlignError(
            f"sharding {config.sharding}: a quantised base, or a model object, is held whole by every process: set "
            "quantization to none, or sharding."
        )
    trust = {"trust_remote_code": config.trust_remote_code}
    quantized = quantization_config(config.quantization, config.dtype)
    if quantized is not None:  # such a model stays where it is loaded
        options |= {"quantization_config": quantized, "device_map": {"": device}}
    if given.model is not None:
        options["attn_implementation"] = given.base.config._attn_implementation

    def load() -> tuple[Any, Any, Any]:
        check_configuration(path, config.trust_remote_code)
        base, loading = auto_class.from_pretrained(
            path, dtype=dtype, use_safetensors=True, output_loading_info=True, **trust, **options
        )
        if config.sharding != "none":
            check_weights(base)
            shard(base, config.sharding, device)
        elif quantized is None:
            base = base.to(device)
        return base, loading, AutoTokenizer.from_pretrained(adapter or path, **trust)

    hint = "" if given.model is None else f"; of a model object: {SAVE_IT}"
    base, loading, tokenizer = loaded("a model and tokenizer", config.name_or_path, load, hint)
    if given.model is not None:
        unheld = {*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])}
        take_weights(base, given, path, unheld)
        check_adapter(given, adapter or path)
    reader = tokenizer if given.tokenizer is None else copy.deepcopy(given.tokenizer)
    return base, reader, adapter, sorted(loading["missing_keys"])


def _without_dropout(model: nn.Module) -> None:
    """Sets every dropout probability to 0: its coins would be shared by the rows of a micro-batch."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _fan_in_fan_out(model: nn.Module) -> bool:
    return any(type(m).__name__ == "Conv1D" for m in model.modules())


def _refuse_coupling(model: PreTrainedModel) -> None:
    """Refuses layers through which one record changes another's gradient."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise DPAlignError(
                f"{name} is a {kind}: batch statistics mix records, so no per-unit guarantee is possible."
            )
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        raise DPAlignError("the model's load-balancing loss mixes records: set output_router_logits to false.")
