"""Units that a run writes itself, in its own formats and columns, for trying a stage before anything is drawn."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ..algorithms.base import Algorithm, Tokenizer
from ..data.load import Record
from ..errors import DPAlignError
from ..models import AdapterStack
from ..rewards import RewardConfig
from ..rewards.load import asked_columns


@contextmanager
def own_randomness(device: torch.device) -> Iterator[None]:
    """Within the block every global generator starts at 0; behind it, each goes on as if nothing had been."""
    plain, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        try:
            yield
        finally:
            random.setstate(plain)
            np.random.set_state(numpy)


def self_written(
    algorithm: Algorithm[Any, Any, Any], model: AdapterStack, count: int, records: int, chats: bool
) -> list[list[Record]]:
    """`count` units of 1 to `records` records: random tokens as text, some one token only, of many lengths.

    Every alternative of the stage's columns comes that the stage takes; as chats, or as plain text.

    Raises:
        DPAlignError: it takes none.
    """
    kind, config, writer = type(algorithm), algorithm.config, Writer(model.tokenizer)
    forms = [(columns, chats) for columns in kind.columns]
    asked = [
        column
        for entering in kind.entering(config).values()
        if isinstance(entering, RewardConfig)
        for column in asked_columns(entering)
    ]

    def write(columns: tuple[str, ...], is_chat: bool, length: int) -> Record | None:
        while length >= 1:
            record = {c: writer.text(length) for c in asked} | {c: writer.value(length, is_chat) for c in columns}
            try:
                kind.check(config, model.tokenizer, record)
                algorithm.encode(model, record)
                return record
            except Exception:  # too long, or no form of this stage's
                length //= 2
        return None

    usable = [form for form in forms if write(*form, 8) is not None]
    if not usable:
        raise DPAlignError(
            f"stage {kind.name} takes no text in its columns {', '.join(kind.columns[0])}: it cannot be tried before "
            "the first draw."
        )
    longest = kind.longest(config)
    lengths = [longest, max(4, longest // 2), 4, max(4, longest // 3), max(4, longest // 4)]
    units: list[list[Record]] = []
    for number in range(count):
        written = [
            write(*usable[number % len(usable)], lengths[number % len(lengths)]) for _ in range(1 + number % records)
        ]
        units.append([record for record in written if record is not None])
    return units


class Writer:
    """Text of random tokens, the same at every start."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.random = tokenizer, random.Random(0)
        special = set(tokenizer.all_special_ids)
        self.ids = [i for i in range(len(tokenizer)) if i not in special]

    def text(self, length: int) -> str:
        """About `length` tokens; now and then the same one again and again."""
        ids = self.random.choices(self.ids, k=length)
        if self.random.random() < 0.2:
            ids = ids[:1] * length
        return str(self.tokenizer.decode(ids))

    def value(self, length: int, is_chat: bool) -> Any:
        """That text, or a chat of a question and an answer that are it."""
        if not is_chat:
            return self.text(length)
        half = max(1, length // 2)
        return [{"role": "user", "content": self.text(half)}, {"role": "assistant", "content": self.text(half)}]
