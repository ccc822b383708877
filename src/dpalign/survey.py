"""What the data does to a stage: what is cut, and what teaches nothing although it is paid for.

These numbers are functions of private records without any noise. They are for the data holder: on the terminal that
asks for them (`dpalign plan`) and in the run's private folder, never in anything that is published.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .algorithms.base import Reading
from .data.load import Record
from .data.names import same_name, unit_value


@dataclass(frozen=True)
class Survey:
    """Of one stage's records.

    limit: tokens that are read of a record. cut: records that have more. longest: tokens of the longest record, the
    limit that cuts none; nine_in_ten: the limit that cuts one in ten. empty: records of which no token is learned.
    idle_units: units that have no other records, out of `units`: they add nothing and are sampled all the same. padded:
    whether every record is padded to the limit.
    """

    records: int
    limit: int
    cut: int
    longest: int
    nine_in_ten: int
    empty: int
    units: int
    idle_units: int
    padded: bool = False

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def sentences(self) -> list[str]:
        """What a data holder should know, if there is anything."""
        said = []
        if self.cut:
            said.append(
                f"{self.cut:,} of {self.records:,} records are cut at {self.limit} tokens; {self.nine_in_ten} would "
                f"hold nine in ten, {self.longest} all"
            )
        enough = self.limit
        while self.padded and 0 < self.longest <= enough // 2:
            enough //= 2  # not the length of any record
        if enough < self.limit:
            said.append(
                f"prompts are padded to max_prompt_length {self.limit}, and none has more than {enough} tokens: that "
                "limit would do, in less time"
            )
        if self.empty:
            said.append(
                f"of {self.empty:,} records no token is learned; {self.idle_units:,} of {self.units:,} units have no "
                "other: they are paid for and teach nothing"
            )
        return said


def survey(
    readings: Iterable[Reading | None], records: Sequence[Record], unit: str | None, *, padded: bool = False
) -> Survey | None:
    """None of a stage that cannot say what it reads.

    Args:
        readings, records: of one stage, in the same order. unit: the column that names the privacy unit. padded: as
            `Survey` has it.
    """
    tokens, learned, limit = array("q"), array("q"), 0
    for reading in readings:
        if reading is not None:
            tokens.append(reading.tokens)
            learned.append(reading.learned)
            limit = limit or reading.limit
    if len(tokens) < len(records) or not tokens:
        return None
    lengths, of_records = np.sort(np.frombuffer(tokens, dtype=np.int64)), np.frombuffer(learned, dtype=np.int64)
    of_units = of_records if unit is None else np.bincount(_owners(records, unit), of_records)
    return Survey(
        records=len(lengths),
        limit=limit,
        cut=int((lengths > limit).sum()),
        longest=int(lengths[-1]),
        nine_in_ten=int(lengths[math.ceil(0.9 * len(lengths)) - 1]),
        empty=int((of_records == 0).sum()),
        units=len(of_units),
        idle_units=int((of_units == 0).sum()),
        padded=padded,
    )


def _owners(records: Iterable[Record], unit: str) -> np.ndarray:
    """`(records,)` int64: the unit of each, numbered as they come."""
    numbers: dict[object, int] = {}
    found = (numbers.setdefault(same_name(unit_value(record, unit)), len(numbers)) for record in records)
    return np.fromiter(found, dtype=np.int64)
