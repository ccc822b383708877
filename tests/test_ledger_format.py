"""The ledger's file outlives the code: old files are read, new columns only add, newer files are refused."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from dpalign.errors import DPAlignError
from dpalign.privacy import ledger as format_of
from dpalign.privacy.ledger import MIGRATIONS, Ledger
from test_provenance import INTENT


def version(path: Path) -> int:
    database = sqlite3.connect(path)
    try:
        return database.execute("PRAGMA user_version").fetchone()[0]
    finally:
        database.close()


def unversioned(path: Path) -> None:
    """As of before there was a version."""
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 0")
    database.close()


def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version to come, with one more optional column."""
    monkeypatch.setattr(format_of, "MIGRATIONS", (*MIGRATIONS, ("ALTER TABLE intents ADD COLUMN cohort TEXT",)))


@pytest.fixture
def written(tmp_path) -> Path:
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    ledger.secret("d")
    ledger.write([INTENT, replace(INTENT, step=1)])
    ledger.close()
    return path


def test_a_new_file_has_this_version_and_opening_it_changes_nothing(written):
    assert version(written) == len(MIGRATIONS)
    before = written.read_bytes()
    assert len(Ledger(written).intents()) == 2 and written.read_bytes() == before


def test_a_file_without_a_version_is_read_and_stamped(written):
    identity, key = Ledger(written).identity, Ledger(written).secret("d")
    unversioned(written)
    ledger = Ledger(written)
    assert ledger.intents() == [INTENT, replace(INTENT, step=1)] and version(written) == len(MIGRATIONS)
    assert (ledger.identity, ledger.secret("d")) == (identity, key)
    ledger.write([replace(INTENT, step=2)])
    assert len(ledger.intents()) == 3


def test_a_later_column_leaves_old_rows_readable_and_this_version_refuses_it(written, monkeypatch):
    unversioned(written)
    with monkeypatch.context() as future:
        later(future)
        ledger = Ledger(written)
        ledger.write([replace(INTENT, step=2)])
        assert [i.step for i in ledger.intents()] == [0, 1, 2] and version(written) == len(MIGRATIONS) + 1
        ledger.close()
    before = written.read_bytes()
    newer = f"format {len(MIGRATIONS) + 1}, this one knows {len(MIGRATIONS)}"
    with pytest.raises(DPAlignError, match=rf"newer dpalign \({newer}\)") as raised:
        Ledger(written)
    assert "cannot be opened or written" not in str(raised.value) and written.read_bytes() == before


def test_a_migration_that_fails_leaves_the_old_file(written, monkeypatch):
    half = ("ALTER TABLE intents ADD COLUMN cohort TEXT", "ALTER TABLE nowhere ADD COLUMN x")
    with monkeypatch.context() as future:
        future.setattr(format_of, "MIGRATIONS", (*MIGRATIONS, half))
        with pytest.raises(DPAlignError, match="cannot be opened or written"):
            Ledger(written)
    assert version(written) == len(MIGRATIONS) and len(Ledger(written).intents()) == 2
