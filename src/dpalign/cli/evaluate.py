"""`dpalign evaluate`: models side by side on public prompts, in one table, JSON and a plot."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..domains import COUNT, LENGTH, SCALE, SEEDS
from ..errors import DPAlignError
from ..files import write_json
from ..settings.rollouts import SamplingConfig
from .arguments import DTYPE, DTYPES, LEDGER, PREPEND_BOS, Parser, Switch, add_shared_texts, number
from .rewards import add_reward, reward_of

if TYPE_CHECKING:
    from ..evaluation import Comparison
    from ..reporting.progress import Reporter

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


def run(arguments: list[str], as_json: bool) -> dict[str, Any]:
    """Returns one row per model."""
    if "--private" in arguments:
        from . import evaluate_private

        return evaluate_private.run(arguments, as_json)
    given = _parser().parse_args(arguments)
    _check(given)

    from ..reporting.progress import Reporter  # these import torch
    from ..reporting.tables import print_evaluation

    comparison = _compare(given, Reporter(quiet=as_json))
    result = comparison.to_json()
    if given.output:
        write_json(Path(given.output), result)
    labels = short_names(list(comparison.models))
    shown = {labels[name]: model.as_dict() for name, model in comparison.models.items()}
    title, outside = f"{comparison.prompts:,} public prompts", comparison.columns_outside
    if given.plot:
        from ..reporting.plots import plot_evaluation  # imports matplotlib

        plot_evaluation(shown, Path(given.plot), title=f"Reward against KL on {title}", outside=outside)
    if not as_json:
        print_evaluation(shown, title, outside, _notes(comparison, labels))
    return result


def _compare(given: argparse.Namespace, reporter: Reporter) -> Comparison:
    from ..evaluation import compare
    from ..release import as_trained

    return compare(
        given.models,
        given.data,
        SamplingConfig(
            max_prompt_length=given.max_prompt_length,
            max_completion_length=given.max_completion_length,
            prompt_max_tokens=given.prompt_tokens,
            prepend_bos=as_trained(given.models, given.prepend_bos),
            reward=reward_of(given),
        ),
        prompts_are_public=given.eval_is_public,
        num_prompts=given.num_prompts,
        baseline=given.baseline,
        judge=given.judge,
        judge_is_public=given.judge_is_public,
        reference_reward=reward_of(given, "reference_reward") if given.reference_reward else None,
        reference_column=given.reference_column,
        seed=given.seed,
        device=given.device,
        dtype=given.dtype,
        shared_texts=given.shared_texts,
        ledger=given.ledger,
        status=lambda doing: reporter.status(doing),
    )


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
    add_shared_texts(data, "checked: no prompt is in private data that the ledger knows; declared: it is public anyway")
    data.add_argument("--ledger", help=LEDGER)
    data.add_argument("--num_prompts", type=number(int, COUNT), help="use only the first so many prompts")
    data.add_argument(
        "--prompt_tokens", type=number(int, LENGTH), help="cut `text` into prompts of this many tokens (default 8)"
    )
    data.add_argument(
        "--max_prompt_length", type=number(int, LENGTH), default=64, help="a longer prompt is an error (default 64)"
    )
    data.add_argument(
        "--max_completion_length",
        type=number(int, "[1, 100000]"),
        default=16,
        help="tokens that are sampled (default 16)",
    )
    data.add_argument("--prepend_bos", action=Switch, help=PREPEND_BOS)
    data.add_argument("--seed", type=number(int, SEEDS), default=0, help="of the sampling, the same for every model")
    data.add_argument(
        "--reference_column",
        help="column of reference texts for ROUGE-1, -2 and -L (default: `completion` if every record has one)",
    )
    _add_rewards(parser)
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
    out.add_argument("--dtype", choices=DTYPES, default="auto", help=DTYPE)
    return parser


def _add_rewards(parser: Parser) -> None:
    rewards = parser.add_argument_group("rewards")
    add_reward(rewards, "vader")
    rewards.add_argument("--reference_reward", help="a second reward, in a column of its own; may be non-private")
    rewards.add_argument(
        "--reference_reward_is_public",
        action="store_true",
        help="declare a classifier or function public; without it, its column is labelled",
    )
    rewards.add_argument("--reference_reward_low", type=number(float, SCALE))
    rewards.add_argument("--reference_reward_high", type=number(float, SCALE))


def _check(given: argparse.Namespace) -> None:
    # What `compare` cannot know, or would say without the name of the option.
    for name in ("num_prompts", "prompt_tokens", "max_prompt_length", "max_completion_length"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise DPAlignError(f"--{name} {value} must be at least 1.")
    if given.plot and Path(given.plot).suffix not in PLOT_ENDINGS:
        raise DPAlignError(f"--plot {given.plot} must end in {', '.join(PLOT_ENDINGS)}.")
    for name in ("output", "plot"):
        path = getattr(given, name)
        if path and not Path(path).parent.is_dir():
            raise DPAlignError(f"the folder of --{name} {path} does not exist: create it first.")


def _notes(comparison: Comparison, labels: dict[str, str]) -> list[str]:
    """What a reader of the table must know."""
    from ..reporting.tables import OUTSIDE

    lines = [f"reward: {comparison.reward}"]
    if comparison.reference_reward:
        lines.append(f"reference reward: {comparison.reference_reward}")
    if comparison.baseline:
        judge = comparison.judge
        how = f"judge {judge}, asked in both orders" if judge else "the higher reward wins, ties half"
        lines.append(f"win rate against {comparison.baseline}: {how}; 95% Wilson interval")
    leans = {name: model.won.position_bias or 0.0 for name, model in comparison.models.items() if model.won}
    lines += [
        f"the judge leans to the first of two completions by {bias:+.3f} ({labels[name]})"
        for name, bias in leans.items()
        if abs(bias) > 0.05
    ]
    unprotected = [column.replace("_", " ") for column in comparison.columns_outside]
    unprotected += [labels[name] for name in comparison.models_outside]
    if unprotected:
        what = ", ".join(unprotected)
        lines.append(f"{OUTSIDE}: {what}. Made from private data without one, or not declared public: not for release.")
    lines += [f"assumed: {assumption}" for assumption in comparison.assumptions]
    return lines + ([comparison.no_rouge] if comparison.no_rouge else [])


def short_names(names: list[str]) -> dict[str, str]:
    """Each name's last parts, as many as tell all names apart."""
    parts = {name: Path(name).parts or (name,) for name in names}
    for count in range(1, max(map(len, parts.values())) + 1):
        short = {name: "/".join(p[-count:]) for name, p in parts.items()}
        if len(set(short.values())) == len(names):
            return short
    return {name: name for name in names}
