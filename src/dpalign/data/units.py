"""Records become privacy units, and one dataset becomes disjoint parts, by keyed hash.

The key is secret and fixed for the dataset's name, so a unit lands in the same part in every run,
and nobody without the ledger can tell in which. Each unit's place is independent of all others.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from ..errors import DPAlignError
from ..privacy.gate import Gate
from ..privacy.ledger import Ledger
from ..privacy.parts import Part
from .load import DataConfig, Record


@dataclass(frozen=True)
class UnitDataset:
    """The units that one stage may sample.

    units: records of each unit (at least one, at most max_records_per_unit).
    ids: keyed hash of each unit's identity, in the order of `units`.
    part: the dataset's name, and the range of the hash that the units come from; its identity is the keyed name of
        what was hashed (the unit column, or, without one, the whole file).
    declared_units: public number of units that q and the divisor use: the declared total times high - low.
    fingerprint: keyed hash of the contents.
    """

    part: Part
    units: list[list[Record]]
    ids: list[bytes]
    declared_units: float
    unit: str
    fingerprint: str

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
        DPAlignError: no name, a missing unit column, or an empty part.
    """
    if not config.name:
        raise DPAlignError("the data needs a declared name (data.name): the ledger adds up all runs on that name.")
    if config.max_records_per_unit < 1:
        raise DPAlignError(f"max_records_per_unit {config.max_records_per_unit} must be at least 1.")
    grouped: dict[bytes, list[tuple[bytes, Record]]] = {}
    for number, record in enumerate(records, 1):
        content = json.dumps(record, sort_keys=True, ensure_ascii=False, default=str).encode()
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
    # Without a unit column an identity is a content: parts of another version of the file are other units.
    kind = [b"column", config.unit.encode()] if config.unit else [b"records", *sorted(grouped)]
    identity_name = ledger.keyed_hash(config.name, b"split", *kind).hex()[:16]
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
        part=Part(config.name, identity_name, low, high),
        units=units,
        ids=list(kept),
        declared_units=total * (high - low),
        unit="record" if config.unit is None else config.unit,
        fingerprint=fingerprint,
    )


def count_units(records: list[Record], config: DataConfig) -> int:
    """Declared number of units of the whole dataset, or else the number in the file."""
    if config.declared_units is not None or config.unit is None:
        return config.declared_units if config.declared_units is not None else len(records)
    return len({unit_key(record, config.unit, number) for number, record in enumerate(records, 1)})


def unit_key(record: Record, column: str, number: int) -> str:
    """A unit's name as text: spaces around it and integral floats do not make another unit.

    Raises:
        DPAlignError: no name, or neither text nor a whole number.
    """
    value = record.get(column)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise DPAlignError(
            f"record {number} names no unit in column {column!r}: every record needs text or a whole number there."
        )
    return str(value).strip()


def check_disjoint(parts: dict[str, tuple[list[Record], DataConfig]], declared: bool) -> list[str]:
    """Checks that separate datasets share no unit; returns the assumptions that remain.

    Args:
        parts: records and settings by stage.
        declared: the user declares the units of different datasets disjoint.

    Raises:
        DPAlignError: an overlap (it says of how many units), or nothing to check and nothing declared.
    """
    assumptions = []
    stages = list(parts)
    for i, a in enumerate(stages):
        for b in stages[i + 1 :]:
            (records_a, config_a), (records_b, config_b) = parts[a], parts[b]
            same_file = (config_a.path, config_a.split) == (config_b.path, config_b.split)
            if config_a.name == config_b.name and same_file and config_a.unit == config_b.unit:
                continue  # one file, split by the hash of its units
            if config_a.name == config_b.name and config_a.unit and config_a.unit == config_b.unit:
                continue  # two files, split by the same hash of the same units
            if config_a.unit and config_b.unit:
                shared = unit_keys(records_a, config_a.unit) & unit_keys(records_b, config_b.unit)
                if shared:
                    raise DPAlignError(
                        f"{len(shared)} units are in both {config_a.name!r} ({a}) and {config_b.name!r} ({b}): the "
                        "stages would spend on them twice; make the datasets disjoint."
                    )
            elif not declared:
                raise DPAlignError(
                    f"whether {config_a.name!r} ({a}) and {config_b.name!r} ({b}) share units cannot be checked "
                    "without a unit column in both: name one, or declare units_disjoint: declared."
                )
            else:
                assumptions.append(f"the units of {config_a.name!r} and {config_b.name!r} are disjoint (declared)")
    return assumptions


def unit_keys(records: list[Record], unit: str) -> set[str]:
    """Names of the units in a file."""
    return {unit_key(record, unit, number) for number, record in enumerate(records, 1)}


def _fraction(identity: bytes) -> float:
    return int.from_bytes(identity[:6], "big") / 2.0**48  # exact in float64, below 1
