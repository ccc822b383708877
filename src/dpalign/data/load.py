"""Reading private files. Nothing is cached outside the run, and no message quotes a record."""

from __future__ import annotations

import re
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ..errors import RECORDS_READ, DPAlignError
from . import demo
from .readers import ENDINGS, READERS, ending, read_folder, read_hub

Record = dict[str, Any]
HUB_NAME = r"(\w[\w.-]*(?:/\w[\w.-]*)?)(?::(\w[\w.+-]*))?"  # and perhaps one of its configurations
CHATS = ("conversations", "messages")  # columns that a column `system` may stand beside
UNPAIRED = "holds unpaired preferences (prompt, completion and label)"
JOIN = "join a true and a false answer to one prompt into a record with prompt, chosen and rejected"


def check_there(path: str) -> None:
    """Raises DPAlignError for a data file that does not exist; folders, hub names and demo data are not looked for."""
    if not path.startswith(demo.PREFIX) and ending(Path(path)) in READERS and not Path(path).exists():
        raise DPAlignError(f"data file {path} does not exist.")


def read_records(path: str, split: str = "train", cache_dir: Path | None = None) -> list[Record]:
    """Records of a file, a `datasets` folder or a hub dataset, as dicts.

    Args:
        path: of a hub dataset with several configurations, `NAME:CONFIGURATION`.
        cache_dir: where a hub dataset may be cached; give a private folder.

    Raises:
        DPAlignError: missing, empty, not UTF-8, or not what its ending says; the line is named, never quoted.
    """
    RECORDS_READ.set()
    file = demo.demo_file(path) if path.startswith(demo.PREFIX) else Path(path)
    kind = ending(file)
    try:
        if file.is_dir():
            records = read_folder(file, split)
        elif kind in READERS:
            if not file.is_file():
                raise DPAlignError(f"data file {path} does not exist.")
            records = READERS[kind](file)
        elif file.exists():
            raise DPAlignError(
                f"data file {path} has an unknown ending: use {ENDINGS} (.gz allowed); save a spreadsheet as CSV."
            )
        elif named := re.fullmatch(HUB_NAME, path):
            records = read_hub(named[1], named[2], split, cache_dir)
        else:
            raise DPAlignError(f"data file {path} does not exist.")
    except UnicodeDecodeError as error:
        raise DPAlignError(f"data file {path} is not UTF-8 text (byte {error.start}): convert it first.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DPAlignError(f"data file {path} cannot be read: {type(error).__name__}.") from None
    if not records:
        raise DPAlignError(f"data file {path} is empty: there is nothing to train on.")
    return with_system(records, path)


def with_system(records: list[Record], path: str) -> list[Record]:
    """The records, with a `system` beside their `conversations` or `messages` as the first message of those.

    Raises:
        DPAlignError: it is no text, or the chat has another system message.
    """
    return [_with_system(record, f"record {number} of {path}") for number, record in enumerate(records, 1)]


def _with_system(record: Record, where: str) -> Record:
    system = record.get("system") if isinstance(record, dict) else None
    chats = [name for name in CHATS if isinstance(record.get(name), list)] if system else []
    if not chats:
        return record
    if not isinstance(system, str):
        raise DPAlignError(f"{where} has a column 'system' that is no text beside its chat.")
    said = {"role": "system", "content": system}
    chat = record[chats[0]]
    own = [m for m in chat if isinstance(m, dict) and (m.get("role") or m.get("from")) == "system"]
    if not own:
        return record | {chats[0]: [said, *chat]}
    if [m.get("content") or m.get("value") for m in own] != [system] or own[0] is not chat[0]:
        raise DPAlignError(f"{where} has a column 'system' and another system message in its chat: keep one of them.")
    return record


def require_columns(records: list[Record], alternatives: list[tuple[str, ...]], path: str) -> tuple[str, ...]:
    """The first of `alternatives` whose columns every record has.

    Raises:
        DPAlignError: none fits; names the columns expected and found.
    """
    for columns in alternatives:
        if all(c in records[0] for c in columns):
            for number, record in enumerate(records, 1):
                for c in columns:
                    if not isinstance(record.get(c), str | list) or not record[c]:
                        raise DPAlignError(
                            f"record {number} of {path} has no text in column {c!r}: give a non-empty string "
                            "(or a list of chat messages) in every record."
                        )
                    if isinstance(record[c], str) != isinstance(records[0][c], str):
                        raise DPAlignError(
                            f"column {c!r} of {path} holds a string in one record and chat messages in another (record "
                            f"{number}): give one kind in all records."
                        )
            _refuse_labels(records, columns, path)
            return columns
    if {"completion", "label"} <= set(records[0]) and any("chosen" in columns for columns in alternatives):
        raise DPAlignError(f"{path} {UNPAIRED}, and this stage learns from pairs: {JOIN}.")
    expected = " or ".join(" + ".join(repr(c) for c in a) for a in alternatives)
    found = ", ".join(repr(c) for c in records[0])
    raise DPAlignError(f"{path} has the columns {found}; expected {expected}.")


def _refuse_labels(records: list[Record], columns: tuple[str, ...], path: str) -> None:
    """Answers that somebody found bad must not be learned as good ones."""
    if columns == ("prompt", "completion") and any(r.get("label") is False for r in records):
        raise DPAlignError(
            f"{path} {UNPAIRED}: keep the records whose label is true, and leave the column out; or {JOIN}, for a "
            "stage that learns from pairs."
        )


def only_columns(
    records: list[Record], alternatives: Sequence[tuple[str, ...]], keep: Collection[str] = ()
) -> list[Record]:
    """The records without the columns of the alternatives that the first record does not choose, but for `keep`.

    What is read is chosen once for a file: a later record that has another text as well is not read otherwise.
    """
    others = unread_columns(records, alternatives, keep)
    if not any(others & set(record) for record in records):
        return records
    return [{name: value for name, value in record.items() if name not in others} for record in records]


def unread_columns(
    records: list[Record], alternatives: Sequence[tuple[str, ...]], keep: Collection[str] = ()
) -> set[str]:
    """Columns of the alternatives that the first record does not choose, but for `keep`; none if it lacks them all."""
    chosen = next((columns for columns in alternatives if all(c in records[0] for c in columns)), None)
    return set() if chosen is None else {c for columns in alternatives for c in columns} - {*chosen, *keep}
