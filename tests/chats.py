"""Chat templates in the manner of well-known models, in our own wording, and a byte tokenizer that adds what is asked."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LLAMA = (  # BOS by the template; every turn has a header and an end of its own; content is trimmed
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ (m['content'] | trim) + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (  # BOS by the template; no system role; strict alternation; the assistant is called model
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role is not known here') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate: user, assistant, user, ...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + (m['content'] | trim) }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN = (  # a system turn where there is none; tools and tool calls
    "{% if tools %}{{ '<|im_start|>system\nTools: ' + (tools | tojson) + '<|im_end|>\n' }}"
    "{% elif messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>' + (call | tojson) + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (  # BOS by the template, EOS behind an answer, nothing that opens one; strict alternation
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate.') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
SMOL = (  # a default system turn before the first
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are small and kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PHI = (  # a turn ends in <|end|>; EOS only behind a whole conversation
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
CHATML = (  # marks what the assistant says
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "llama": LLAMA, "gemma": GEMMA, "qwen": QWEN, "mistral": MISTRAL, "smol": SMOL, "phi": PHI, "chatml": CHATML,
}  # fmt: skip
TURN_ENDS = {
    "llama": "<|eot_id|>", "gemma": "<end_of_turn>", "qwen": "<|im_end|>", "mistral": "<eos>", "smol": "<|im_end|>",
    "phi": "<|end|>", "chatml": "<|im_end|>",
}  # fmt: skip
MARKS = [
    "<pad>", "<bos>", "<eos>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>",
    "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>",
]  # fmt: skip
ADDS = ("nothing", "bos", "eos", "both")


def byte_tokenizer(template: str | None = None, adds: str = "nothing") -> PreTrainedTokenizerFast:
    """One token a byte; a common pair of bytes across a turn's beginning is merged, as real vocabularies do.

    Args:
        template: a name of TEMPLATES. adds: which special tokens it adds to a text that is not a template's.
    """
    letters = sorted(ByteLevel.alphabet())
    merges = [("h", "e"), ("Ġ", "t"), ("Ċ", "Ċ")]
    vocabulary = {word: i for i, word in enumerate([*MARKS, *letters, *("".join(pair) for pair in merges)])}
    model = Tokenizer(BPE(vocabulary, merges))
    model.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens(MARKS)
    front, back = "<bos> " * (adds in ("bos", "both")), " <eos>" * (adds in ("eos", "both"))
    if adds != "nothing":
        model.post_processor = TemplateProcessing(
            single=f"{front}$A{back}", special_tokens=[(mark, vocabulary[mark]) for mark in ("<bos>", "<eos>")]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATES[template] if template else None
    return tokenizer


def model_folder(folder: Path, template: str, positions: int = 256, width: int = 16) -> Path:
    """A random Llama with a byte tokenizer, as one downloads it."""
    tokenizer = byte_tokenizer(template)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=positions, initializer_range=0.2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
