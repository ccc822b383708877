"""A recipe becomes a plan: whose units each stage may sample, and with how much noise. Pure; nothing is drawn or read.

`dpalign plan` prints it and `dpalign run` obeys it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .algorithms.base import Algorithm
from .errors import DPAlignError
from .privacy import accountant
from .privacy.accountant import SampledGaussian
from .privacy.budget import StageBudget, allocate
from .privacy.parts import Part, Spending, attack_success, epsilon_of, met
from .privacy.statement import StageStatement
from .provenance import Origin, past_assumptions, past_stages
from .recipe import Recipe
from .settings.base import StageConfig
from .settings.prompts import PromptedConfig
from .stages import STAGES, kind
from .training import StagePlan, plan_stage

Range = tuple[float, float]  # of the hash


@dataclass(frozen=True)
class Units:
    """The units that a stage may sample, as far as they are public.

    part: without data at hand its identity is empty. count: how many they are, declared. total: in the whole dataset.
    is_counted: nobody declared the total; it is the number in the file, which thereby is public.
    """

    part: Part
    count: float
    unit: str
    total: float
    is_counted: bool = False


@dataclass(frozen=True)
class Past:
    """What the models of a run were made of, and what it has drawn itself in stages that its recipe no longer has."""

    origins: Mapping[str, Origin] = field(default_factory=dict)
    dropped: tuple[StageStatement, ...] = ()


@dataclass(frozen=True)
class RecipeStage:
    """A stage of the recipe; one that is no `PlannedStage` draws nothing."""

    name: str
    config: StageConfig

    @property
    def kind(self) -> Any:
        """Its class: see `StageKind`."""
        return kind(self.name).of(self.config)

    @property
    def is_measurement(self) -> bool:
        """Whether it trains nothing."""
        return not issubclass(self.kind, Algorithm)

    @property
    def steps(self) -> int:
        """Planned updates."""
        return self.config.updates if isinstance(self.config, PromptedConfig) else 0


@dataclass(frozen=True)
class PlannedStage(RecipeStage):
    """A stage that draws, before anything was drawn.

    alone: the plan with the whole budget for itself. plan: the plan that runs.
    """

    units: Units
    alone: StagePlan
    plan: StagePlan

    @property
    def steps(self) -> int:
        return self.plan.steps

    @property
    def part(self) -> Part:
        return self.units.part

    @property
    def batch_size(self) -> float:
        """Units expected in a sample."""
        return self.plan.sampling_rate * self.units.count

    @property
    def spending(self) -> Spending:
        return self.at(self.plan)

    def at(self, plan: StagePlan) -> Spending:
        """What it spends under a plan."""
        return Spending(self.part, plan.mechanism(), stage=self.name)


@dataclass(frozen=True)
class Plan:
    """What a run will do and spend: epsilon of the whole, and each stage's noise.

    stages: those that draw. order: all of them, as they run. before: private stages that its models rest on, or that
    it has drawn itself and no longer has.
    """

    recipe: Recipe
    delta: float
    epsilon: float
    stages: Mapping[str, PlannedStage]
    order: Mapping[str, RecipeStage]
    origins: Mapping[str, Origin]
    before: tuple[StageStatement, ...]
    assumptions: tuple[str, ...]

    @property
    def demo(self) -> set[str]:
        """Names of the datasets that are public data playing private."""
        configs = [self.recipe.data_of(name) for name in self.stages]
        return {config.name for config in configs if config.is_demo}

    @property
    def attack_success(self) -> list[dict[str, float]]:
        """How well anybody will be able to tell who took part, as the run's statement has it."""
        before = [spending for stage in self.before for spending in stage.spendings()]
        return attack_success([*before, *(stage.spending for stage in self.stages.values())])

    @property
    def is_all_demo(self) -> bool:
        """Whether no dataset is really private; of a run that draws nothing the recipe's data says it."""
        names = {self.recipe.data_of(name).name for name in self.stages}
        return self.demo == names if names else self.recipe.data.is_demo


def make_plan(recipe: Recipe, units: Mapping[str, Units], past: Past, assumptions: Iterable[str] = ()) -> Plan:
    """Everything about a run that needs no model.

    Args:
        units: of each stage; see `declared_units` and `records.units_of`. assumptions: what is unchecked about them.

    Raises:
        DPAlignError: a target that cannot be reached, or would be exceeded; units that cannot be compared.
    """
    delta = delta_of(recipe, units, past_stages(past.origins))
    before = (*past_stages(past.origins), *past.dropped)
    stages = plan_stages(recipe, units, delta, before)
    epsilon = check_budget(recipe, stages, before, delta)
    assumed = {*assumptions, *past_assumptions(past.origins)}
    assumed |= {f"the number of units of {u.part.dataset!r} is public" for u in units.values() if u.is_counted}
    order = {name: stages.get(name) or RecipeStage(name, config) for name, config in recipe.stages.items()}
    for name, stage in order.items():
        assumed |= stage.kind.assumptions(stage.config)
        if isinstance(stage.config, PromptedConfig) and not stage.config.draws:
            assumed.add(f"stage {name} read {stage.config.read_prompts}; it drew nothing")
    return Plan(recipe, delta, epsilon, stages, order, past.origins, before, tuple(sorted(assumed)))


# Whose units ---------------------------------------------------------------------------------------------------------


def declared_units(recipe: Recipe, counted: Mapping[str, int] | None = None) -> dict[str, Units]:
    """Units of each stage by their declared numbers alone, or by those that were counted where none is declared.

    Raises:
        DPAlignError: a dataset has neither.
    """
    parts, counted, units = split_parts(recipe), counted or {}, {}
    for name in recipe.drawing:
        config = recipe.data_of(name)
        number = config.declared_units if config.declared_units is not None else counted.get(name)
        if number is None:
            raise DPAlignError(
                f"stage {name} has no data file here and no declared number of units: set declared_units."
            )
        low, high = parts[name]
        part, total = Part(config.name, "", low, high), float(number)
        units[name] = Units(part, total * (high - low), config.unit or "record", total, config.declared_units is None)
    return units


def split_parts(recipe: Recipe) -> dict[str, Range]:
    """Range of the hash for each stage; stages on one dataset get disjoint ranges, in order, unless it gives ranges.

    With `split` given, its keys fix the parts even for stages that this run skips, so that a command for one stage of
    a recipe takes the same units as `dpalign run`.

    Raises:
        DPAlignError: fractions or ranges that cannot be.
    """
    ranges, fractions = _checked_split(recipe)
    parts: dict[str, Range] = {}
    configs = {name: recipe.data_of(name) for name in recipe.drawing}
    for dataset in {c.name for c in configs.values()}:
        sharing = [n for n in configs if configs[n].name == dataset]
        if recipe.composition == "sequential" or ranges:
            parts |= _ranges_of(sharing, dataset, ranges)
        else:
            parts |= _shares_of(
                sharing, dataset, {n: f for n, f in fractions.items() if recipe.data_of(n).name == dataset}
            )
    return parts


def _checked_split(recipe: Recipe) -> tuple[dict[str, Range], dict[str, float]]:
    """Ranges and fractions of `split`, in the order of the stages."""
    split = dict(recipe.split or {})
    fractions = {name: float(split[name]) for name in STAGES if isinstance(split.get(name), int | float)}  # type: ignore[arg-type]
    ranges = {name: value for name, value in split.items() if isinstance(value, list | tuple)}
    if len(fractions) + len(ranges) < len(split) and set(split) <= set(STAGES):
        raise DPAlignError(f"split {split}: each stage's value is a fraction, or a range [low, high].")
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
    return {name: (float(r[0]), float(r[1])) for name, r in ranges.items()}, fractions


def _ranges_of(sharing: list[str], dataset: str, ranges: dict[str, Range]) -> dict[str, Range]:
    """Ranges as given; everything for all, where none is."""
    missing = [name for name in sharing if name not in ranges]
    if missing and len(missing) < len(sharing):
        raise DPAlignError(f"split {ranges} gives stage {missing[0]} no range of {dataset!r}.")
    return {name: ranges.get(name, (0.0, 1.0)) for name in sharing}


def _shares_of(sharing: list[str], dataset: str, fractions: dict[str, float]) -> dict[str, Range]:
    """Disjoint ranges one after the other, as wide as the fractions; equal ones, where none is given."""
    missing = [name for name in sharing if name not in fractions]
    if fractions and missing:
        raise DPAlignError(f"split {fractions} gives stage {missing[0]} no fraction of {dataset!r}.")
    parts, start = {}, 0.0
    for name, share in (fractions or {name: 1 / len(sharing) for name in sharing}).items():
        if name in sharing:
            parts[name] = (start, min(1.0, start + share))
        start += share
    return parts


# The budget ----------------------------------------------------------------------------------------------------------


def plan_stages(
    recipe: Recipe, units: Mapping[str, Units], delta: float, before: Iterable[StageStatement] = ()
) -> dict[str, PlannedStage]:
    """Steps and noise of every stage; their noise is raised together where sequential composition asks for it.

    Args:
        before: stages of a release that is trained further.

    Raises:
        DPAlignError: a target that cannot be reached, or kinds of units that cannot be compared.
    """
    before = list(before)
    stages: dict[str, PlannedStage] = {}
    for name in recipe.drawing:
        config = stage_config(recipe, name, delta)
        alone = plan_stage(name, config, units[name].count)
        stages[name] = PlannedStage(name, config, units[name], alone, alone)
    kinds = {(s.part.dataset, s.units.unit) for s in stages.values()} | {(s.dataset, s.unit) for s in before}
    if len(kinds) > len({dataset for dataset, _ in kinds}):
        raise DPAlignError("two stages name different units of one dataset: use one data.unit throughout.")
    _check_allocation(recipe, stages)
    if math.isinf(recipe.target_epsilon):
        return stages
    spent = [sp for s in before for sp in s.spendings()]
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
    for held_out in (stage for stage in stages.values() if stage.is_measurement):
        for name, stage in stages.items():
            if stage is not held_out and stage.part.overlaps(held_out.part):
                raise DPAlignError(
                    f"stages {held_out.name} and {name} share units, so nothing would be held out: give "
                    f"{held_out.name} a range of its own (split), or {held_out.name}_data with a name of its own."
                )


def _budget(recipe: Recipe, stage: PlannedStage) -> StageBudget:
    given = recipe.stages[stage.name]
    fixed = given.target_epsilon is not None or given.noise_multiplier is not None
    return StageBudget(stage.at(stage.alone), stage.batch_size, fixed)


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


def check_budget(
    recipe: Recipe, stages: Mapping[str, PlannedStage], before: Iterable[StageStatement], delta: float
) -> float:
    """Composes everything that the run is about to spend, with what its model has spent, before the first draw.

    Returns:
        Epsilon of the whole.

    Raises:
        DPAlignError: it is more than the target.
    """
    before = list(before)
    known = all(stage.private for stage in before) and all(s.plan.noise_multiplier > 0 for s in stages.values())
    spendings = [sp for stage in before for sp in stage.spendings()] + [stage.spending for stage in stages.values()]
    together = epsilon_of(spendings, delta) if known else math.inf
    if together > recipe.target_epsilon:
        raise DPAlignError(
            f"all stages together would spend epsilon {together:.3f} at delta {delta:.3g}, more than the target "
            f"{recipe.target_epsilon:g}: give the stages disjoint units (split), let them share the budget "
            "(composition: sequential), lower their target_epsilon or noise, or raise the run's target_epsilon."
        )
    return together


def stage_config(recipe: Recipe, name: str, delta: float) -> StageConfig:
    """A stage's settings, with the run's epsilon and delta and what other stages say where it has none of its own."""
    config: StageConfig = recipe.kind_of(name).completed(recipe.stages[name], recipe.stages.values())
    if config.target_epsilon is None and config.noise_multiplier is None:
        config = replace(config, target_epsilon=recipe.target_epsilon)
    if config.target_delta not in (None, delta):
        raise DPAlignError(f"stage {name} has another target_delta than the run: the stages share one.")
    return replace(config, target_delta=delta)


def delta_of(recipe: Recipe, units: Mapping[str, Units], earlier: Iterable[StageStatement] = ()) -> float:
    """The run's one delta; by default that of its largest dataset, or, where it draws nothing, of its models'."""
    if recipe.target_delta is not None:
        accountant.check_delta(recipe.target_delta)
        return recipe.target_delta
    numbers = [u.total for u in units.values()] or [stage.declared_units for stage in earlier]
    return accountant.default_delta(math.ceil(max(numbers, default=1)))
