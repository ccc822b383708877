"""The examples of a stage's units: each made when its unit is first drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

from ..algorithms.base import Algorithm, encode_units
from ..data.load import Record
from ..models import AdapterStack

MOST = 2**14  # units whose examples are kept; reading a text again takes some 30 microseconds


class Examples(Sequence[list[Any]]):
    """What `encode_units` makes of each unit; of the first `most` that are drawn it is kept, so that memory does not
    grow with the data."""

    def __init__(
        self, algorithm: Algorithm[Any, Any, Any], model: AdapterStack, units: Sequence[list[Record]], most: int = MOST
    ) -> None:
        self._algorithm, self._model, self._units, self._most = algorithm, model, units, most
        self._kept: dict[int, list[Any]] = {}

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
        if number in self._kept:
            return self._kept[number]
        (examples,) = encode_units(self._algorithm, self._model, [self._units[number]])
        if len(self._kept) < self._most:
            self._kept[number] = examples
        return examples
