"""Reading private files, some records at a time. Nothing is cached outside the run, and no message quotes a record."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow

from ..errors import RECORDS_READ, DPAlignError
from . import demo
from .readers import BATCH, ENDINGS, READERS, TEXTS, ending, from_arrow, read_folder, read_hub, read_parquet

Record = dict[str, Any]
HUB_NAME = r"(\w[\w.-]*(?:/\w[\w.-]*)?)(?::(\w[\w.+-]*))?"  # and perhaps one of its configurations
CHATS = ("conversations", "messages")  # columns that a column `system` may stand beside


def check_there(path: str) -> None:
    """Raises DPAlignError for a data file that does not exist; folders, hub names and demo data are not looked for."""
    if not path.startswith(demo.PREFIX) and ending(Path(path)) in READERS and not Path(path).exists():
        raise DPAlignError(f"data file {path} does not exist.")


@dataclass(frozen=True)
class Chunk:
    """Some records in their order. batch: the same as their source holds them, where that is a table."""

    records: list[Record]
    batch: pyarrow.RecordBatch | None = None


def read_records(path: str, split: str = "train", cache_dir: Path | None = None) -> list[Record]:
    """All records that `read_chunks` reads, in memory."""
    return [record for chunk in read_chunks(path, split, cache_dir) for record in chunk.records]


def read_chunks(path: str, split: str = "train", cache_dir: Path | None = None) -> Iterator[Chunk]:
    """Records of a file, a `datasets` folder or a hub dataset, as dicts; a few thousand of them are in memory at once.

    Args:
        path: of a hub dataset with several configurations, `NAME:CONFIGURATION`.
        cache_dir: where a hub dataset may be cached; give a private folder.

    Raises:
        DPAlignError: missing, empty, not UTF-8, or not what its ending says; the line is named, never quoted.
    """
    RECORDS_READ.set()
    count = 0
    try:
        for chunk in _chunks(path, split, cache_dir):
            records = with_system(chunk.records, path, count)
            count += len(records)
            if records:
                yield Chunk(records, chunk.batch)
    except UnicodeDecodeError as error:
        raise DPAlignError(f"data file {path} is not UTF-8 text (byte {error.start}): convert it first.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DPAlignError(f"data file {path} cannot be read: {type(error).__name__}.") from None
    if not count:
        raise DPAlignError(f"data file {path} is empty: there is nothing to train on.")


def _chunks(path: str, split: str, cache_dir: Path | None) -> Iterator[Chunk]:
    file = demo.demo_file(path) if path.startswith(demo.PREFIX) else Path(path)
    kind = ending(file)
    if file.is_dir():
        return _of_tables(read_folder(file, split))
    if kind in READERS:
        if not file.is_file():
            raise DPAlignError(f"data file {path} does not exist.")
        return _of_texts(TEXTS[kind](file)) if kind in TEXTS else _of_tables(read_parquet(file))
    if file.exists():
        raise DPAlignError(
            f"data file {path} has an unknown ending: use {ENDINGS} (.gz allowed); save a spreadsheet as CSV."
        )
    if named := re.fullmatch(HUB_NAME, path):
        return _of_tables(read_hub(named[1], named[2], split, cache_dir))
    raise DPAlignError(f"data file {path} does not exist.")


def _of_texts(records: Iterator[Record]) -> Iterator[Chunk]:
    while some := list(islice(records, BATCH)):
        yield Chunk(some)


def _of_tables(batches: Iterable[pyarrow.RecordBatch]) -> Iterator[Chunk]:
    return (Chunk(from_arrow(batch.to_pylist()), batch) for batch in batches)


def with_system(records: list[Record], path: str, before: int = 0) -> list[Record]:
    """The records, with a `system` beside their `conversations` or `messages` as the first message of those.

    Args:
        before: how many records of `path` come before these.

    Raises:
        DPAlignError: it is no text, or the chat has another system message.
    """
    return [_with_system(record, path, number) for number, record in enumerate(records, before + 1)]


def _with_system(record: Record, path: str, number: int) -> Record:
    system = record.get("system") if isinstance(record, dict) else None
    chats = [name for name in CHATS if isinstance(record.get(name), list)] if system else []
    if not chats:
        return record
    where = f"record {number} of {path}"
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
