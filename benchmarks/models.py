"""A GPT-2 of any size with random weights, and a word tokenizer: nothing is downloaded.

Runs under both environments of the benchmarks (dpalign's transformers, and the older one of TRL).
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

END = "<end>"


def gpt2(vocabulary: int, layers: int, hidden: int, heads: int, positions: int = 128) -> GPT2LMHeadModel:
    """GPT-2 without dropout, with the torch generator's weights; token 0 begins, ends and pads."""
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=positions,
        n_layer=layers,
        n_embd=hidden,
        n_head=heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config)


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Words `w1`, `w2`, ... are the tokens 1, 2, ...; token 0 is the end of a text."""
    words = {END: 0} | {f"w{i}": i for i in range(1, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##")  # joins words with spaces
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, unk_token=END, padding_side="left"
    )
