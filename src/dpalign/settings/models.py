"""Which model, and what is trained of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from ..domains import LENGTH, within

TINY_REVIEW_LM = "tiny-review-lm"
Dtype: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]
LAYERS = "layers"  # the pooling that reads several of them


@dataclass
class ModelConfig:
    """The model to align.

    Args:
        name_or_path: folder or hub name of a causal LM, a dpalign release (its stages then count towards the
            budget), or `tiny-review-lm`, a 5M-parameter review model that ships with dpalign.
        is_public: declares that the weights and tokenizer were made without the private data. Training refuses
            a model for which nobody says so.
        dtype: dtype of the frozen base: float32, bfloat16 or float16; `auto` is float32 or bfloat16 by what this device
            computes faster (a small model: float32), and stays what it is when the run goes on elsewhere. Adapters
            and heads are always float32.
        trust_remote_code: run code that comes with the model.
        quantization: holds the frozen base's linear layers in 4 bits (`nf4`, `nf4_double`, `fp4`, `fp4_double`) or 8
            (`int8`), by bitsandbytes; the adapters on it stay float32.
        sharding: of a run in several processes, each of which holds the frozen base (`none`), or an equal part of its
            large weights: `training` puts all of it together while completions are sampled, `full` only a few layers at
            a time, always.
    """

    name_or_path: str = TINY_REVIEW_LM
    is_public: bool = False
    dtype: Dtype = "auto"
    trust_remote_code: bool = False
    quantization: Literal["none", "nf4", "nf4_double", "fp4", "fp4_double", "int8"] = "none"
    sharding: Literal["none", "training", "full"] = "none"


@dataclass
class AdapterConfig:
    """The adapter that a stage trains.

    Args:
        kind: `lora`, or `full`: the layers' whole weights (of a model in float32), released as LoRA of full rank;
            embeddings, norms and biases stay as they are. Of the settings below it has target_modules and layers only.
        r: rank; 0 trains no adapter (a reward model's head alone). The noise of a private step grows with the square
            root of the number of trained weights.
        lora_alpha: scale of the update is lora_alpha / r; default 2 r.
        target_modules: layers to adapt by name ending, or `all-linear`; default: query and value projections
            (peft's default for the architecture; in GPT-2 they are fused with the key projection in c_attn), and all
            linear layers where kind is full.
        layers: adapt only these layer indices; default all.
        freeze_a: train only the B matrices; halves the trained dimension.
        init_a: `random` (peft's); `synthetic_gradient` (stages that sample): the input directions of the reward's
            gradient on prompts that the policy writes itself; `activations` (sft, dpo): the leading directions of what
            each layer reads of text that the policy writes itself. Both are best with freeze_a, and read no data.
        init_rows: texts that the policy writes for that; for `activations` a few hundred are enough.
    """

    kind: Literal["lora", "full"] = "lora"
    r: int = within(4, "[0, 65536]")
    lora_alpha: int | None = within(None, "[1, 1000000]")
    target_modules: list[str] | str | None = None
    layers: list[int] | None = within(None, "[0, 10000]")
    freeze_a: bool = False
    init_a: Literal["random", "synthetic_gradient", "activations"] = "random"
    init_rows: int = within(1024, "[1, 1000000]")


@dataclass(frozen=True)
class TextFormat:
    """How a reward model reads a text; fixed when it is trained.

    max_length: longest sequence in tokens; of a longer text the last tokens are read, because answers end texts.
    prepend_bos, append_eos: of strings; a chat is what the tokenizer's template writes.
    pooling: the score of a text is that of its last token, or the mean of all its tokens' scores; or (`layers`) it is
        linear in what several layers say of it.
    """

    max_length: int = within(128, LENGTH)
    prepend_bos: bool = False
    append_eos: bool = False
    pooling: Literal["last", "mean", "layers"] = "last"
