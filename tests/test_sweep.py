"""`dpalign sweep`: its rows by hand, one small sweep, and going on after an interruption."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

import pytest

import dpalign
from dpalign import sweep
from dpalign.errors import DPAlignError
from dpalign.files import dumps
from dpalign.reporting.sweep import interval, plot_sweep, summarize_sweep, write_markdown
from dpalign.results import Finished
from helpers import call, in_this_process, ledger_rows, reviews, write_jsonl, write_recipe


def trial(epsilon: str, seed: int, reward: float, **more):
    return {
        "epsilon": epsilon, "seed": seed, "value": None, "reward": reward, "kl": 1.0 + seed, "reward_ci95_prompts": 0.2
    } | more  # fmt: skip


def test_rows_worked_by_hand():
    runs = [trial("0", 0, 0.1), trial("inf", 0, 0.9), trial("4", 0, 0.6), trial("4", 1, 0.8)]
    rows = {row["epsilon"]: row for row in summarize_sweep(runs)}
    assert set(rows) == {0.0, 4.0, "inf"}
    four = rows[4.0]
    assert four["reward_mean"] == pytest.approx(0.7) and four["kl"] == pytest.approx(1.5) and four["seeds"] == 2
    # Student's t with one degree of freedom is 12.706; the standard error is 0.1.
    assert four["reward_ci95"] == pytest.approx(1.2706, rel=1e-3) and four["interval_over"] == "seeds"
    assert four["share"] == pytest.approx((0.7 - 0.1) / (0.9 - 0.1))
    assert rows[0.0]["reward_ci95"] == 0.2 and rows[0.0]["interval_over"] == "prompts" and "share" not in rows[0.0]


def test_losses_on_texts_after_each_stage(tmp_path):
    before = {"pretrained": {"reward": 0.1, "text_loss": 4.5}, "sft": {"reward": 0.2, "text_loss": 4.25}}
    runs = [trial("0", 0, 0.1, text_loss=4.5)]
    runs += [trial("4", seed, 0.6, text_loss=4.375 + seed / 4, before=before) for seed in (0, 1)]
    base, private = summarize_sweep(runs)
    assert (base["text_loss"], private["text_loss"], private["text_loss_after_sft"]) == (4.5, 4.5, 4.25)
    assert private["text_loss_ci95"] == pytest.approx(0.125 * 12.706, rel=1e-3) and "text_loss_after_sft" not in base
    write_markdown(tmp_path / "a.md", {"varied": None, "rows": [base, private], "command": "x", "spent_by_tuning": []})
    table = [line.split(" | ") for line in (tmp_path / "a.md").read_text().splitlines() if line.startswith("| ")]
    columns = dict(zip(*(table[i] for i in (0, 2)), strict=True))
    assert columns["text loss after sft"] == "4.250" and columns["text loss"] == "4.500 ± 1.588"


def test_interval_of_one_value_is_unknown():
    assert math.isnan(interval([1.0]))


def test_varied_values_get_rows_of_their_own(tmp_path):
    runs = [trial("4", 0, 0.5) | {"value": "1"}, trial("4", 0, 0.25) | {"value": "8"}]
    rows = summarize_sweep(runs)
    assert [(r["value"], r["reward_mean"]) for r in rows] == [("1", 0.5), ("8", 0.25)]
    result = {"varied": "ppo.num_ppo_epochs", "rows": rows, "command": "dpalign sweep", "spent_by_tuning": []}
    plot_sweep(result, tmp_path / "a.png")
    write_markdown(tmp_path / "a.md", result)
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert "| epsilon | `ppo.num_ppo_epochs` |" in (tmp_path / "a.md").read_text()


LEARNED = ["--ppo.reward.source", "reward_model:release"]


def stated(folder, private: bool) -> None:
    """A folder that looks like a release."""
    folder.mkdir()
    mechanism = {"sampling_rate": 0.5, "noise_multiplier": 2.0, "steps": 3}
    stage = {
        "stage": "sft", "dataset": "reviews", "part": [0, 1], "split": "s", "unit": "record", "declared_units": 9,
        "max_grad_norm": 1, "epsilon_alone": 1, "mechanisms": [mechanism], "private": private,
    }  # fmt: skip
    (folder / "privacy.json").write_text(
        json.dumps({"private": private, "epsilon": 1.0, "stages": [stage], "assumptions": []})
    )


@pytest.fixture
def recipe(tmp_path):
    write_jsonl(tmp_path / "public.jsonl", reviews(8, "morning"))
    public = {"eval_path": str(tmp_path / "public.jsonl"), "eval_is_public": True}
    return write_recipe(tmp_path, sft=None, data=public, ppo={"max_steps": 1})


def test_sweep_end_to_end_and_resumed(tmp_path, capsys, recipe, monkeypatch):
    monkeypatch.setenv("DPALIGN_LEDGER", str(tmp_path / "ledger.sqlite"))
    out = tmp_path / "sweep"
    words = ("sweep", recipe, "--epsilons", "0", "2", "--seeds", 1, "--output_dir", out, "--json")
    first = call(capsys, *words).json
    assert [row["epsilon"] for row in first["rows"]] == [0, 2]
    assert all(-5 < row["kl"] < 5 and math.isfinite(row["reward_mean"]) for row in first["rows"])
    spent = first["spent_by_tuning"][0]
    assert spent["runs"] == 1 and 0 < spent["epsilon_of_all_private_runs"] <= 2
    assert {f.name for f in out.iterdir()} == {
        "private", "report.html", "runs", "runs.jsonl", "sweep.json", "sweep.md", "sweep.png",
    }  # fmt: skip
    drawn = ledger_rows(tmp_path)
    # An interruption after the first run: the second is not in the log, and its folder goes on without a draw.
    lines = (out / "runs.jsonl").read_text().splitlines()
    (out / "runs.jsonl").write_text(lines[0] + "\n")
    monkeypatch.setattr(sweep, "_in_fresh_process", in_this_process)
    again = call(capsys, *words).json
    assert ledger_rows(tmp_path) == drawn and again["rows"] == first["rows"]
    assert [json.loads(line)["epsilon"] for line in (out / "runs.jsonl").read_text().splitlines()] == ["0", "2"]
    # Another recipe does not mix with these runs, and a damaged log is not guessed at.
    assert "other overrides" in call(capsys, *words, "--ppo.beta", "0.1").error
    (out / "runs.jsonl").write_text('{"epsilon": \n')
    assert "line 1" in call(capsys, *words).error


def test_run_sweep_from_python_goes_on_where_the_command_stopped(tmp_path, capsys, recipe, monkeypatch):
    monkeypatch.setenv("DPALIGN_LEDGER", str(tmp_path / "ledger.sqlite"))
    monkeypatch.setattr(sweep, "_in_fresh_process", in_this_process)
    out = tmp_path / "sweep"
    asked = {"epsilons": {0: 1, 2.0: 1}, "at": {2: {"ppo.beta": 0.1}}, "output_dir": out}
    result = dpalign.run_sweep(recipe, **asked)
    words = ("--epsilons", "0", "2", "--seeds", 1, "--at", "2", "ppo.beta=0.1", "--output_dir", out)
    assert result.command == shlex.join(["dpalign", "sweep", str(recipe), *map(str, words)])
    pretrained, private = result.runs
    assert (pretrained.trial.key, private.trial.key) == (("0", 0, None), ("2", 0, None))
    assert 0 < private.spent_epsilon <= 2 and private.delta == 1e-5 and private.noise_multipliers["ppo"] > 0
    assert list(private.before) == ["pretrained"] and private.pairs is None
    assert private.before["pretrained"].reward == pretrained.reward, "one seed, one measurement"
    assert json.loads((out / "sweep.json").read_text()) == json.loads(dumps(result.to_json()))
    log, drawn = (out / "runs.jsonl").read_text(), ledger_rows(tmp_path)
    monkeypatch.setattr(sweep, "_in_fresh_process", None)  # nothing is run again, neither by the function nor by the command
    assert dumps(dpalign.run_sweep(recipe, **asked).to_json()) == dumps(result.to_json())
    assert call(capsys, "sweep", recipe, *words, "--json").json["rows"] == json.loads(dumps(result.rows))
    assert (out / "runs.jsonl").read_text() == log and ledger_rows(tmp_path) == drawn
    with pytest.raises(DPAlignError, match="was run with other settings"):
        dpalign.run_sweep(recipe, epsilons=[2], seeds=1, output_dir=out)


def test_lines_of_earlier_sweeps_are_read():
    """Those that this project has published: each is written again as it was, and their report says the same."""
    results = Path(__file__).parent.parent / "docs" / "results"
    for name in ("quickstart_preferences", "quickstart_sentiment"):
        text = (results / f"{name}.runs.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        runs = [Finished.from_json(line) for line in lines]
        assert [json.loads(dumps(run.to_json())) for run in runs] == lines
        trained = [run for run in runs if name == "quickstart_preferences" and run.trial.epsilon not in ("0", "free")]
        assert [run for run in runs if run.pairs is not None] == trained, "those that have trained a reward model"
        published = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))["rows"]
        assert any("reward_sft" in row for row in published)
        again = json.loads(dumps(summarize_sweep([run.to_json() for run in runs])))
        assert {str(row["epsilon"]): row for row in again} == {str(row["epsilon"]): row for row in published}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"epsilons": []}, "at least one epsilon"),
        ({"epsilons": {4: 0}}, "give at least 1"),
        ({"epsilons": [4], "at": {8: {"ppo.beta": 0.1}}}, "none of the swept"),
        ({"epsilons": [4], "vary": ("ppo.num_ppo_epochs", [])}, "at least one value"),
        ({"epsilons": [4], "overrides": ["--ppo.nonsense", "1"]}, "unknown field ppo.nonsense"),
    ],
)
def test_run_sweep_refuses_before_any_run(tmp_path, recipe, options, says):
    with pytest.raises(DPAlignError, match=says):
        dpalign.run_sweep(recipe, output_dir=tmp_path / "sweep", **options)
    assert not (tmp_path / "sweep").exists()


def test_public_proxy_does_not_touch_the_private_name(tmp_path, capsys, recipe, monkeypatch):
    monkeypatch.setattr(sweep, "_in_fresh_process", in_this_process)
    words = ("sweep", recipe, "--epsilons", "2", "--seeds", 1, "--output_dir", tmp_path / "proxy", "--json")
    proxy = write_jsonl(tmp_path / "proxy.jsonl", reviews(40, "noon"))
    eval_path = ("--data.eval_path", tmp_path / "public.jsonl", "--data.eval_is_public", "true")
    done = call(capsys, *words, "--public_proxy", proxy, *eval_path).json
    assert [s["dataset"] for s in done["spent_by_tuning"]] == ["public-proxy"] and done["spent_by_tuning"][0][
        "demo_data"
    ]
    assert ledger_rows(tmp_path, dataset="reviews") == 0 and ledger_rows(tmp_path, dataset="public-proxy") > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--epsilons", "four"], "expected an epsilon"),
        (["--epsilons", "-1"], "impossible"),
        (["--epsilons", "4:0"], "at least 1"),
        (["--vary", "ppo.num_ppo_epochs"], "--vary needs"),
        (["--at", "8", "ppo.beta=0.1", "--epsilons", "4"], "none of the swept"),
        (["--at", "4", "ppo.beta", "--epsilons", "4"], "FIELD=VALUE"),
        (["--epsilons", "4", "--vary", "ppo.nonsense", "1"], "unknown field ppo.nonsense"),
        (["--epsilons", "inf", "--ppo.target_epsilon", "2"], "would not be without privacy"),
        (["--epsilons", "0", "--model.name_or_path", "release"], "trained on private data already"),
        (["--epsilons", "0", *LEARNED], "has no reward model of its own"),
        (["--epsilons", "0", *LEARNED, "--reference_reward.source", "reward_model:free"], "has no guarantee"),
    ],
)
def test_bad_calls_say_why_before_any_run(tmp_path, capsys, recipe, words, said, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stated(tmp_path / "release", True)
    stated(tmp_path / "free", False)
    assert said in call(capsys, "sweep", recipe, "--output_dir", tmp_path / "sweep", *words).error
    assert ledger_rows(tmp_path) == 0 if (tmp_path / "ledger.sqlite").exists() else True


def test_a_sweep_without_public_prompts_is_refused(tmp_path, capsys):
    recipe = write_recipe(tmp_path, sft=None)
    assert "public prompts" in call(capsys, "sweep", recipe, "--output_dir", tmp_path / "sweep").error
