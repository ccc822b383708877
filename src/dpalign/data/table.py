"""Records in an Arrow file that is mapped into memory: what a million of them cost is disk.

The columns that are kept lie in a file without a name, which its owner alone could open and of which nothing is left
when the process ends, however it ends. Those of a table are stored as they were; records that were read from text (JSON
or CSV) are stored as JSON, for in one column there may be texts in some of them and lists in others, or nothing.
"""

from __future__ import annotations

import json
import mmap
import tempfile
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, overload

import pyarrow

from ..errors import DPAlignError
from .load import Chunk, Record, with_system
from .readers import batches_of, from_arrow

if TYPE_CHECKING:
    from .hashes import RecordHashes

JSON = pyarrow.schema([("record", pyarrow.large_utf8())], metadata={"dpalign": "json"})
_write = json.JSONEncoder(ensure_ascii=True).encode
_read = json.JSONDecoder().decode


class Table(Sequence[Record]):
    """Records that are read from Arrow when they are asked for; going over all of them holds a few thousand.

    columns: all that the first record had, those that were not kept too. hashes: that were taken of the whole records,
    by the name of the dataset and its unit column.
    """

    def __init__(
        self,
        batches: Sequence[pyarrow.RecordBatch],
        columns: Sequence[str],
        hashes: Mapping[tuple[str, str | None], RecordHashes],
        *,
        dropped: frozenset[str] = frozenset(),
        mapped: mmap.mmap | None = None,
    ) -> None:
        self._batches, self.columns, self.hashes = batches, tuple(columns), hashes
        self._dropped, self._mapped = dropped, mapped
        self._ends = list(accumulate(batch.num_rows for batch in batches))

    def without(self, columns: Collection[str]) -> Table:
        """The same records without these columns, and without the hashes of whole records."""
        dropped = self._dropped.union(columns)
        return Table(self._batches, self.columns, {}, dropped=dropped, mapped=self._mapped)

    @property
    def contents(self) -> object:
        """The same for tables whose records are the same."""
        return id(self._batches), self._dropped

    def __len__(self) -> int:
        return int(self._ends[-1])

    @overload
    def __getitem__(self, row: int) -> Record: ...
    @overload
    def __getitem__(self, row: slice) -> list[Record]: ...
    def __getitem__(self, row: int | slice) -> Record | list[Record]:
        if isinstance(row, slice):
            return [self[number] for number in range(len(self))[row]]
        number = range(len(self))[row]
        place = bisect_right(self._ends, number)
        batch = self._batches[place]
        return self._records(batch.slice(number - self._ends[place] + batch.num_rows, 1))[0]

    def __iter__(self) -> Iterator[Record]:
        for batch in self._batches:
            yield from self._records(batch)
            if self._mapped is not None:
                self._mapped.madvise(mmap.MADV_DONTNEED)  # what has been read is the disk's again

    def _records(self, batch: pyarrow.RecordBatch) -> list[Record]:
        records: list[Record]
        if batch.schema.equals(JSON, check_metadata=True):
            records = _read(f"[{','.join(batch.column(0).to_pylist())}]")  # at once: in half of the time
        else:
            records = with_system(from_arrow(batch.to_pylist()), "")
        if not self._dropped:
            return records
        return [{name: v for name, v in record.items() if name not in self._dropped} for record in records]


def write_table(
    chunks: Iterable[Chunk],
    keep: Collection[str],
    folder: Path | None,
    hashes: Mapping[tuple[str, str | None], RecordHashes],
) -> Table:
    """A table of these columns of records, and of their hashes, which are taken of all columns.

    Args:
        folder: where the file without a name lies; None keeps the table in memory.

    Raises:
        DPAlignError: what reading the records or hashing them raises, or a full disk.
    """
    columns: list[str] = []
    with nullcontext() if folder is None else tempfile.TemporaryFile(dir=folder) as file:
        sink: Any = pyarrow.BufferOutputStream() if file is None else file
        writer: Any = None
        for chunk in chunks:
            columns = columns or list(chunk.records[0])
            for taken in hashes.values():
                taken.add(chunk.records)
            batch = _batch(chunk, keep)
            try:
                writer = writer or pyarrow.ipc.new_stream(sink, batch.schema)
                writer.write_batch(batch)
            except OSError as error:
                raise DPAlignError(f"{folder} has no room for the records ({error.strerror}): free some.") from None
        writer.close()
        mapped = None if file is None else _mapped(file)
        buffer = sink.getvalue() if mapped is None else pyarrow.py_buffer(mapped)
        return Table(list(pyarrow.ipc.open_stream(buffer)), columns, hashes, mapped=mapped)


def table_of(dataset: Any, name: str) -> Table:
    """The rows of a `datasets.Dataset` that has some, which are not copied.

    Raises:
        DPAlignError: what `with_system` refuses.
    """
    batches, count = list(batches_of(dataset)), 0
    for batch in batches:
        count += len(with_system(from_arrow(batch.to_pylist()), name, count))
    return Table(batches, batches[0].schema.names, {})


def _mapped(file: IO[bytes]) -> mmap.mmap:
    file.flush()
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _batch(chunk: Chunk, keep: Collection[str]) -> pyarrow.RecordBatch:
    kept = [] if chunk.batch is None else [name for name in chunk.batch.schema.names if name in keep]
    if chunk.batch is not None and kept:
        return chunk.batch.select(kept)
    texts = [_write({name: record[name] for name in record if name in keep}) for record in chunk.records]
    return pyarrow.record_batch([texts], schema=JSON)
