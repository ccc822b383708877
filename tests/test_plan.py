"""`dpalign plan`: the arithmetic of the budget, against golden values."""

from __future__ import annotations

import math
import re
import time
from copy import deepcopy

import pytest

from dpalign.cli.plan_recipe import plan_of
from dpalign.parsing import recipe_from
from dpalign.privacy import accountant
from dpalign.training.plan import StagePlan, signal_of
from helpers import call, write_recipe

# units, batch size, steps, golden noise multiplier at epsilon 4 and delta 4e-5 (dp-accounting PLD, checked twice)
GOLDEN = [
    (12500, 256, 4883, 1.6164),
    (12500, 4096, 305, 5.860),
    (12500, 512, 977, 1.498),
    (1, 1, 100, 10.088),
]
BUDGET = ("--epsilon", 4, "--delta", 4e-5)
PAPER = ("--units", 12500, "--delta", 4e-5)


def plan(capsys, *arguments):
    return call(capsys, "plan", *arguments, "--json").json


@pytest.mark.parametrize(("units", "batch", "steps", "golden"), GOLDEN)
def test_golden_noise_multipliers(capsys, units, batch, steps, golden):
    found = plan(capsys, "--units", units, "--batch-size", batch, "--steps", steps, *BUDGET)
    assert golden <= found["noise_multiplier"] <= golden * 1.002
    assert 3.98 < found["epsilon"] <= 4


@pytest.mark.parametrize(("units", "batch", "steps", "golden"), GOLDEN)
def test_calibration_is_quick(units, batch, steps, golden):
    accountant._single.cache_clear()
    accountant._epsilon.cache_clear()
    started = time.process_time()
    accountant.noise_multiplier(4, 4e-5, sampling_rate=batch / units, steps=steps)
    assert time.process_time() - started < 2


def test_any_one_from_the_others(capsys):
    units, batch, steps, sigma = ("--units", 64), ("--batch-size", 32), ("--steps", 100), ("--noise-multiplier", 5)
    epsilon = plan(capsys, *units, *batch, *steps, *sigma)["epsilon"]
    target = ("--epsilon", epsilon + 0.002)
    more = plan(capsys, *units, *batch, *sigma, *target)
    assert 98 <= more["steps"] <= 101 and more["epsilon"] <= epsilon + 0.002
    larger = plan(capsys, *units, *steps, *sigma, *target)
    assert 31 <= larger["batch_size"] <= 33 and larger["epsilon"] <= epsilon + 0.002
    quieter = plan(capsys, *units, *batch, *steps, "--epsilon", epsilon)
    assert 5 <= quieter["noise_multiplier"] <= 5 * 1.002


def test_passes_over_one_sample_cost_as_one_release_of_less_noise(capsys):
    arguments = (*PAPER, "--batch-size", 256, "--steps", 4883, "--noise-multiplier", 1.616)
    once, four = plan(capsys, *arguments)["epsilon"], plan(capsys, *arguments, "--passes", 4)["epsilon"]
    assert once == pytest.approx(4.00, abs=0.01) and four == pytest.approx(14.13, abs=0.01)  # as fresh samples: 9.13


def test_without_privacy(capsys):
    found = plan(capsys, "--units", 1000, "--batch-size", 10, "--steps", 10, "--epsilon", "inf")
    assert found["noise_multiplier"] == 0 and found["epsilon"] == "inf"
    assert (
        "NOT PRIVATE"
        in call(capsys, "plan", "--units", 1000, "--batch-size", 10, "--steps", 10, "--epsilon", "inf").out
    )


def test_aliases_of_the_recipe_fields(capsys):
    short = plan(capsys, *PAPER, "--batch-size", 512, "--steps", 300, "--passes", 2, "--epsilon", 4)
    long = plan(
        capsys, "--declared_units", 12500, "--target_delta", 4e-5, "--expected_batch_size", 512, "--max_steps", 300,
        "--num_ppo_epochs", 2, "--target_epsilon", 4,
    )  # fmt: skip
    assert short == long


def test_default_delta_and_the_table(capsys):
    found = plan(capsys, "--units", 50_000, "--batch-size", 512, "--steps", 10, "--noise-multiplier", 2)
    assert found["delta"] == pytest.approx(2e-6) and math.isfinite(found["epsilon"])
    table = call(capsys, "plan", "--units", 64, "--batch-size", 32, "--steps", 100, "--epsilon", 2)
    assert table.status == 0 and " 16 " in table.out and " 64 " in table.out and " 128 " not in table.out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--batch-size", 10), "missing: epsilon, noise multiplier, steps"),
        (("--batch-size", 10, "--steps", 5, "--epsilon", 1, "--noise-multiplier", 1), "all of them are given"),
        (("--batch-size", 10, "--steps", 5, "--epsilon", 0), "0.0 must be above 0"),
        (("--batch-size", 10, "--steps", 5, "--epsilon", -1), "-1.0 must be above 0"),
        (("--batch-size", 10, "--steps", 5, "--epsilon", "nan"), "nan must be above 0"),
        (("--batch-size", 10, "--steps", 5, "--epsilon", 1, "--delta", 1), "1.0 must be above 0 and below 1"),
        (("--batch-size", 101, "--steps", 5, "--epsilon", 1), "batch size 101"),
        (("--batch-size", 10, "--steps", 0, "--epsilon", 1), "0 must be at least 1"),
        (("--batch-size", 10, "--steps", "many", "--epsilon", 1), "many"),
        (("--batch-size", 10, "--steps", 5, "--noise-multiplier", -1), "-1.0 must be at least 0"),
        (("--batch-size", 10, "--steps", 5, "--noise-multiplier", 1, "--passes", 0), "0 must be at least 1"),
    ],
)
def test_what_cannot_be_planned(capsys, arguments, says):
    assert says in call(capsys, "plan", "--units", 100, *arguments, "--json").error


def test_a_plan_says_how_far_its_signal_stands_out_of_the_noise(tmp_path, capsys):
    sizes = {"expected_batch_size": 64, "max_steps": 9, "target_epsilon": 2}
    path = write_recipe(
        tmp_path, sft=sizes, ppo=None, split=None, data={"name": "d", "declared_units": 200}, target_delta=1e-5
    )
    (stage,) = call(capsys, "plan", path, "--json").json["stages"]
    found, sigma = stage["signal_to_noise"], stage["noise_multiplier"]
    assert found["planned"] == pytest.approx(3 * 64 / sigma)  # the square root of nine steps
    whole = accountant.noise_multiplier(stage["epsilon_alone"], 1e-5, sampling_rate=1.0, steps=1)
    assert found["ceiling"] == pytest.approx(200 / whole, rel=2e-3) and found["planned"] < found["ceiling"]
    ratio = {"metrics_noise_ratio": 10.0}
    twice = accountant.noise_multiplier(stage["epsilon_alone"], 1e-5, sampling_rate=0.64, steps=9, **ratio)
    assert found["doubled"] == pytest.approx(3 * 128 / twice, rel=2e-3) and found["doubled"] > found["planned"]
    said = call(capsys, "plan", path).out
    assert "200 units will buy little at epsilon" in " ".join(said.split()) and f"{found['planned']:.0f}" in said


def test_a_plan_of_one_query_is_its_own_ceiling_and_enough_people_are_no_warning(tmp_path, capsys):
    def stage_of(units: int, **sizes: object) -> tuple[dict, str]:
        data = {"name": "d", "declared_units": units}
        recipe = {"data": data, "target_delta": 1e-5, "target_epsilon": sizes["target_epsilon"]}
        path = write_recipe(tmp_path, sft=sizes, ppo=None, split=None, **recipe)
        (stage,) = call(capsys, "plan", path, "--json").json["stages"]
        return stage["signal_to_noise"], call(capsys, "plan", path).out

    one = {"max_steps": 1, "target_epsilon": 1, "metrics_noise_ratio": 0}
    query, said = stage_of(100, expected_batch_size=100, **one)
    assert query["planned"] == pytest.approx(query["ceiling"], rel=2e-3) and query["doubled"] is None
    assert "buy little" not in said
    many, said = stage_of(20_000, expected_batch_size=100, max_steps=2, target_epsilon=1)
    assert many["ceiling"] > 500 and "buy little" not in said
    free, said = stage_of(100, expected_batch_size=10, max_steps=2, target_epsilon=math.inf)
    assert free is None and "buy little" not in said


def test_planning_leaves_the_recipe_as_it_was(tmp_path):
    """The number of units is counted for the plan; a run with the same recipe still counts for itself."""
    given = recipe_from("plan", [str(write_recipe(tmp_path))])
    before = deepcopy(given)
    plan = plan_of(given)
    assert plan["stages"][0]["units"] == 32 and given == before and given.data.declared_units is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("plan", "--units", 100, "--passes", 0), "--passes.*: 0 must be at least 1"),
        (("plan", "--units", 100, "--passes", "9" * 20), "must be at least 1 and at most 1024"),
        (("plan", "--units", "nan"), "nan must be above 0"),
        (("plan", "--units", 100, "--noise-multiplier", "inf"), "inf must be at least 0 and at most 100000"),
        (("plan", "--units", 100, "--steps", "1e3"), "'1e3' is no whole number"),
        (("generate", "tiny-review-lm", "--prompt", "x", "--max_completion_length", 0), "0 must be at least 1"),
        (("generate", "tiny-review-lm", "--prompt", "x", "--temperature", "nan"), "nan must be above 0"),
        (("evaluate", "tiny-review-lm", "--data", "x", "--num_prompts", -1), "-1 must be at least 1"),
        (("ledger", "--delta", 1), "must be above 0 and below 1"),
    ],
)
def test_every_number_of_a_command_has_an_interval(capsys, arguments, says):
    assert re.search(says, call(capsys, *arguments, "--json").error)


def test_passes_over_a_sample_add_to_its_signal_as_steps_do():
    plan = StagePlan.of(accountant.SampledGaussian(0.5, 3.0, 4, passes=9), 1e-5)
    signal = signal_of(plan, 100)
    assert signal is not None and signal.planned == pytest.approx(6 * 50 / 3)  # the root of 4 times 9, units, noise
