"""No malformed input is accepted, ends in an internal error, is refused after a draw, or takes long: a sample of each kind."""

from __future__ import annotations

import math

import pytest

from malformed_inputs import Case, all_cases, judge

CASES = all_cases()
GROUPS = list(dict.fromkeys(case.group for case in CASES))
MOST = 8  # of a group, spread over it; benchmarks/malformed.py judges all
ALWAYS = {  # what a sample of a group may not show
    "calls": ["plan --epsilon '1e400'", "sweep --epsilons '1e400'", "generate more than the model holds"],
    "checkpoints": ["a step that is a word", "a state that is a list", "a run that is a list", "no algorithm"],
    "data": ["half a character in a key"],
    "fields": ["model = 3", "sft.adapter = 3"],
    "file": ["a number beyond all numbers", "a section that is nothing"],
    "ledgers": ["dataset = 3", "dataset = None", "run = 3"],
}  # fmt: skip


def sample(group: str) -> list[Case]:
    cases = [case for case in CASES if case.group == group]
    spread = cases[:: math.ceil(len(cases) / MOST)]
    always = [next(case for case in cases if case.name == name) for name in ALWAYS.get(group, [])]
    return list(dict.fromkeys([*spread, *always]))


def test_there_are_many():
    assert len(CASES) > 2000 and len({(case.group, case.name) for case in CASES}) == len(CASES)


@pytest.mark.parametrize("group", GROUPS)
def test_malformed(group, tmp_path, monkeypatch):
    faults = {}
    for number, case in enumerate(sample(group)):
        folder = tmp_path / f"malformed-{number}"
        folder.mkdir()
        monkeypatch.setenv("DPALIGN_LEDGER", str(folder / "ledger.sqlite"))
        verdict = judge(case, folder)
        if verdict.fault:
            faults[case.name] = f"{verdict.fault}: {verdict.error[-200:]}"
    assert not faults
