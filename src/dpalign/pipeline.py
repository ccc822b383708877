"""The stages of a recipe, one after the other, under one budget."""

from __future__ import annotations

import fcntl
import json
import math
import resource
import secrets
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import transformers

from .algorithms import PPO, SFT, PPOConfig, SFTConfig
from .algorithms.base import Algorithm, TrainingConfig
from .algorithms.ppo import check_ppo_columns
from .algorithms.sft import check_sft_columns
from .data.load import DataConfig, Record, read_records
from .data.units import UnitDataset, build_units, check_disjoint, count_units
from .errors import DPAlignError
from .evaluation import evaluate_stages, public_prompts
from .files import private_folder, write_json
from .models import Policy, embedded
from .privacy import accountant
from .privacy.ledger import Ledger
from .recipe import Recipe
from .reporting.progress import Reporter
from .reporting.release import write_release
from .reporting.statement import PrivacyStatement, StageStatement, epsilon_of, state_privacy
from .rewards import Reward, RewardFunction, load_reward
from .training import Stage, plan_stage

STAGES = ("sft", "ppo")
SAMPLES = 20  # public completions that are kept for people to read


@dataclass
class PreparedStage:
    """One stage before anything was drawn: its algorithm and the units that it may sample."""

    algorithm: Algorithm
    data: UnitDataset


def run_recipe(
    recipe: Recipe,
    *,
    reporter: Reporter | None = None,
    records: dict[str, list[Record]] | None = None,
    policy: Policy | None = None,
    reward_function: RewardFunction | None = None,
) -> dict[str, Any]:
    """Runs, resumes or finishes a recipe; returns what `summary.json` then holds.

    Args:
        records: records by stage instead of the data files (the Python trainers use this).
        policy: a loaded model instead of the recipe's.
        reward_function: a Python function instead of the one that ppo.reward.source names.

    Raises:
        DPAlignError: anything a person can mend, before the first draw wherever that is possible.
    """
    started = time.monotonic()
    _quiet_libraries()
    reporter = reporter or Reporter(quiet=True)
    if recipe.num_threads:
        torch.set_num_threads(recipe.num_threads)
    folder = Path(recipe.output_dir)
    names = [name for name in STAGES if getattr(recipe, name) is not None]
    if not names:
        raise DPAlignError("the recipe has no stage: give it a section sft, ppo or both.")
    private = private_folder(folder / "private")
    with _locked(private):
        ledger = _open_ledger(recipe)
        run = _run_identity(private, folder, ledger)
        earlier, assumed = check_provenance(recipe, names)
        policy = policy or Policy.load(recipe.model, _device(recipe.device))
        reward = load_reward(recipe.ppo.reward, policy.device, reward_function) if recipe.ppo else None
        stages, assumptions = prepare(recipe, names, policy, reward, ledger, records)
        assumptions = sorted({*assumptions, *assumed})
        delta = run_delta(recipe, names, stages)
        check_budget(recipe, stages, earlier, delta)
        for name in names:
            _run_stage(name, stages[name], policy, private, run, ledger, folder, recipe, reporter)
        demo = {c.name for c in _data_configs(recipe, names).values() if c.is_demo}
        statement = state_privacy(run, ledger, delta, earlier, assumptions, demo)
        base = embedded.resolve(recipe.model.name_or_path)
        if "earlier" in policy.adapters:
            base = policy.model.peft_config["earlier"].base_model_name_or_path
        title = f"{folder.name}, {'aligned privately' if statement.private else 'aligned WITHOUT privacy'}"
        with reporter.status("writing the release"):
            write_release(folder / "release", policy, statement, base, title)
        summary = summarize(statement, names, stages, folder)
        summary |= _evaluate(recipe, policy, reward, names, reporter)
        resources = {"seconds": round(time.monotonic() - started, 1), "peak_memory_mb": peak_memory_mb()}
        write_json(private / "resources.json", resources)
        if demo == {c.name for c in _data_configs(recipe, names).values()}:
            summary |= resources  # of private data, time and memory would tell how long the longest record is
        write_json(folder / "summary.json", summary)
        ledger.close()
    return summary


def prepare(
    recipe: Recipe,
    names: list[str],
    policy: Policy,
    reward: Reward | None,
    ledger: Ledger,
    records: dict[str, list[Record]] | None = None,
) -> tuple[dict[str, PreparedStage], list[str]]:
    """Reads and checks the data and plans every stage; draws nothing.

    Returns:
        The stages by name, and the assumptions that remain unchecked.
    """
    configs = _data_configs(recipe, names)
    cache = Path(recipe.output_dir) / "private" / "cache"
    if records is None:
        by_source: dict[tuple[str, str], list[Record]] = {}
        for c in configs.values():
            if not c.path:
                raise DPAlignError("the recipe names no data: set data.path (and data.name).")
            if (c.path, c.split) not in by_source:
                by_source[c.path, c.split] = read_records(c.path, c.split, cache)
        records = {name: by_source[c.path, c.split] for name, c in configs.items()}
    assumptions = check_disjoint(
        {name: (records[name], configs[name]) for name in names}, recipe.units_disjoint == "declared"
    )
    parts = split_parts(names, configs, recipe.split)
    delta = recipe.target_delta
    if delta is None:  # by the units of the largest dataset
        totals = [count_units(records[n], configs[n]) for n in names]
        delta = accountant.default_delta(max(totals))
    stages: dict[str, PreparedStage] = {}
    for name in names:
        source = configs[name].path or configs[name].name
        algorithm = build_algorithm(name, _stage_config(recipe, name, delta), reward)
        check_lengths(name, algorithm.config, policy)
        if name == "sft":
            check_sft_columns(records[name], source)
        else:
            check_ppo_columns(policy, records[name], source, algorithm.config)
        data = build_units(records[name], configs[name], ledger, *parts[name])
        plan_stage(algorithm, data.declared_units)
        stages[name] = PreparedStage(algorithm, data)
        if configs[name].declared_units is None:
            assumptions.append(f"the number of units of {configs[name].name!r} is public")
    return stages, sorted(set(assumptions))


def split_parts(
    names: list[str], configs: dict[str, DataConfig], split: dict[str, float] | None
) -> dict[str, tuple[float, float]]:
    """Part of the hash range for each stage; stages on one dataset get disjoint parts, in order.

    With `split` given, its keys fix the parts even for stages that this run skips, so that `dpalign sft`
    and `dpalign ppo` on one recipe take the same units as `dpalign run`.
    """
    fractions = dict(split) if split else {}
    unknown = set(fractions) - set(STAGES)
    if unknown or any(f <= 0 for f in fractions.values()) or sum(fractions.values()) > 1 + 1e-9:
        raise DPAlignError(
            f"split {split} must give {' and '.join(STAGES)} positive fractions that add up to at most 1."
        )
    parts: dict[str, tuple[float, float]] = {}
    for dataset in {c.name for c in configs.values()}:
        sharing = [n for n in names if configs[n].name == dataset]
        if fractions and len({c.name for c in configs.values()}) == 1:
            missing = [n for n in sharing if n not in fractions]
            if missing:
                raise DPAlignError(f"split {split} gives stage {missing[0]} no fraction of the data.")
            keys = [n for n in STAGES if n in fractions]
            shares = [fractions[n] for n in keys]
        else:
            keys, shares = sharing, [1 / len(sharing)] * len(sharing)
        start = 0.0
        for name, share in zip(keys, shares, strict=True):
            if name in sharing:
                parts[name] = (start, min(1.0, start + share))
            start += share
    return parts


def build_algorithm(name: str, config: TrainingConfig, reward: Reward | None) -> Algorithm:
    """The algorithm of a stage's section."""
    if name == "sft":
        return SFT(cast(SFTConfig, config))
    assert reward is not None
    return PPO(cast(PPOConfig, config), reward)


def check_provenance(recipe: Recipe, names: list[str]) -> tuple[list[StageStatement], list[str]]:
    """Refuses a model of unknown past; returns the stages and assumptions of a release that is trained further.

    Raises:
        DPAlignError: the model is neither embedded, declared public, nor a private release; or the release's
            datasets differ from this run's and nobody declares them disjoint.
    """
    name = recipe.model.name_or_path
    path = Path(embedded.resolve(name)) / "privacy.json"
    if not path.exists():
        if name != embedded.TINY_REVIEW_LM and not recipe.model.is_public:
            raise DPAlignError(
                f"model {name!r} must be declared public (model.is_public: true), or be a dpalign release: weights "
                "made from the private data would void the guarantee."
            )
        return [], []
    value = json.loads(path.read_text(encoding="utf-8"))
    stages, assumptions = PrivacyStatement.stages_from(value), list(value["assumptions"])
    if not value["private"] and not math.isinf(recipe.target_epsilon):
        raise DPAlignError(
            f"model {name} was trained without privacy on private data: nothing trained from it can be private; start "
            "from a public model or a private release."
        )
    datasets = {s.dataset for s in stages} | {c.name for c in _data_configs(recipe, names).values()}
    if len(datasets) > 1:
        if recipe.units_disjoint != "declared":
            raise DPAlignError(
                f"the release {name} was trained on {sorted({s.dataset for s in stages})}, which cannot be compared with "
                "this run's data: use the same data.name, or declare units_disjoint: declared."
            )
        assumptions.append(f"the units of {', '.join(map(repr, sorted(datasets)))} are disjoint (declared)")
    return stages, assumptions


def check_budget(recipe: Recipe, stages: dict[str, PreparedStage], earlier: list[StageStatement], delta: float) -> None:
    """Composes everything that the run is about to spend, with what its model has spent, before the first draw.

    Raises:
        DPAlignError: together it is more than the target, or the statement would mix kinds of units.
    """
    planned = list(earlier)
    for name, stage in stages.items():
        plan, data = plan_stage(stage.algorithm, stage.data.declared_units), stage.data
        planned.append(
            StageStatement(
                stage=name, dataset=data.name, part=(data.low, data.high), split=data.split, unit=data.unit,
                declared_units=data.declared_units, max_grad_norm=stage.algorithm.config.max_grad_norm,
                epsilon_alone=plan.epsilon, mechanisms=[asdict(plan.mechanism(plan.steps))], private=plan.noise_multiplier > 0,
            )
        )  # fmt: skip
    kinds = {(s.dataset, s.unit) for s in planned}
    if len(kinds) > len({s.dataset for s in planned}):
        raise DPAlignError("two stages name different units of one dataset: use one data.unit throughout.")
    together = epsilon_of(planned, delta)
    if together > recipe.target_epsilon:
        raise DPAlignError(
            f"all stages together would spend epsilon {together:.3f} at delta {delta:.3g}, more than the target "
            f"{recipe.target_epsilon:g}: give the stages disjoint units (split), lower their target_epsilon or "
            "noise, or raise the run's target_epsilon."
        )


def check_lengths(name: str, config: TrainingConfig, policy: Policy) -> None:
    """Refuses lengths that the model cannot hold: otherwise the one long record that is drawn would tell.

    Raises:
        DPAlignError: too long, or positions whose scaling depends on the longest row of a batch.
    """
    model = policy.model.config.get_text_config()
    needed = config.max_length
    if isinstance(config, PPOConfig):
        needed = config.max_prompt_length + config.max_completion_length
    limit = getattr(model, "max_position_embeddings", None)
    if limit is not None and needed > limit:
        raise DPAlignError(
            f"stage {name} needs {needed} positions and the model has {limit}: lower the stage's lengths."
        )
    scaling = getattr(model, "rope_parameters", None) or {}
    if scaling.get("rope_type") in ("dynamic", "longrope") and needed > scaling.get(
        "original_max_position_embeddings", limit or needed
    ):
        raise DPAlignError("the model scales positions by the longest row of a batch: lower the stage's lengths.")


def summarize(
    statement: PrivacyStatement, names: list[str], stages: dict[str, PreparedStage], folder: Path
) -> dict[str, Any]:
    """The private and public facts of a finished run."""
    return {
        "private": statement.private,
        "epsilon": statement.epsilon,
        "delta": statement.delta,
        "stages": [
            {
                "stage": s.stage,
                "dataset": s.dataset,
                "units": s.declared_units,
                "epsilon": s.epsilon_alone,
                "mechanisms": s.mechanisms,
            }
            for s in statement.stages
        ],
        "assumptions": statement.assumptions,
        "ledger": statement.ledger,
        "release": str(folder / "release"),
    }


def peak_memory_mb() -> float:
    """Largest resident size of this process so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1024**2 if sys.platform == "darwin" else 1024), 1)


def _run_stage(
    name: str, prepared: PreparedStage, policy: Policy, private: Path, run: str, ledger: Ledger, folder: Path,
    recipe: Recipe, reporter: Reporter,
) -> None:  # fmt: skip
    stage = Stage(
        policy, prepared.algorithm, prepared.data, folder=private / name, run=run, ledger=ledger,
        log=folder / "metrics.jsonl", report=reporter.step, tell=reporter.note,
    )  # fmt: skip
    if stage.is_finished:
        stage.load_final()
        reporter.note(f"stage {name} is already done.")
        return
    reporter.start(name, stage.plan, prepared.data.declared_units, prepared.data.unit, stage.private)
    with reporter.tracking(recipe.report_to, folder / "logs", name):
        stage.train()


def _evaluate(recipe: Recipe, policy: Policy, reward: Reward | None, names: list[str], reporter: Reporter) -> dict:
    data = recipe.ppo_data or recipe.data
    if recipe.ppo is None or reward is None or not data.eval_path or not data.eval_is_public:
        return {}
    prompts = public_prompts(policy, read_records(data.eval_path, data.split), recipe.ppo, recipe.eval_prompts)
    with reporter.status("measuring on the public prompts"):
        results = evaluate_stages(policy, prompts, reward, recipe.ppo)
    texts = [
        {"prompt": prompt, **{stage: results[stage][1][i][1] for stage in results}}
        for i, (prompt, _) in enumerate(results["pretrained"][1][:SAMPLES])
    ]
    write_json(Path(recipe.output_dir) / "completions.json", texts)
    return {"evaluation": {stage: result.as_dict() for stage, (result, _) in results.items()}}


def _stage_config(recipe: Recipe, name: str, delta: float) -> TrainingConfig:
    config: TrainingConfig = getattr(recipe, name)
    if config.target_epsilon is None and config.noise_multiplier is None:
        config = replace(config, target_epsilon=recipe.target_epsilon)
    if config.target_delta not in (None, delta):
        raise DPAlignError(f"stage {name} has another target_delta than the run: the stages share one.")
    return replace(config, target_delta=delta)


def run_delta(recipe: Recipe, names: list[str], stages: dict[str, PreparedStage]) -> float:
    """The run's one delta."""
    if recipe.target_delta is not None:
        accountant.check_delta(recipe.target_delta)
        return recipe.target_delta
    return stages[names[0]].algorithm.config.target_delta


def _data_configs(recipe: Recipe, names: list[str]) -> dict[str, DataConfig]:
    return {name: getattr(recipe, f"{name}_data") or recipe.data for name in names}


def _quiet_libraries() -> None:
    # Their warnings may quote lengths or texts of records.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def _device(name: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _open_ledger(recipe: Recipe) -> Ledger:
    if recipe.ledger == ":memory:":
        raise DPAlignError("a ledger in memory forgets what was spent: give --ledger a file.")
    return Ledger(recipe.ledger)


def _run_identity(private: Path, folder: Path, ledger: Ledger) -> str:
    """The run's name in the ledger: readable, and new whenever the folder is made anew."""
    file = private / "run.json"
    if not file.exists():
        write_json(file, {"run": f"{folder.name}-{secrets.token_hex(4)}", "ledger": ledger.identity})
    value = json.loads(file.read_text(encoding="utf-8"))
    if value["ledger"] != ledger.identity:
        raise DPAlignError(
            f"{folder} was begun with another ledger than {ledger.path}: give that one with --ledger, or choose another "
            "output folder."
        )
    return value["run"]


@contextmanager
def _locked(private: Path) -> Iterator[None]:
    with open(private / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DPAlignError(
                f"another process is running in {private.parent}: wait for it, or choose another folder."
            ) from None
        yield
