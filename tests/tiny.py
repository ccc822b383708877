"""Tiny random models, a word tokenizer and data for the tests; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from dpalign.data import UnitDataset
from dpalign.data.load import Record
from dpalign.models import Policy
from dpalign.privacy.parts import Part

VOCABULARY = 96


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words `w0`, `w1`, ... separated by spaces, padding and end of text."""
    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(VOCABULARY - 2))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="w0")


SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
OTHERS: dict[str, dict] = {
    "qwen2": {}, "qwen3": {"head_dim": 16}, "gemma": {"head_dim": 16}, "gemma2": {"head_dim": 16, "sliding_window": 8},
    "mistral": {"sliding_window": 8}, "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}  # fmt: skip


def tiny_base(kind: str) -> PreTrainedModel:
    """A random `gpt2` (Conv1D, learned positions, tied head), `llama` (Linear, rotary, grouped heads), or other kind."""
    torch.manual_seed(0)
    if kind in OTHERS:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **OTHERS[kind]))
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2,
                bos_token_id=1, eos_token_id=1,
            )
        )  # fmt: skip
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.2, bos_token_id=1, eos_token_id=1,
        )
    )  # fmt: skip


def tiny_folder(kind: str, folder: Path) -> Path:
    """`tiny_base` and its tokenizer, saved."""
    tiny_base(kind).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_object(kind: str, folder: Path) -> PreTrainedModel:
    """`tiny_base` as an object that was loaded from `folder`, where it is saved if there is nothing yet."""
    if not folder.exists():
        tiny_folder(kind, folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def tiny_policy(kind: str, dtype: torch.dtype = torch.float32) -> Policy:
    return Policy(tiny_base(kind).to(dtype), tiny_tokenizer())


def words(count: int, seed: int) -> str:
    """`count` random words."""
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(0, VOCABULARY - 2, (count,), generator=generator).tolist())


def dataset(units: list[list[Record]], declared: float | None = None) -> UnitDataset:
    """Units as they are; a unit's id is the `id` column of its first record."""
    return UnitDataset(
        part=Part("tiny"), units=units, ids=[str(unit[0]["id"]).encode() for unit in units],
        declared_units=float(declared or len(units)), unit="record", fingerprint="none",
    )  # fmt: skip
