"""`dpalign generate`: completions from a base model or a release, perhaps the best of several."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

from rich.text import Text as Rich

from ..data.columns import require_columns
from ..data.load import Record, read_records
from ..domains import SEEDS
from ..errors import DPAlignError
from ..files import check_is_there
from ..reporting.terminal import Terminal, plain
from ..settings.models import ModelConfig
from ..settings.rewards import RewardConfig
from .arguments import DTYPE, DTYPES, PREPEND_BOS, Parser, Switch, number
from .rewards import add_reward, reward_of

if TYPE_CHECKING:
    from torch import Tensor

    from ..data.text import Text
    from ..models import Policy
    from ..models.generation import Prompt
    from ..rewards import Reward

DESCRIPTION = """Samples completions of prompts from a model or a release. Sampling from a release costs no privacy, as
long as the prompts are not private themselves: they are echoed.

With --best_of N each completion is the one of N that --reward scores highest. That costs no privacy either: it is
post-processing of the model and of the reward. A reward that was made from private data must be the release of one; if
its statement says that it was trained without privacy, what it chooses is outside the guarantee, and labelled so.
Choosing takes the completions at most log N - (N-1)/N nats of KL away from what the model writes."""


def run(arguments: list[str], as_json: bool) -> dict[str, Any]:
    """Returns the prompts with their completions."""
    given = _parser().parse_args(arguments)
    check_is_there(given.model)
    section = _section(given)
    asked = _asked(given)

    import torch

    from ..models import Policy
    from ..models.generation import answers, padded

    policy = Policy.load(ModelConfig(name_or_path=given.model, dtype=given.dtype))
    prompts = _prompts(policy, asked, given, section)
    reward = None if section is None else _load(section, prompts, given)
    each = given.num_generations * (given.best_of or 1)
    many = [prompt for prompt in prompts for _ in range(each)]
    torch.manual_seed(given.seed)
    rollouts = policy.sample(
        *padded(policy, many), given.max_completion_length, temperature=given.temperature, top_p=given.top_p
    )
    said = [p.text if isinstance(p.text, str) else str(policy.tokenizer.decode(p.ids)) for p in prompts]
    written = answers(policy, many, rollouts)
    rows = [{"prompt": said[row // each], "completion": completion} for row, completion in enumerate(written)]
    found: dict[str, Any] = {"model": given.model}
    if reward is not None and section is not None:
        columns = {name: [(prompt.columns or {})[name] for prompt in many] for name in many[0].columns or ()}
        scores = reward([prompt.text for prompt in many], written, columns)
        rows = best_of(given.best_of, rows, scores)
        found |= _about(given.best_of, section)
    if not as_json:
        _show(rows, found)
    return found | {"completions": rows}


def best_of(count: int, rows: list[dict[str, Any]], scores: Tensor) -> list[dict[str, Any]]:
    """Of each `count` rows in a row the one with the highest score, its score, and their mean.

    Of equal ones the first. One without a score (NaN) is chosen only where all are, and left out of the mean.
    """
    groups = scores.view(-1, count)
    chosen = groups.nan_to_num(nan=-math.inf).argmax(1).tolist()
    means = groups.nanmean(1).tolist()
    return [
        rows[number * count + place] | {"score": float(groups[number, place]), "mean_score": mean}
        for number, (place, mean) in enumerate(zip(chosen, means, strict=True))
    ]


def _parser() -> Parser:
    parser = Parser(
        prog="dpalign generate", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help=DTYPE)
    best = parser.add_argument_group("best of several")
    best.add_argument(
        "--best_of",
        type=number(int, "[2, 10000]"),
        help="sample so many for each completion, and keep the one that --reward scores highest",
    )
    add_reward(best, None)
    return parser


def _section(given: argparse.Namespace) -> RewardConfig | None:
    """The reward that chooses; None where nothing is chosen.

    Raises:
        DPAlignError: a number without a reward, a reward without a number, or no section of a reward.
    """
    if given.best_of is not None:
        if given.reward is None:
            raise DPAlignError("--best_of needs the reward that chooses: --reward vader, say.")
        return reward_of(given)
    plain = _parser()
    unread = [
        name for name in vars(given) if name.startswith("reward") and getattr(given, name) != plain.get_default(name)
    ]
    if unread:
        raise DPAlignError(f"--{unread[0]} chooses among several completions: say how many with --best_of.")
    return None


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


def _prompts(
    policy: Policy, asked: list[Record], given: argparse.Namespace, section: RewardConfig | None
) -> list[Prompt]:
    """The prompts as the model reads them, with the columns that a reward is given.

    Raises:
        DPAlignError: one is empty, or too long.
    """
    from ..data.text import encode_prompt_text, template_options
    from ..models.generation import Prompt, padded
    from ..models.loading import positions_of
    from ..models.prompt_format import PromptFormat, prompt_format_of
    from ..release import as_trained
    from ..rewards.load import given_columns

    said = prompt_format_of(given.model) or PromptFormat()
    as_chats = said.chats if given.chat is None else given.chat
    prepend_bos, columns = as_trained([given.model], given.prepend_bos), given_columns(section) if section else []
    prompts = []
    for record in asked:
        text, options = _text(record, as_chats), template_options(record)
        ids = encode_prompt_text(policy.tokenizer, text, prepend_bos=prepend_bos, options=options)
        prompts.append(Prompt(ids, text, {name: record.get(name) for name in columns}, options))
    if not all(prompt.ids for prompt in prompts):
        raise DPAlignError("an empty prompt needs --prepend_bos.")
    longest = padded(policy, prompts)[0].shape[1] + given.max_completion_length
    limit = positions_of(policy.model.config)
    if limit is not None and longest > limit:
        raise DPAlignError(
            f"prompt and completion need {longest} positions and the model has {limit}: lower --max_completion_length, "
            "or shorten the prompts."
        )
    return prompts


def _text(record: Record, as_chat: bool) -> Text:
    from ..data.text import read_text

    prompt = read_text(record["prompt"])
    return [{"role": "user", "content": prompt}] if as_chat and isinstance(prompt, str) else prompt


def _load(section: RewardConfig, prompts: list[Prompt], given: argparse.Namespace) -> Reward:
    from ..rewards import load_reward
    from ..rewards.written import PublicModels

    chats = any(not isinstance(prompt.text, str) for prompt in prompts)
    public = PublicModels(completion_tokens=given.max_completion_length, chats=chats)
    return load_reward(section, public=public)


def _about(count: int, section: RewardConfig) -> dict[str, Any]:
    """What a reader must know of the choice."""
    from ..evaluation.guarantee import is_outside_the_guarantee

    most = math.log(count) - (count - 1) / count
    outside = is_outside_the_guarantee(section)
    return {"best_of": count, "reward": section.source, "kl_at_most": most, "outside_the_guarantee": outside}


def _show(rows: list[dict[str, Any]], found: dict[str, Any]) -> None:
    console = Terminal()
    for row in rows:
        console.print(Rich.assemble(plain(row["prompt"], "dim", lines=True), plain(row["completion"], lines=True)))
        if "score" in row:
            console.print(f"score {row['score']:.3f}, mean of {found['best_of']}: {row['mean_score']:.3f}", style="dim")
    if found.get("outside_the_guarantee"):
        console.say(
            f"outside the guarantee: the reward {found['reward']} was made from private data without one, or is not "
            "declared public. What it chose is not for release."
        )
