"""`dpalign report --nist`: from the run's published numbers alone, and open where only the data holder knows."""

from __future__ import annotations

import json
import re

import pytest

from dpalign.privacy.statement import attack_success_of
from dpalign.reporting.numbers import at_most, attacks
from finished import finished_run, statement
from helpers import call

# The blocks of the document's pyramid, from the top.
BLOCKS = [
    "unit of privacy", "privacy parameters", "algorithms", "correctness", "utility", "bias", "trust model", "access control",
    "side channels", "data collection exposure",
]  # fmt: skip


@pytest.fixture
def run(tmp_path):
    return finished_run(tmp_path / "support")


def written(run, capsys) -> str:
    assert call(capsys, "report", run, "--nist", "--json").json == {"nist": str(run / "nist-sp-800-226.md")}
    return (run / "nist-sp-800-226.md").read_text(encoding="utf-8")


def test_every_block_of_the_pyramid_is_answered_in_order(run, capsys):
    said = written(run, capsys)
    assert re.findall(r"^### .*\(([a-z ]+)\)$", said, re.MULTILINE) == BLOCKS
    assert said.count("**Open:**") >= 8 and "NOT PRIVATE" not in said


def test_the_numbers_are_the_runs(run, capsys):
    said, stated = written(run, capsys), statement("support-chats")
    assert f"epsilon at most {at_most(stated.epsilon)}, delta = 1e-05" in said
    assert attacks(attack_success_of(stated.stages)) in said
    assert "Any one `customer` of `support-chats`" in said and "No unit is in two stages" in said
    assert (
        "| `sft` | `support-chats` | `customer` | 12,500.5 | 0% to 50% of the hash range | 0.32000 | 4.0000 | 40.0000 | 60 | 1 | 0.5 |"
        in said
    )
    assert said.count("dpalign plan --units 12500.5") == 2 and "- `assumed of support-chats`" in said
    assert "together epsilon 7.322" in said and "1 run(s) on the same data had no privacy" in said
    assert "hyperparameters chosen by looking" in said and "Measured on records that are declared public" in said


def test_it_is_made_from_what_is_published(run, capsys):
    before = written(run, capsys)
    for file in (run / "private").iterdir():
        file.unlink()
    (run / "metrics.jsonl").write_text("")
    assert written(run, capsys) == before


def test_stages_that_share_units_are_said_to(run, capsys):
    summary = json.loads((run / "summary.json").read_text())
    summary["stages"][1]["part"] = [0.25, 1.0]
    (run / "summary.json").write_text(json.dumps(summary))
    assert "several stages (`sft` and `rloo`)" in written(run, capsys)


def test_without_privacy_there_is_no_number(tmp_path, capsys):
    said = written(finished_run(tmp_path / "bare", private=False), capsys)
    assert said.index("NOT PRIVATE") < said.index("## How strong") and "there is no epsilon" in said
    assert "epsilon at most" not in said and "Whoever guesses" not in said


def test_what_others_have_named_is_no_markup(tmp_path, capsys):
    said = written(finished_run(tmp_path / "x", said="a [link](http://x) | <b>`x`\n# y"), capsys)
    assert "\n# y" not in said and said.count("\n# ") == 0 and "<b>" not in said


def test_what_cannot_be_answered_is_one_sentence(run, tmp_path, capsys):
    assert "holds no finished run" in call(capsys, "report", tmp_path, "--nist").error
    (run / "summary.json").write_text('{"not_covered": []}')
    assert "holds files that no run writes" in call(capsys, "report", run, "--nist").error
    assert "--beside" in call(capsys, "report", run, "--nist", "--beside", run).error
