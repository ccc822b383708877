"""`dpalign plan RECIPE.yaml`: the whole budget of a recipe, before anything runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from ..models import embedded
from ..models.bases import base_path
from ..plan import Past, Plan, PlannedStage, RecipeStage, declared_units, make_plan
from ..privacy import accountant
from ..privacy.budget import StageBudget, allocate
from ..privacy.parts import Part, epsilon_of
from ..provenance import check_provenance
from ..recipe import Recipe
from ..records import count_undeclared, stages_without_data
from ..reporting.numbers import at_most, attacks
from ..reporting.terminal import Terminal, plain
from ..run import check_recipe
from ..settings.prompts import PromptedConfig
from ..survey import Survey
from ..training.plan import signal_of

FEW = 500  # of a ceiling: a tenth of the demo's, where little is left to try (docs/how_many_people.md)


def run(recipe: Recipe, as_json: bool, with_data: bool) -> dict[str, Any]:
    """Returns the plan."""
    plan = planned(recipe)
    is_here = with_data and not stages_without_data(recipe)
    surveys = check_recipe(recipe, plan) if is_here else None
    shown = _as_json(plan)
    if not as_json:
        _print(shown)
        _print_surveys(surveys)
    return shown


def plan_of(recipe: Recipe) -> dict[str, Any]:
    """The plan of every stage, and of all together in parallel and in sequential composition, as JSON."""
    return _as_json(planned(recipe))


def planned(recipe: Recipe) -> Plan:
    """Units are counted, not split by the secret hash: a stage's number is its share of the declared or counted total,
    as in a run."""
    recipe.check()
    units = declared_units(recipe, count_undeclared(recipe))
    return make_plan(recipe, units, Past(check_provenance(recipe)))


def _as_json(plan: Plan) -> dict[str, Any]:
    recipe, parameters = plan.recipe, parameter_count(plan.recipe)
    shown: dict[str, Any] = {
        "target_epsilon": recipe.target_epsilon,
        "delta": plan.delta,
        "composition": recipe.composition,
        "epsilon": plan.epsilon,
        "attack_success": plan.attack_success,
        "stages": [_stage(stage, parameters) for stage in plan.stages.values()],
        "drawing_nothing": [_own(s, parameters) for name, s in plan.order.items() if name not in plan.stages],
        "assumptions": list(plan.assumptions),
        "adjacency": "add or remove one unit",
        "accountant": accountant.ACCOUNTANT,
    }
    return shown | _if_units_were_shared(plan)


def _if_units_were_shared(plan: Plan) -> dict[str, Any]:
    """`sequential_epsilon`: what a unit in all stages would pay at the parallel noise; `inflation`: the common factor
    on all noise multipliers that brings it back to the target."""
    target = plan.recipe.target_epsilon
    shared = [
        StageBudget(replace(stage.at(stage.alone), part=Part("all")), stage.batch_size)
        for stage in plan.stages.values()
    ]
    if not shared or math.isinf(target) or any(s.spending.mechanism.noise_multiplier == 0 for s in shared):
        return {"sequential_epsilon": math.inf, "inflation": None}
    factors = allocate(shared, target, plan.delta)
    return {
        "sequential_epsilon": epsilon_of([s.spending for s in shared], plan.delta),
        "inflation": max(factors.values()),
    }


def _stage(stage: PlannedStage, parameters: float | None) -> dict[str, Any]:
    plan, size = stage.plan, stage.batch_size
    signal = signal_of(plan, stage.units.count)
    return {
        "stage": stage.name,
        "dataset": stage.part.dataset,
        "unit": stage.units.unit,
        "part": [stage.part.low, stage.part.high],
        "units": stage.units.count,
        "batch_size": size,
        "sampling_rate": plan.sampling_rate,
        "steps": plan.steps,
        "passes": plan.passes,
        "noise_multiplier_alone": stage.alone.noise_multiplier,
        "noise_multiplier": plan.noise_multiplier,
        "noise_per_update": plan.noise_multiplier / size,
        "signal_to_noise": None if signal is None else asdict(signal),
        "epsilon_alone": plan.epsilon,
        **_compute(stage, plan.steps * size, parameters),
    }


def _own(stage: RecipeStage, parameters: float | None) -> dict[str, Any]:
    """A stage that reads no record."""
    config = stage.config
    assert isinstance(config, PromptedConfig)
    size, steps = config.expected_batch_size, config.updates
    return {
        "stage": stage.name,
        "prompts": config.prompts,
        "reads": config.read_prompts,
        "batch_size": size,
        "steps": steps,
        **_compute(stage, steps * size, parameters),
    }


def _compute(stage: RecipeStage, turns: float, parameters: float | None) -> dict[str, Any]:
    """What so many turns of a unit cost."""
    each = stage.kind.tokens(stage.config)
    trained, read = turns * each.trained, turns * each.read
    adapter = getattr(stage.config, "adapter", None)
    passes = 6 if adapter is not None and adapter.kind == "full" else 4  # a forward pass is 2
    return {
        "tokens_trained": trained,
        "tokens_read": read,
        # Forward 2, and 2 more for activations' gradients; weights' gradients, 2 more, only where these are trained.
        "flops": None if parameters is None else parameters * (passes * trained + 2 * read),
    }


def parameter_count(recipe: Recipe) -> float | None:
    """Weights of the model, from its configuration alone; None where that is not here."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    path = embedded.resolve(recipe.model.name_or_path)
    if (Path(path) / "adapter_config.json").exists():
        path = base_path(path)
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        with torch.device("meta"):
            return float(AutoModelForCausalLM.from_config(config).num_parameters())  # type: ignore[no-untyped-call]
    except (OSError, ValueError):
        return None


def _print(plan: dict[str, Any]) -> None:
    console = Terminal()
    table = Table(title=f"{plan['composition']} composition, delta {plan['delta']:.3g}")
    table.add_column("")
    for stage in plan["stages"]:
        table.add_column(plain(f"{stage['stage']} ({stage['dataset'] or 'data'})"), justify="right")
    for heading, cell in _CELLS.items():
        table.add_row(heading, *[plain(cell(stage)) for stage in plan["stages"]])
    if plan["stages"]:
        console.print(table)
    for stage in plan["stages"]:
        if sentence := _too_few(stage):
            console.say(sentence)
    for own in plan["drawing_nothing"]:
        console.say(
            f"{own['stage']}: {own['steps']} updates of {own['batch_size']:,} prompts; it reads {own['reads']}, draws "
            "nothing and spends nothing."
        )
    console.print(f"The whole run: epsilon [bold]{at_most(plan['epsilon'], 4)}[/] (target {plan['target_epsilon']:g}).")
    if plan["stages"] and (sentence := attacks(plan["attack_success"])):
        console.say(sentence)
    if len(plan["stages"]) > 1 and plan["inflation"] is not None:
        console.print(
            f"A unit in all stages would pay epsilon {at_most(plan['sequential_epsilon'], 4)} at the noise that each "
            f"stage needs alone; composition: sequential keeps the target with all of it x{plan['inflation']:.4f}."
        )
    if any(s["flops"] is None for s in [*plan["stages"], *plan["drawing_nothing"]]):
        console.print("FLOPs need the model's configuration, which is not here.")
    for assumption in plan["assumptions"]:
        console.say(f"assumed: {assumption}")


def _too_few(stage: dict[str, Any]) -> str | None:
    """What is to be expected of many steps on few units."""
    signal = stage["signal_to_noise"]
    if signal is None or stage["steps"] == 1 or signal["ceiling"] >= FEW:
        return None
    return (
        f"{stage['stage']}: {stage['units']:g} units will buy little at epsilon {at_most(stage['epsilon_alone'])}: "
        f"even what all of them agree on, asked once, is {signal['ceiling']:.0f} times the noise in one direction, and "
        "a training has thousands. Ask one query (reward_query), train fewer weights (adapter.r 1, freeze_a and an "
        "init_a), or find more people."
    )


def _print_surveys(surveys: dict[str, Survey] | None) -> None:
    console = Terminal()
    if surveys is None:
        console.print("Data, model and rewards were not checked.")
        return
    for name, survey in surveys.items():
        for sentence in survey.sentences():
            console.say(f"{name}, for the data holder alone: {sentence}.")
    if surveys and not any(survey.sentences() for survey in surveys.values()):
        console.print("The data: nothing is cut, and every record teaches something.")


def _signal(stage: dict[str, Any], which: str) -> str:
    found = (stage["signal_to_noise"] or {}).get(which)
    return "" if found is None else f"{found:,.0f}"


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
    "signal to noise": lambda s: _signal(s, "planned"),
    "of at most": lambda s: _signal(s, "ceiling"),
    "twice the sample": lambda s: _signal(s, "doubled"),
    "epsilon alone": lambda s: at_most(s["epsilon_alone"]),
    "tokens": lambda s: f"{s['tokens_trained'] + s['tokens_read']:.1e}",
    "FLOPs": lambda s: "?" if s["flops"] is None else f"{s['flops']:.1e}",
}
