"""The ledger's file outlives the code: old files are read, new columns only add, newer files are refused."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
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


# What is no ledger any more -------------------------------------------------------------------------------------------


CHANGES = {
    "a trigger": "CREATE TRIGGER gone AFTER INSERT ON intents BEGIN DELETE FROM intents; END",
    "a view": "CREATE VIEW also AS SELECT * FROM intents",
    "no key": "CREATE TABLE kept AS SELECT * FROM intents; DROP TABLE intents; ALTER TABLE kept RENAME TO intents",
    "no identity": "DELETE FROM identity",
    "a secret that is a number": "UPDATE datasets SET secret = 1000000000000",
    "hashes that are none": "INSERT INTO texts VALUES ('d', 0, 0, x'00')",
    "texts of nobody": "INSERT INTO texts VALUES ('d', 3, 0, x'')",
    "a run that is a number": "UPDATE intents SET run = 3",
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("is_old", [False, True])
def test_a_ledger_that_is_refused_stays_as_it_was(change, is_old, written):
    if is_old:
        unversioned(written)
    with closing(sqlite3.connect(written)) as database:
        database.executescript(CHANGES[change])
    before = written.read_bytes()
    if is_old and change == "no identity":  # as of before it had one
        assert len(Ledger(written).intents()) == 2
        return
    with pytest.raises(DPAlignError, match="restore it from a copy"):
        Ledger(written)
    assert written.read_bytes() == before and [*written.parent.iterdir()] == [written]
    with pytest.raises(DPAlignError, match="restore it from a copy"):
        Ledger.copy_of(written)


def test_an_index_that_hides_a_row_is_found(written):
    content = written.read_bytes()
    with closing(sqlite3.connect(written)) as database:
        (page,) = database.execute("SELECT rootpage FROM sqlite_master WHERE name = 'sqlite_autoindex_intents_1'").fetchone()
        (size,) = database.execute("PRAGMA page_size").fetchone()
    place = (page - 1) * size + 3  # of the number of cells in the index
    assert content[place : place + 2] == b"\0\2"
    written.write_bytes(content[:place] + b"\0\1" + content[place + 2 :])
    with closing(sqlite3.connect(written)) as database:  # what the ledger would count
        by_name = "SELECT count(*) FROM intents WHERE dataset = 'd' AND run = 'run' AND stage = 'sft'"
        assert database.execute(by_name).fetchone() == (1,)
        assert database.execute("SELECT count(*) FROM intents NOT INDEXED").fetchone() == (2,)
    with pytest.raises(DPAlignError, match="is damaged"):
        Ledger(written)


@pytest.mark.parametrize("column", ["private", "max_grad_norm", "noise_multiplier", "units"])
def test_a_number_that_no_draw_has(column, written):
    value = {"private": "'no'", "max_grad_norm": "'x'"}.get(column, "9e999")
    with closing(sqlite3.connect(written)) as database, database:
        database.execute(f"UPDATE intents SET {column} = {value} WHERE step = 1")
    with pytest.raises(DPAlignError, match="values that cannot be"):
        Ledger(written).intents()


def test_what_sqlite_cannot_read_is_one_sentence_that_quotes_nothing(written):
    with closing(sqlite3.connect(written)) as database, database:
        database.execute("UPDATE intents SET fingerprint = CAST(x'ff7a65627261' AS TEXT)")
    with pytest.raises(DPAlignError, match="Could not decode to UTF-8 column 'fingerprint'") as raised:
        Ledger(written).intents()
    assert "zebra" not in str(raised.value)
    with closing(sqlite3.connect(written)) as database, database:
        database.execute("DROP TABLE keys")
    with pytest.raises(DPAlignError, match="no such table: keys"):
        Ledger(written).key("texts")


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
