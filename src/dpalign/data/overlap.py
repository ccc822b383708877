"""Texts that two datasets share, found by keyed hash: 16 bytes for each text, and no look at who wrote it.

Datasets of different names are taken to have different units, and public records to be nobody's. Unit columns say so
where they can be compared; here contents are, whatever the columns say. The key is the ledger's, so that its hashes
confirm nothing to somebody without it.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DPAlignError
from ..privacy.ledger import Ledger
from .load import Record
from .names import same_text
from .text import read_text

DECLARED = "texts that several datasets hold, or public records too, are different units' or public (declared)"
SIZE = 16  # bytes of a hash
ANSWERS = {"completion", "chosen", "rejected"}  # to a prompt, where there is one: a short one proves nothing
PROMPT = "prompt"
OTHER_ROLES = ("system", "assistant")


@dataclass(frozen=True)
class Texts:
    """Hashes of the texts of some records, sorted, and the record that each is of.

    name: the dataset's; None of records that are declared public. source: how a message calls them.
    """

    name: str | None
    is_public: bool
    source: str
    records: int
    hashes: np.ndarray  # (texts,) S16
    record: np.ndarray  # (texts,) int64

    def shared_with(self, blocks: Iterable[np.ndarray]) -> int:
        """How many records have a text in one of the blocks `(texts,) S16`."""
        found = np.zeros(len(self.hashes), dtype=bool)  # at the first of equal hashes
        for block in blocks:
            place = np.searchsorted(self.hashes, block)
            inside = place < len(self.hashes)
            place, block = place[inside], block[inside]
            found[place[self.hashes[place] == block]] = True
        firsts = np.searchsorted(self.hashes, self.hashes)
        return len(np.unique(self.record[found[firsts]]))


def hash_texts(
    records: Sequence[Record],
    columns: Iterable[str],
    ledger: Ledger,
    *,
    name: str | None,
    is_public: bool,
    source: str,
) -> Texts:
    """Of the columns that a stage reads, as far as a record has them; of an answer to a prompt, the prompt alone."""
    columns, key = list(dict.fromkeys((PROMPT, *columns))), ledger.key("texts")
    hashes, owners, keyed = bytearray(), array("q"), hashlib.blake2b(digest_size=SIZE, key=key)
    for number, record in enumerate(records):
        for text in _texts(record, columns):
            one = keyed.copy()
            one.update(text.encode("utf-8", "surrogatepass"))
            hashes += one.digest()
            owners.append(number)
    found = np.frombuffer(hashes, dtype=f"S{SIZE}")
    order = np.argsort(found, kind="stable")
    return Texts(name, is_public, source, len(records), found[order], np.array(owners, dtype=np.int64)[order])


def check_contents(datasets: list[Texts], ledger: Ledger) -> None:
    """Compares all with each other, and with what the ledger has drawn from under other names.

    Raises:
        DPAlignError: texts are shared; it says by how many records, and quotes none.
    """
    for number, one in enumerate(datasets):
        for other in datasets[number + 1 :]:
            if _matters(one, other.name, other.is_public):
                _refuse(one, one.shared_with([other.hashes]), other.source, other.is_public)
        for name, is_public in ledger.known_texts():
            if _matters(one, name, is_public):
                blocks = _blocks(ledger, name, is_public)
                _refuse(one, one.shared_with(blocks), f"{name!r}, which the ledger knows", is_public)


def remember_contents(datasets: list[Texts], ledger: Ledger) -> None:
    """From here on the ledger knows the texts of all that have a name: to be called before the first draw."""
    for one in datasets:
        if one.name is None:
            continue
        new = np.unique(one.hashes)
        for block in _blocks(ledger, one.name, one.is_public):
            new = np.setdiff1d(new, block, assume_unique=True)
        ledger.remember_texts(one.name, one.is_public, new.tobytes())


def _matters(one: Texts, name: str | None, is_public: bool) -> bool:
    """What is public may be in several places, and one dataset's units are known by one name."""
    return not (one.is_public and is_public) and (one.name is None or one.name != name)


def _refuse(one: Texts, shared: int, other: str, other_is_public: bool) -> None:
    if not shared:
        return
    public = " Whatever is declared public is shown as it is." if one.is_public or other_is_public else ""
    raise DPAlignError(
        f"{shared} of the {one.records} records of {one.source} have texts that are in {other}, too: who wrote them "
        f"would be counted as two.{public} Give data one name wherever it is used, and take out what is not to be "
        "there; if equal texts are different people's (form letters, say), declare it (shared_texts: "
        "declared, or for a command --shared_texts declared)."
    )


def _blocks(ledger: Ledger, dataset: str, is_public: bool) -> Iterator[np.ndarray]:
    return (np.frombuffer(blob, dtype=f"S{SIZE}") for blob in ledger.texts(dataset, is_public))


def _texts(record: Record, columns: list[str]) -> list[str]:
    values = {c: record[c] for c in columns if isinstance(record.get(c), str | list) and record[c]}
    if PROMPT in values:
        values = {c: value for c, value in values.items() if c not in ANSWERS}
    texts = [_plain(value) for value in values.values()]
    return [text for text in texts if text]


def _plain(value: str | list[Any]) -> str:
    """A text in one spelling; of a chat, what is said to the assistant: it is one with and without an answer."""
    try:
        messages = read_text(value)
    except DPAlignError:  # in a column that no stage reads as a chat
        messages = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    if isinstance(messages, str):
        return same_text(messages)
    said = [m["content"] for m in messages if m["role"] not in OTHER_ROLES] or [m["content"] for m in messages]
    return same_text(" ".join(said))
