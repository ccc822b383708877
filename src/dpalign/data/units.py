"""Records become privacy units, and one dataset becomes disjoint parts, by keyed hash.

The key is secret and fixed for the dataset's name, so a unit lands in the same part in every run,
and nobody without the ledger can tell in which. Each unit's place is independent of all others.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path

from ..errors import DPAlignError
from ..privacy.gate import Gate
from ..privacy.ledger import Ledger
from ..privacy.parts import Part
from ..settings.data import DataConfig
from .load import Record


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
    units: list[list[Record]]
    ids: list[bytes]
    declared_units: float
    unit: str
    fingerprint: str

    def without(self, columns: set[str]) -> UnitDataset:
        """The same units, and who they are as before, without these columns of their records."""
        units = [[{c: v for c, v in row.items() if c not in columns} for row in rows] for rows in self.units]
        return replace(self, units=units) if columns else self

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
    records: list[Record], config: DataConfig, ledger: Ledger, low: float = 0.0, high: float = 1.0
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
    grouped: dict[bytes, list[tuple[bytes, Record]]] = {}
    for number, record in enumerate(records, 1):
        content = json.dumps(record, sort_keys=True, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
        if config.unit is None:
            # Equal records are different units: the second copy's identity counts it.
            identity = ledger.keyed_hash(config.name, b"record", content)
            copies = 0
            while identity in grouped:
                copies += 1
                identity = ledger.keyed_hash(config.name, b"record", content, copies.to_bytes(4, "little"))
        else:
            identity = ledger.keyed_hash(config.name, b"unit", unit_key(record, config.unit, number).encode())
        grouped.setdefault(identity, []).append((ledger.keyed_hash(config.name, b"order", content), record))
    total = config.declared_units if config.declared_units is not None else len(grouped)
    if total < 1:
        raise DPAlignError(f"declared_units {total} must be positive.")
    kept = {i: rows for i, rows in sorted(grouped.items()) if low <= _fraction(i) < high}
    if not kept:
        raise DPAlignError(f"no unit of {config.name!r} falls into the part [{low:g}, {high:g}): add data or widen it.")
    units, content_hashes = [], []
    for rows in kept.values():
        rows = sorted(rows, key=lambda row: row[0])[: config.max_records_per_unit]
        units.append([record for _, record in rows])
        content_hashes += [order for order, _ in rows]
    fingerprint = ledger.keyed_hash(config.name, b"fingerprint", *kept, *content_hashes).hex()
    return UnitDataset(
        part=Part(config.name, _split_of(config, ledger, sorted(grouped), low, high), low, high),
        units=units,
        ids=list(kept),
        declared_units=total * (high - low),
        unit="record" if config.unit is None else config.unit,
        fingerprint=fingerprint,
    )


def _split_of(config: DataConfig, ledger: Ledger, identities: list[bytes], low: float, high: float) -> str:
    """The name under which parts are compared: random, so that it tells nothing of the records."""
    if config.unit is not None or (low, high) == (0.0, 1.0):
        contents = None  # places rest on the units' names alone; and whoever is in the data is in the whole
    else:
        contents = ledger.keyed_hash(config.name, b"records", *identities)
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


def count_units(records: list[Record], config: DataConfig) -> int:
    """Declared number of units of the whole dataset, or else the number in the file."""
    if config.declared_units is not None or config.unit is None:
        return config.declared_units if config.declared_units is not None else len(records)
    return len({unit_key(record, config.unit, number) for number, record in enumerate(records, 1)})


def unit_key(record: Record, column: str, number: int) -> str:
    """A unit's name, written as `same_name` does.

    Raises:
        DPAlignError: no name, or neither text nor a whole number.
    """
    name = same_name(unit_value(record, column))
    if name is None:
        raise DPAlignError(
            f"record {number} names no unit in column {column!r}: every record needs text or a whole number there."
        )
    if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
        raise DPAlignError(f"record {number} has half of a character (a lone surrogate) in the unit column {column!r}.")
    return name


def unit_value(record: Record, column: str) -> object:
    """What a record holds in a column; `meta.user` is `user` inside `meta`, unless a column is called so itself."""
    value: object = record
    for part in [column] if column in record else column.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def same_name(value: object) -> str | None:
    """One spelling for all spellings of a unit's name; None of what names nobody.

    Composed and decomposed letters (Unicode NFC), spaces around and doubled within, and 7, 7.0, "7" and "7.0" make no
    other unit; capitals do, and so do leading zeros.
    """
    if isinstance(value, float | Decimal) and math.isfinite(value) and value.as_integer_ratio()[1] == 1:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    name = same_text(str(value))
    if re.fullmatch(r"-?[0-9]+\.0+", name, re.ASCII):
        name = name.partition(".")[0]
    return ("0" if name == "-0" else name) or None


def same_text(text: str) -> str:
    """Unicode NFC, one space where there are several, none around."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def check_disjoint(parts: dict[str, tuple[list[Record], DataConfig]], declared: bool) -> list[str]:
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


def unit_keys(records: list[Record], unit: str) -> set[str]:
    """Names of the units in a file."""
    return {unit_key(record, unit, number) for number, record in enumerate(records, 1)}


def _fraction(identity: bytes) -> float:
    return int.from_bytes(identity[:6], "big") / 2.0**48  # exact in float64, below 1
