"""`dpalign evaluate --private`: one noisy measurement of a model on held-out private units."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from ..domains import LENGTH, SCALE
from ..errors import DPAlignError
from ..files import write_json
from ..recipe import Recipe
from ..reporting.numbers import all_runs, at_most
from ..reporting.terminal import Terminal
from ..settings.data import DataConfig
from ..settings.measurement import MeasurementConfig
from ..settings.models import ModelConfig
from ..settings.rollouts import SamplingConfig
from .arguments import DTYPE, DTYPES, LEDGER, PREPEND_BOS, Parser, Switch, add_shared_texts, number
from .rewards import SOURCES, reward_section

DESCRIPTION = """Measures one model on held-out private prompts without showing any of them: the mean reward of the
model and of its base, and how often the model wins, as one Gaussian release. It is journaled in the ledger under the
data's name before anything is read, and adds to what has been spent there: give units that no training has seen, or
accept the sum that is printed. The same --output_dir gives the same numbers again and spends nothing."""
EXAMPLE = """example:
  dpalign evaluate runs/x/release --private --dataset_name support-chats-heldout --data heldout.jsonl --epsilon 1 \\
      --reward reward_model:runs/x/reward_model --output_dir runs/x-heldout"""


def run(arguments: list[str], as_json: bool) -> dict[str, Any]:
    """Returns the noisy means, the noise's standard deviations, and what the ledger has now."""
    given = _parser().parse_args(arguments)
    _check(given)

    from ..reporting.progress import Reporter  # these import torch
    from ..run import run_recipe

    results = run_recipe(recipe_of(given), reporter=Reporter(quiet=as_json))
    (found,) = results.measurements.values()
    if found is None:
        raise DPAlignError(
            "this measurement was lost by an interruption and its budget is spent: another --output_dir spends again."
        )
    statement = results.statement
    (entry,) = [entry for entry in statement.ledger if entry["dataset"] == given.dataset_name]
    result = {
        "model": given.model,
        "reward_source": given.reward,
        **found,
        "delta": statement.delta,
        "epsilon_with_the_models": statement.epsilon,
        "assumptions": statement.assumptions,
        "ledger": entry,
    }
    write_json(Path(given.output_dir) / "evaluation.json", result)
    if not as_json:
        _print(result)
    return result


def recipe_of(given: argparse.Namespace) -> Recipe:
    """A recipe of one stage, which measures; nothing but what the stage itself spends is bounded by a target."""
    from ..release import as_trained

    sampling = SamplingConfig(
        max_prompt_length=given.max_prompt_length,
        max_completion_length=given.max_completion_length,
        prompt_max_tokens=given.prompt_tokens,
        prepend_bos=as_trained([given.model], given.prepend_bos),
        reward=reward_section(
            given.reward, is_public=given.reward_is_public, low=given.reward_low, high=given.reward_high
        ),
    )
    return Recipe(
        output_dir=given.output_dir,
        model=ModelConfig(name_or_path=given.model, is_public=given.model_is_public, dtype=given.dtype),
        data=DataConfig(
            name=given.dataset_name,
            path=given.data,
            unit=given.unit,
            max_records_per_unit=given.max_records_per_unit,
            declared_units=given.declared_units,
        ),
        target_epsilon=math.inf,
        target_delta=given.delta,
        measurement=MeasurementConfig(
            target_epsilon=given.epsilon, noise_multiplier=given.noise_multiplier, sampling=sampling
        ),
        units_disjoint="declared",
        shared_texts=given.shared_texts,
        ledger=given.ledger,
        device=given.device,
    )


def _check(given: argparse.Namespace) -> None:
    if (given.epsilon is None) == (given.noise_multiplier is None):
        raise DPAlignError("give exactly one of --epsilon and --noise_multiplier.")
    if given.noise_multiplier == 0 or given.epsilon == math.inf:
        raise DPAlignError(
            "without noise the measurement would show the held-out units: give a finite --epsilon, or measure public "
            "prompts (dpalign evaluate without --private)."
        )


def _parser() -> Parser:
    parser = Parser(
        prog="dpalign evaluate --private",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="a release")
    parser.add_argument("--private", action="store_true", required=True)
    parser.add_argument("--dataset_name", required=True, help="declared name of the held-out data, the ledger's key")
    parser.add_argument("--data", required=True, help="file with `prompt`, or `text` to cut prompts from")
    parser.add_argument("--unit", help="column that names the privacy unit; without one each record is a unit")
    parser.add_argument("--max_records_per_unit", type=number(int, "[1, 1000000]"), default=1)
    told = "checked: no text of these is in other data that the ledger knows; declared: equal ones are other units'"
    add_shared_texts(parser, told)
    parser.add_argument(
        "--declared_units",
        type=number(int, "[1, 1000000000000]"),
        help="public number of units (default: counted, and so public)",
    )
    parser.add_argument(
        "--model_is_public", action="store_true", help="declare a model without a privacy statement public"
    )
    parser.add_argument("--epsilon", type=number(float, "(0, 1000]", or_inf=True), help="epsilon of the measurement")
    parser.add_argument("--noise_multiplier", type=number(float, "[0, 100000]"), help="sigma instead of epsilon")
    parser.add_argument("--delta", type=number(float, "(0, 1)"), help="default: min(1e-5, 1/(10 units))")
    parser.add_argument(
        "--reward",
        default="vader",
        help=f"vader, {SOURCES}",
    )
    parser.add_argument("--reward_is_public", action="store_true", help="declare any reward but vader public")
    parser.add_argument(
        "--reward_low", type=number(float, SCALE), help="declared range of the reward; values are clipped to it"
    )
    parser.add_argument("--reward_high", type=number(float, SCALE))
    parser.add_argument(
        "--prompt_tokens", type=number(int, LENGTH), help="cut `text` into prompts of this many tokens (default 8)"
    )
    parser.add_argument("--max_prompt_length", type=number(int, LENGTH), default=64)
    parser.add_argument("--max_completion_length", type=number(int, "[1, 100000]"), default=16)
    parser.add_argument("--prepend_bos", action=Switch, help=PREPEND_BOS)
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help=DTYPE)
    parser.add_argument("--ledger", help=LEDGER)
    parser.add_argument("--output_dir", required=True, help="folder of this measurement")
    return parser


def _print(result: dict[str, Any]) -> None:
    console = Terminal()
    noise = result["noise_standard_deviation"]
    for key, label in (
        ("reward", "mean reward"),
        ("reward_reference", "mean reward of the base"),
        ("win_rate", "win rate over the base"),
    ):
        console.print(f"{label}: {result[key]:.3f} (standard deviation of the noise {noise[key]:.3f})")
    entry = result["ledger"]
    console.say(
        f"epsilon {at_most(result['epsilon'])} at delta {result['delta']:.3g} on {result['units']:g} units; all "
        f"{entry['runs']} run(s) on {entry['dataset']!r} together: {all_runs(entry)}."
    )
    with_models = at_most(float(result["epsilon_with_the_models"]))
    console.print(f"with the stages that the model and the reward were trained in: epsilon {with_models}.")
    for assumption in result["assumptions"]:
        console.say(f"assumed: {assumption}")
