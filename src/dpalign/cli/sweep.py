"""`dpalign sweep`: a recipe over epsilons and seeds, as in the paper's tables and figure."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ..algorithms import TrainingConfig
from ..algorithms.completions import check_prompts
from ..algorithms.rollouts import RolloutConfig
from ..data.load import read_records
from ..errors import DPAlignError
from ..evaluation import evaluate_policy, public_prompts
from ..evaluation.guarantee import is_outside_the_guarantee
from ..files import dumps, write_json
from ..models import Policy
from ..privacy import accountant
from ..privacy.ledger import Ledger
from ..privacy.statement import account
from ..provenance import check_provenance
from ..recipe import Recipe
from ..reporting.numbers import all_runs
from ..reporting.progress import Reporter
from ..reporting.sweep import plot_sweep, summarize_sweep, sweep_table, write_markdown
from ..rewards import RewardConfig, is_reward_model, load_reward
from ..stages import STAGES
from .arguments import Parser
from .parsing import recipe_from

DESCRIPTION = """Runs a recipe once for each epsilon and seed, each run in a process of its own, and prints the mean and
95% interval over seeds. Epsilon 0 is the pretrained model, inf the run without privacy.

Every finished run is appended to OUTPUT_DIR/runs.jsonl and is not run again, so the same command goes on after an
interruption. Every run is in the ledger: on private data all of them add up, and the report says to what. To
tune without that cost, tune on public text of the same kind (--public_proxy FILE)."""
EXAMPLES = """examples:
  dpalign sweep recipe.yaml --epsilons 0 1 2:1 4 8:1 inf --seeds 3 --output_dir runs/sweep
  dpalign sweep recipe.yaml --epsilons 4 --vary ppo.num_ppo_epochs 1 2 4 8 --output_dir runs/passes
  dpalign sweep recipe.yaml --epsilons 4 --public_proxy public.jsonl --vary ppo.learning_rate 2e-3 4e-3 8e-3
  dpalign sweep recipe.yaml --epsilons 4 inf --at inf ppo.learning_rate=2e-3 --ppo.max_steps 20"""
MEASURED = ("reward", "reference_reward", "kl", "perplexity", "distinct_2", "completion_length")


@dataclass(frozen=True)
class Trial:
    """One run of the sweep: its epsilon as written, its seed, the value of the varied field, and its overrides."""

    epsilon: str
    seed: int
    value: str | None
    overrides: tuple[str, ...]

    @property
    def key(self) -> tuple[str, int, str | None]:
        return self.epsilon, self.seed, self.value

    @property
    def folder(self) -> str:
        varied = "" if self.value is None else "-" + "".join(c if c.isalnum() or c in ".-" else "_" for c in self.value)
        return f"epsilon-{self.epsilon}{varied}-seed-{self.seed}"


def run(arguments: list[str], as_json: bool) -> dict[str, Any]:
    """Returns the table's rows, and what all runs spent together."""
    given, overrides = _parser().parse_known_args(arguments)
    folder = Path(given.output_dir)
    shared = [*overrides, *_proxy(given)]
    recipe = recipe_from("sweep", [given.recipe, *shared], DESCRIPTION)
    _rollouts(recipe)
    data = recipe.data_of(_sampling_stage(recipe))
    if not data.eval_path or not data.eval_is_public:
        raise DPAlignError("a sweep compares runs on public prompts: set data.eval_path and data.eval_is_public: true.")
    trials = _trials(given, recipe)
    recipes = [recipe_from("sweep", [given.recipe, *shared, *trial.overrides], DESCRIPTION) for trial in trials]
    for trial, asked in zip(trials, recipes, strict=True):  # what is wrong is said before any run
        _check(trial, asked)
    reporter = Reporter(quiet=as_json)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "runs.jsonl"
    done = _finished(log, given.recipe, shared)
    for number, trial in enumerate(trials, 1):
        if trial.key in done:
            _check_same(done[trial.key], trial, log)
            continue
        reporter.note(
            f"run {number} of {len(trials)}: epsilon {trial.epsilon}, seed {trial.seed}" + _says(given, trial)
        )
        row = (
            _pretrained(recipe, trial, reporter) if trial.epsilon == "0" else _run(given.recipe, shared, trial, folder)
        )
        done[trial.key] = {"recipe": given.recipe, "overrides": shared, "of_trial": list(trial.overrides), **row}
        with open(log, "a", encoding="utf-8") as file:
            file.write(dumps(done[trial.key], indent=None) + "\n")
    result = {
        "recipe": given.recipe,
        "overrides": shared,
        "varied": given.vary[0] if given.vary else None,
        "command": " ".join(["dpalign sweep", *arguments]),
        "rows": summarize_sweep([done[t.key] for t in trials]),
        "spent_by_tuning": _spent(
            recipes, max([float(done[t.key].get("delta") or 0) for t in trials], default=0) or 1e-5
        ),
    }
    write_json(folder / "sweep.json", result)
    write_markdown(folder / "sweep.md", result)
    plot_sweep(result, folder / "sweep.png")
    if not as_json:
        console = Console(highlight=False)
        console.print(sweep_table(result))
        for line in result["spent_by_tuning"]:
            console.print(line["sentence"], markup=False)
        console.print(f"{folder}/sweep.json, sweep.md, sweep.png; one line per run in runs.jsonl", markup=False)
    return result


def _parser() -> Parser:
    parser = Parser(
        prog="dpalign sweep",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="the recipe; its fields can be overridden as in `dpalign run`")
    parser.add_argument(
        "--epsilons",
        nargs="+",
        default=["0", "1", "2", "4", "8", "inf"],
        metavar="EPSILON[:SEEDS]",
        help="epsilons, each perhaps with a number of seeds of its own (default: 0 1 2 4 8 inf)",
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each epsilon (default 3)")
    parser.add_argument("--vary", nargs="+", metavar=("FIELD", "VALUE"), help="also run every value of this field")
    parser.add_argument(
        "--at",
        nargs="+",
        action="append",
        default=[],
        metavar=("EPSILON", "FIELD=VALUE"),
        help="overrides for one epsilon alone (a learning rate tuned for it, say); may be given several times",
    )
    parser.add_argument(
        "--public_proxy", help="public file that takes the place of all private data: tuning on it is free"
    )
    parser.add_argument("--output_dir", default="runs/sweep", help="where all runs and the report go")
    return parser


def _proxy(given: argparse.Namespace) -> list[str]:
    # Declared public: its runs go under a name of their own, and cost the private data nothing.
    if not given.public_proxy:
        return []
    fields = {"name": "public-proxy", "path": given.public_proxy, "is_demo": "true", "declared_units": "null"}
    return [
        word
        for section in ("data", *(f"{s}_data" for s in STAGES))
        for word in ([f"--{section}", "null"] if section != "data" else [])
    ] + [word for name, value in fields.items() for word in (f"--data.{name}", value)]


def _trials(given: argparse.Namespace, recipe: Recipe) -> list[Trial]:
    if given.vary and len(given.vary) < 2:
        raise DPAlignError("--vary needs a field and at least one value: --vary ppo.num_ppo_epochs 1 2 4.")
    values: list[str | None] = list(given.vary[1:]) if given.vary else [None]
    only: dict[str, list[str]] = {}
    for epsilon, *fields in given.at:
        for text in fields:
            name, equals, value = text.partition("=")
            if not equals:
                raise DPAlignError(f"--at {epsilon} {text}: expected FIELD=VALUE, such as ppo.learning_rate=2e-3.")
            only.setdefault(epsilon, []).extend([f"--{name}", value])
    stages = [name for name, config in recipe.stages.items() if isinstance(config, TrainingConfig)]
    trials = []
    for text in given.epsilons:
        epsilon, _, count = text.partition(":")
        try:
            number, seeds = float(epsilon), int(count or given.seeds)
        except ValueError:
            raise DPAlignError(
                f"--epsilons {text!r}: expected an epsilon (0, 4, inf), perhaps with seeds (4:3)."
            ) from None
        if number != 0:
            accountant.check_epsilon(number)
        if seeds < 1:
            raise DPAlignError(f"--epsilons {text!r} asks for {seeds} seeds: give at least 1.")
        for value in values:
            for seed in range(seeds):
                words = ["--target_epsilon", epsilon] if number != 0 else []
                words += [word for stage in stages for word in (f"--{stage}.seed", str(seed))]
                words += [f"--{given.vary[0]}", value] if value is not None else []
                words += ["--eval_seed", str(seed), *only.get(epsilon, [])]
                trials.append(Trial("0" if number == 0 else epsilon, seed, value, tuple(words)))
    unknown = set(only) - {t.epsilon for t in trials}
    if unknown:
        raise DPAlignError(f"--at {unknown.pop()} is none of the swept epsilons.")
    return trials


def _finished(log: Path, recipe: str, shared: list[str]) -> dict[tuple[str, int, str | None], dict[str, Any]]:
    if not log.exists():
        return {}
    rows = []
    for number, line in enumerate(log.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise DPAlignError(
                f"line {number} of {log} is damaged: delete that line, and its run is made again."
            ) from None
    if any(row["recipe"] != recipe or row["overrides"] != shared for row in rows):
        raise DPAlignError(f"{log} holds runs of another recipe or other overrides: choose another --output_dir.")
    return {(row["epsilon"], row["seed"], row["value"]): row for row in rows}


def _check_same(row: dict[str, Any], trial: Trial, log: Path) -> None:
    if row["of_trial"] != list(trial.overrides):
        raise DPAlignError(
            f"epsilon {trial.epsilon}, seed {trial.seed} was run with other settings (--at, --vary): delete its line "
            f"in {log} and its folder to run it again, or choose another --output_dir."
        )


def _run(recipe: str, shared: list[str], trial: Trial, folder: Path) -> dict[str, Any]:
    output = folder / "runs" / trial.folder
    command = [sys.executable, "-m", "dpalign", "run", recipe, "--json", *shared, *trial.overrides]
    done = subprocess.run([*command, "--output_dir", str(output)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise DPAlignError(f"the run in {output} failed (above): mend it and call the sweep again; finished runs stay.")
    summary = json.loads(done.stdout)
    last = list(summary["evaluation"])[-1]
    row = {name: summary["evaluation"][last][name] for name in MEASURED if name in summary["evaluation"][last]}
    before = {k: v for k, v in summary["evaluation"].items() if k != last}
    stages = {s["stage"]: s["mechanisms"][0]["noise_multiplier"] for s in summary["stages"]}
    return {
        "epsilon": trial.epsilon,
        "seed": trial.seed,
        "value": trial.value,
        **row,
        "reward_ci95_prompts": summary["evaluation"][last]["reward_ci95"],
        "before": before,
        "reward_model": summary.get("reward_model"),
        "spent_epsilon": summary["epsilon"],
        "delta": summary["delta"],
        "noise_multipliers": stages,
        "seconds": summary.get("seconds"),
    }


def _check(trial: Trial, recipe: Recipe) -> None:
    """Refuses rows that would not be what their label says.

    Raises:
        DPAlignError: an inf with noise, or a pretrained model that has seen private data or needs a private reward.
    """
    if trial.epsilon == "inf":
        fixed = [n for n, c in recipe.stages.items() if c.target_epsilon is not None or c.noise_multiplier is not None]
        if fixed:
            raise DPAlignError(
                f"stage {fixed[0]} has a target_epsilon or noise_multiplier of its own, so a run at inf would not be "
                "without privacy: leave inf out, or the stage's own setting."
            )
    if trial.epsilon != "0":
        return
    if check_provenance(recipe)["model"].stages:
        raise DPAlignError(
            f"epsilon 0 is the pretrained model, and {recipe.model.name_or_path} has been trained on private data "
            "already: leave 0 out, or start from its base model."
        )
    reference = _reward_of_pretrained(recipe)
    if not is_reward_model(_rollouts(recipe).reward):
        return
    is_demo = all(recipe.data_of(name).is_demo for name in recipe.stages)
    if is_outside_the_guarantee(reference.source, reference.is_public) and not is_demo:
        raise DPAlignError(
            f"the reference reward {reference.source!r} has no guarantee, so its numbers on epsilon 0 are not shown: "
            "leave 0 out, or give a reference_reward that is public or a private release."
        )


def _sampling_stage(recipe: Recipe) -> str:
    return next(name for name, config in recipe.stages.items() if isinstance(config, RolloutConfig))


def _rollouts(recipe: Recipe) -> RolloutConfig:
    if recipe.rollouts is None:
        raise DPAlignError("a sweep measures what a stage that samples has trained: the recipe has none (ppo or rloo).")
    return recipe.rollouts


def _reward_of_pretrained(recipe: Recipe) -> RewardConfig:
    # A reward model is trained by a run, and the pretrained model has none: the reference reward stands in.
    reward = _rollouts(recipe).reward
    if not is_reward_model(reward):
        return reward
    if recipe.reference_reward is None:
        raise DPAlignError(
            "epsilon 0 has no reward model of its own: give the recipe a reference_reward, or leave 0 out."
        )
    return recipe.reference_reward


def _pretrained(recipe: Recipe, trial: Trial, reporter: Reporter) -> dict[str, Any]:
    config = _rollouts(recipe)
    policy = Policy.load(recipe.model)
    reward = load_reward(_reward_of_pretrained(recipe))
    data = recipe.data_of(_sampling_stage(recipe))
    records = read_records(data.eval_path or "", data.eval_split)
    check_prompts(policy.tokenizer, records, config, data.eval_path or "")
    prompts = public_prompts(policy, records, config, recipe.eval_prompts)
    with reporter.status("measuring the pretrained model"):
        found = evaluate_policy(policy, prompts, reward, config, seed=trial.seed)[0].as_dict()
    row = {name: found[name] for name in MEASURED if name in found}
    if is_reward_model(config.reward):
        row["reference_reward"] = row["reward"]
    return {
        "epsilon": "0",
        "seed": trial.seed,
        "value": trial.value,
        **row,
        "reward_ci95_prompts": found["reward_ci95"],
        "spent_epsilon": 0.0,
    }


def _says(given: argparse.Namespace, trial: Trial) -> str:
    return "" if trial.value is None else f", {given.vary[0]} {trial.value}"


def _spent(recipes: list[Recipe], delta: float) -> list[dict[str, Any]]:
    """What the ledger knows of each dataset: this sweep and everything else that ran on it."""
    ledger = Ledger(recipes[0].ledger)
    spent = []
    for config in {c.name: c for recipe in recipes for c in map(recipe.data_of, recipe.stages)}.values():
        entry = account(ledger, config.name, delta, demo=config.is_demo)
        exact = entry["runs_without_privacy"]
        cost = f"{all_runs(entry)} at delta {delta:.3g}"
        if config.is_demo:
            meaning = f"had it been private data, choosing by these results would have cost {cost}"
            meaning += ", and no bound at all for the runs without privacy" if exact else ""
        elif exact:
            meaning = (
                f"the private ones together {cost}, but these results show runs without privacy too: do not publish "
            )
            meaning += "them, and what was chosen by them has no guarantee"
        else:
            meaning = f"choosing by these results costs {cost}: quote it with whatever you release"
        sentence = (
            f"The ledger has {entry['runs']} runs on {config.name!r}, {exact} of them without privacy: {meaning}."
        )
        spent.append({**entry, "sentence": sentence})
    ledger.close()
    return spent
