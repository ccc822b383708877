"""`dpalign generate`: completions from a base model or a release."""

from __future__ import annotations

from typing import Any

import torch
from rich.text import Text

from ..data.load import Record, read_records, require_columns
from ..data.text import encode_prompt_text, read_text, template_options
from ..errors import DPAlignError
from ..models import ModelConfig, Policy
from ..reporting.terminal import Terminal, plain
from .arguments import Parser

DESCRIPTION = """Samples completions of prompts from a model or a release. Sampling from a release costs no privacy, as
long as the prompts are not private themselves: they are echoed."""


def run(arguments: list[str], as_json: bool) -> dict[str, Any]:
    """Returns the prompts with their completions."""
    parser = Parser(prog="dpalign generate", description=DESCRIPTION)
    parser.add_argument("model", help="folder of a release, folder or hub name of a base model, or tiny-review-lm")
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; may be given several times")
    parser.add_argument("--prompts", help="file with a column `prompt` (.jsonl, .csv, .parquet)")
    parser.add_argument("--max_completion_length", type=int, default=32)
    parser.add_argument("--num_generations", type=int, default=1, help="completions per prompt")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--prepend_bos", action="store_true", help="put BOS in front, as the recipes here do")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    asked: list[Record] = [{"prompt": prompt} for prompt in given.prompt]
    if given.prompts:
        records = read_records(given.prompts)
        require_columns(records, [("prompt",)], given.prompts)
        asked += records
    if not asked:
        raise DPAlignError("give at least one --prompt, or a file with --prompts.")
    policy = Policy.load(ModelConfig(name_or_path=given.model))
    prompts = [(read_text(record["prompt"]), template_options(record)) for record in asked]
    encoded = [
        encode_prompt_text(policy.tokenizer, prompt, prepend_bos=given.prepend_bos, options=options)
        for prompt, options in prompts
        for _ in range(given.num_generations)
    ]
    if not all(encoded):
        raise DPAlignError("an empty prompt needs --prepend_bos.")
    torch.manual_seed(given.seed)
    with policy.merged():
        rollouts = policy.generate(
            *policy.encode_prompts(encoded, max(map(len, encoded))),
            given.max_completion_length,
            temperature=given.temperature,
            top_p=given.top_p,
        )
    texts = [
        p if isinstance(p, str) else str(policy.tokenizer.decode(ids))
        for (p, _), ids in zip([p for p in prompts for _ in range(given.num_generations)], encoded, strict=True)
    ]
    rows = [{"prompt": p, "completion": c} for p, c in zip(texts, policy.decode(rollouts), strict=True)]
    if not as_json:
        console = Terminal()
        for row in rows:
            prompt, completion = plain(row["prompt"], "dim", lines=True), plain(row["completion"], lines=True)
            console.print(Text.assemble(prompt, completion))
    return {"model": given.model, "completions": rows}
