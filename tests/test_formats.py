"""Ledgers and privacy statements that an earlier version wrote are read as it read them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dpalign.errors import DPAlignError
from dpalign.privacy.ledger import Ledger
from dpalign.privacy.statement import epsilon_of, read_statement
from helpers import call

FORMATS = Path(__file__).with_name("formats")
EXPECTED = json.loads((FORMATS / "expected.json").read_text(encoding="utf-8"))
STATEMENTS = sorted(EXPECTED["statements"])


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Equal, numbers to 1e-9; `found` may have keys that the earlier version did not write."""
    if isinstance(expected, dict):
        assert expected.keys() <= found.keys(), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, value in enumerate(expected):
            assert_same(found[number], value, f"{where}[{number}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-9), where
    else:
        assert found == expected and type(found) is type(expected), where


@pytest.fixture
def old_ledger(tmp_path: Path) -> Path:
    """A copy, since opening a ledger may write to it."""
    return Path(shutil.copy(FORMATS / "ledger_v0.sqlite", tmp_path / "old.sqlite"))


def test_every_statement_has_its_expectation():
    assert [f.name for f in sorted(FORMATS.glob("privacy_*.json"))] == STATEMENTS


def test_an_old_ledger_adds_up_to_what_it_did(old_ledger, capsys):
    told = call(capsys, "ledger", "--ledger", old_ledger, "--json").json
    assert_same({k: v for k, v in told.items() if k != "ledger"}, EXPECTED["ledger"])


def test_an_old_ledger_goes_on(old_ledger, capsys):
    ledger = Ledger(old_ledger)
    before = ledger.intents()
    assert {i.attempt for i in before} == {0, 1} and {i.private for i in before} == {True, False}
    new = dataclasses.replace(before[0], step=999)
    ledger.write([new])
    ledger.close()
    again = Ledger(old_ledger)
    assert again.intents() == [*before, new]
    again.close()
    told = call(capsys, "ledger", "--ledger", old_ledger, "--dataset", new.dataset, "--json").json["datasets"][0]
    old = next(d for d in EXPECTED["ledger"]["datasets"] if d["dataset"] == new.dataset)
    draws = [sum(run["draws"] for run in d["runs"]) for d in (old, told)]
    assert draws[1] == draws[0] + 1
    assert told["epsilon_of_all_private_runs"] > old["epsilon_of_all_private_runs"]


@pytest.mark.parametrize("name", STATEMENTS)
def test_an_old_statement_says_what_it_did(tmp_path, name):
    shutil.copy(FORMATS / name, tmp_path / "privacy.json")
    read = read_statement(tmp_path)
    assert read is not None
    value, stages = read
    expected = EXPECTED["statements"][name]
    assert value["private"] is expected["private"] and len(stages) == expected["stages"]
    assert_same(value["epsilon"], expected["epsilon"])
    assert epsilon_of(stages, value["delta"]) == pytest.approx(float(expected["recomputed"]), rel=1e-9)


@pytest.mark.parametrize(("field", "value"), [("private", 1), ("private", "yes"), ("assumptions", "none"), ("assumptions", [3])])
def test_a_statement_says_in_its_own_kinds(field, value, tmp_path):
    """What is private is true or false, and what is assumed is sentences: anything else is nothing that a run writes."""
    name = next(iter(STATEMENTS))
    shutil.copy(FORMATS / name, tmp_path / "privacy.json")
    stated = json.loads((tmp_path / "privacy.json").read_text(encoding="utf-8"))
    assert read_statement(tmp_path) is not None
    (tmp_path / "privacy.json").write_text(json.dumps(stated | {field: value}), encoding="utf-8")
    with pytest.raises(DPAlignError, match="not a privacy statement"):
        read_statement(tmp_path)
