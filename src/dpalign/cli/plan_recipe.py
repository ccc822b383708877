"""`dpalign plan RECIPE.yaml`: the whole budget of a recipe, before anything runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from ..algorithms import RewardModelConfig, RolloutConfig, SFTConfig
from ..data.units import count_units
from ..errors import DPAlignError
from ..planning import (
    PlannedStage,
    check_budget,
    check_provenance,
    parameter_count,
    past_assumptions,
    past_stages,
    plan_recipe,
    read_stage_records,
    run_delta,
)
from ..privacy import accountant
from ..privacy.budget import StageBudget, allocate
from ..privacy.parts import Part, epsilon_of
from ..recipe import Recipe
from ..reporting.numbers import at_most
from .parsing import recipe_from

DESCRIPTION = """The budget of a recipe, stage by stage: sampling rate, noise, epsilon alone and together, compute.
Draws nothing and writes nothing. Needs the data only where a dataset has no declared_units."""


def run(arguments: list[str], as_json: bool) -> dict[str, Any]:
    """Returns the plan."""
    recipe = recipe_from("plan", arguments, DESCRIPTION)
    if not recipe.stages:
        raise DPAlignError("the recipe has no stage: give it a section sft, reward, ppo or rloo.")
    plan = plan_of(recipe)
    if not as_json:
        _print(plan)
    return plan


def plan_of(recipe: Recipe) -> dict[str, Any]:
    """Plan of every stage, and of all together in parallel and in sequential composition.

    Units are counted, not split by the secret hash: a stage's number is its share of the declared or counted total,
    as in a run.
    """
    recipe = _with_counted_units(recipe)
    origins = check_provenance(recipe)
    earlier, assumptions = past_stages(origins), sorted(past_assumptions(origins))
    delta = run_delta(recipe, None)
    stages = plan_recipe(recipe, None, delta, earlier)
    together = check_budget(recipe, stages, earlier, delta)
    parameters = parameter_count(recipe)
    plan: dict[str, Any] = {
        "target_epsilon": recipe.target_epsilon,
        "delta": delta,
        "composition": recipe.composition,
        "epsilon": together,
        "stages": [_stage(stage, parameters) for stage in stages.values()],
        "assumptions": assumptions,
        "adjacency": "add or remove one unit",
        "accountant": accountant.ACCOUNTANT,
    }
    return plan | _if_units_were_shared(stages, recipe.target_epsilon, delta)


def _with_counted_units(recipe: Recipe) -> Recipe:
    """A copy of the recipe that declares the number of units of every dataset, counted where it was not declared."""
    undeclared = [name for name in recipe.stages if recipe.data_of(name).declared_units is None]
    if not undeclared:
        return recipe
    records = read_stage_records(recipe)
    counted = {}
    for name in undeclared:
        config = recipe.data_of(name)
        counted[id(config)] = replace(config, declared_units=count_units(records[name], config))
    sections: dict[str, Any] = {f.name: getattr(recipe, f.name) for f in fields(recipe)}
    declared: dict[str, Any] = {name: counted[id(v)] for name, v in sections.items() if id(v) in counted}
    return replace(recipe, **declared)


def _if_units_were_shared(stages: dict[str, PlannedStage], target: float, delta: float) -> dict[str, Any]:
    """`sequential_epsilon`: what a unit in all stages would pay at the parallel noise; `inflation`: the common factor
    on all noise multipliers that brings it back to the target."""
    shared = [
        StageBudget(
            replace(stage.at(stage.alone), part=Part("all")),
            getattr(stage.config, "expected_batch_size", stage.units),
        )
        for stage in stages.values()
    ]
    if math.isinf(target) or any(s.spending.mechanism.noise_multiplier == 0 for s in shared):
        return {"sequential_epsilon": math.inf, "inflation": None}
    factors = allocate(shared, target, delta)
    return {
        "sequential_epsilon": epsilon_of([s.spending for s in shared], delta),
        "inflation": max(factors.values()),
    }


def _stage(stage: PlannedStage, parameters: float | None) -> dict[str, Any]:
    plan = stage.plan
    size = getattr(stage.config, "expected_batch_size", stage.units)
    tokens = _tokens(stage)
    return {
        "stage": stage.name,
        "dataset": stage.part.dataset,
        "unit": stage.unit,
        "part": [stage.part.low, stage.part.high],
        "units": stage.units,
        "batch_size": size,
        "sampling_rate": plan.sampling_rate,
        "steps": plan.steps,
        "passes": plan.passes,
        "noise_multiplier_alone": stage.alone.noise_multiplier,
        "noise_multiplier": plan.noise_multiplier,
        "noise_per_update": plan.noise_multiplier / size,
        "epsilon_alone": plan.epsilon,
        **tokens,
        # Forward 2, and 2 more for activations' gradients: the frozen base needs no weight gradients.
        "flops": None
        if parameters is None
        else parameters * (4 * tokens["tokens_trained"] + 2 * tokens["tokens_read"]),
    }


def _tokens(stage: PlannedStage) -> dict[str, float]:
    """Tokens that pass through the model with a backward pass, and without one (generated, or scored)."""
    config, steps = stage.config, stage.plan.steps
    if isinstance(config, RolloutConfig):
        rows = steps * config.expected_batch_size * config.num_generations
        length = config.max_prompt_length + config.max_completion_length
        return {"tokens_trained": rows * length * stage.plan.passes, "tokens_read": 2 * rows * length}
    if isinstance(config, RewardModelConfig):
        return {"tokens_trained": 2 * steps * config.expected_batch_size * config.max_length, "tokens_read": 0}
    if isinstance(config, SFTConfig):
        return {"tokens_trained": steps * config.expected_batch_size * config.max_length, "tokens_read": 0}
    return {"tokens_trained": 0, "tokens_read": 0}


def _print(plan: dict[str, Any]) -> None:
    console = Console(highlight=False)
    table = Table(title=f"{plan['composition']} composition, delta {plan['delta']:.3g}")
    table.add_column("")
    for stage in plan["stages"]:
        table.add_column(f"{stage['stage']} ({stage['dataset'] or 'data'})", justify="right")
    for heading, cell in _CELLS.items():
        table.add_row(heading, *[cell(stage) for stage in plan["stages"]])
    console.print(table)
    console.print(f"The whole run: epsilon [bold]{at_most(plan['epsilon'], 4)}[/] (target {plan['target_epsilon']:g}).")
    if len(plan["stages"]) > 1 and plan["inflation"] is not None:
        console.print(
            f"A unit in all stages would pay epsilon {at_most(plan['sequential_epsilon'], 4)} at the noise that each "
            f"stage needs alone; composition: sequential keeps the target with all of it x{plan['inflation']:.4f}."
        )
    if any(s["flops"] is None for s in plan["stages"]):
        console.print("FLOPs need the model's configuration, which is not here.")
    for assumption in plan["assumptions"]:
        console.print(f"assumed: {assumption}", markup=False)


_CELLS: dict[str, Callable[[dict[str, Any]], str]] = {
    "units": lambda s: f"{s['units']:g} ({s['unit']})",
    "part of the data": lambda s: f"{s['part'][0]:.3g} to {s['part'][1]:.3g}",
    "expected batch": lambda s: f"{s['batch_size']:g}",
    "sampling rate": lambda s: f"{s['sampling_rate']:.5f}",
    "steps": lambda s: str(s["steps"]),
    "passes per sample": lambda s: str(s["passes"]),
    "noise multiplier, alone": lambda s: f"{s['noise_multiplier_alone']:.4f}",
    "noise multiplier": lambda s: f"{s['noise_multiplier']:.4f}",
    "noise per update (of C)": lambda s: f"{s['noise_per_update']:.6f}",
    "epsilon alone": lambda s: at_most(s["epsilon_alone"]),
    "tokens": lambda s: f"{s['tokens_trained'] + s['tokens_read']:.1e}",
    "FLOPs": lambda s: "?" if s["flops"] is None else f"{s['flops']:.1e}",
}
