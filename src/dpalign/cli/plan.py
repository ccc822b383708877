"""`dpalign plan`: the arithmetic of the budget, before anything runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from rich.table import Table

from ..domains import STEPS
from ..errors import DPAlignError
from ..parsing import recipe_from
from ..privacy import accountant
from ..privacy.accountant import SampledGaussian
from ..privacy.parts import Part, Spending, attack_success
from ..reporting.numbers import at_most, attacks
from ..reporting.terminal import Terminal
from . import manual
from .arguments import Parser, number

DESCRIPTION = """Computes any one of epsilon, noise multiplier, batch size and steps from the others, for Poisson
samples of privacy units (add or remove one unit). Shows how the noise per update falls with the batch size and
what that costs in compute. Metrics noise is not included.

`dpalign plan RECIPE.yaml [--field value ...]` shows the budget of a whole recipe instead, stage by stage."""


OF_A_RECIPE = """The budget of a recipe, stage by stage: sampling rate, noise, epsilon alone and together, compute.
Makes every check that a run makes, and says what the data does to each stage: what is cut, what teaches nothing. These
numbers have no noise: they are for the data holder, on this terminal and not in --json. Nothing is drawn or written.
--no_data asks for the budget alone, which needs no data where the datasets have declared_units."""


def run(arguments: list[str], as_json: bool) -> dict[str, Any] | str:
    """Returns the completed plan, or that of a recipe, or the help that is asked for."""
    if arguments and not arguments[0].startswith("-"):
        return _of_recipe(arguments, as_json)
    parser = Parser(prog="dpalign plan", description=DESCRIPTION)
    parser.add_argument(
        "--units",
        "--declared_units",
        type=number(float, "(0, 1000000000000]"),
        required=True,
        help="privacy units of the stage",
    )
    parser.add_argument(
        "--batch_size",
        "--expected_batch_size",
        type=number(float, "(0, 1000000000000]"),
        help="expected units in a sample",
    )
    parser.add_argument("--steps", "--max_steps", type=number(int, STEPS), help="number of samples drawn")
    parser.add_argument(
        "--passes", "--num_ppo_epochs", type=number(int, "[1, 1024]"), default=1, help="passes over each sample (T_PPO)"
    )
    parser.add_argument(
        "--delta", "--target_delta", type=number(float, "(0, 1)"), help="default: min(1e-5, 1/(10 units))"
    )
    parser.add_argument(
        "--epsilon", "--target_epsilon", type=number(float, "(0, 1000]", or_inf=True), help="target, or inf"
    )
    parser.add_argument("--noise_multiplier", type=number(float, "[0, 100000]"), help="sigma of each pass")
    given = parser.parse_args(arguments)
    plan = complete_plan(
        units=given.units,
        batch_size=given.batch_size,
        steps=given.steps,
        passes=given.passes,
        delta=given.delta,
        epsilon=given.epsilon,
        noise_multiplier=given.noise_multiplier,
    )
    if not as_json:
        _print(plan)
    return plan


def _of_recipe(arguments: list[str], as_json: bool) -> dict[str, Any] | str:
    text = manual.asked("plan", arguments, "dpalign plan recipe.yaml --target_epsilon 2", OF_A_RECIPE)
    if text is not None:
        return text
    recipe = recipe_from("plan", [word for word in arguments if word != "--no_data"])
    recipe.check()

    from . import plan_recipe  # imports torch, which the arithmetic and what is wrong with a recipe do without

    return plan_recipe.run(recipe, as_json, with_data="--no_data" not in arguments)


def complete_plan(
    *,
    units: float,
    batch_size: float | None,
    steps: int | None,
    passes: int = 1,
    delta: float | None = None,
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
) -> dict[str, Any]:
    """Fills in the one quantity of epsilon, noise_multiplier, batch_size and steps that is None.

    Raises:
        DPAlignError: not exactly one is missing, or there is no solution.
    """
    if units < 1:
        raise DPAlignError(f"units {units:g} must be at least 1.")
    delta = accountant.default_delta(math.ceil(units)) if delta is None else delta
    accountant.check_delta(delta)
    if epsilon is not None:
        accountant.check_epsilon(epsilon)
    noise_multiplier, batch_size, steps = _complete(units, delta, passes, epsilon, noise_multiplier, batch_size, steps)
    mechanism = SampledGaussian(batch_size / units, noise_multiplier, steps, passes)
    reached = accountant.epsilon([mechanism], delta)
    return {
        "units": units,
        "batch_size": batch_size,
        "steps": steps,
        "passes": passes,
        "delta": delta,
        "target_epsilon": epsilon,
        "epsilon": reached,
        "noise_multiplier": noise_multiplier,
        "sampling_rate": batch_size / units,
        "epochs": steps * batch_size / units,
        "noise_per_update": noise_multiplier / batch_size,
        "attack_success": attack_success([Spending(Part("all"), mechanism)]),
        "adjacency": "add or remove one unit",
        "accountant": accountant.ACCOUNTANT,
    }


def _complete(
    units: float,
    delta: float,
    passes: int,
    epsilon: float | None,
    sigma: float | None,
    batch_size: float | None,
    steps: int | None,
) -> tuple[float, float, int]:
    """Noise multiplier, batch size and steps: those that are given, and the one that follows from epsilon."""

    def affordable(sigma: float, epsilon: float, batch: float, count: int) -> bool:
        return accountant.epsilon([SampledGaussian(batch / units, sigma, count, passes)], delta, quick=True) <= epsilon

    named = {"epsilon": epsilon, "noise multiplier": sigma, "batch size": batch_size, "steps": steps}
    missing = [name for name, value in named.items() if value is None]
    if len(missing) == 1:
        if batch_size is not None and not 0 < batch_size <= units:
            raise DPAlignError(f"batch size {batch_size:g} must be positive and at most the {units:g} units.")
        if steps is not None and steps < 1:
            raise DPAlignError(f"steps {steps} must be at least 1.")
        if epsilon is None:
            if sigma is not None and batch_size is not None and steps is not None:
                return sigma, batch_size, steps
        elif sigma is None:
            if batch_size is not None and steps is not None:
                rate = batch_size / units
                sigma = accountant.noise_multiplier(epsilon, delta, sampling_rate=rate, steps=steps, passes=passes)
                return sigma, batch_size, steps
        elif batch_size is not None:
            high = min(accountant.LARGEST_STEPS, int(accountant.LARGEST_DRAWS * units / batch_size))
            most = _largest(lambda n: affordable(sigma, epsilon, batch_size, n), high)
            return _checked(epsilon, sigma, batch_size, most)
        elif steps is not None:
            largest = _largest(lambda b: affordable(sigma, epsilon, b, steps), int(units))
            return _checked(epsilon, sigma, float(largest), steps)
    what = "all of them are given" if not missing else f"missing: {', '.join(missing)}"
    raise DPAlignError(
        f"give three of epsilon, noise multiplier, batch size and steps, and the fourth follows ({what})."
    )


def _checked(epsilon: float, sigma: float, batch_size: float, steps: int) -> tuple[float, float, int]:
    if steps < 1 or batch_size < 1:
        raise DPAlignError(
            f"noise multiplier {sigma:g} is too small for epsilon {epsilon:g}, even for one step of one unit."
        )
    return sigma, batch_size, steps


def _largest(feasible: Callable[[int], bool], high: int) -> int:
    # Searched from below by doubling: what overspends the target by far is slow to account for.
    bound = 1
    while bound < high and feasible(bound):
        bound = min(2 * bound, high)
    return accountant.largest_where(feasible, max(1, bound // 2), bound)


def _print(plan: dict[str, Any]) -> None:
    console = Terminal()
    console.print(
        f"epsilon [bold]{at_most(plan['epsilon'], 4)}[/] at delta {plan['delta']:.3g} with noise multiplier "
        f"[bold]{plan['noise_multiplier']:.4f}[/]: {plan['steps']} Poisson samples of {plan['batch_size']:g} expected "
        f"out of {plan['units']:g} units (rate {plan['sampling_rate']:.5f}), {plan['passes']} pass(es) each."
    )
    if plan["noise_multiplier"] == 0:
        console.print("NOT PRIVATE: epsilon is infinite without noise.")
        return
    if sentence := attacks(plan["attack_success"]):
        console.say(sentence)
    target = plan["target_epsilon"] or plan["epsilon"]
    table = Table(title=f"Larger samples: noise per update at epsilon {target:.3g} (per coordinate, in units of C)")
    for column in ("batch size", "steps", "noise multiplier", "noise per update", "compute"):
        table.add_column(column, justify="right")
    here = plan["batch_size"] * plan["steps"]
    sizes = [plan["batch_size"] * 2.0**k for k in range(-2, 4)]
    for batch in [b for b in sizes if 1 <= b <= plan["units"]]:
        for steps in sorted({plan["steps"], max(1, round(here / batch))}, reverse=True):
            sigma = accountant.noise_multiplier(
                target, plan["delta"], sampling_rate=batch / plan["units"], steps=steps, passes=plan["passes"]
            )
            mark = "bold" if (batch, steps) == (plan["batch_size"], plan["steps"]) else None
            compute = f"{batch * steps / here:.2f}x"
            table.add_row(f"{batch:g}", str(steps), f"{sigma:.4f}", f"{sigma / batch:.6f}", compute, style=mark)
    console.print(table)
    console.print("Each batch size is shown with the same steps, and with the same compute.")
