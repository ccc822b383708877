"""Durable record of every spending, written before it is spent.

The ledger belongs to the user, not to a run: it is keyed by the dataset's declared name, and every
run on that name adds up, whatever became of the run. Epsilon is the replay of intents, so a crash
can overstate it and never understate it. Contents are kept as keyed hashes only.

The file outlives every version of this code, so its format has a rule: a table or column is never removed and never
changes its meaning; a new one is optional, and a row without it must not mean less spending than one with it. Each
such change is one more entry of MIGRATIONS; a file that has seen more of them than this code knows is refused.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import os
import secrets
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from copy import copy
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DPAlignError
from ..files import owner_only
from ..printable import printable
from .accountant import SampledGaussian
from .parts import Part, Spending

# One tuple of statements for each version of the format, oldest first; PRAGMA user_version counts those applied. The
# first also fits the files of before there was a version: they have these tables, and only lack the number.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE IF NOT EXISTS datasets (name TEXT PRIMARY KEY, secret BLOB NOT NULL)",
        "CREATE TABLE IF NOT EXISTS identity (name TEXT NOT NULL)",
        # UNIQUE: copies of a run that begin together cannot both go on.
        """CREATE TABLE IF NOT EXISTS intents (
            id INTEGER PRIMARY KEY, written TEXT NOT NULL, dataset, run, stage, step, attempt, split, low, high,
            sampling_rate, noise_multiplier, metrics_noise_multiplier, passes, max_grad_norm, unit, units, fingerprint,
            config_hash, private, UNIQUE (dataset, run, stage, step, attempt))""",
    ),
    (
        """CREATE TABLE IF NOT EXISTS splits (dataset TEXT NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL,
            contents BLOB, PRIMARY KEY (dataset, kind))""",
        # hashes: 16 bytes each, at most SHELF of them in a row, each once in a dataset.
        """CREATE TABLE IF NOT EXISTS texts (dataset TEXT NOT NULL, is_public INTEGER NOT NULL, shelf INTEGER NOT NULL,
            hashes BLOB NOT NULL, PRIMARY KEY (dataset, is_public, shelf))""",
        "CREATE TABLE IF NOT EXISTS keys (name TEXT PRIMARY KEY, secret BLOB NOT NULL)",
    ),
)
NOBODY_WROTE = (  # rows that no query would find, or whose keys and hashes are none
    "intents WHERE typeof(dataset) != 'text' OR typeof(run) != 'text' OR typeof(stage) != 'text'",
    "datasets WHERE typeof(name) != 'text' OR typeof(secret) != 'blob'",
    "identity WHERE typeof(name) != 'text'",
    "splits WHERE typeof(name) != 'text'",
    "texts WHERE typeof(dataset) != 'text' OR is_public NOT IN (0, 1)",
    "texts WHERE typeof(hashes) != 'blob' OR length(hashes) % 16",
    "keys WHERE typeof(secret) != 'blob'",
)
FAILED = (sqlite3.Error, UnicodeDecodeError)  # the latter where SQLite quotes what is no text
SHELF = 1 << 16
COLUMNS = (
    "dataset",
    "run",
    "stage",
    "step",
    "attempt",
    "split",
    "low",
    "high",
    "sampling_rate",
    "noise_multiplier",
    "metrics_noise_multiplier",
    "passes",
    "max_grad_norm",
    "unit",
    "units",
    "fingerprint",
    "config_hash",
    "private",
)


@dataclass(frozen=True)
class Intent:
    """One Poisson sample about to be drawn and answered; the fields are those of one ledger row.

    `low` and `high` name the part of the dataset that may be sampled: the units whose keyed hash,
    a number in [0, 1), falls into [low, high). `split` says of which identity the hash was taken: parts
    are comparable only under one split. Disjoint parts do not add up; overlapping ones do.
    """

    dataset: str
    run: str
    stage: str
    step: int
    attempt: int
    split: str
    low: float
    high: float
    sampling_rate: float
    noise_multiplier: float
    metrics_noise_multiplier: float
    passes: int
    max_grad_norm: float
    unit: str
    units: float
    fingerprint: str
    config_hash: str
    private: bool

    @property
    def is_whole(self) -> bool:
        """Whether its fields are texts and numbers that can be added up."""
        texts = (self.dataset, self.run, self.stage, self.split, self.unit, self.fingerprint, self.config_hash)
        counts = (self.step, self.attempt, self.passes)
        numbers = (self.low, self.high, self.sampling_rate, self.noise_multiplier)
        sigma_m = self.metrics_noise_multiplier
        return (
            all(isinstance(text, str) for text in texts)
            and all(isinstance(count, int) and count >= 0 for count in counts)
            and all(
                isinstance(n, int | float) and 0 <= n < math.inf for n in (*numbers, self.units, self.max_grad_norm)
            )
            and (isinstance(sigma_m, int | float) and sigma_m >= 0)
            and self.low < self.high <= 1
            and 0 < self.sampling_rate <= 1
            and self.passes >= 1
            and self.units > 0
        )

    @property
    def part(self) -> Part:
        """The units that could be drawn."""
        return Part(self.dataset, self.split, self.low, self.high)

    @property
    def mechanism(self) -> SampledGaussian:
        """What the accountant counts: no noise where the run was not private."""
        sigma = self.noise_multiplier if self.private else 0.0
        return SampledGaussian(self.sampling_rate, sigma, 1, self.passes, self.metrics_noise_multiplier)


class KeyedHash:
    """HMAC-SHA256 of parts, each behind its length: confirms nothing to somebody without the secret."""

    def __init__(self, secret: bytes) -> None:
        self._mac = hmac.new(secret, digestmod=hashlib.sha256)

    def __call__(self, *parts: bytes) -> bytes:
        return self._with(*parts).digest()

    def behind(self, part: bytes) -> KeyedHash:
        """The hash of parts of which this one is the first."""
        found = copy(self)
        found._mac = self._with(part)
        return found

    def of_rows(self, part: bytes, *arrays: np.ndarray) -> bytes:
        """The same of `part`, and of every row of arrays `(rows, bytes)` uint8."""
        mac = self._with(part)
        for array in arrays:
            length = np.frombuffer(array.shape[1].to_bytes(8, "little"), dtype=np.uint8)
            for start in range(0, len(array), SHELF):
                rows = array[start : start + SHELF]
                mac.update(np.concatenate([np.broadcast_to(length, (len(rows), 8)), rows], axis=1).tobytes())
        return mac.digest()

    def _with(self, *parts: bytes) -> hmac.HMAC:
        mac = self._mac.copy()
        for part in parts:
            mac.update(len(part).to_bytes(8, "little") + part)
        return mac


class Ledger:
    """SQLite file, synchronous, mode 0600. `path` may be ':memory:' for a run without a record (tests).

    begins: told of stage and attempt before anything of theirs is written.
    """

    def __init__(self, path: str | Path | None = None, begins: Callable[[str, int], None] | None = None) -> None:
        self.path = Path(path) if path is not None else default_path()
        self._begins, self._is_ahead = begins, False
        self._secrets: dict[str, bytes] = {}
        try:
            if str(self.path) != ":memory:":
                with owner_only():
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    self.path.touch(exist_ok=True)
            self._db = sqlite3.connect(self.path, timeout=60, isolation_level=None)
            self._db.execute("PRAGMA synchronous=EXTRA")
            self._migrate()
        except (*FAILED, OSError) as error:
            raise DPAlignError(
                f"the ledger {self.path} cannot be opened or written ({_why(error)}): nothing was drawn from the data; "
                "give another path with --ledger."
            ) from None

    @classmethod
    def copy_of(cls, path: str | Path | None = None) -> Ledger:
        """What a ledger holds now, in memory: nothing that is done with it is written. Empty where there is no file."""
        copy, path = cls(":memory:"), Path(path) if path is not None else default_path()
        if path.is_file():
            copy.path = path
            try:
                # Not mode=ro, which cannot mend what a killed process left half written; no file is made.
                with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True, timeout=60)) as file:
                    file.backup(copy._db)
                copy._migrate()
            except FAILED as error:
                raise DPAlignError(
                    f"the ledger {path} cannot be read ({_why(error)}): restore it from a copy."
                ) from None
        return copy

    def _migrate(self) -> None:
        """Brings the file to this code's format, by adding only; one that is refused stays as it was.

        Raises:
            DPAlignError: a newer version has written it, whose rows may mean what this one cannot count; or it is
                damaged.
        """
        version = self._version()
        tables = {row[0] for row in self._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if tables - {"datasets", "identity", "intents"} and "intents" not in tables:
            raise DPAlignError(f"{self.path} is the database of another program: give --ledger a file of its own.")
        if version > len(MIGRATIONS):
            raise DPAlignError(
                f"the ledger {self.path} was written by a newer dpalign (format {version}, this one knows "
                f"{len(MIGRATIONS)}): upgrade dpalign, for this version cannot count all that it holds."
            )
        if version == len(MIGRATIONS):
            self._check()
            return
        try:
            self._db.execute("BEGIN IMMEDIATE")  # of two processes that open an old file, one changes it
            for statements in MIGRATIONS[self._version() :]:
                for statement in statements:
                    self._db.execute(statement)
            self._db.execute(
                "INSERT INTO identity SELECT ? WHERE NOT EXISTS (SELECT * FROM identity)", (secrets.token_hex(16),)
            )
            self._db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
            self._check()
            self._db.execute("COMMIT")
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    def _check(self) -> None:
        """Refuses a file in which a query would not find every row, or that would not keep one.

        An index that lacks rows hides them; a trigger may take them away; without its unique key two copies of a run go
        on; and nothing is found under a name that is no text.
        """
        whole = self._db.execute("PRAGMA integrity_check(1)").fetchone()[0] == "ok"
        foreign = self._db.execute("SELECT 1 FROM sqlite_master WHERE type IN ('trigger', 'view')").fetchone()
        key = self._db.execute("SELECT 1 FROM pragma_index_list('intents') WHERE origin = 'u'").fetchone()
        if not whole or foreign or not key:
            raise DPAlignError(
                f"the ledger {self.path} is damaged, or another program has changed it: restore it from a copy, for "
                "what it has counted may be missed."
            )
        if any(self._db.execute(f"SELECT 1 FROM {rows} LIMIT 1").fetchone() for rows in NOBODY_WROTE):
            raise self._not_ours()
        if not self._db.execute("SELECT 1 FROM identity").fetchone():
            raise self._not_ours()

    def _not_ours(self) -> DPAlignError:
        return DPAlignError(
            f"the ledger {self.path} holds a row that no dpalign wrote (values that cannot be): restore it from a "
            "copy, for what it has counted cannot be added up."
        )

    def _version(self) -> int:
        return int(self._db.execute("PRAGMA user_version").fetchone()[0])

    @property
    def identity(self) -> str:
        """Random name of this ledger: a run goes on only with the ledger that it began with."""
        return str(self._ask("SELECT name FROM identity")[0][0])

    def secret(self, dataset: str) -> bytes:
        """The dataset's secret key: fixed for its name, so that splits and hashes agree across runs."""
        if dataset not in self._secrets:  # asked for every record
            self._ask("INSERT OR IGNORE INTO datasets VALUES (?, ?)", (dataset, secrets.token_bytes(32)))
            self._secrets[dataset] = bytes(self._ask("SELECT secret FROM datasets WHERE name = ?", (dataset,))[0][0])
        return self._secrets[dataset]

    def keyed(self, dataset: str) -> KeyedHash:
        """The hash under the dataset's secret."""
        return KeyedHash(self.secret(dataset))

    def keyed_hash(self, dataset: str, *parts: bytes) -> bytes:
        """One such hash."""
        return self.keyed(dataset)(*parts)

    def split(self, dataset: str, kind: str, contents: bytes | None, *, is_public: bool = False) -> str | None:
        """Random name of how a dataset's units are spread over [0, 1): one for each kind of unit.

        Args:
            contents: hash of what the units' places rest on beside their names; None where that is nothing.
            is_public: other contents get another name, which is no secret then.

        Returns:
            None if parts were drawn under the name with other contents: they could not be compared with new ones.
        """
        with self._transaction():
            where = (dataset, kind)
            row = self._db.execute("SELECT name, contents FROM splits WHERE dataset = ? AND kind = ?", where).fetchone()
            if row is not None and (contents is None or row[1] == contents):
                return str(row[0])
            drawn = self._db.execute(
                "SELECT max(low > 0 OR high < 1) FROM intents WHERE dataset = ? AND split = ?",
                (dataset, row and row[0]),
            ).fetchone()[0]
            if drawn and row[1] is not None and not is_public:
                return None
            # Wholes are compared whatever they hold; a name that nothing was drawn under may be another process's.
            keeps = row is not None and (row[1] is None or drawn == 0)
            name = str(row[0]) if keeps else secrets.token_hex(8)
            self._db.execute("INSERT OR REPLACE INTO splits VALUES (?, ?, ?, ?)", (*where, name, contents))
            return name

    def key(self, name: str) -> bytes:
        """A secret of this ledger."""
        self._ask("INSERT OR IGNORE INTO keys VALUES (?, ?)", (name, secrets.token_bytes(32)))
        return bytes(self._ask("SELECT secret FROM keys WHERE name = ?", (name,))[0][0])

    def remember_texts(self, dataset: str, is_public: bool, hashes: bytes) -> None:
        """Puts hashes of 16 bytes each, in a row and none of them there yet, on disk; all or none."""
        with self._transaction():
            (first,) = self._db.execute(
                "SELECT count(*) FROM texts WHERE dataset = ? AND is_public = ?", (dataset, is_public)
            ).fetchone()
            for number, start in enumerate(range(0, len(hashes), 16 * SHELF), first):
                blob = hashes[start : start + 16 * SHELF]
                self._db.execute("INSERT INTO texts VALUES (?, ?, ?, ?)", (dataset, is_public, number, blob))

    def texts(self, dataset: str, is_public: bool) -> Iterator[bytes]:
        """The hashes of a dataset, 16 bytes each, a shelf at a time."""
        where, values = "WHERE dataset = ? AND is_public = ?", (dataset, is_public)
        for (shelf,) in self._ask(f"SELECT shelf FROM texts {where} ORDER BY shelf", values):
            yield bytes(self._ask(f"SELECT hashes FROM texts {where} AND shelf = ?", (*values, shelf))[0][0])

    def known_texts(self) -> list[tuple[str, bool]]:
        """Datasets that something was drawn from, and whether they were declared public then."""
        drawn = "SELECT DISTINCT dataset, is_public FROM texts WHERE dataset IN (SELECT dataset FROM intents)"
        return [(name, bool(is_public)) for name, is_public in self._ask(f"{drawn} ORDER BY 1, 2")]

    def _ask(self, statement: str, values: tuple[object, ...] = ()) -> list[tuple[Any, ...]]:
        """The rows that a statement finds.

        Raises:
            DPAlignError: the file cannot be read or written any more, or holds what SQLite cannot read.
        """
        try:
            return self._db.execute(statement, values).fetchall()
        except FAILED as error:
            raise DPAlignError(
                f"the ledger {self.path} cannot be read or written ({_why(error)}): restore it from a copy."
            ) from None

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield
            self._db.execute("COMMIT")
        except FAILED as error:
            raise DPAlignError(
                f"the ledger {self.path} cannot be written ({_why(error)}): nothing was drawn from the data."
            ) from None
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    def write(self, intents: list[Intent]) -> None:
        """Puts the intents on disk, all or none; returns only when they are durable."""
        if self._begins is not None:
            for stage, attempt in dict.fromkeys((intent.stage, intent.attempt) for intent in intents):
                self._begins(stage, attempt)
        names, marks = ", ".join(COLUMNS), ", ".join("?" for _ in COLUMNS)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        newer = "SELECT 1 FROM intents WHERE dataset = ? AND run = ? AND stage = ? AND attempt > ?"
        try:
            self._write_ahead()
            self._db.execute("BEGIN IMMEDIATE")
            for intent in intents:
                if self._db.execute(newer, (intent.dataset, intent.run, intent.stage, intent.attempt)).fetchone():
                    raise sqlite3.IntegrityError("a later attempt has begun")
                row = (now, *(getattr(intent, name) for name in COLUMNS))
                self._db.execute(f"INSERT INTO intents (written, {names}) VALUES (?, {marks})", row)
            self._db.execute("COMMIT")
        except sqlite3.IntegrityError:
            self._db.execute("ROLLBACK")
            raise DPAlignError(
                "another copy of this run has gone on from here: only one copy of a run may go on."
            ) from None
        except FAILED as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise DPAlignError(
                f"the ledger {self.path} cannot be written ({_why(error)}): the next step was not started, "
                "and the run resumes from its last checkpoint once there is room."
            ) from None

    def intents(self, *, dataset: str | None = None, run: str | None = None, stage: str | None = None) -> list[Intent]:
        """Intents in the order they were written, filtered by equality."""
        given = {"dataset": dataset, "run": run, "stage": stage}
        given = {k: v for k, v in given.items() if v is not None}
        where = " AND ".join(f"{k} = ?" for k in given) or "1"
        found = self._ask(f"SELECT {', '.join(COLUMNS)} FROM intents WHERE {where} ORDER BY id", tuple(given.values()))
        rows = [dict(zip(COLUMNS, row, strict=True)) for row in found]
        intents = [Intent(**{**row, "private": bool(row["private"])}) for row in rows]
        if any(row["private"] not in (0, 1) for row in rows) or any(not intent.is_whole for intent in intents):
            raise self._not_ours()
        return intents

    def spendings(self, **where: str | None) -> list[Spending]:
        """Intents counted into mechanisms; see `intents` for the filters."""
        counted: dict[Spending, int] = {}
        for i in self.intents(**where):
            one = Spending(i.part, i.mechanism, i.run, i.stage)
            counted[one] = counted.get(one, 0) + 1
        return [replace(one, mechanism=replace(one.mechanism, steps=count)) for one, count in counted.items()]

    def datasets(self) -> list[str]:
        query = "SELECT name FROM datasets UNION SELECT dataset FROM intents ORDER BY 1"
        return [str(row[0]) for row in self._ask(query)]

    def _write_ahead(self) -> None:
        """From here on a commit is one write and one fsync of a log beside the file, `-wal`, where it took several.

        Where the file system cannot do that, SQLite goes on as before.
        """
        if not self._is_ahead:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._is_ahead = True

    def close(self) -> None:
        """Leaves one whole file behind, unless other processes still write to it: then the last of them does."""
        if self._is_ahead:
            with suppress(sqlite3.Error):
                self._db.execute("PRAGMA busy_timeout=0")
                self._db.execute("PRAGMA journal_mode=DELETE")
        self._db.close()


def _why(error: Exception) -> str:
    """What SQLite says, without the text that it may quote."""
    return (
        printable(str(error).partition(" with text ")[0]) if isinstance(error, sqlite3.Error | OSError) else "no text"
    )


def default_path() -> Path:
    """$DPALIGN_LEDGER, else ~/.local/share/dpalign/ledger.sqlite (XDG_DATA_HOME is respected)."""
    if os.environ.get("DPALIGN_LEDGER"):
        return Path(os.environ["DPALIGN_LEDGER"])
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "dpalign" / "ledger.sqlite"
