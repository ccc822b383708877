"""Which columns of records are read: chosen once for a file, by its first record."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import overload

from ..errors import DPAlignError
from ..printable import printable
from .load import Record
from .readers import SEPARATED, ending
from .table import Table

UNPAIRED = "holds unpaired preferences (prompt, completion and label)"
JOIN = "join a true and a false answer to one prompt into a record with prompt, chosen and rejected"
ANSWERED = ("prompt", "completion")  # answers that somebody found bad must not be learned as good ones
LOOKED_AT = ("system", "label")  # whatever a stage reads


def require_columns(records: Sequence[Record], alternatives: Sequence[tuple[str, ...]], path: str) -> None:
    """Goes through all `with_columns`."""
    for _ in with_columns(records, alternatives, path):
        pass


def with_columns(
    records: Sequence[Record], alternatives: Sequence[tuple[str, ...]], path: str
) -> Iterator[tuple[int, Record]]:
    """The records, numbered from 1, each of which has the columns of the first alternative that fits the first record.

    Raises:
        DPAlignError: none fits; names the columns expected and found. A record that lacks one, or has another kind.
    """
    first = records[0]
    columns = _chosen(first, alternatives)
    if columns is None:
        raise _no_columns(columns_of(records), alternatives, path)
    are_texts = [(name, isinstance(first[name], str)) for name in columns]
    for number, record in enumerate(records, 1):
        for name, is_text in are_texts:
            value = record.get(name)
            if not isinstance(value, str | list) or not value:
                raise DPAlignError(
                    f"record {number} of {path} has no text in column {name!r}: give a non-empty string "
                    "(or a list of chat messages) in every record."
                )
            if isinstance(value, str) != is_text:
                raise DPAlignError(
                    f"column {name!r} of {path} holds a string in one record and chat messages in another (record "
                    f"{number}): give one kind in all records."
                )
        if columns == ANSWERED and record.get("label") is False:
            raise DPAlignError(
                f"{path} {UNPAIRED}: keep the records whose label is true, and leave the column out; or {JOIN}, for a "
                "stage that learns from pairs."
            )
        yield number, record


def _chosen(first: Record, alternatives: Sequence[tuple[str, ...]]) -> tuple[str, ...] | None:
    return next((columns for columns in alternatives if all(name in first for name in columns)), None)


def _no_columns(found: Collection[str], alternatives: Sequence[tuple[str, ...]], path: str) -> DPAlignError:
    if {"completion", "label"} <= set(found) and any("chosen" in columns for columns in alternatives):
        return DPAlignError(f"{path} {UNPAIRED}, and this stage learns from pairs: {JOIN}.")
    expected = " or ".join(" + ".join(repr(c) for c in a) for a in alternatives)
    if ending(Path(path)) in SEPARATED:  # its first line may be a record
        return DPAlignError(
            f"{path} has {len(found)} columns, named by its first line; expected {expected} among them."
        )
    names = printable(", ".join(repr(c) for c in found), longest=500)
    return DPAlignError(f"{path} has the columns {names}; expected {expected}.")


def columns_of(records: Sequence[Record]) -> Collection[str]:
    """Of the first record, in its file."""
    return records.columns if isinstance(records, Table) else records[0]


@overload
def only_columns(
    records: list[Record], alternatives: Sequence[tuple[str, ...]], keep: Collection[str] = ()
) -> list[Record]: ...
@overload
def only_columns(
    records: Sequence[Record], alternatives: Sequence[tuple[str, ...]], keep: Collection[str] = ()
) -> Sequence[Record]: ...
def only_columns(
    records: Sequence[Record], alternatives: Sequence[tuple[str, ...]], keep: Collection[str] = ()
) -> Sequence[Record]:
    """The records without the columns of the alternatives that the first record does not choose, but for `keep`.

    What is read is chosen once for a file: a later record that has another text as well is not read otherwise.
    """
    others = unread_columns(records, alternatives, keep)
    if isinstance(records, Table):
        return records.without(others)
    if not any(others & set(record) for record in records):
        return records
    return [{name: value for name, value in record.items() if name not in others} for record in records]


def unread_columns(
    records: Sequence[Record], alternatives: Sequence[tuple[str, ...]], keep: Collection[str] = ()
) -> set[str]:
    """Columns of the alternatives that the first record does not choose, but for `keep`; none if it lacks them all."""
    chosen = _chosen(records[0], alternatives)
    return set() if chosen is None else {c for columns in alternatives for c in columns} - {*chosen, *keep}
