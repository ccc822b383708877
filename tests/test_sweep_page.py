"""The report of a sweep: what it says of each setting, whom it may be shown to, and how it looks on a phone."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from browser import needs_chromium, too_wide
from dpalign.files import append_line, write_json
from dpalign.reporting.sweep import spent_sentence, summarize_sweep
from dpalign.reporting.sweep_page import write_sweep_report
from dpalign.results import Finished, Trial
from finished import DELTA, LONG
from helpers import call
from reader import ROOT
from test_report import Reading


def finished_sweep(folder: Path, *, demo: bool, varied: str | None = None, said: str = "support-chats") -> Path:
    """A sweep over 0, 4 and inf with two seeds, as its files say it."""
    folder.mkdir(parents=True)
    values = [None] if varied is None else [f"{said} 1", f"{said} 2"]
    rewards = {"0": (0.1, 0.1, 0.0), "4": (0.5, 0.6, 3.9871), "inf": (0.8, 0.8, math.inf)}
    runs = [
        Finished(
            "recipe.yaml", (), Trial(epsilon, seed, value, ()), reward=pair[seed], reward_ci95_prompts=0.025, kl=2.0 + seed,
            perplexity=50.0, distinct_2=0.5, completion_length=12.0, spent_epsilon=pair[2], delta=DELTA if pair[2] else None,
        )
        for epsilon, pair in rewards.items() for value in values for seed in (0, 1)
    ]  # fmt: skip
    for run in runs:
        append_line(folder / "runs.jsonl", run.to_json())
    entry = {
        "dataset": said, "unit_kinds": ["customer"], "runs": 4, "runs_without_privacy": 2,
        "epsilon_of_all_private_runs": 7.3211, "delta": DELTA, "demo_data": demo,
    }  # fmt: skip
    write_json(folder / "sweep.json", {
        "recipe": "recipe.yaml", "overrides": [], "varied": varied, "command": f"dpalign sweep recipe.yaml {said}",
        "rows": summarize_sweep([run.to_json() for run in runs]),
        "spent_by_tuning": [entry | {"sentence": spent_sentence(entry)}],
    })  # fmt: skip
    return folder


def read(folder: Path) -> tuple[Reading, Reading]:
    page, _ = write_sweep_report(folder)
    return Reading(page), Reading(folder / "private" / "report.html")


def test_it_says_what_each_setting_gave_and_cost(tmp_path):
    shown, own = read(finished_sweep(tmp_path / "tuning", demo=True))
    text = shown.text
    assert "4 runs, 3 settings" in text
    # (0.55 - 0.1) / (0.8 - 0.1) = 0.64; Student's t of two values at 95% is 12.706: 12.706 * 0.0707 / 1.414 = 0.635.
    assert "epsilon 4 ε ≤ 3.988, δ 1e-5 0.550 ± 0.635 0.64 2.50 ± 6.35" in text
    assert "pretrained free 0.100 ± 0.000" in text and "without privacy not covered 0.800 ± 0.000" in text
    assert "epsilon-4-seed-1 ε ≤ 3.988, δ 1e-5 0.600 ± 0.025 3.00" in text
    assert "had it been private data, choosing by these results would have cost epsilon 7.322" in text
    assert "support-chats: 4 run(s), together epsilon 7.322 at δ 1e-5; 2 of them ran WITHOUT privacy" in text
    assert "Command" not in text and "dpalign sweep recipe.yaml" in own.text and "Stays with" not in own.text


def test_what_ran_without_privacy_on_private_data_is_the_data_holders_alone(tmp_path, capsys):
    folder = finished_sweep(tmp_path / "tuning", demo=False)
    shown, own = read(folder)
    assert "2 runs, 2 settings" in shown.text and "epsilon 4 ε ≤ 3.988" in shown.text
    for told in ("0.800", "0.64 ", "not covered 0", "share", "epsilon-inf", "without privacy"):
        assert told not in shown.text.replace("WITHOUT privacy", ""), told  # nor what is computed from it
        assert told in own.text or told == "share"
    assert "Stays with the data holder." in own.text and "do not publish them" in own.text
    called = call(capsys, "report", folder)
    assert "without privacy is without privacy: it is in the data holder's report only." in called.out
    assert call(capsys, "report", folder, "--json").json == {
        "report": str(folder / "report.html"), "private_report": str(folder / "private" / "report.html"),
        "only_private": ["without privacy"],
    }  # fmt: skip
    assert (folder / "private").stat().st_mode & 0o077 == 0


def test_varied_values_are_settings_of_their_own(tmp_path):
    shown, _ = read(finished_sweep(tmp_path / "tuning", demo=True, varied="ppo.beta", said="<b>0.1</b>"))
    assert "epsilon 4, ppo.beta <b>0.1</b> 2 ε ≤ 3.988" in shown.text and "b" not in shown.tags
    assert not shown.fetched and "8 runs, 6 settings" in shown.text


def test_sweeps_of_older_versions_are_read(tmp_path):
    folder = tmp_path / "passes"
    folder.mkdir()
    shutil.copy(ROOT / "docs" / "results" / "passes.json", folder / "sweep.json")
    shutil.copy(ROOT / "docs" / "results" / "passes.runs.jsonl", folder / "runs.jsonl")
    shown, _ = read(folder)
    assert "epsilon 4, ppo.num_ppo_epochs 1" in shown.text and "demo-movie-snippets: 15 run(s)" in shown.text


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("sweep.json", "{", "is no JSON"),
        ("sweep.json", "[]", "files that no sweep writes"),
        ("sweep.json", '{"rows": [{"epsilon": "x"}], "spent_by_tuning": []}', "files that no sweep writes"),
        ("runs.jsonl", '{"recipe": 3}\n', "files that no sweep writes"),
    ],
)
def test_a_folder_that_is_no_finished_sweep(file, content, sentence, tmp_path, capsys):
    folder = finished_sweep(tmp_path / "tuning", demo=True)
    (folder / file).write_text(content, encoding="utf-8")
    assert sentence in call(capsys, "report", folder).error
    assert not (folder / "report.html").exists()


def test_beside_is_for_runs(tmp_path, capsys):
    folder = finished_sweep(tmp_path / "tuning", demo=True)
    assert "--beside is for a run's report" in call(capsys, "report", folder, "--beside", folder).error


@needs_chromium
def test_nothing_has_to_be_scrolled_sideways(tmp_path):
    folder = finished_sweep(tmp_path / LONG[:100], demo=False, varied="ppo.learning_rate", said=LONG[:60])
    write_sweep_report(folder)
    page = folder / "report.html"
    assert too_wide([page, folder / "private" / "report.html"], tmp_path) == []
    style = page.read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in style and json.dumps(LONG[:60])[1:-1] in style
