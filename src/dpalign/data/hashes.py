"""Whose each record is, and what it holds, by keyed hash: 64 bytes of memory for each record.

Both are taken of a record as its file has it, with the columns that no stage reads: so while the file is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np

from ..privacy.ledger import Ledger
from ..settings.data import DataConfig
from .load import Record
from .names import unit_key

SIZE = 32  # bytes of a hash
SEEN = 26  # bits of a hash by which a record may have come before
_content = json.JSONEncoder(sort_keys=True, ensure_ascii=False, default=str).encode


class RecordHashes:
    """Of a dataset's records, in their order: each is told once.

    A record's unit is its value in the unit column; without one, its contents. Equal records are different units then:
    the second copy's hash counts it.
    """

    def __init__(self, config: DataConfig, ledger: Ledger) -> None:
        keyed = ledger.keyed(config.name)
        self.unit, self._of_unit = config.unit, keyed.behind(b"record" if config.unit is None else b"unit")
        self._of_content = keyed.behind(b"order")
        self._units, self._contents = bytearray(), bytearray()
        self._seen, self._again = bytearray(1 << (SEEN - 3)), dict[int, bytes]()
        self._grouped: Grouped | None = None

    def add(self, records: Iterable[Record]) -> None:
        """Raises DPAlignError for a record that names no unit."""
        for number, record in enumerate(records, len(self._units) // SIZE):
            content = _content(record).encode("utf-8", "surrogatepass")
            if self.unit is None:
                unit = self._of_unit(content)
                self._keep_a_copy(number, unit, content)
            else:
                unit = self._of_unit(unit_key(record, self.unit, number + 1).encode())
            self._units += unit
            self._contents += self._of_content(content)

    def _keep_a_copy(self, number: int, unit: bytes, content: bytes) -> None:
        """Of what may have come before: of all that has, and of a few that only share some bits with another."""
        place = int.from_bytes(unit[:4], "big") >> (32 - SEEN)
        byte, bit = place >> 3, 1 << (place & 7)
        if self._seen[byte] & bit:
            self._again[number] = content
        self._seen[byte] |= bit

    def grouped(self) -> Grouped:
        """The records by their units; none is added afterwards."""
        if self._grouped is None:
            units, contents = (
                np.frombuffer(hashes, dtype=np.uint8).reshape(-1, SIZE) for hashes in (self._units, self._contents)
            )
            if self._again:
                self._count_copies(units)
            self._grouped = Grouped(units, contents)
            self._units, self._seen, self._again = bytearray(), bytearray(), {}  # no more is added
        return self._grouped

    def _count_copies(self, units: np.ndarray) -> None:
        order = np.lexsort(words(units))
        found = units[order]
        last, copies = -1, 0
        for place in (np.flatnonzero((found[1:] == found[:-1]).all(1)) + 1).tolist():
            copies = copies + 1 if place == last + 1 else 1
            number, last = int(order[place]), place
            counted = self._of_unit(self._again[number], copies.to_bytes(4, "little"))
            units[number] = np.frombuffer(counted, dtype=np.uint8)


class Grouped:
    """Records by their units, these in the order of their hashes, and a unit's records in the order of theirs.

    units, contents: `(records, 32)` uint8, in the file's order. order: `(records,)` int64, the records' places in the
    file. starts: `(units,)` int64, where each unit begins in `order`.
    """

    def __init__(self, units: np.ndarray, contents: np.ndarray) -> None:
        self.contents = contents
        self.order = np.lexsort(words(units))
        found = units[self.order]
        is_first = np.ones(len(units), dtype=bool)
        is_first[1:] = (found[1:] != found[:-1]).any(1)
        self.starts, self.units = np.flatnonzero(is_first), found
        if len(self.starts) < len(units):  # some have several records
            self.order = np.lexsort([*words(contents), *words(units)])
            self.units = found[self.starts]  # each once

    @property
    def sizes(self) -> np.ndarray:
        """`(units,)` int64: records of each."""
        return np.diff(self.starts, append=len(self.order))

    def places(self) -> np.ndarray:
        """`(units,)` float64 in [0, 1): the first 48 bits of each unit's hash."""
        places: np.ndarray = (words(self.units)[-1] >> np.uint64(16)) * 2.0**-48  # exact
        return places


def words(hashes: np.ndarray) -> list[np.ndarray]:
    """The hashes `(n, 32)` as keys of `np.lexsort`: four times `(n,)` uint64, the first bytes last."""
    return [word.astype(np.uint64) for word in reversed(hashes.view(">u8").T)]
