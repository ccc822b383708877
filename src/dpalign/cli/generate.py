"""`dpalign generate`: completions from a base model or a release."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from rich.text import Text as Rich

from ..data.load import Record, read_records, require_columns
from ..domains import SEEDS
from ..errors import DPAlignError
from ..files import check_is_there
from ..reporting.terminal import Terminal, plain
from ..settings.models import ModelConfig
from .arguments import PREPEND_BOS, Parser, Switch, number

if TYPE_CHECKING:
    from ..data.text import Text

DESCRIPTION = """Samples completions of prompts from a model or a release. Sampling from a release costs no privacy, as
long as the prompts are not private themselves: they are echoed."""


def run(arguments: list[str], as_json: bool) -> dict[str, Any]:
    """Returns the prompts with their completions."""
    given = _parser().parse_args(arguments)
    check_is_there(given.model)
    asked = _asked(given)

    import torch

    from ..data.text import encode_prompt_text, template_options
    from ..models import Policy
    from ..models.loading import positions_of
    from ..release import PromptFormat, as_trained, prompt_format_of

    policy = Policy.load(ModelConfig(name_or_path=given.model))
    said = prompt_format_of(given.model) or PromptFormat()
    as_chats = said.chats if given.chat is None else given.chat
    prompts = [(_prompt(record, as_chats), template_options(record)) for record in asked]
    prepend_bos = as_trained([given.model], given.prepend_bos)
    encoded = [
        encode_prompt_text(policy.tokenizer, prompt, prepend_bos=prepend_bos, options=options)
        for prompt, options in prompts
        for _ in range(given.num_generations)
    ]
    if not all(encoded):
        raise DPAlignError("an empty prompt needs --prepend_bos.")
    longest, limit = max(map(len, encoded)) + given.max_completion_length, positions_of(policy.model.config)
    if limit is not None and longest > limit:
        raise DPAlignError(
            f"prompt and completion need {longest} positions and the model has {limit}: lower --max_completion_length, "
            "or shorten the prompts."
        )
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
            console.print(Rich.assemble(prompt, completion))
    return {"model": given.model, "completions": rows}


def _parser() -> Parser:
    parser = Parser(prog="dpalign generate", description=DESCRIPTION)
    parser.add_argument("model", help="folder of a release, folder or hub name of a base model, or tiny-review-lm")
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; may be given several times")
    parser.add_argument("--prompts", help="file with a column `prompt` (.jsonl, .csv, .parquet)")
    parser.add_argument("--max_completion_length", type=number(int, "[1, 100000]"), default=32)
    parser.add_argument("--num_generations", type=number(int, "[1, 10000]"), default=1, help="completions per prompt")
    parser.add_argument("--temperature", type=number(float, "(0, 100]"), default=1.0)
    parser.add_argument("--top_p", type=number(float, "(0, 1]"), default=1.0)
    parser.add_argument("--prepend_bos", action=Switch, help=PREPEND_BOS)
    parser.add_argument(
        "--chat",
        action=Switch,
        help="ask a prompt that is a string as a chat's user would (default: as the release was trained)",
    )
    parser.add_argument("--seed", type=number(int, SEEDS), default=0)
    return parser


def _asked(given: argparse.Namespace) -> list[Record]:
    """Records with the prompts that are given."""
    asked: list[Record] = [{"prompt": prompt} for prompt in given.prompt]
    if given.prompts:
        records = read_records(given.prompts)
        require_columns(records, [("prompt",)], given.prompts)
        asked += records
    if not asked:
        raise DPAlignError("give at least one --prompt, or a file with --prompts.")
    return asked


def _prompt(record: Record, as_chat: bool) -> Text:
    from ..data.text import read_text

    prompt = read_text(record["prompt"])
    return [{"role": "user", "content": prompt}] if as_chat and isinstance(prompt, str) else prompt
