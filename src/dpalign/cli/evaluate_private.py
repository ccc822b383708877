"""`dpalign evaluate --private`: one noisy measurement of a model on held-out private units."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import secrets
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..algorithms import PPOConfig
from ..algorithms.rollouts import check_prompt_columns
from ..data.load import DataConfig, read_records
from ..data.units import build_units
from ..errors import DPAlignError
from ..evaluation.guarantee import is_outside_the_guarantee, stated_epsilon
from ..evaluation.private import PrivateEvaluationConfig, evaluate_privately, plan_evaluation
from ..files import private_folder, write_json
from ..models import ModelConfig, Policy
from ..planning import check_lengths
from ..privacy import accountant
from ..privacy.ledger import Ledger
from ..privacy.statement import account, read_statement, state_privacy
from ..reporting.numbers import all_runs, at_most
from ..rewards import RewardConfig, load_reward
from ..rewards.load import RELEASED
from .arguments import Parser

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
    if (given.epsilon is None) == (given.noise_multiplier is None):
        raise DPAlignError("give exactly one of --epsilon and --noise_multiplier.")
    if given.noise_multiplier == 0 or given.epsilon == math.inf:
        raise DPAlignError(
            "without noise the measurement would show the held-out units: give a finite --epsilon, or measure public "
            "prompts (dpalign evaluate without --private)."
        )
    _refuse_unprivate(given)
    policy = Policy.load(ModelConfig(name_or_path=given.model), "cuda" if torch.cuda.is_available() else "cpu")
    if not policy.adapters:
        raise DPAlignError(f"{given.model} has no adapter to compare with its base: give a release.")
    config = PPOConfig(
        max_prompt_length=given.max_prompt_length,
        max_completion_length=given.max_completion_length,
        prompt_max_tokens=given.prompt_tokens,
        prepend_bos=given.prepend_bos,
        reward=RewardConfig(
            source=given.reward, is_public=given.reward_is_public, low=given.reward_low, high=given.reward_high
        ),
    )
    reward = load_reward(config.reward, policy.device)
    records = read_records(given.data)
    check_prompt_columns(policy, records, given.data, config)
    check_lengths("evaluation", config, policy.model.config)
    source = DataConfig(
        name=given.dataset_name,
        path=given.data,
        unit=given.unit,
        max_records_per_unit=given.max_records_per_unit,
        declared_units=given.declared_units,
    )
    ledger = Ledger(given.ledger)
    data = build_units(records, source, ledger)
    delta = given.delta if given.delta is not None else accountant.default_delta(int(data.declared_units))
    settings = PrivateEvaluationConfig(
        target_epsilon=given.epsilon, noise_multiplier=given.noise_multiplier, target_delta=delta
    )
    plan = plan_evaluation(settings, data.declared_units)
    folder = private_folder(Path(given.output_dir) / "private")
    identity = _identity(folder, given)
    stages = [s for name in _folders(given) for s in (read_statement(name) or ({}, []))[1]]  # before anything is spent
    result = evaluate_privately(policy, data, plan, reward, config, folder=folder, run=identity, ledger=ledger)
    if result is None:
        raise DPAlignError(
            "this measurement was lost by an interruption and its budget is spent: another --output_dir spends again."
        )
    result = {"model": given.model, "reward_source": given.reward, **result, "delta": delta}
    result["epsilon_with_the_models"] = state_privacy(identity, ledger, delta, stages, [], set()).epsilon
    result["assumptions"] = _assumptions(given, {stage.dataset for stage in stages})
    result["ledger"] = account(ledger, given.dataset_name, delta)
    ledger.close()
    write_json(Path(given.output_dir) / "evaluation.json", result)
    if not as_json:
        _print(result)
    return result


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
    parser.add_argument("--max_records_per_unit", type=int, default=1)
    parser.add_argument("--declared_units", type=int, help="public number of units (default: counted, and so public)")
    parser.add_argument(
        "--model_is_public", action="store_true", help="declare a model without a privacy statement public"
    )
    parser.add_argument("--epsilon", type=float, help="epsilon of the measurement")
    parser.add_argument("--noise_multiplier", type=float, help="sigma instead of epsilon")
    parser.add_argument("--delta", type=float, help="default: min(1e-5, 1/(10 units))")
    parser.add_argument(
        "--reward", default="vader", help="vader, classifier:PATH, reward_model:PATH or module:function"
    )
    parser.add_argument("--reward_is_public", action="store_true", help="declare any reward but vader public")
    parser.add_argument("--reward_low", type=float, help="declared range of the reward; values are clipped to it")
    parser.add_argument("--reward_high", type=float)
    parser.add_argument("--prompt_tokens", type=int, help="cut `text` into prompts of this many tokens (default 8)")
    parser.add_argument("--max_prompt_length", type=int, default=64)
    parser.add_argument("--max_completion_length", type=int, default=16)
    parser.add_argument("--prepend_bos", action="store_true", help="put BOS in front, as the recipes here do")
    parser.add_argument("--ledger", help="the ledger file (default: as for `dpalign run`)")
    parser.add_argument("--output_dir", required=True, help="folder of this measurement")
    return parser


def _refuse_unprivate(given: argparse.Namespace) -> None:
    """The numbers carry one epsilon: what was made from private data without one must not enter them."""
    if stated_epsilon(given.model) is None and not given.model_is_public:
        raise DPAlignError(
            f"{given.model} has no privacy.json: give a dpalign release, or declare that it was made without private "
            "data (--model_is_public)."
        )
    if stated_epsilon(given.model) == math.inf:
        raise DPAlignError(
            f"{given.model} was trained without privacy: numbers made with it have no guarantee to state."
        )
    if is_outside_the_guarantee(given.reward, given.reward_is_public):
        raise DPAlignError(
            f"reward {given.reward!r} is neither public (--reward_is_public) nor a private release: the measurement "
            "would have no guarantee."
        )


def _folders(given: argparse.Namespace) -> list[Path]:
    """Of the model and the reward, where they are releases."""
    return [Path(given.model), Path(given.reward.removeprefix(f"{RELEASED}:"))]


def _assumptions(given: argparse.Namespace, datasets: set[str]) -> list[str]:
    name = given.dataset_name
    others = ", ".join(map(repr, sorted(datasets - {name})))
    said = {
        f"the number of units of {name!r} is public": not given.declared_units,
        f"the units of {name!r} are not in {others} (declared by its name)": bool(others),
        f"model {given.model!r} was made without the private data (declared)": given.model_is_public,
        f"reward {given.reward!r} was made without the private data (declared)": given.reward_is_public,
    }
    return [text for text, holds in said.items() if holds]


def _identity(folder: Path, given: argparse.Namespace) -> str:
    """The measurement's name in the ledger; the folder belongs to one measurement."""
    file, asked = folder / "run.json", vars(given) | {"output_dir": None, "weights": _weights(given)}
    if not file.exists():
        write_json(file, {"run": f"{Path(given.output_dir).name}-{secrets.token_hex(4)}", "asked": asked})
    value = json.loads(file.read_text(encoding="utf-8"))
    if value["asked"] != asked:
        raise DPAlignError(f"{given.output_dir} holds another measurement: choose another --output_dir for this one.")
    return str(value["run"])


def _weights(given: argparse.Namespace) -> list[str]:
    """SHA-256 of the adapters: a release that was trained again at the same path is another model."""
    files = [folder / "adapter_model.safetensors" for folder in _folders(given)]
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()]


def _print(result: dict[str, Any]) -> None:
    console = Console(highlight=False)
    noise = result["noise_standard_deviation"]
    for key, label in (
        ("reward", "mean reward"),
        ("reward_reference", "mean reward of the base"),
        ("win_rate", "win rate over the base"),
    ):
        console.print(f"{label}: {result[key]:.3f} (standard deviation of the noise {noise[key]:.3f})")
    entry = result["ledger"]
    console.print(
        f"epsilon {at_most(result['epsilon'])} at delta {result['delta']:.3g} on {result['units']:g} units; all "
        f"{entry['runs']} run(s) on {entry['dataset']!r} together: {all_runs(entry)}.",
        markup=False,
    )
    with_models = at_most(float(result["epsilon_with_the_models"]))
    console.print(f"with the stages that the model and the reward were trained in: epsilon {with_models}.")
    for assumption in result["assumptions"]:
        console.print(f"assumed: {assumption}", markup=False)
