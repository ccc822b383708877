"""One epsilon over stages that may meet the same units: golden values, brute force, crashes, and what one name charges."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dpalign.algorithms import SFT, PPOConfig, RewardModelConfig, RewardModelling, RLOOConfig, SFTConfig
from dpalign.data import DataConfig
from dpalign.errors import DPAlignError
from dpalign.evaluation.private import MeasurementConfig
from dpalign.models import AdapterConfig, RewardModel
from dpalign.plan import Plan, PlannedStage, Units, check_budget, declared_units, plan_stages
from dpalign.privacy.accountant import SampledGaussian, epsilon
from dpalign.privacy.budget import Allocation, StageBudget, allocate
from dpalign.privacy.ledger import Ledger
from dpalign.privacy.parts import Part, Spending, epsilon_of
from dpalign.privacy.statement import StageStatement
from dpalign.recipe import Recipe
from dpalign.run import still_beside
from dpalign.training import Stage, StagePlan, plan_stage
from dpalign.workspace import Workspace
from tiny import dataset, tiny_policy, words

Range = tuple[float, float]
ALL: Range = (0.0, 1.0)


def spending_of(stage: str, dataset: str, identity: str, within: Range, mechanism: SampledGaussian) -> Spending:
    """What no run has spent yet."""
    return Spending(Part(dataset, identity, *within), mechanism, stage=stage)


# Golden values -----------------------------------------------------------------------------------------------

IMDB = {"sft": (12_500, 512, 977, 1.4990), "ppo": (12_500, 256, 4883, 1.6168)}
TLDR = {
    "sft": (100_000, 512, 1953, 0.681),
    "reward_model": (179_000, 4096, 2185, 1.448),
    "ppo": (200_000, 256, 781, 0.507),
}


def planned_alone(
    sizes: Mapping[str, tuple], delta: float, target: float = 4.0
) -> dict[str, tuple[StageBudget, StagePlan]]:
    """Every stage with epsilon `target` for itself; its budget, in which all stages meet all units, and its plan."""
    found = {}
    for name, (units, batch, steps, _) in sizes.items():
        config = SFTConfig(
            expected_batch_size=batch, max_steps=steps, target_epsilon=target, target_delta=delta, metrics_noise_ratio=0
        )
        plan = plan_stage(name, config, units)
        found[name] = StageBudget(spending_of(name, "d", "", ALL, plan.mechanism()), batch), plan
    return found


@pytest.mark.parametrize(
    ("sizes", "delta", "sequential", "within", "inflation", "near"),
    [(IMDB, 4e-5, 5.97, 0.01, 1.333, 0.002), (TLDR, 1 / 479_000, 6.02, 0.01, 1.185, 0.003)],
    ids=["IMDb", "TL;DR"],
)
def test_the_papers_sizes(sizes, delta, sequential, within, inflation, near):
    """Each stage alone at epsilon 4; all of them on the same units; and the factor that brings them back to 4."""
    alone = planned_alone(sizes, delta)
    for name, (_, plan) in alone.items():
        assert plan.noise_multiplier == pytest.approx(sizes[name][3], rel=2e-3) and 3.98 < plan.epsilon <= 4
    stages = [budget for budget, _ in alone.values()]
    assert epsilon_of([s.spending for s in stages], delta) == pytest.approx(sequential, abs=within)
    factors = allocate(stages, 4.0, delta)
    assert len(set(factors.values())) == 1 and factors["sft"] == pytest.approx(inflation, abs=near)
    assert 3.98 < epsilon_of([s.at(factors[s.name]) for s in stages], delta) <= 4
    short = [s.at(0.99 * factors[s.name]) for s in stages]
    assert epsilon_of(short, delta, quick=True) > 4.01, "mutant: one per cent less noise is too little"


# Allocation --------------------------------------------------------------------------------------------------

DELTA = 1e-5
TARGET = 3.0
SIZES = {"sft": (2000, 100, 30), "reward_model": (2000, 400, 20), "ppo": (2000, 50, 60)}


@cache
def plan(name: str, given: float | None) -> StagePlan:
    """A stage of `SIZES` by itself, for `TARGET` or at a given noise."""
    units, batch, steps = SIZES[name]
    config = SFTConfig(
        expected_batch_size=batch, max_steps=steps, target_delta=DELTA, noise_multiplier=given,
        target_epsilon=None if given else TARGET,
    )  # fmt: skip
    return plan_stage(name, config, units)


def budgets(
    parts: Mapping[str, Range], fixed: Mapping[str, float] | None = None, split: str = "s"
) -> list[StageBudget]:
    """Stages of `SIZES` on their parts of one dataset, each planned alone."""
    given = fixed or {}
    return [
        StageBudget(
            spending_of(name, "d", split, part, plan(name, given.get(name)).mechanism()), SIZES[name][1], name in given
        )
        for name, part in parts.items()
    ]


def brute_force(spendings: list[Spending]) -> float:
    """The worst unit's epsilon: for every place of a unit, the stages whose part contains it, composed."""
    places = [i / 1000 + 1 / 2000 for i in range(1000)]
    met = {tuple(s.mechanism for s in spendings if s.part.low <= place < s.part.high) for place in places}
    return max(epsilon(mechanisms, DELTA, quick=True) for mechanisms in met)


def allocated(
    stages: list[StageBudget], allocation: Allocation = "equal", **options: Any
) -> tuple[dict, list[Spending]]:
    factors = allocate(stages, TARGET, DELTA, allocation=allocation, **options)
    return factors, [s.at(factors[s.name]) for s in stages]


MIXED = [
    ({"sft": (0, 0.5), "reward_model": (0.5, 1), "ppo": ALL}, [{"sft", "reward_model", "ppo"}]),
    ({"sft": (0, 0.4), "reward_model": (0.2, 0.6), "ppo": (0.6, 1)}, [{"sft", "reward_model"}, {"ppo"}]),
    ({"sft": (0, 0.4), "reward_model": (0.3, 0.7), "ppo": (0.6, 1)}, [{"sft", "reward_model", "ppo"}]),
    ({"sft": ALL, "reward_model": ALL, "ppo": ALL}, [{"sft", "reward_model", "ppo"}]),
    ({"sft": (0, 0.25), "reward_model": (0.25, 0.5), "ppo": (0.5, 1)}, [{"sft"}, {"reward_model"}, {"ppo"}]),
    ({"sft": (0, 0.25), "reward_model": (0.5, 1), "ppo": (0.75, 0.8)}, [{"sft"}, {"reward_model", "ppo"}]),
]  # fmt: skip


@pytest.mark.parametrize(("parts", "groups"), MIXED)
def test_mixed_parts_against_brute_force(parts, groups):
    """Never above the target at any place; stages that meet nobody keep their noise; no budget is left lying."""
    stages = budgets(parts)
    factors, spendings = allocated(stages)
    assert epsilon_of(spendings, DELTA, quick=True) == pytest.approx(brute_force(spendings), rel=1e-9)
    for group in groups:
        together = [s for s in spendings if s.stage in group]
        assert 0.985 * TARGET < brute_force(together) <= TARGET
        assert len({factors[name] for name in group}) == 1
        assert (factors[next(iter(group))] == 1) == (len(group) == 1)
    if groups[0] == set(parts):
        assert brute_force([s.spending for s in stages]) > 1.2 * TARGET, "mutant: everyone has the whole budget"


def test_a_chain_of_overlaps_pays_for_its_neighbours_only():
    """No unit is in both ends of a chain, so the factor is smaller than where all three meet."""
    chain, all_three = MIXED[2][0], MIXED[3][0]
    assert 1 < allocated(budgets(chain))[0]["sft"] < allocated(budgets(all_three))[0]["sft"]


def test_parts_of_different_splits_cannot_be_told_apart():
    disjoint = {"sft": (0.0, 0.5), "ppo": (0.5, 1.0)}
    stages = [budgets(disjoint)[0], budgets(disjoint, split="another file")[1]]
    factors, spendings = allocated(stages)
    assert min(factors.values()) > 1.05
    assert epsilon([s.mechanism for s in spendings], DELTA) <= TARGET
    other = replace(stages[1], spending=replace(stages[1].spending, part=replace(stages[1].spending.part, dataset="e")))
    assert allocated([stages[0], other])[0] == {"sft": 1, "ppo": 1}  # another name: disjoint by check or declaration


@pytest.mark.parametrize("allocation", ["equal", {"sft": 1, "ppo": 2}, {"reward_model": 0.5}])
def test_no_allocation_exceeds_the_target(allocation):
    stages = budgets(MIXED[0][0])
    factors, spendings = allocated(stages, allocation)
    assert 0.985 * TARGET < brute_force(spendings) <= TARGET
    if isinstance(allocation, dict):
        weights = {name: allocation.get(name, 1.0) for name in factors}
        level = factors["sft"] * weights["sft"]
        assert {name: factors[name] * weights[name] for name in factors} == pytest.approx(dict.fromkeys(factors, level))


def test_minimal_has_the_least_noise():
    """No more total noise than equal factors, nor than two uneven ones beside it."""
    stages = budgets({"sft": ALL, "ppo": ALL})

    def noise(allocation: Allocation) -> float:
        factors, spendings = allocated(stages, allocation)
        assert 0.985 * TARGET < brute_force(spendings) <= TARGET
        return sum(s.total_noise(factors[s.name]) for s in stages)

    minimal = noise("minimal")
    others = [noise("equal"), noise({"sft": 1, "ppo": 2})]
    assert all(minimal <= 1.002 * other for other in others) and minimal < 0.99 * max(others)


def test_total_noise_worked_by_hand():
    stage = StageBudget(spending_of("ppo", "d", "", ALL, SampledGaussian(0.1, 2.0, 30, 4)), 50)
    assert stage.total_noise(1.0) == pytest.approx(30 * 4 * (2 / 50) ** 2)
    assert stage.total_noise(3.0) == pytest.approx(9 * stage.total_noise(1.0))
    wide = stage.at(3.0).mechanism
    assert (wide.noise_multiplier, wide.steps, wide.passes) == (6.0, 30, 4)


def test_the_noise_of_the_metrics_is_raised_with_the_gradients():
    (stage,) = budgets({"sft": ALL})
    wide = stage.at(1.5).mechanism
    assert wide.metrics_noise_multiplier == pytest.approx(10 * wide.noise_multiplier)


def test_a_given_noise_stays():
    stages = budgets({"sft": ALL, "reward_model": ALL, "ppo": ALL}, fixed={"reward_model": 30.0})
    factors, spendings = allocated(stages)
    assert factors["reward_model"] == 1 and factors["sft"] == factors["ppo"] > 1
    assert 0.985 * TARGET < brute_force(spendings) <= TARGET


def test_earlier_releases_on_the_same_data_are_paid_first():
    stages = budgets({"sft": (0.0, 0.5), "ppo": (0.5, 1.0)})
    spent = spending_of("old", "d", "s", (0.0, 0.5), SampledGaussian(0.05, 2.0, 100))
    factors, spendings = allocated(stages, spent=(spent,))
    assert factors["sft"] > 1 == factors["ppo"]
    assert 0.985 * TARGET < brute_force([*spendings, spent]) <= TARGET
    elsewhere = replace(spent, part=replace(spent.part, dataset="e"))
    assert allocated(stages, spent=(elsewhere,))[0] == {"sft": 1, "ppo": 1}


def test_a_target_that_cannot_be_reached_is_one_clear_error():
    together = {"sft": ALL, "ppo": ALL}
    much = spending_of("old", "d", "s", ALL, SampledGaussian(1.0, 0.5, 100))
    for stages, options in (
        (budgets(together, fixed={"sft": 0.4}), {}),
        (budgets(together, fixed={"sft": 0.4, "ppo": 9.0}), {}),
        (budgets(together), {"spent": (much,)}),
    ):
        with pytest.raises(DPAlignError, match="leaves them nothing of epsilon 3") as raised:
            allocated(stages, **options)
        assert "sft, ppo" in str(raised.value) and str(raised.value).count(". ") == 0
    for weight in (0, -1, math.inf, math.nan):
        with pytest.raises(DPAlignError, match="must be positive"):
            allocated(budgets(together), {"sft": weight})
    assert allocate(budgets(together), math.inf, DELTA) == {"sft": 1, "ppo": 1}


# Planning ----------------------------------------------------------------------------------------------------


def recipe(stages: tuple[str, ...] = ("sft", "reward_model", "ppo"), **changes: Any) -> Recipe:
    kinds: dict[str, Any] = {"sft": SFTConfig, "reward_model": RewardModelConfig, "ppo": PPOConfig, "rloo": RLOOConfig}
    sections = {
        name: kinds[name](expected_batch_size=SIZES[name][1], max_steps=SIZES[name][2])
        for name in stages
        if name in kinds
    }
    settings: dict[str, Any] = {
        "data": DataConfig(name="d", declared_units=2000), "target_epsilon": TARGET, "composition": "sequential"
    }  # fmt: skip
    return Recipe(**settings | sections | changes)


def mechanisms(stages: Mapping[str, PlannedStage]) -> list[Spending]:
    return [s.spending for s in stages.values()]


def planned_by_declaration(given: Recipe, before: Sequence[StageStatement] = ()) -> dict[str, PlannedStage]:
    return plan_stages(given, declared_units(given), DELTA, before)


RANGES = {"sft": [0.0, 0.5], "reward_model": [0.25, 1.0], "ppo": [0.0, 1.0]}


@pytest.mark.parametrize("split", [None, RANGES])
def test_a_planned_recipe_keeps_its_target_and_every_stage_knows_its_neighbours(split):
    """`beside` is what a refit after a crash composes with: the sets of other stages that a unit may meet."""
    planned = planned_by_declaration(recipe(split=split))
    assert 0.985 * TARGET < brute_force(mechanisms(planned)) <= TARGET
    for stage in planned.values():
        low, high = stage.part.low, stage.part.high
        others = [s.spending for s in planned.values() if s is not stage]
        met = {
            frozenset(o.mechanism for o in others if o.part.low <= place < o.part.high)
            for place in (low + (high - low) * (i + 0.5) / 400 for i in range(400))
        }
        beside = {frozenset(o) for o in stage.plan.beside}
        assert beside <= met and all(any(m <= b for b in beside) for m in met)  # a subset costs no more
        assert stage.plan.target_epsilon == TARGET and stage.plan.noise_multiplier > 1.05 * stage.alone.noise_multiplier
        assert stage.plan.epsilon == pytest.approx(epsilon([stage.plan.mechanism()], DELTA), rel=1e-3)
    assert check_budget(recipe(split=split), planned, [], DELTA) <= TARGET


def test_disjoint_stages_are_planned_alone():
    split = {"sft": [0.0, 0.2], "reward_model": [0.2, 0.6], "ppo": [0.6, 1.0]}
    for composition in ("sequential", "parallel"):
        planned = planned_by_declaration(recipe(split=split, composition=composition))
        assert all(s.plan.noise_multiplier == pytest.approx(s.alone.noise_multiplier) for s in planned.values())
        assert all(not any(s.plan.beside) for s in planned.values())


def test_overlapping_ranges_in_parallel_composition_are_refused():
    """Mutant of a recipe: every stage keeps the whole budget although they share units."""
    greedy = recipe(split=RANGES, composition="parallel")
    planned = planned_by_declaration(greedy)
    assert brute_force(mechanisms(planned)) > TARGET
    with pytest.raises(DPAlignError, match="all stages together would spend epsilon"):
        check_budget(greedy, planned, [], DELTA)


def test_a_given_noise_of_a_recipe_stays_and_the_others_make_room():
    fixed = recipe(reward_model=RewardModelConfig(expected_batch_size=400, max_steps=20, noise_multiplier=20.0))
    planned = planned_by_declaration(fixed)
    assert planned["reward_model"].plan.noise_multiplier == 20.0
    assert all(planned[n].plan.noise_multiplier > planned[n].alone.noise_multiplier for n in ("sft", "ppo"))
    assert brute_force(mechanisms(planned)) <= TARGET


def test_the_evaluation_has_its_own_units_and_keeps_its_noise():
    split = {"sft": [0.0, 0.8], "ppo": [0.0, 0.8], "measurement": [0.8, 1.0]}
    stages = {"measurement": MeasurementConfig(), "split": split}
    planned = planned_by_declaration(recipe(("sft", "ppo"), **stages))
    held_out = planned["measurement"]
    assert held_out.plan.noise_multiplier == held_out.alone.noise_multiplier and held_out.plan.sampling_rate == 1
    assert planned["sft"].plan.noise_multiplier > planned["sft"].alone.noise_multiplier
    assert 0.985 * TARGET < brute_force(mechanisms(planned)) <= TARGET
    for overlapping in (None, split | {"measurement": [0.7, 1.0]}):
        with pytest.raises(DPAlignError, match="nothing would be held out"):
            planned_by_declaration(recipe(("sft", "ppo"), **stages | {"split": overlapping}))


def test_the_stages_of_an_earlier_release_are_paid_first():
    mechanism = SampledGaussian(0.05, 2.0, 100)
    earlier = StageStatement(
        stage="sft", dataset="d", part=ALL, split="", unit="record", declared_units=2000, max_grad_norm=1.0,
        epsilon_alone=epsilon([mechanism], DELTA), private=True,
        mechanisms=[mechanism],
    )  # fmt: skip
    ppo = recipe(("ppo",))
    planned = planned_by_declaration(ppo, [earlier])
    assert planned["ppo"].plan.beside == ((mechanism,),)
    assert 0.985 * TARGET < epsilon([planned["ppo"].plan.mechanism(), mechanism], DELTA) <= TARGET
    assert check_budget(ppo, planned, [earlier], DELTA) <= TARGET
    alone = planned_by_declaration(ppo)
    with pytest.raises(DPAlignError, match="together would spend"):
        check_budget(ppo, alone, [earlier], DELTA)


def test_two_kinds_of_units_on_one_dataset_are_refused():
    mixed = recipe(reward_model_data=DataConfig(name="d", declared_units=2000, unit="judge"))
    with pytest.raises(DPAlignError, match="different units of one dataset"):
        planned_by_declaration(mixed)


# Crashes -----------------------------------------------------------------------------------------------------

SAME = Units(Part("tiny"), 60.0, "record", 60.0)
RECORDS = [
    [{"id": f"r{i}", "text": words(6, i), "chosen": words(4, 100 + i), "rejected": words(5, 200 + i)}]
    for i in range(60)
]


class DiesAt(Stage):
    """Dies when step 6 of 12 has been drawn; steps 1 to 4 are saved."""

    def _step(self, phase, positions, sample, step):
        if step == 5:
            raise KeyboardInterrupt
        return super()._step(phase, positions, sample, step)


class ForgetsTheOthers(Stage):
    """Refits as if its units were in no other stage."""

    def _refit(self, step: int) -> tuple[int, float]:
        plan, self.plan, self.beside = self.plan, replace(self.plan, beside=((),)), ((),)
        try:
            return super()._refit(step)
        finally:
            self.plan = plan


def two_stages(
    folder: Path, dying: set[str], resumed: type[Stage] = Stage, *, as_drawn: bool = True
) -> tuple[list[Spending], list[str]]:
    """SFT and a reward model that share all units and one budget; the `dying` ones crash once and go on.

    Args:
        as_drawn: a stage is told what the others have drawn, as the pipeline does; else what they had planned.
    """
    small = {
        "expected_batch_size": 12,
        "max_steps": 12,
        "max_length": 8,
        "save_steps": 4,
        "adapter": AdapterConfig(r=1),
    }
    together = Recipe(
        data=DataConfig(name="tiny"), target_epsilon=TARGET, composition="sequential", sft=SFTConfig(**small),
        reward_model=RewardModelConfig(**small),
    )  # fmt: skip
    data, ledger, told = dataset(RECORDS), Ledger(":memory:"), []
    planned = plan_stages(together, dict.fromkeys(("sft", "reward_model"), SAME), DELTA)
    policy = tiny_policy("llama")
    plan = Plan(together, DELTA, TARGET, planned, planned, {}, (), ())
    workspace = SimpleNamespace(ledger=ledger, identity="run", private=folder)

    def run(kind: type[Stage], name: str) -> None:
        model = RewardModel.from_policy(policy, planned[name].config.text) if name == "reward_model" else policy
        algorithm = RewardModelling(planned[name].config) if name == "reward_model" else SFT(planned[name].config)
        kind(
            model,
            algorithm,
            data,
            folder=folder / name,
            run="run",
            ledger=ledger,
            plan=planned[name].plan,
            tell=told.append,
            beside=still_beside(planned[name], plan, cast(Workspace, workspace)) if as_drawn else None,
        ).train()

    for name in planned:
        if name in dying:
            with pytest.raises(KeyboardInterrupt):
                run(DiesAt, name)
            if name == "sft":  # as a new process would begin
                policy = tiny_policy("llama")
        run(resumed if name in dying else Stage, name)
    return ledger.spendings(), told


@pytest.mark.parametrize("dying", [(), ("sft",), ("reward_model",), ("sft", "reward_model")], ids=str)
def test_a_crash_never_lifts_the_stages_above_their_common_target(dying, tmp_path):
    """What was lost stays spent; the refitted stage leaves the others what they were planned to spend."""
    spendings, told = two_stages(tmp_path, dying)
    for name in ("sft", "reward_model"):
        draws = [s.mechanism for s in spendings if s.stage == name]
        assert sum(m.steps for m in draws) == 12 + (name in dying) and len(draws) == 1 + (name in dying)
    assert sum("stay spent" in message for message in told) == len(dying)
    assert 0.9 * TARGET < epsilon([s.mechanism for s in spendings], DELTA) <= TARGET


def test_a_refit_that_forgets_the_other_stages_is_found(tmp_path):
    """Mutant: the refitted stage uses the whole target for itself, and the next one believes its plan."""
    spendings, _ = two_stages(tmp_path / "believed", {"sft"}, ForgetsTheOthers, as_drawn=False)
    assert epsilon([s.mechanism for s in spendings], DELTA) > TARGET
    spendings, _ = two_stages(tmp_path / "seen", {"sft"}, ForgetsTheOthers)  # one that sees it makes room
    assert epsilon([s.mechanism for s in spendings], DELTA) <= TARGET


def test_a_refit_by_what_the_other_stage_had_planned_is_found(tmp_path):
    """Mutant: after two crashes the second stage composes with the plan of the first, not with its draws."""
    spendings, _ = two_stages(tmp_path, {"sft", "reward_model"}, as_drawn=False)
    assert epsilon([s.mechanism for s in spendings], DELTA) > TARGET


def test_a_stage_makes_room_for_what_others_drew_beyond_their_plan(tmp_path):
    """Nothing of its own was lost; but the recipe had changed for a while, and another stage took more than planned."""
    data = dataset(RECORDS)
    small = {"expected_batch_size": 12, "max_steps": 12, "max_length": 8, "adapter": AdapterConfig(r=1)}
    together = Recipe(
        data=DataConfig(name="tiny"), target_epsilon=TARGET, composition="sequential", sft=SFTConfig(**small),
        reward_model=RewardModelConfig(**small),
    )  # fmt: skip
    planned = plan_stages(together, dict.fromkeys(("sft", "reward_model"), SAME), DELTA)["sft"]
    ((other,),) = planned.plan.beside
    more = replace(other, steps=other.steps + 2)

    def refitted(beside: tuple) -> float:
        stage = Stage(
            tiny_policy("llama"), SFT(planned.config), data, folder=tmp_path / "sft", run="run", ledger=Ledger(":memory:"),
            plan=planned.plan, beside=beside,
        )  # fmt: skip
        _, sigma = stage._refit(0)
        return sigma

    assert refitted(planned.plan.beside) == planned.plan.noise_multiplier
    noisier = replace(planned.plan, noise_multiplier=refitted(((more,),)))
    assert epsilon([noisier.mechanism(), more], DELTA) <= TARGET
    assert epsilon([planned.plan.mechanism(), more], DELTA) > TARGET, "mutant: the planned noise is kept"


def test_stages_that_meet_in_a_parallel_recipe_are_refitted_beside_each_other():
    """Each has an epsilon of its own and their ranges overlap: allowed, and composed after a crash too."""
    own = {"expected_batch_size": 100, "max_steps": 30, "target_epsilon": 1.0}
    meeting = recipe(
        (), composition="parallel", split={"sft": [0.0, 0.6], "ppo": [0.4, 1.0]}, sft=SFTConfig(**own), ppo=PPOConfig(**own),
    )  # fmt: skip
    planned = planned_by_declaration(meeting)
    for stage, other in (("sft", "ppo"), ("ppo", "sft")):
        assert planned[stage].plan.noise_multiplier == planned[stage].alone.noise_multiplier
        assert (planned[other].plan.mechanism(),) in planned[stage].plan.beside
        assert planned[stage].plan.target_epsilon == TARGET and planned[stage].plan.epsilon <= 1.0
