"""The examples of a stage's units: each made when its unit is first drawn, and kept on disk."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, overload

import numpy as np

from ..algorithms.base import Algorithm, encode_units
from ..data.load import Record
from ..models import AdapterStack


class Examples(Sequence[list[Any]]):
    """What `encode_units` makes of each unit: a unit that is drawn again is not encoded again, and costs 8 bytes.

    Args:
        folder: private; the file in it has no name, so nothing of it outlives the process, and nobody else writes it.
    """

    def __init__(
        self,
        algorithm: Algorithm[Any, Any, Any],
        model: AdapterStack,
        units: Sequence[list[Record]],
        folder: Path,
    ) -> None:
        self._algorithm, self._model, self._units = algorithm, model, units
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (open as long as the stage trains)
        self._starts = np.full(len(units), -1, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._units)

    @overload
    def __getitem__(self, unit: int) -> list[Any]: ...
    @overload
    def __getitem__(self, unit: slice) -> list[list[Any]]: ...
    def __getitem__(self, unit: int | slice) -> list[Any] | list[list[Any]]:
        if isinstance(unit, slice):
            return [self[number] for number in range(len(self))[unit]]
        number = range(len(self))[unit]
        if self._starts[number] >= 0:
            self._file.seek(self._starts[number])
            kept: list[Any] = pickle.load(self._file)
            return kept
        (examples,) = encode_units(self._algorithm, self._model, [self._units[number]])
        with suppress(Exception):  # a full disk, or an object in a reward's column: it is encoded again another time
            written = pickle.dumps(examples)
            start = self._file.seek(0, os.SEEK_END)
            self._file.write(written)
            self._starts[number] = start
        return examples
