"""Files as Excel, TRL and `datasets` write them, to records, a few at a time. No message quotes a record.

CSV and JSON are read by hand: pyarrow's readers take the unit 007 for the number 7.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pyarrow

from ..errors import DPAlignError
from ..printable import printable

DELIMITERS = ",;\t"
BATCH = 4096  # records of a table that are read at a time


def open_text(file: Path) -> TextIO:
    """UTF-8, with or without the byte order mark that Excel writes."""
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8-sig", newline="")
    return open(file, encoding="utf-8-sig", newline="")


def read_json(file: Path) -> Iterator[dict[str, Any]]:
    """One object per line, or one array of objects, which is held in memory."""
    with open_text(file) as text:
        start = text.read(1)
        while start.isspace():
            start = text.read(1)
        text.seek(0)
        yield from _read_array(file, text) if start == "[" else _read_lines(file, text)


def _read_array(file: Path, text: TextIO) -> Iterator[dict[str, Any]]:
    try:
        records = json.load(text)
    except (ValueError, RecursionError) as error:
        raise DPAlignError(f"{file} begins as a JSON array and is none{_line_of(error)}.") from None
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise DPAlignError(f"entry {number} of the array in {file} is not a JSON object.")
        _check_columns(record, f"entry {number} of the array in {file}")
    yield from records


def _read_lines(file: Path, text: TextIO) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            text.seek(0)
            raise DPAlignError(
                f"line {number} of {file} is not JSON: expected one object per line, or one array of objects"
                f"{_inside(text.read())}."
            ) from None
        if not isinstance(record, dict):
            raise DPAlignError(f"line {number} of {file} is not a JSON object.")
        _check_columns(record, f"line {number} of {file}")
        yield record


def _inside(text: str) -> str:
    """Of a file that is one object: which of its entries holds the records."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    lists = [key for key, value in whole.items() if isinstance(value, list)] if isinstance(whole, dict) else []
    return f"; it is one object, so save the array in its {printable(lists[0])!r} by itself" if lists else ""


def _check_columns(record: dict[str, Any], where: str) -> None:
    for name in record:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DPAlignError(f"{where} has a column whose name is no valid Unicode (a lone surrogate).") from None


def _line_of(error: Exception) -> str:
    return f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""


def read_csv(file: Path) -> Iterator[dict[str, Any]]:
    """With a header; separated by commas, semicolons or tabs, whichever makes the most columns of the header."""
    csv.field_size_limit(2**31 - 1)
    with open_text(file) as text:
        first = text.readline()
        has_separator = first.lower().startswith("sep=")  # Excel says it in a line of its own
        header = text.readline() if has_separator else first
        delimiter = max(DELIMITERS, key=lambda d: len(next(csv.reader([header], delimiter=d), [])))
        text.seek(0)
        if has_separator:
            text.readline()
        try:
            reader = csv.DictReader(text, delimiter=delimiter, strict=True)
            names = list(reader.fieldnames or [])
            _check_header(file, names)
            for number, row in enumerate(reader, 1):
                if None in row or None in row.values():
                    raise DPAlignError(
                        f"record {number} of {file} has more or fewer fields than the header's {len(names)} (separated "
                        f"by {delimiter!r}): put texts that hold the separator between quotation marks."
                    )
                yield row
        except csv.Error:
            raise DPAlignError(f"{file} is not valid CSV: a quotation mark is not closed, or not doubled.") from None


def _check_header(file: Path, names: list[str]) -> None:
    places = [names.index(name) for name in names]
    if twice := [number for number, place in enumerate(places) if place < number]:
        first, second = places[twice[0]] + 1, twice[0] + 1
        raise DPAlignError(f"{file} has one name for its columns {first} and {second}: its first line must name each.")
    if any(not name.strip() for name in names):
        raise DPAlignError(f"{file} has a column without a name: its first line must name every column.")


def read_parquet(file: Path) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow.parquet

    try:
        yield from pyarrow.parquet.ParquetFile(file).iter_batches(BATCH)
    except pyarrow.ArrowException:
        raise DPAlignError(f"{file} is not a Parquet file.") from None


def from_arrow(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records of a table, without the nulls inside a column: a table has every key that any record has, and a chat's
    tools and calls would seem to have arguments that nobody gave."""
    return [{name: _without_nulls(value) for name, value in record.items()} for record in records]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def read_folder(folder: Path, split: str) -> Iterator[pyarrow.RecordBatch]:
    from datasets import DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(folder))
    except (FileNotFoundError, ValueError):
        files = sorted(f.name for f in folder.rglob("*") if ending(f) in READERS)
        cure = f": give one of its files, such as {printable(files[0])}" if files else ""
        raise DPAlignError(f"{folder} is not a folder written by datasets' save_to_disk{cure}.") from None
    if isinstance(loaded, DatasetDict):
        if split not in loaded:
            raise DPAlignError(f"{folder} has no split {split!r}; it has {', '.join(loaded)}.")
        loaded = loaded[split]
    yield from batches_of(loaded)


def read_hub(name: str, configuration: str | None, split: str, cache_dir: Path | None) -> Iterator[pyarrow.RecordBatch]:
    """configuration: one of those that the dataset has, or None for its only one."""
    from datasets import load_dataset

    try:
        loaded = load_dataset(name, configuration, split=split, cache_dir=str(cache_dir) if cache_dir else None)
    except Exception as error:
        reason = _why_not(error, name, split)
        raise DPAlignError(f"{name!r} is no file here, and the hub gave no dataset of that name: {reason}.") from None
    yield from batches_of(loaded)


def batches_of(dataset: Any) -> Iterator[pyarrow.RecordBatch]:
    """The rows of a `datasets.Dataset` as they are stored, whatever its format."""
    for table in dataset.with_format("arrow").iter(BATCH):
        yield from table.to_batches()


def _why_not(error: Exception, name: str, split: str) -> str:
    """Nothing of a record is in what the hub says before it gives any."""
    said = str(error)
    if splits := re.match(r'Unknown split ".*?"\. Should be one of \[(.*)\]', said):
        return f"it has no split {split!r} (data.split), but {splits[1]}"
    if names := re.match(r"Config name is missing\.\s+Please pick one among the available configs: \[(.*)\]", said):
        return f"it has several configurations ({names[1]}): say which one, as {name}:CONFIGURATION"
    if names := re.match(r"BuilderConfig '(.*?)' not found\. Available: \[(.*)\]", said):
        return f"it has no configuration {printable(names[1])}, but {names[2]}"
    offline = isinstance(error, ConnectionError) or type(error).__name__ in ("OfflineModeIsEnabled", "ConnectError")
    return "there is no connection to it" if offline else type(error).__name__


TEXTS: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    "jsonl": read_json,
    "ndjson": read_json,
    "json": read_json,
    "csv": read_csv,
    "tsv": read_csv,
}
SEPARATED = ("csv", "tsv")
READERS = (*TEXTS, "parquet")  # endings
ENDINGS = ", ".join(f".{kind}" for kind in READERS)


def ending(file: Path) -> str:
    return file.name.removesuffix(".gz").rpartition(".")[2].lower()
