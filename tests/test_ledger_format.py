"""The ledger's file outlives the code: old files are read, new columns only add, newer files are refused."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from dataclasses import asdict, replace
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


# The log beside the file ---------------------------------------------------------------------------------------------


def is_plain(path: Path) -> bool:
    """Whether a file is whole by itself: neither a log nor a journal beside it, and none asked for in its header."""
    return path.read_bytes()[18:20] == b"\x01\x01" and [f for f in path.parent.iterdir() if f.stem == path.stem] == [path]


def test_a_row_is_one_write_and_the_file_is_whole_again_when_it_is_closed(tmp_path):
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    ledger.secret("d")
    assert is_plain(path)  # nothing was drawn
    ledger.write([INTENT])
    assert ledger._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert ledger._db.execute("PRAGMA synchronous").fetchone() == (3,)
    modes = [file.stat().st_mode & 0o777 for file in tmp_path.iterdir()]
    assert modes == [0o600] * 3 and len(Ledger.copy_of(path).intents()) == 1
    ledger.close()
    assert is_plain(path) and Ledger(shutil.copy(path, tmp_path / "copy.sqlite")).intents() == [INTENT]


def test_the_last_of_two_runs_makes_it_whole(tmp_path):
    path = tmp_path / "ledger.sqlite"
    first, second = Ledger(path), Ledger(path)
    first.write([INTENT])
    second.write([replace(INTENT, step=1)])
    first.close()
    assert not is_plain(path) and len(second.intents()) == 2
    second.write([replace(INTENT, step=2)])
    second.close()
    assert is_plain(path) and [i.step for i in Ledger(path).intents()] == [0, 1, 2]


KILLED = """
import json, os, sys
from dpalign.privacy.ledger import Intent, Ledger
ledger = Ledger(sys.argv[1])
for step in range(3):
    ledger.write([Intent(**json.loads(sys.argv[2]) | {"step": step})])
os.kill(os.getpid(), 9)
"""


def test_rows_of_a_killed_run_are_there(tmp_path):
    path = tmp_path / "ledger.sqlite"
    subprocess.run([sys.executable, "-c", KILLED, str(path), json.dumps(asdict(INTENT))], check=False)
    assert path.with_name("ledger.sqlite-wal").exists()
    assert [i.step for i in Ledger.copy_of(path).intents()] == [0, 1, 2]
    ledger = Ledger(path)
    ledger.write([replace(INTENT, step=3)])
    ledger.close()
    assert is_plain(path) and len(Ledger(path).intents()) == 4
