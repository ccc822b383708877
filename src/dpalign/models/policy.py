"""A causal language model whose stages are LoRA adapters on one frozen base.

Every stage adds one adapter. Adapters of earlier stages stay unmerged, active and frozen; the
reference model is the policy with its newest adapter off; the release is one LoRA that concatenates
all ranks on the original base, which is exact.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from ..errors import DPAlignError
from ..privacy.entropy import SystemEntropy
from . import embedded
from .sampling import DrawToken

RELEASE_ADAPTER = "default"


@dataclass
class ModelConfig:
    """The model to align.

    Args:
        name_or_path: folder or hub name of a causal LM, a dpalign release (its stages then count towards the
            budget), or `tiny-review-lm`, a 5M-parameter review model that ships with dpalign.
        is_public: declares that the weights and tokenizer were made without the private data. Training refuses
            a model for which nobody says so.
        dtype: dtype of the frozen base: float32, bfloat16 or float16. Adapters and heads are always float32.
        trust_remote_code: run code that comes with the model.
    """

    name_or_path: str = embedded.TINY_REVIEW_LM
    is_public: bool = False
    dtype: str = "float32"
    trust_remote_code: bool = False


@dataclass
class AdapterConfig:
    """The LoRA adapter that a stage trains.

    Args:
        r: rank. The noise of a private step grows with the square root of the number of trained weights.
        lora_alpha: scale of the update is lora_alpha / r; default 2 r.
        target_modules: layers to adapt by name ending, or `all-linear`; default: query and value projections
            (peft's default for the architecture; in GPT-2 they are fused with the key projection in c_attn).
        layers: adapt only these layer indices; default all.
        freeze_a: train only the B matrices; halves the trained dimension.
        init_a: `random` (peft's), or `synthetic_gradient` (PPO): the input directions of the reward's gradient on
            prompts that the policy writes itself; best with freeze_a. Reads no data.
        init_rows: synthetic rollouts for `synthetic_gradient`.
    """

    r: int = 4
    lora_alpha: int | None = None
    target_modules: list[str] | str | None = None
    layers: list[int] | None = None
    freeze_a: bool = False
    init_a: Literal["random", "synthetic_gradient"] = "random"
    init_rows: int = 1024


@dataclass
class Rollouts:
    """Prompts and sampled completions of some rows, padded to fixed widths.

    input_ids: `(rows, prompt + completion)` int64, prompts left-padded.
    attention_mask: the same shape, 1 where there is a token.
    completion_mask: `(rows, completion)` float, 1 up to and including the first EOS.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor

    @property
    def completion_ids(self) -> Tensor:
        return self.input_ids[:, -self.completion_mask.shape[1] :]

    def __getitem__(self, rows) -> Rollouts:
        return Rollouts(self.input_ids[rows], self.attention_mask[rows], self.completion_mask[rows])

    @staticmethod
    def cat(parts: list[Rollouts]) -> Rollouts:
        return Rollouts(
            torch.cat([p.input_ids for p in parts]),
            torch.cat([p.attention_mask for p in parts]),
            torch.cat([p.completion_mask for p in parts]),
        )


class Policy(nn.Module):
    """See the module's docstring. `adapters` lists the stages' names, oldest first."""

    def __init__(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        base.requires_grad_(False)
        base.eval()
        _without_dropout(base)
        _refuse_coupling(base)
        # generate fills every unset field from here: a base's own penalties or top-k would change the sampled law.
        base.generation_config = GenerationConfig()
        self.model: Any = base  # a PreTrainedModel, and a PeftModel once there is an adapter
        self.tokenizer = tokenizer
        self.adapters: list[str] = []
        self.value_head: nn.Linear | None = None
        self.coins: SystemEntropy | None = None  # secret coins of rollouts, set by the training loop
        # In half precision a row's rounding depends on how many rows are computed together: then every
        # micro-batch is filled up to the same size, so that nobody's rounding tells who else is there.
        self.constant_rows = base.dtype != torch.float32
        accepted = inspect.signature(base.forward).parameters
        self._accepts_positions = "position_ids" in accepted
        self._accepts_keep = "logits_to_keep" in accepted

    @classmethod
    def load(cls, config: ModelConfig, device: str | torch.device = "cpu") -> Policy:
        """Loads a base model, or the base and adapter of a release.

        Raises:
            DPAlignError: the folder or dtype is wrong.
        """
        path = embedded.resolve(config.name_or_path)
        dtype = getattr(torch, config.dtype, None)
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise DPAlignError(f"dtype {config.dtype!r} is not one of float32, bfloat16, float16.")
        adapter = None
        if (Path(path) / "adapter_config.json").exists():
            adapter = path
            path = embedded.resolve(LoraConfig.from_pretrained(path).base_model_name_or_path)
        options = {"trust_remote_code": config.trust_remote_code}
        try:
            base = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True, **options)
            tokenizer = AutoTokenizer.from_pretrained(adapter or path, **options)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise DPAlignError(
                f"cannot load a causal LM and tokenizer from {config.name_or_path!r}: {reason}"
            ) from None
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        base.to(device)  # type: ignore[arg-type]
        policy = cls(base, tokenizer)
        if adapter:
            policy.model = PeftModel.from_pretrained(base, adapter, adapter_name="earlier", is_trainable=False)
            policy.adapters.append("earlier")
            policy.eval()
        return policy

    @property
    def device(self) -> torch.device:
        return self.model.device

    # Stages ------------------------------------------------------------------------------------------

    def add_adapter(self, name: str, config: AdapterConfig) -> None:
        """Adds a trainable adapter on top of the frozen earlier ones; B is zero, so nothing changes yet."""
        lora = LoraConfig(
            r=config.r,
            lora_alpha=config.lora_alpha if config.lora_alpha is not None else 2 * config.r,
            target_modules=config.target_modules,
            layers_to_transform=config.layers,
            lora_dropout=0.0,
            bias="none",
            fan_in_fan_out=_fan_in_fan_out(self.model),
            task_type="CAUSAL_LM",
        )
        try:
            if isinstance(self.model, PeftModel):
                self.model.add_adapter(name, lora)
            else:
                self.model = get_peft_model(self.model, lora, adapter_name=name)
        except ValueError as error:
            raise DPAlignError(f"the adapter cannot be added: {str(error).splitlines()[0]}") from None
        self.adapters.append(name)
        self._freeze_a = config.freeze_a
        self._activate(self.adapters)
        self.eval()

    def add_value_head(self) -> None:
        """A linear layer from the body's last hidden state to one value, float32, zero at first."""
        hidden_size = self.model.config.get_text_config().hidden_size
        self.value_head = nn.Linear(hidden_size, 1, device=self.device, dtype=torch.float32)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

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
        """Freezes what the stage trained and drops the value head."""
        self.value_head = None
        self.requires_grad_(False)

    def stage_state(self) -> dict[str, Tensor]:
        """The tensors of the newest adapter and the value head by name, frozen A matrices included."""
        newest = f".{self.adapters[-1]}."
        return {n: p.detach() for n, p in self.named_parameters() if newest in n or n.startswith("value_head.")}

    def _activate(self, adapters: list[str], trainable: bool = True) -> None:
        # peft turns gradients on for everything it activates: freeze all but the newest again.
        self.model.base_model.set_adapter(adapters, inference_mode=True)
        if trainable and adapters:
            newest = adapters[-1]
            for name, p in self.model.named_parameters():
                if f".{newest}." in name and not (self._freeze_a and "lora_A" in name):
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
        unmerged: rounding would lose part of a small adapter.
        """
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

    # Computation -------------------------------------------------------------------------------------

    def forward(self, input_ids: Tensor, attention_mask: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        """Logits and last hidden states of the last `keep` positions, in float32 (float64 of a float64 model).

        Args:
            input_ids, attention_mask: `(rows, length)`; either side may be padded.
        Returns:
            `(rows, keep, vocabulary)` and `(rows, keep, hidden)`.
        """
        arguments = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if self._accepts_positions:
            arguments["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
        if self._accepts_keep:
            length = input_ids.shape[1]  # as indices: gathered states are contiguous, and the head is one large matmul
            arguments["logits_to_keep"] = torch.arange(length - keep, length, device=input_ids.device)
        out = self.model(**arguments, output_hidden_states=self.value_head is not None)
        wide = torch.promote_types(out.logits.dtype, torch.float32)
        logits = out.logits[:, -keep:].to(wide)
        hidden = out.hidden_states[-1][:, -keep:].to(wide) if self.value_head is not None else logits.new_empty(0)
        return logits, hidden

    def completion_logprobs(self, rollouts: Rollouts, min_new_tokens: int = 0) -> tuple[Tensor, Tensor]:
        """Log-probability and value of every completion token, under the law that sampled it.

        Returns:
            logprobs, values: `(rows, completion)` float32; both are 0 beyond the completion's end. Values
            are of the state before the token, and 0 without a value head.
        """
        width = rollouts.completion_mask.shape[1]
        # The logits at position t are for the token at t + 1: the last token is never an input.
        logits, hidden = self(rollouts.input_ids[:, :-1], rollouts.attention_mask[:, :-1], width)
        if min_new_tokens and self.tokenizer.eos_token_id is not None:
            with torch.no_grad():  # in place, for a copy is large; at probability 0 the gradient is 0 anyway
                logits[:, :min_new_tokens, self.tokenizer.eos_token_id] = -torch.inf
        # cross_entropy keeps one tensor of the logits' size for the backward pass; gather and logsumexp keep three.
        chosen = -nn.functional.cross_entropy(logits.flatten(0, 1), rollouts.completion_ids.flatten(), reduction="none")
        inside = rollouts.completion_mask > 0
        logprobs = torch.where(inside, chosen.view_as(inside), 0.0)
        if self.value_head is None:
            return logprobs, torch.zeros_like(logprobs)
        values = self.value_head(hidden).squeeze(2)
        return logprobs, torch.where(inside, values, 0.0)

    def chunks(self, rows: int, size: int) -> Iterator[tuple[list[int], int]]:
        """Row numbers in chunks of `size`, and how many of each count: see `constant_rows`."""
        for start in range(0, rows, size):
            chunk = list(range(start, min(rows, start + size)))
            filler = [chunk[-1]] * (size - len(chunk)) if self.constant_rows else []
            yield chunk + filler, len(chunk)

    @torch.no_grad()
    def generate(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        max_new_tokens: int,
        *,
        min_new_tokens: int = 0,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> Rollouts:
        """Samples one completion per left-padded prompt, with `coins` or else torch's global generator.

        By default the law is exactly the policy's own (no top-k, no penalties), which PPO needs.
        """
        tokenizer = self.tokenizer
        config = GenerationConfig(
            do_sample=False,  # DrawToken draws
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens or None,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )
        processors = LogitsProcessorList()
        if temperature != 1:
            processors.append(TemperatureLogitsWarper(temperature))
        if top_p < 1:
            processors.append(TopPLogitsWarper(top_p))
        processors.append(DrawToken(self.coins))
        sequences = self.model.generate(
            input_ids=prompt_ids, attention_mask=prompt_mask, generation_config=config, logits_processor=processors
        )
        completions = sequences[:, prompt_ids.shape[1] :]
        missing = max_new_tokens - completions.shape[1]  # generation stops early once every row has ended
        completions = nn.functional.pad(completions, (0, missing), value=tokenizer.pad_token_id)
        ended = completions == tokenizer.eos_token_id if tokenizer.eos_token_id is not None else completions < 0
        mask = (ended.long().cumsum(1) - ended.long() == 0).float()  # 1 up to and including the first EOS
        if missing and not ended.any(1).all():
            raise DPAlignError("generation stopped before the completions ended; the model's stop rules are not EOS.")
        return Rollouts(
            torch.cat([prompt_ids, completions], 1), torch.cat([prompt_mask, mask.to(prompt_mask.dtype)], 1), mask
        )

    def sample(
        self, ids: Tensor, mask: Tensor, max_new_tokens: int, *, min_new_tokens: int = 0, rows_at_once: int = 256
    ) -> Rollouts:
        """On-policy completions for `(rows, prompt)` ids in chunks of a fixed size, with merged weights."""
        with self.merged():
            parts = [
                self.generate(ids[chunk], mask[chunk], max_new_tokens, min_new_tokens=min_new_tokens)[:count]
                for chunk, count in self.chunks(len(ids), rows_at_once)
            ]
        if not parts:  # an empty sample
            nothing = ids.new_zeros(0, ids.shape[1] + max_new_tokens)
            return Rollouts(nothing, nothing, torch.zeros(0, max_new_tokens, device=ids.device))
        return Rollouts.cat(parts)

    def decode(self, rollouts: Rollouts) -> list[str]:
        """Text of the completions, without special tokens."""
        rows = zip(rollouts.completion_ids.tolist(), rollouts.completion_mask.sum(1).int().tolist(), strict=True)
        return self.tokenizer.batch_decode([ids[:length] for ids, length in rows], skip_special_tokens=True)

    def encode_prompts(self, prompts: list[list[int]], width: int) -> tuple[Tensor, Tensor]:
        """Left-pads token lists to `(rows, width)` ids and mask."""
        ids = torch.full((len(prompts), width), self.tokenizer.pad_token_id, dtype=torch.int64)
        mask = torch.zeros((len(prompts), width), dtype=torch.int64)
        for row, tokens in enumerate(prompts):
            if tokens:
                ids[row, -len(tokens) :] = torch.tensor(tokens)
                mask[row, -len(tokens) :] = 1
        return ids.to(self.device), mask.to(self.device)

    # Release -----------------------------------------------------------------------------------------

    def save_adapter(self, folder: Path, base_model: str) -> None:
        """Writes all stages as one LoRA (safetensors) that plain peft loads on the original base."""
        layers: dict[str, Any] = {
            n: m for n, m in self.model.base_model.model.named_modules() if isinstance(m, LoraLayer) and m.lora_A
        }
        rank = sum(self.model.peft_config[a].r for a in self.adapters)
        # Layers by their full names: the stages may adapt different ones. peft's own concatenation refuses that.
        config = LoraConfig(
            r=rank, lora_alpha=rank, target_modules=list(layers), lora_dropout=0.0, bias="none",
            fan_in_fan_out=_fan_in_fan_out(self.model), task_type="CAUSAL_LM",
        )  # fmt: skip
        self.model.add_adapter(RELEASE_ADAPTER, config)
        try:
            with torch.no_grad():
                for layer in layers.values():
                    stages = [a for a in self.adapters if a in layer.lora_A]
                    down = torch.cat([layer.lora_A[a].weight * layer.scaling[a] for a in stages])
                    up = torch.cat([layer.lora_B[a].weight for a in stages], 1)
                    layer.lora_A[RELEASE_ADAPTER].weight.zero_()[: len(down)] = down
                    layer.lora_B[RELEASE_ADAPTER].weight.zero_()[:, : len(down)] = up
            self.model.peft_config[RELEASE_ADAPTER].base_model_name_or_path = base_model
            self.model.save_pretrained(folder, selected_adapters=[RELEASE_ADAPTER], safe_serialization=True)
        finally:
            self.model.delete_adapter(RELEASE_ADAPTER)
            self._activate(self.adapters, trainable=False)
        (Path(folder) / "README.md").unlink(missing_ok=True)  # peft's template; the release writes its own card
        self.tokenizer.save_pretrained(folder)


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
