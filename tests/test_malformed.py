"""No malformed input is accepted, ends in an internal error, is refused after a draw, or takes long; see `malformed_inputs`."""

from __future__ import annotations

import pytest

from malformed_inputs import all_cases, judge

CASES = all_cases(per_field=1)
GROUPS = ["fields", "together", "file", "models", "statements", "rewards"]


def test_there_are_many():
    assert len(CASES) > 700 and len({(case.group, case.name) for case in CASES}) == len(CASES)


@pytest.mark.parametrize("group", GROUPS)
def test_malformed(group, tmp_path, monkeypatch):
    faults = {}
    for number, case in enumerate(case for case in CASES if case.group == group):
        folder = tmp_path / f"malformed-{number}"
        folder.mkdir()
        monkeypatch.setenv("DPALIGN_LEDGER", str(folder / "ledger.sqlite"))
        verdict = judge(case, folder)
        if verdict.fault:
            faults[case.name] = f"{verdict.fault}: {verdict.error[-200:]}"
    assert not faults
