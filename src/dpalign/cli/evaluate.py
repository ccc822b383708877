"""`dpalign evaluate`: models side by side on public prompts, in one table, JSON and a plot."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

from ..algorithms.completions import SamplingConfig, check_prompts
from ..data.load import Record, read_records, require_columns
from ..errors import DPAlignError
from ..evaluation import (
    Measured,
    PublicPrompts,
    WinRate,
    higher_wins,
    judged,
    load_judge,
    measure_policy,
    public_prompts,
    reference_texts,
    stated_epsilon,
    win_rate,
)
from ..evaluation.guarantee import is_outside_the_guarantee
from ..evaluation.text_overlap import lacking_references
from ..evaluation.win_rate import Judge
from ..files import write_json
from ..models import ModelConfig, Policy
from ..reporting.progress import Reporter
from ..reporting.tables import OUTSIDE, print_evaluation
from ..rewards import Reward, RewardConfig, load_reward
from .arguments import Parser

DESCRIPTION = """Samples one completion per public prompt from each model and measures them side by side:
reward, KL to the model's own base (nats per completion), perplexity under that base, distinct-1, -2 and -3, length;
ROUGE F1 if the data has reference texts; the win rate against a baseline; the reward under a second, reference reward.
Numbers come with 95% intervals over prompts: normal for means, the delta method for perplexity, Wilson for win rates
(ties count half). All models are given the same prompts and the same seed.

The numbers are exact, so the prompts must be declared public with --eval_is_public; measuring a private release on
public prompts costs nothing. What was made from private data without a guarantee (a reward model or a model whose
privacy.json says so, a reference reward or judge that nobody declares public) may be measured with, but its numbers
are labelled "outside the guarantee", and go to the terminal, --output and --plot only: do not publish them, and choose
nothing by them.

Without public prompts: `dpalign evaluate RELEASE --private --help` measures once, with noise, on held-out private
units."""
EXAMPLES = """examples:
  dpalign evaluate tiny-review-lm runs/x/release --data public.jsonl --eval_is_public --prompt_tokens 5 --prepend_bos
  dpalign evaluate runs/eps4/release runs/eps8/release --data posts.jsonl --eval_is_public \\
      --reward reward_model:runs/eps4/reward_model --reference_reward reward_model:runs/nonprivate/reward_model \\
      --baseline runs/sft/release --num_prompts 500 --output table.json --plot table.png
  dpalign evaluate A B --data public.jsonl --eval_is_public --baseline A --judge my_judge:prefer --judge_is_public"""
PLOT_ENDINGS = (".png", ".pdf", ".svg")
INTERVALS = "95% over prompts: normal (ci95 is the half-width), delta method for perplexity, Wilson for win_rate"


def run(arguments: list[str], as_json: bool) -> dict[str, Any]:
    """Returns one row per model."""
    if "--private" in arguments:
        from . import evaluate_private

        return evaluate_private.run(arguments, as_json)
    given = _parser().parse_args(arguments)
    _check(given)
    inputs = _read(given)
    measured = _measure(given, inputs, Reporter(quiet=as_json))
    rows = _rows(given, inputs, measured)
    outside = _outside(given)
    result = _result(given, rows, outside, inputs.reference_column)
    if given.output:
        write_json(Path(given.output), result)
    labels = short_names(inputs.names)
    shown = {labels[name]: row for name, row in rows.items()}
    title = f"{rows[inputs.names[0]]['prompts']:,} public prompts"
    if given.plot:
        from ..reporting.plots import plot_evaluation  # imports matplotlib

        plot_evaluation(shown, Path(given.plot), title=f"Reward against KL on {title}", outside=outside)
    if not as_json:
        print_evaluation(shown, title, outside, _notes(given, rows, labels, outside) + inputs.no_rouge)
    return result


@dataclass(frozen=True)
class _Inputs:
    """What is read before the first model is loaded.

    reference_column: column of the texts for ROUGE; no_rouge: a note on why there is none, where a reader may wonder.
    names: models in the order of the table; epsilons: what their statements say, None without one.
    """

    records: list[Record]
    reference_column: str | None
    no_rouge: list[str]
    device: str
    config: SamplingConfig
    reward: Reward
    reference_reward: Reward | None
    judge: Judge | None
    names: list[str]
    epsilons: dict[str, float | None]


def _read(given: argparse.Namespace) -> _Inputs:
    records = read_records(given.data)
    require_columns(records, [("prompt",), ("text",)], given.data)
    column, no_rouge = _reference_column(given, records)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if given.device == "auto" else given.device
    config = SamplingConfig(
        max_prompt_length=given.max_prompt_length,
        max_completion_length=given.max_completion_length,
        prompt_max_tokens=given.prompt_tokens,
        prepend_bos=given.prepend_bos,
        reward=RewardConfig(
            source=given.reward,
            is_public=given.reward_is_public,
            low=given.reward_low,
            high=given.reward_high,
            columns=given.reward_columns,
        ),
    )
    reward = load_reward(config.reward, device)
    reference_reward = None
    if given.reference_reward:
        # Declared or not: it decides nothing here, and its numbers are labelled by `_outside`.
        reference_reward = load_reward(
            RewardConfig(
                source=given.reference_reward,
                is_public=True,
                low=given.reference_reward_low,
                high=given.reference_reward_high,
                columns=given.reward_columns,
            ),
            device,
        )
    judge = load_judge(given.judge) if given.judge else None
    names = [*given.models, *([given.baseline] if given.baseline and given.baseline not in given.models else [])]
    epsilons = {name: stated_epsilon(name) for name in names}
    return _Inputs(records, column, no_rouge, device, config, reward, reference_reward, judge, names, epsilons)


def _reference_column(given: argparse.Namespace, records: list[Record]) -> tuple[str | None, list[str]]:
    """The column of reference texts, and a note if `completion` would be it but for records without a text."""
    column: str | None = given.reference_column
    no_rouge = []
    lacking = lacking_references(records, "completion")
    if column is None and not lacking:
        column = "completion"
    elif column is None and lacking < len(records):
        no_rouge = [f"no ROUGE: {lacking} of {len(records)} records have no text in column 'completion'"]
    if column:
        reference_texts(records, column, given.data)
    return column, no_rouge


def _measure(given: argparse.Namespace, inputs: _Inputs, reporter: Reporter) -> dict[str, Measured]:
    """Every model on the same prompts."""
    measured: dict[str, Measured] = {}
    first: tuple[PublicPrompts, list[str]] | None = None
    column = inputs.reference_column
    # A baseline that cannot be loaded is said first.
    for name in sorted(inputs.names, key=lambda n: n != given.baseline):
        with reporter.status(f"measuring {escape(name)}"):
            policy = Policy.load(ModelConfig(name_or_path=name), inputs.device)
            prompts = _prompts(policy, inputs.records, inputs.config, given, first)
            references = reference_texts(prompts.records, column, given.data) if column else None
            measured[name] = measure_policy(
                policy,
                prompts,
                inputs.reward,
                inputs.config,
                seed=given.seed,
                reference_reward=inputs.reference_reward,
                references=references,
            )
            first = first or (prompts, measured[name].prompts)
    return measured


def _rows(given: argparse.Namespace, inputs: _Inputs, measured: dict[str, Measured]) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {name: measured[name].evaluation.as_dict() for name in inputs.names}
    for name, row in rows.items():
        if inputs.epsilons[name] is not None:
            row["epsilon"] = inputs.epsilons[name]
        if given.baseline and name != given.baseline:
            row |= _against(measured[name], measured[given.baseline], inputs.judge, given.judge)
    return rows


def _parser() -> Parser:
    parser = Parser(
        prog="dpalign evaluate",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="+", help="releases or base models")
    data = parser.add_argument_group("prompts")
    data.add_argument("--data", required=True, help="file with `prompt`, or `text` to cut prompts from")
    data.add_argument("--eval_is_public", action="store_true", help="declare the prompts public")
    data.add_argument("--num_prompts", type=int, help="use only the first so many prompts")
    data.add_argument("--prompt_tokens", type=int, help="cut `text` into prompts of this many tokens (default 8)")
    data.add_argument("--max_prompt_length", type=int, default=64, help="a longer prompt is an error (default 64)")
    data.add_argument("--max_completion_length", type=int, default=16, help="tokens that are sampled (default 16)")
    data.add_argument("--prepend_bos", action="store_true", help="put BOS in front, as the recipes here do")
    data.add_argument("--seed", type=int, default=0, help="of the sampling, the same for every model")
    data.add_argument(
        "--reference_column",
        help="column of reference texts for ROUGE-1, -2 and -L (default: `completion` if every record has one)",
    )
    rewards = parser.add_argument_group("rewards")
    rewards.add_argument(
        "--reward", default="vader", help="vader (default), classifier:PATH, reward_model:PATH or module:function"
    )
    rewards.add_argument("--reward_is_public", action="store_true", help="declare a classifier or function public")
    rewards.add_argument("--reward_low", type=float, help="declared range of the reward, for module:function")
    rewards.add_argument("--reward_high", type=float)
    rewards.add_argument("--reward_columns", nargs="*", default=[], help="columns of the data that functions are given")
    rewards.add_argument("--reference_reward", help="a second reward, in a column of its own; may be non-private")
    rewards.add_argument(
        "--reference_reward_is_public",
        action="store_true",
        help="declare a classifier or function public; without it, its column is labelled",
    )
    rewards.add_argument("--reference_reward_low", type=float)
    rewards.add_argument("--reference_reward_high", type=float)
    wins = parser.add_argument_group("win rate")
    wins.add_argument("--baseline", help="a model: how often is each of the others better on the same prompt?")
    wins.add_argument(
        "--judge",
        help="module:function, f(prompts, completions_a, completions_b) -> probabilities in [0, 1] that a is better; "
        "asked in both orders and averaged (default: the higher reward wins)",
    )
    wins.add_argument("--judge_is_public", action="store_true", help="declare that no private data made the judge")
    out = parser.add_argument_group("results")
    out.add_argument("--output", help="also write the result to this JSON file")
    out.add_argument("--plot", help="reward against KL with intervals: a file ending in .png, .pdf or .svg")
    out.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    return parser


def _check(given: argparse.Namespace) -> None:
    # What can be refused is refused before the first model is loaded.
    if not given.eval_is_public:
        raise DPAlignError("evaluation is exact and shows no noise: declare the prompts public with --eval_is_public.")
    for name in ("num_prompts", "prompt_tokens", "max_prompt_length", "max_completion_length"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise DPAlignError(f"--{name} {value} must be at least 1.")
    twice = next((name for name in given.models if given.models.count(name) > 1), None)
    if twice:
        raise DPAlignError(f"model {twice!r} is given twice: name each model once.")
    for name in [*given.models, *filter(None, [given.baseline])]:
        # A hub name is tried when it is loaded; this cannot be one.
        if not Path(name).exists() and (name.count("/") > 1 or name[:1] in ("", ".", "/", "~")):
            raise DPAlignError(f"model {name!r} is neither a folder here nor the name of a model on the hub.")
    if given.judge and not given.baseline:
        raise DPAlignError("--judge compares two models: name the one to compare with by --baseline.")
    if given.plot and Path(given.plot).suffix not in PLOT_ENDINGS:
        raise DPAlignError(f"--plot {given.plot} must end in {', '.join(PLOT_ENDINGS)}.")
    for name in ("output", "plot"):
        path = getattr(given, name)
        if path and not Path(path).parent.is_dir():
            raise DPAlignError(f"the folder of --{name} {path} does not exist: create it first.")


def _prompts(
    policy: Policy,
    records: list[Record],
    config: SamplingConfig,
    given: argparse.Namespace,
    first: tuple[PublicPrompts, list[str]] | None,
) -> PublicPrompts:
    """The model's prompts: those of the first model, also where another tokenizer would cut texts elsewhere."""
    prompts = public_prompts(policy, records, config, given.num_prompts)
    if first is not None and "prompt" not in records[0]:
        earlier, texts = first
        if policy.tokenizer.batch_decode(prompts.ids, skip_special_tokens=True) != texts:
            cut = [{**r, "prompt": text} for r, text in zip(earlier.records, texts, strict=True)]
            prompts = public_prompts(policy, cut, config)
    check_prompts(policy.tokenizer, prompts.records, config, given.data)
    if not all(prompts.ids):
        raise DPAlignError(f"a prompt of {given.data} has no token: give every record text, or --prepend_bos.")
    needed = max(map(len, prompts.ids)) + config.max_completion_length
    limit = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and needed > limit:
        raise DPAlignError(
            f"prompt and completion need {needed} positions and a model has {limit}: lower --max_completion_length or "
            "shorten the prompts."
        )
    return prompts


def _against(ours: Measured, baseline: Measured, judge: Judge | None, name: str | None) -> dict[str, Any]:
    if judge is None:
        won = win_rate(higher_wins(ours.rewards, baseline.rewards))
    else:
        won = win_rate(*judged(judge, str(name), baseline.prompts, ours.completions, baseline.completions))
    return _fields(won)


def _fields(won: WinRate) -> dict[str, Any]:
    fields = {"win_rate": won.win_rate, "win_rate_low": won.low, "win_rate_high": won.high, "win_rate_pairs": won.pairs}
    return fields if won.position_bias is None else fields | {"judge_position_bias": won.position_bias}


# What the guarantee does not cover -----------------------------------------------------------------------------------


def _outside(given: argparse.Namespace) -> list[str]:
    """Columns whose numbers rest on private data without a guarantee, or on something undeclared."""
    outside = []
    if is_outside_the_guarantee(given.reward, given.reward_is_public):
        outside.append("reward")
    if given.reference_reward and is_outside_the_guarantee(given.reference_reward, given.reference_reward_is_public):
        outside.append("reference_reward")
    if given.baseline and (not given.judge_is_public if given.judge else "reward" in outside):
        outside.append("win_rate")
    return outside


def _result(
    given: argparse.Namespace, rows: dict[str, dict[str, Any]], outside: list[str], column: str | None
) -> dict[str, Any]:
    result: dict[str, Any] = {"data": given.data, "reward": given.reward, "seed": given.seed, "intervals": INTERVALS}
    if given.reference_reward:
        result["reference_reward"] = {
            "source": given.reference_reward,
            "outside_the_guarantee": "reference_reward" in outside,
        }
    if given.baseline:
        result["baseline"] = given.baseline
        result["judge"] = {"source": given.judge or given.reward, "outside_the_guarantee": "win_rate" in outside}
    if column:
        result["reference_column"] = column
    models = [name for name, row in rows.items() if row.get("epsilon") == math.inf]
    return result | {"outside_the_guarantee": {"columns": outside, "models": models}, "models": rows}


def _notes(
    given: argparse.Namespace, rows: dict[str, dict[str, Any]], labels: dict[str, str], outside: list[str]
) -> list[str]:
    """What a reader of the table must know."""
    lines = [f"reward: {given.reward}"]
    if given.reference_reward:
        lines.append(f"reference reward: {given.reference_reward}")
    if given.baseline:
        how = f"judge {given.judge}, asked in both orders" if given.judge else "the higher reward wins, ties half"
        lines.append(f"win rate against {given.baseline}: {how}; 95% Wilson interval")
    lines += [
        f"the judge leans to the first of two completions by {row['judge_position_bias']:+.3f} ({labels[name]})"
        for name, row in rows.items()
        if abs(row.get("judge_position_bias", 0.0)) > 0.05
    ]
    unprotected = [c.replace("_", " ") for c in outside]
    unprotected += [labels[name] for name, row in rows.items() if row.get("epsilon") == math.inf]
    if unprotected:
        what = ", ".join(unprotected)
        lines.append(f"{OUTSIDE}: {what}. Made from private data without one, or not declared public: not for release.")
    return lines


def short_names(names: list[str]) -> dict[str, str]:
    """Each name's last parts, as many as tell all names apart."""
    parts = {name: Path(name).parts or (name,) for name in names}
    for count in range(1, max(map(len, parts.values())) + 1):
        short = {name: "/".join(p[-count:]) for name, p in parts.items()}
        if len(set(short.values())) == len(names):
            return short
    return {name: name for name in names}
