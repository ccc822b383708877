"""Records become privacy units, and one dataset becomes disjoint parts, by keyed hash.

The key is secret and fixed for the dataset's name, so a unit lands in the same part in every run,
and nobody without the ledger can tell in which. Each unit's place is independent of all others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

import numpy as np

from ..errors import DPAlignError
from ..privacy.gate import Gate
from ..privacy.ledger import Ledger
from ..privacy.parts import Part
from ..settings.data import DataConfig
from .hashes import RecordHashes
from .load import Record
from .names import unit_key
from .table import Table

Records = Sequence[Record]


class Units(Sequence[list[Record]]):
    """The records of units, read when they are asked for.

    Args:
        records: of all. rows: `(records of the units,)` int64, places in `records`.
        offsets: `(units + 1,)` int64, where each unit begins in `rows`, and where the last one ends.
    """

    def __init__(self, records: Records, rows: np.ndarray, offsets: np.ndarray) -> None:
        self.records, self.rows, self.offsets = records, rows, offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, unit: int) -> list[Record]: ...
    @overload
    def __getitem__(self, unit: slice) -> list[list[Record]]: ...
    def __getitem__(self, unit: int | slice) -> list[Record] | list[list[Record]]:
        if isinstance(unit, slice):
            return [self[number] for number in range(len(self))[unit]]
        number = range(len(self))[unit]
        return [self.records[row] for row in self.rows[self.offsets[number] : self.offsets[number + 1]].tolist()]


class Identities(Sequence[bytes]):
    """Hashes `(units, 32)` uint8, one after the other."""

    def __init__(self, hashes: np.ndarray) -> None:
        self.hashes = hashes

    def __len__(self) -> int:
        return len(self.hashes)

    @overload
    def __getitem__(self, unit: int) -> bytes: ...
    @overload
    def __getitem__(self, unit: slice) -> list[bytes]: ...
    def __getitem__(self, unit: int | slice) -> bytes | list[bytes]:
        if isinstance(unit, slice):
            return [self[number] for number in range(len(self))[unit]]
        return bytes(self.hashes[unit])


@dataclass(frozen=True)
class UnitDataset:
    """The units that one stage may sample.

    units: records of each unit (at least one, at most max_records_per_unit).
    ids: keyed hash of each unit's identity, in the order of `units`.
    part: the dataset's name, and the range of the hash that the units come from; its identity is a random name that the
        ledger keeps for what was hashed: the unit column, or, without one, the records of one version of the data.
    declared_units: public number of units that q and the divisor use: the declared total times high - low.
    fingerprint: keyed hash of the contents.
    """

    part: Part
    units: Sequence[list[Record]]
    ids: Sequence[bytes]
    declared_units: float
    unit: str
    fingerprint: str

    def reading(self, records: Records) -> UnitDataset:
        """The same units, and who they are as before, from the same records with fewer columns."""
        assert isinstance(self.units, Units)
        return replace(self, units=Units(records, self.units.rows, self.units.offsets))

    def gate(self, ledger: Ledger, *, run: str, stage: str, config_hash: str, insecure_seed: int | None = None) -> Gate:
        """The only door to them, for one stage of a run."""
        return Gate(
            ledger,
            self.part,
            count=len(self.units),
            unit=self.unit,
            declared_units=self.declared_units,
            fingerprint=self.fingerprint,
            run=run,
            stage=stage,
            config_hash=config_hash,
            insecure_seed=insecure_seed,
        )


def build_units(
    records: Records, config: DataConfig, ledger: Ledger, low: float = 0.0, high: float = 1.0
) -> UnitDataset:
    """Groups records by unit, keeps the units whose hash falls into [low, high), bounds each unit.

    Raises:
        DPAlignError: no name, a missing unit column, an empty part, or a part of records where parts were drawn before
            from other ones.
    """
    if not config.name:
        raise DPAlignError("the data needs a declared name (data.name): the ledger adds up all runs on that name.")
    if config.max_records_per_unit < 1:
        raise DPAlignError(f"max_records_per_unit {config.max_records_per_unit} must be at least 1.")
    hashes = hashes_of(records, config, ledger)
    grouped, keyed = hashes.grouped(), ledger.keyed(config.name)
    total = config.declared_units if config.declared_units is not None else len(grouped.units)
    if total < 1:
        raise DPAlignError(f"declared_units {total} must be positive.")
    kept = slice(*np.searchsorted(grouped.places(), [low, high]).tolist())  # the units are in the order of their places
    if kept.start == kept.stop:
        raise DPAlignError(f"no unit of {config.name!r} falls into the part [{low:g}, {high:g}): add data or widen it.")
    starts, sizes = grouped.starts[kept], np.minimum(grouped.sizes[kept], config.max_records_per_unit)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    rows = grouped.order[np.repeat(starts - offsets[:-1], sizes) + np.arange(offsets[-1])]
    identities = grouped.units[kept]
    return UnitDataset(
        part=Part(config.name, _split_of(config, ledger, grouped.units, low, high), low, high),
        units=Units(records, rows, offsets),
        ids=Identities(identities),
        declared_units=total * (high - low),
        unit="record" if config.unit is None else config.unit,
        fingerprint=keyed.of_rows(b"fingerprint", identities, grouped.contents[rows]).hex(),
    )


def hashes_of(records: Records, config: DataConfig, ledger: Ledger) -> RecordHashes:
    """Those that were taken when the records were read, or else of the records as they are here."""
    if isinstance(records, Table) and (config.name, config.unit) in records.hashes:
        return records.hashes[config.name, config.unit]
    hashes = RecordHashes(config, ledger)
    hashes.add(records)
    return hashes


def _split_of(config: DataConfig, ledger: Ledger, identities: np.ndarray, low: float, high: float) -> str:
    """The name under which parts are compared: random, so that it tells nothing of the records.

    identities: `(units, 32)` uint8, sorted, of the whole dataset.
    """
    if config.unit is not None or (low, high) == (0.0, 1.0):
        contents = None  # places rest on the units' names alone; and whoever is in the data is in the whole
    else:
        contents = ledger.keyed(config.name).of_rows(b"records", identities)
    kind = f"records {config.version}" if config.unit is None else f"column {config.unit}"
    name = ledger.split(config.name, kind, contents, is_public=config.is_demo)
    if name is None:
        raise DPAlignError(
            f"the data {config.name!r} has changed since this run began, or another one that took a part of it: "
            "without a unit column nobody can tell which records are the same. Restore it; or name a unit column "
            "(data.unit), or this state of the data (data.version), and what it spends is added to what was spent "
            "before."
        )
    return name


def count_units(records: Iterable[Record], config: DataConfig) -> int:
    """Declared number of units of the whole dataset, or else the number in the file."""
    if config.declared_units is not None:
        return config.declared_units
    if isinstance(records, Table) and (config.name, config.unit) in records.hashes:
        return len(records.hashes[config.name, config.unit].grouped().units)
    return sum(1 for _ in records) if config.unit is None else len(unit_keys(records, config.unit))


def check_disjoint(parts: Mapping[str, tuple[Records, DataConfig]], declared: bool) -> list[str]:
    """Checks that separate datasets share no unit; returns the assumptions that remain.

    Args:
        parts: records and settings by stage.
        declared: the user declares the units of different datasets disjoint.

    Raises:
        DPAlignError: an overlap (it says of how many units), one file under two names, or nothing to check and nothing
            declared.
    """
    assumptions = []
    stages = list(parts)
    for i, a in enumerate(stages):
        for b in stages[i + 1 :]:
            (records_a, config_a), (records_b, config_b) = parts[a], parts[b]
            if _are_one(config_a, config_b):
                continue  # split by one hash of one kind of unit
            if config_a.name != config_b.name and _file(config_a) == _file(config_b) != ("", ""):
                raise DPAlignError(
                    f"{config_a.name!r} ({a}) and {config_b.name!r} ({b}) are one file, {config_a.path}: give it "
                    "one name."
                )
            if config_a.unit is not None and config_a.unit == config_b.unit:
                shared = unit_keys(records_a, config_a.unit) & unit_keys(records_b, config_b.unit)
                if shared:
                    raise DPAlignError(
                        f"{len(shared)} units are in both {config_a.name!r} ({a}) and {config_b.name!r} ({b}): the "
                        "stages would spend on them twice; make the datasets disjoint."
                    )
            elif not declared:
                raise DPAlignError(
                    f"whether {config_a.name!r} ({a}) and {config_b.name!r} ({b}) share units cannot be checked "
                    "without one unit column in both, of the same name: name it in both, or declare "
                    "units_disjoint: declared."
                )
            else:
                assumptions.append(f"the units of {config_a.name!r} and {config_b.name!r} are disjoint (declared)")
    return assumptions


def _are_one(a: DataConfig, b: DataConfig) -> bool:
    """Whether parts of both are compared by one hash: of one unit column, or of one file's records."""
    return a.name == b.name and a.unit == b.unit and (a.unit is not None or _file(a) == _file(b))


def _file(config: DataConfig) -> tuple[str, str]:
    """What a path leads to, and its split where it has some; empty for records in memory."""
    path = Path(config.path)
    if not config.path or not path.exists():
        return config.path, config.split if config.path else ""
    return str(path.resolve()), config.split if path.is_dir() else ""


def unit_keys(records: Iterable[Record], unit: str) -> set[str]:
    """Names of the units in a file."""
    return {unit_key(record, unit, number) for number, record in enumerate(records, 1)}
