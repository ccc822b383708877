"""`dpalign run` from the recipe to the release, as a user would call it."""

from __future__ import annotations

import fcntl
import json
import math
import stat
import subprocess
import sys

import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant

from helpers import PICKLES, call, environment, files_below, ledger_rows, statement, write_recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run in a fresh process: its folder, standard output and standard error."""
    folder = tmp_path_factory.mktemp("pipeline")
    command = [sys.executable, "-m", "dpalign", "run", str(write_recipe(folder)), "--json"]
    done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, done.stderr


def recomputed(stages: list[dict], delta: float) -> float:
    """Epsilon of mechanisms that all met the same unit, by dp-accounting alone."""
    accountant = PLDAccountant()
    for m in (m for stage in stages for m in stage["mechanisms"]):
        precision = m["passes"] / m["noise_multiplier"] ** 2 + 1 / float(m["metrics_noise_multiplier"]) ** 2
        gaussian = dp_event.GaussianDpEvent(precision**-0.5)
        accountant.compose(dp_event.PoissonSampledDpEvent(m["sampling_rate"], gaussian), m["steps"])
    return accountant.get_epsilon(delta)


def test_prints_one_json_object_and_keeps_it(finished):
    folder, out, _ = finished
    assert out.count("\n") == 1
    summary = json.loads(out)
    assert summary == json.loads((folder / "run" / "summary.json").read_text())
    assert summary["private"] is True and 0 < summary["epsilon"] <= 2 and summary["delta"] == 1e-5
    assert [(s["stage"], s["units"]) for s in summary["stages"]] == [("sft", 32), ("ppo", 32)]


def test_release_is_complete_and_nothing_is_pickled(finished):
    run = finished[0] / "run"
    names = {f.name for f in (run / "release").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md", "privacy.json"} <= names
    assert not [f for f in files_below(run) if f.suffix in PICKLES]
    assert {f.parts[0] for f in (f.relative_to(run) for f in files_below(run))} == {
        "private", "release", "summary.json", "metrics.jsonl", "report.html",
    }  # fmt: skip
    assert stat.S_IMODE((run / "private").stat().st_mode) == 0o700
    assert stat.S_IMODE((run / "release").stat().st_mode) == 0o755


def test_epsilon_recomputes_from_the_statement(finished):
    folder, out, err = finished
    value, epsilon = statement(folder / "run"), json.loads(out)["epsilon"]
    assert value["epsilon"] == epsilon
    alone = [recomputed([stage], value["delta"]) for stage in value["stages"]]
    assert max(alone) == pytest.approx(epsilon, rel=1e-3)  # the stages' units are disjoint
    assert [stage["epsilon_alone"] for stage in value["stages"]] == pytest.approx(alone, rel=1e-3)
    assert [stage["part"] for stage in value["stages"]] == [[0, 0.5], [0.5, 1]]
    assert f"{epsilon:.4g}" in (folder / "run" / "release" / "README.md").read_text()
    assert f"epsilon {epsilon:.3f}" in err


def test_every_draw_is_in_the_ledger_and_a_second_call_draws_nothing(finished, capsys):
    folder = finished[0]
    assert (ledger_rows(folder, stage="sft"), ledger_rows(folder, stage="ppo")) == (3, 2)
    weights = (folder / "run" / "release" / "adapter_model.safetensors").read_bytes()
    again = call(capsys, "run", folder / "recipe.yaml", "--json")
    assert again.json["epsilon"] == json.loads(finished[1])["epsilon"]
    assert again.err.count("already done") == 2
    assert ledger_rows(folder) == 5
    assert (folder / "run" / "release" / "adapter_model.safetensors").read_bytes() == weights


def test_other_commands_take_the_release(finished, capsys, tmp_path):
    folder = finished[0]
    spent = call(capsys, "ledger", "--ledger", folder / "ledger.sqlite", "--json").json["datasets"]
    assert [(d["dataset"], d["runs"][0]["draws"]) for d in spent] == [("reviews", 5)]
    assert spent[0]["epsilon_of_all_private_runs"] == pytest.approx(json.loads(finished[1])["epsilon"], rel=1e-3)
    merged = tmp_path / "merged"
    assert call(capsys, "export", folder / "run", "--to", merged, "--merge", "--json").json["merged"]
    assert (merged / "model.safetensors").exists() and not (merged / "adapter_config.json").exists()
    question = ("--prompt", "This film", "--prepend_bos", "--max_completion_length", 8, "--json")
    adapted = call(capsys, "generate", folder / "run" / "release", *question).json["completions"]
    assert adapted == call(capsys, "generate", merged, *question).json["completions"]
    assert adapted[0]["prompt"] == "This film" and adapted[0]["completion"]


FAST = {"target_epsilon": 100, "sft": {"noise_multiplier": 2, "max_steps": 2}, "ppo": {"noise_multiplier": 2}}


@pytest.mark.parametrize("split", [{"sft": 0.5, "ppo": 0.5}, None])
def test_ppo_on_the_release_of_sft_composes_them(tmp_path, capsys, split):
    one, two = tmp_path / "one", tmp_path / "two"
    whole = {"sft": None} if split is None else {}
    recipe = write_recipe(tmp_path, split=split, **FAST | ({"ppo": None} if split is None else {}))
    sft = call(capsys, "sft", recipe, "--output_dir", one, "--json").json
    recipe = write_recipe(tmp_path, split=split, **FAST | whole)
    ppo = call(capsys, "ppo", recipe, "--output_dir", two, "--model.name_or_path", one / "release", "--json").json
    assert [s["stage"] for s in sft["stages"]] == ["sft"] and [s["stage"] for s in ppo["stages"]] == ["sft", "ppo"]
    stages, delta = statement(two)["stages"], ppo["delta"]
    alone = [stage["epsilon_alone"] for stage in stages]
    if split:  # disjoint units: every unit pays for one stage
        assert [stage["part"] for stage in stages] == [[0, 0.5], [0.5, 1]]
        assert ppo["epsilon"] == pytest.approx(max(alone))
    else:  # the same units: they pay for both
        assert [stage["part"] for stage in stages] == [[0, 1], [0, 1]]
        assert ppo["epsilon"] == pytest.approx(recomputed(stages, delta), rel=2e-3)
        assert ppo["epsilon"] > 1.2 * max(alone)
    assert json.loads((two / "release" / "adapter_config.json").read_text())["r"] == 4


def test_a_run_without_privacy_says_so(tmp_path, capsys):
    recipe = write_recipe(tmp_path, ppo=None, sft={"max_steps": 2})
    done = call(capsys, "run", recipe, "--target_epsilon", "inf", "--json")
    assert done.json["private"] is False and done.json["epsilon"] == "inf"
    assert "NOT PRIVATE" in done.err
    assert statement(tmp_path / "run")["epsilon"] == "inf"
    assert "NOT PRIVATE" in (tmp_path / "run" / "release" / "README.md").read_text()
    spent = call(capsys, "ledger", "--ledger", tmp_path / "ledger.sqlite", "--json").json["datasets"][0]
    assert spent["runs_without_privacy"] == 1 and spent["runs"][0]["epsilon"] == "inf"
    # A private run on that name owns up to it, and cannot start from its weights.
    private = write_recipe(tmp_path, **FAST | {"ppo": None, "output_dir": str(tmp_path / "next")})
    assert call(capsys, "run", private, "--json").json["ledger"][0]["runs_without_privacy"] == 1
    weights = ("--model.name_or_path", tmp_path / "run" / "release")
    refused = call(capsys, "run", private, *weights, "--output_dir", tmp_path / "last")
    assert "without privacy" in refused.error


def test_epsilon_of_all_runs_on_a_name_adds_up(tmp_path, capsys):
    recipe = write_recipe(tmp_path, **FAST | {"ppo": None})
    first = call(capsys, "run", recipe, "--output_dir", tmp_path / "a", "--json").json
    second = call(capsys, "run", recipe, "--output_dir", tmp_path / "b", "--json").json
    assert second["epsilon"] == first["epsilon"]  # of this release
    assert first["ledger"][0]["epsilon_of_all_private_runs"] == pytest.approx(first["epsilon"])
    assert second["ledger"][0]["epsilon_of_all_private_runs"] > 1.2 * first["epsilon"]
    assert math.isfinite(second["ledger"][0]["epsilon_of_all_private_runs"])


def test_two_processes_never_share_a_run(tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    (tmp_path / "run" / "private").mkdir(parents=True)
    with open(tmp_path / "run" / "private" / "lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another process" in call(capsys, "run", recipe).error
    assert not (tmp_path / "ledger.sqlite").exists()
