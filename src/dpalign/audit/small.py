"""What `dpalign audit` tries without a recipe: DPO of a model of two layers, in a second or two."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..algorithms import DPO, DPOConfig
from ..models import Policy
from ..settings.models import AdapterConfig
from ..training import plan_stage
from .ghosts import Subject

WORDS, UNITS, BATCH, STEPS, LENGTH = 96, 40, 36, 12, 8


def two_layers() -> Policy:
    """A random Llama of two layers of 32 that knows 94 words."""
    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(WORDS - 2))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=WORDS,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=64,
                initializer_range=0.2,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=1,
            )
        )
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "w0"}
    return Policy(base, PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special))  # type: ignore[no-untyped-call]


def small_subject(epsilon: float = 4.0, delta: float = 1e-5) -> Subject:
    """Pairs of texts, at a rate of 0.9: near 1 the accountant's worst case is what the sum of signals shows."""
    config = DPOConfig(
        target_epsilon=epsilon,
        target_delta=delta,
        expected_batch_size=BATCH,
        max_steps=STEPS,
        micro_batch_size=128,
        max_length=LENGTH,
        save_steps=STEPS,
        adapter=AdapterConfig(r=1),
    )
    return Subject(
        kind=DPO,
        config=config,
        plan=plan_stage(DPO.name, config, UNITS),
        make_model=two_layers,
        declared_units=UNITS,
        written=UNITS,
        chats=False,
        rewards={},
    )
