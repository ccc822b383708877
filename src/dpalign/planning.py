"""Everything between a recipe and its first draw: whose data a stage may sample, what it spends, what is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .algorithms import RolloutConfig, SFTConfig
from .algorithms.reward import RewardModelConfig
from .data.load import Record, read_records
from .data.units import UnitDataset, build_units, check_disjoint, count_units
from .errors import DPAlignError
from .evaluation.private import PrivateEvaluationConfig, plan_evaluation
from .files import dumps
from .models import embedded
from .privacy import accountant
from .privacy.accountant import SampledGaussian
from .privacy.budget import StageBudget, allocate
from .privacy.ledger import Ledger
from .privacy.parts import Part, Spending, epsilon_of, met
from .privacy.statement import (
    StageStatement,
    merge_stages,
    read_statement,
    state_privacy,
)
from .recipe import STAGES, Recipe
from .rewards import is_reward_model
from .rewards.load import RELEASED
from .training import StagePlan, plan_stage

Range = tuple[float, float]  # of the hash


@dataclass(frozen=True)
class PlannedStage:
    """A stage before anything was drawn.

    part: the units that it may sample; without data at hand its identity is empty. units: how many they are, declared.
    alone: the plan with the whole budget for itself. plan: the plan that runs.
    """

    name: str
    config: Any
    part: Part
    units: float
    unit: str
    alone: StagePlan
    plan: StagePlan

    @property
    def spending(self) -> Spending:
        return self.at(self.plan)

    def at(self, plan: StagePlan) -> Spending:
        """What it spends under a plan."""
        return Spending(self.part, plan.mechanism(), stage=self.name)


# The data ------------------------------------------------------------------------------------------------------------


def read_stage_records(recipe: Recipe, cache: Path | None = None) -> dict[str, list[Record]]:
    """Records by stage; a file that several stages share is read once.

    Raises:
        DPAlignError: no path, or what `read_records` refuses.
    """
    by_source: dict[tuple[str, str], list[Record]] = {}
    for name in recipe.stages:
        config = recipe.data_of(name)
        if not config.path:
            raise DPAlignError(f"the recipe names no data for stage {name}: set data.path (and data.name).")
        if (config.path, config.split) not in by_source:
            by_source[config.path, config.split] = read_records(config.path, config.split, cache)
    return {n: by_source[recipe.data_of(n).path, recipe.data_of(n).split] for n in recipe.stages}


def stage_units(
    recipe: Recipe, records: dict[str, list[Record]], ledger: Ledger
) -> tuple[dict[str, UnitDataset], list[str]]:
    """The units that each stage may sample, and the assumptions that remain unchecked.

    Raises:
        DPAlignError: stages share units that they must not share (it says how many), or cannot be compared.
    """
    configs = {name: recipe.data_of(name) for name in recipe.stages}
    assumptions = check_disjoint(
        {name: (records[name], config) for name, config in configs.items()}, recipe.units_disjoint == "declared"
    )
    parts = split_parts(recipe)
    data = {name: build_units(records[name], configs[name], ledger, *parts[name]) for name in configs}
    assumptions += [
        f"the number of units of {c.name!r} is public" for c in configs.values() if c.declared_units is None
    ]
    return data, sorted(set(assumptions))


def split_parts(recipe: Recipe) -> dict[str, Range]:
    """Range of the hash for each stage; stages on one dataset get disjoint ranges, in order, unless it gives ranges.

    With `split` given, its keys fix the parts even for stages that this run skips, so that `dpalign sft`
    and `dpalign ppo` on one recipe take the same units as `dpalign run`.

    Raises:
        DPAlignError: fractions or ranges that cannot be.
    """
    split = dict(recipe.split or {})
    fractions = {name: value for name, value in split.items() if not isinstance(value, list)}
    ranges = {name: value for name, value in split.items() if isinstance(value, list)}
    if set(split) - set(STAGES) or any(f <= 0 for f in fractions.values()) or sum(fractions.values()) > 1 + 1e-9:
        raise DPAlignError(
            f"split {split} must give stages ({', '.join(STAGES)}) positive fractions that add up to at most 1."
        )
    if any(len(r) != 2 or not 0 <= r[0] < r[1] <= 1 for r in ranges.values()):
        raise DPAlignError(f"split {split}: a range is [low, high] with 0 <= low < high <= 1.")
    if fractions and (ranges or recipe.composition == "sequential"):
        raise DPAlignError(
            f"split {split}: fractions make disjoint parts; leave split out (--split null) for stages that share all "
            "units, or give every stage a range [low, high]."
        )
    parts: dict[str, Range] = {}
    configs = {name: recipe.data_of(name) for name in recipe.stages}
    for dataset in {c.name for c in configs.values()}:
        sharing = [n for n in configs if configs[n].name == dataset]
        missing = [n for n in sharing if n not in split]
        if recipe.composition == "sequential" or ranges:
            if missing and len(missing) < len(sharing):
                raise DPAlignError(f"split {split} gives stage {missing[0]} no range of {dataset!r}.")
            parts |= {n: (float(ranges[n][0]), float(ranges[n][1])) if n in ranges else (0.0, 1.0) for n in sharing}
            continue
        shares = {n: float(fractions[n]) for n in STAGES if n in fractions and recipe.data_of(n).name == dataset}
        if shares and missing:
            raise DPAlignError(f"split {split} gives stage {missing[0]} no fraction of {dataset!r}.")
        if not shares:
            shares = {n: 1 / len(sharing) for n in sharing}
        start = 0.0
        for name, share in shares.items():
            if name in sharing:
                parts[name] = (start, min(1.0, start + share))
            start += share
    return parts


# The budget ----------------------------------------------------------------------------------------------------------


def plan_recipe(
    recipe: Recipe, data: Mapping[str, UnitDataset] | None, delta: float, earlier: list[StageStatement]
) -> dict[str, PlannedStage]:
    """Steps and noise of every stage; their noise is raised together where sequential composition asks for it.

    Args:
        data: the stages' units; None plans by the declared numbers of units alone.
        earlier: stages of a release that is trained further.

    Raises:
        DPAlignError: a target that cannot be reached, or kinds of units that cannot be compared.
    """
    parts = split_parts(recipe)
    stages: dict[str, PlannedStage] = {}
    for name in recipe.stages:
        source, config = recipe.data_of(name), stage_config(recipe, name, delta)
        if data is not None:
            part, units, unit = data[name].part, data[name].declared_units, data[name].unit
        else:
            part = Part(source.name, "", *parts[name])
            units, unit = _declared_units(recipe, name, parts[name]), source.unit or "record"
        is_evaluation = isinstance(config, PrivateEvaluationConfig)
        alone = plan_evaluation(config, units) if is_evaluation else plan_stage(name, config, units)
        stages[name] = PlannedStage(name, config, part, units, unit, alone, alone)
    kinds = {(s.part.dataset, s.unit) for s in stages.values()} | {(s.dataset, s.unit) for s in earlier}
    if len(kinds) > len({dataset for dataset, _ in kinds}):
        raise DPAlignError("two stages name different units of one dataset: use one data.unit throughout.")
    _check_allocation(recipe, stages)
    if math.isinf(recipe.target_epsilon):
        return stages
    spent = [sp for s in earlier for sp in s.spendings()]
    if recipe.composition == "sequential":
        budgets = [_budget(recipe, stage) for stage in stages.values()]
        factors = allocate(budgets, recipe.target_epsilon, delta, allocation=recipe.allocation, spent=tuple(spent))
        stages = {name: _noised(stage, factors[name]) for name, stage in stages.items()}
    return {name: _beside_others(stage, stages, spent, recipe.target_epsilon) for name, stage in stages.items()}


def _check_allocation(recipe: Recipe, stages: dict[str, PlannedStage]) -> None:
    unknown = set(recipe.allocation) - set(stages) if isinstance(recipe.allocation, dict) else set()
    if unknown:
        raise DPAlignError(f"allocation names {', '.join(sorted(unknown))}; the recipe has {', '.join(stages)}.")
    if recipe.allocation != "equal" and recipe.composition == "parallel":
        raise DPAlignError(
            "allocation divides a budget that stages share: set composition: sequential, or leave it out."
        )
    held_out = stages.get("evaluation")
    for name, stage in stages.items():
        if held_out is not None and stage is not held_out and stage.part.overlaps(held_out.part):
            raise DPAlignError(
                f"stages evaluation and {name} share units, so nothing would be held out: give evaluation a range of "
                "its own (split), or evaluation_data with a name of its own."
            )


def _budget(recipe: Recipe, stage: PlannedStage) -> StageBudget:
    given = getattr(recipe, stage.name)
    fixed = given.target_epsilon is not None or given.noise_multiplier is not None
    size = stage.units if stage.name == "evaluation" else given.expected_batch_size
    return StageBudget(stage.at(stage.alone), size, fixed)


def _noised(stage: PlannedStage, factor: float) -> PlannedStage:
    alone = stage.alone
    return replace(stage, plan=alone.at(alone.noise_multiplier * factor, alone.target_epsilon))


def _beside_others(
    stage: PlannedStage, stages: dict[str, PlannedStage], spent: list[Spending], target: float
) -> PlannedStage:
    # A parallel recipe too may have stages that meet: ranges that overlap, or a release of the same data.
    others = beside(stage, [*(s.spending for name, s in stages.items() if name != stage.name), *spent])
    if not any(others):
        return stage
    return replace(stage, plan=replace(stage.plan, target_epsilon=target, beside=others))


def beside(stage: PlannedStage, others: list[Spending]) -> tuple[tuple[SampledGaussian, ...], ...]:
    """What `others` spend on the units of a stage, for each of the sets of them that a unit may meet."""
    return tuple(sorted(met(others, stage.part), key=str))


def check_budget(recipe: Recipe, stages: dict[str, PlannedStage], earlier: list[StageStatement], delta: float) -> float:
    """Composes everything that the run is about to spend, with what its model has spent, before the first draw.

    Returns:
        Epsilon of the whole.

    Raises:
        DPAlignError: it is more than the target.
    """
    known = all(stage.private for stage in earlier) and all(s.plan.noise_multiplier > 0 for s in stages.values())
    spendings = [sp for stage in earlier for sp in stage.spendings()] + [stage.spending for stage in stages.values()]
    together = epsilon_of(spendings, delta) if known else math.inf
    if together > recipe.target_epsilon:
        raise DPAlignError(
            f"all stages together would spend epsilon {together:.3f} at delta {delta:.3g}, more than the target "
            f"{recipe.target_epsilon:g}: give the stages disjoint units (split), let them share the budget "
            "(composition: sequential), lower their target_epsilon or noise, or raise the run's target_epsilon."
        )
    return together


def stage_config(recipe: Recipe, name: str, delta: float) -> Any:
    """A stage's settings with the run's epsilon and delta where it has none of its own."""
    config = getattr(recipe, name)
    if config.target_epsilon is None and config.noise_multiplier is None:
        config = replace(config, target_epsilon=recipe.target_epsilon)
    if config.target_delta not in (None, delta):
        raise DPAlignError(f"stage {name} has another target_delta than the run: the stages share one.")
    return replace(config, target_delta=delta)


def run_delta(recipe: Recipe, records: dict[str, list[Record]] | None) -> float:
    """The run's one delta; by default that of its largest dataset."""
    if recipe.target_delta is not None:
        accountant.check_delta(recipe.target_delta)
        return recipe.target_delta
    if records is None:
        totals = [_declared_units(recipe, name, (0.0, 1.0)) for name in recipe.stages]
    else:
        totals = [count_units(records[name], recipe.data_of(name)) for name in recipe.stages]
    return accountant.default_delta(math.ceil(max(totals)))


def _declared_units(recipe: Recipe, name: str, part: Range) -> float:
    declared = recipe.data_of(name).declared_units
    if declared is None:
        raise DPAlignError(f"stage {name} has no data file here and no declared number of units: set declared_units.")
    return declared * (part[1] - part[0])


def parameter_count(recipe: Recipe) -> float | None:
    """Weights of the model, from its configuration alone; None where that is not here."""
    import torch
    from peft import LoraConfig
    from transformers import AutoConfig, AutoModelForCausalLM

    path = embedded.resolve(recipe.model.name_or_path)
    if (Path(path) / "adapter_config.json").exists():
        path = embedded.resolve(str(LoraConfig.from_pretrained(path).base_model_name_or_path))
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        with torch.device("meta"):
            return float(AutoModelForCausalLM.from_config(config).num_parameters())  # type: ignore[no-untyped-call]
    except (OSError, ValueError):
        return None


# What is refused -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """A model that enters a run: its name, the private stages that made it, and what remains unchecked about it."""

    name: str
    stages: tuple[StageStatement, ...]
    assumptions: tuple[str, ...]

    @staticmethod
    def from_json(value: dict[str, Any]) -> Origin:
        """From its fields as JSON has them."""
        stages = tuple(StageStatement.from_json(stage) for stage in value["stages"])
        return Origin(value["name"], stages, tuple(value["assumptions"]))

    @property
    def fingerprint(self) -> str:
        """Equal for the same name and the same spending."""
        return dumps([self.name, [asdict(stage) for stage in self.stages]])


def past_stages(origins: dict[str, Origin]) -> list[StageStatement]:
    """The private stages of all models together, each once."""
    return merge_stages([stage for origin in origins.values() for stage in origin.stages])


def past_assumptions(origins: dict[str, Origin]) -> set[str]:
    """What remains unchecked about the models."""
    return {text for origin in origins.values() for text in origin.assumptions}


def check_provenance(recipe: Recipe) -> dict[str, Origin]:
    """Where every model that enters the run comes from, by the field that names it. Models of unknown past are refused.

    Raises:
        DPAlignError: a model is neither embedded, declared public, nor a private release; or a release's
            datasets differ from this run's and nobody declares them disjoint.
    """
    entering = {"model": (recipe.model.name_or_path, recipe.model.is_public)}
    if recipe.reward is not None and recipe.reward.model is not None:
        entering["reward.model"] = (recipe.reward.model.name_or_path, recipe.reward.model.is_public)
    rewards: dict[str, Origin] = {}
    if recipe.rollouts is not None:
        field, reward = "ppo.reward" if recipe.ppo is not None else "rloo.reward", recipe.rollouts.reward
        if is_reward_model(reward):
            if reward.source == RELEASED and recipe.reward is None:
                raise DPAlignError(
                    "reward.source reward_model needs a section reward in the recipe, or a path behind it."
                )
            if reward.source != RELEASED:
                entering[field] = (reward.source.removeprefix(f"{RELEASED}:"), reward.is_public)
        elif reward.source != "vader":
            declared = (
                f"reward {reward.source!r} was made without the private data, and scores each row by itself (declared)"
            )
            rewards[field] = Origin(reward.source, (), (declared,))
    return rewards | {field: _past(recipe, name, is_public) for field, (name, is_public) in entering.items()}


def _past(recipe: Recipe, name: str, is_public: bool) -> Origin:
    stated = read_statement(embedded.resolve(name))
    if stated is None:
        if name == embedded.TINY_REVIEW_LM:
            return Origin(name, (), ())
        if not is_public:
            raise DPAlignError(
                f"model {name!r} must be declared public (model.is_public: true), or be a dpalign release: weights "
                "made from the private data would void the guarantee."
            )
        return Origin(name, (), (f"model {name!r} was made without the private data (declared)",))
    value, stages = stated
    assumptions = set(value["assumptions"])
    if not value["private"] and not math.isinf(recipe.target_epsilon):
        raise DPAlignError(
            f"model {name} was trained without privacy on private data: nothing trained from it can be private; start "
            "from a public model or a private release."
        )
    datasets = {s.dataset for s in stages} | {recipe.data_of(n).name for n in recipe.stages}
    if len(datasets) > 1:
        if recipe.units_disjoint != "declared":
            raise DPAlignError(
                f"the release {name} was trained on {sorted({s.dataset for s in stages})}, which cannot be compared "
                "with this run's data: use the same data.name, or declare units_disjoint: declared."
            )
        assumptions.add(f"the units of {', '.join(map(repr, sorted(datasets)))} are disjoint (declared)")
    return Origin(name, tuple(stages), tuple(sorted(assumptions)))


def stages_elsewhere(run: str, ledger: Ledger, delta: float, recipe: Recipe) -> list[StageStatement]:
    """What this run has drawn in stages that the recipe no longer has: they stay in its statement."""
    stated = state_privacy(run, ledger, delta, [], [], set()).stages
    return [s for s in stated if s.stage not in recipe.stages]


def check_lengths(name: str, config: SFTConfig | RewardModelConfig | RolloutConfig, model_config: Any) -> None:
    """Refuses lengths that the model cannot hold: otherwise the one long record that is drawn would tell.

    Raises:
        DPAlignError: too long, or positions whose scaling depends on the longest row of a batch.
    """
    model = model_config.get_text_config()
    needed = config.max_length
    if isinstance(config, RolloutConfig):
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
