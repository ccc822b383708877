"""Calling a reward function safely, and checking it.

A reward must score every row by itself. One that whitens, ranks or remembers lets one person's text
change another's score, which no clip bounds. So a person's function is called with one row at a time, and what it
remembers is put back after every call. One that asks for batches is given blocks of a constant number of rows, after
`check_reward` has looked for a coupling in such blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import torch

from ..data.text import Text
from ..errors import DPAlignError
from .foreign import Raised, call_rows, contained, signature_of
from .memory import Memory

RewardFunction = Callable[..., list[float]]

BATCH = 32  # rows of a call in the batched form: always as many, so that what was checked is what is called

PROBES = [
    ("The film", " was a delight from start to finish, warm and funny."),
    ("I expected", " little, and even that was too much: dull, loud and far too long."),
    ("Acting aside,", " the script has nothing to say."),
    ("My sister", " loved it; I fell asleep twice."),
    ("What a", " wonderful, generous, beautiful piece of work!"),
    ("Terrible.", " Avoid at all costs, the worst thing I have ever seen."),
    ("Two hours", ""),
    ("It is", " a film about trains."),
]


Row = tuple[Text, str, dict[str, Any]]  # prompt, completion, columns


class Reward:
    """A reward function with its declared range, called so that no row can disturb another.

    rows_at_once: 1, or `BATCH` for a function that asks for batches; None for a reward of dpalign's own, which scores
        every row by itself, remembers nothing and is called with all of them.
    columns: of the data that it is given, by the settings that it was loaded from.
    """

    def __init__(
        self,
        function: RewardFunction,
        low: float,
        high: float,
        scale: float = 1.0,
        shift: float = 0.0,
        rows_at_once: int | None = 1,
        columns: Sequence[str] = (),
    ):
        self.rows_at_once, self.columns = rows_at_once, tuple(columns)
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise DPAlignError(f"the reward's range [{low}, {high}] must be finite and not empty.")
        self.function, self.low, self.high, self.scale, self.shift = function, low, high, scale, shift

    def __call__(
        self, prompts: Sequence[Text], completions: list[str], columns: dict[str, list[Any]] | None = None
    ) -> torch.Tensor:
        """`(rows,)` float32 rewards in [low, high]; NaN for a row that cannot be scored.

        A person's function is given what TRL's reward functions are given: strings, or where prompts are chats the
        messages of the prompt and `[{"role": "assistant", "content": ...}]`.

        Columns that the function does not take (they are those of another part of a mean, or what a model reads
        prompts with) are left out; that it takes those of its own settings was seen when it was loaded.

        A row that makes the function raise is scored alone, so that it cannot fail the others; what was
        raised is never shown, because it may quote the row.
        """
        takes = signature_of(self.function).takes
        columns = {name: v for name, v in (columns or {}).items() if takes is None or name in takes}
        rows = [
            (p, c, {name: values[i] for name, values in columns.items()})
            for i, (p, c) in enumerate(zip(prompts, completions, strict=True))
        ]
        memory = None if self.rows_at_once is None else Memory(self.function)
        size, scores = self.rows_at_once or max(1, len(rows)), []
        for start in range(0, len(rows), size):
            scores += self._score_block(rows[start : start + size], memory)
        raw = torch.tensor(scores, dtype=torch.float32) * self.scale + self.shift
        return torch.where(torch.isfinite(raw), raw.clamp(self.low, self.high), torch.nan)

    def _said(self, prompt: Text, completion: str) -> Text:
        is_own = self.rows_at_once is None
        return completion if is_own or isinstance(prompt, str) else [{"role": "assistant", "content": completion}]

    def _score_block(self, rows: list[Row], memory: Memory | None) -> list[float]:
        """Scores of at most `rows_at_once` rows; NaN for one that cannot be scored even alone."""
        full = rows + [rows[-1]] * ((self.rows_at_once or len(rows)) - len(rows))
        prompts, completions = [p for p, _, _ in full], [self._said(p, c) for p, c, _ in full]
        try:
            columns = {name: [row[name] for _, _, row in full] for name in full[0][2]}
            scores = contained(lambda: [float(s) for s in call_rows(self.function, prompts, completions, columns)])
            if len(scores) == len(full):
                return scores[: len(rows)]
            raise Raised(ValueError())
        except Raised:
            if len(rows) == 1:
                return [math.nan]
        finally:
            if memory is not None:
                memory.put_back()
        return [self._score_block([row], memory)[0] for row in rows]


def check_reward(
    function: RewardFunction,
    name: str = "reward",
    columns: Sequence[str] = (),
    texts: Sequence[tuple[str, str]] = PROBES,
) -> None:
    """Refuses a reward whose score for a row depends on other rows or on earlier calls.

    Scores the texts; swaps one of them, and half of them; reverses them; scores each alone, and all again after that
    history. Every other row must keep its score. Columns hold texts, numbers and None, in every combination that the
    function takes; a combination that makes it raise is passed over.

    Args:
        texts: prompts and completions that no record has touched; the batched form is checked on `BATCH` of them.

    Raises:
        DPAlignError: the reward fails on all of them, returns NaN, the wrong length, or couples rows.
    """
    failures, fillings = [], list(_fillings(columns, len(texts)))
    for filling in fillings:
        rows: list[Row] = [(p, c, {k: v[i] for k, v in filling.items()}) for i, (p, c) in enumerate(texts)]
        try:
            first = _probe(function, name, rows)
        except DPAlignError as error:
            failures.append(error)  # no column of that kind, perhaps
            continue
        _check_rows(function, name, rows, first)
    if len(failures) == len(fillings):
        raise failures[0]


def _fillings(columns: Sequence[str], count: int) -> Iterator[dict[str, list[Any]]]:
    """Values for the columns: nobody says of which kind they are, so each kind comes, None first."""
    kinds: list[list[Any]] = [[None] * count, [PROBES[i % len(PROBES)][1] for i in range(count)], list(range(count))]
    kinds.append([bool(i % 2) for i in range(count)])
    combinations = product(kinds, repeat=len(columns)) if len(columns) <= 3 else ([k] * len(columns) for k in kinds)
    for chosen in combinations:
        yield dict(zip(columns, chosen, strict=True))


def _probe(function: RewardFunction, name: str, rows: list[Row]) -> list[float]:
    """Finite scores of public rows.

    Raises:
        DPAlignError: with what was raised, for these rows are no one's.
    """
    columns = {column: [row[column] for _, _, row in rows] for column in rows[0][2]}
    try:
        scores = contained(lambda: list(call_rows(function, [p for p, _, _ in rows], [c for _, c, _ in rows], columns)))
    except Raised as raised:
        error, said = raised.error, (str(raised.error).splitlines() or [""])[0]
        raise DPAlignError(f"reward {name!r} raised {type(error).__name__} on the public probe texts: {said}") from None
    if len(scores) != len(rows):
        raise DPAlignError(f"reward {name!r} returned {len(scores)} scores for {len(rows)} completions.")
    try:
        values = [float(s) for s in scores]
    except (TypeError, ValueError):
        raise DPAlignError(f"reward {name!r} must return numbers, one per completion.") from None
    if not all(math.isfinite(v) for v in values):
        raise DPAlignError(f"reward {name!r} returned NaN or infinity on the public probe texts.")
    return values


def _check_rows(function: RewardFunction, name: str, rows: list[Row], first: list[float]) -> None:
    """Raises DPAlignError if a row's score changes with its mates, or with what was scored before."""
    extreme = ("X", " awful" * 40, rows[-1][2])
    count = len(rows)
    at_once, few = (BATCH, 4) if count == BATCH else (1, count)  # as the run will call it
    half = [row if i % 2 else extreme for i, row in enumerate(rows)]
    companies = [("one swapped", [extreme, *rows[1:]], {i: i for i in range(1, count)})]
    companies += [("half of them swapped", half, {i: i for i in range(1, count, 2)})]
    companies += [("backwards", rows[::-1], {count - 1 - i: i for i in range(count)})]
    companies += [("alone", [row] * at_once, {0: i}) for i, row in enumerate(rows[:few])]
    companies += [("again", rows, {i: i for i in range(count)})]
    tolerance = 1e-3 * max(1.0, max(abs(v) for v in first))
    for company, changed, kept in companies:
        scores = _probe(function, name, changed)
        if any(abs(scores[there] - first[here]) > tolerance for there, here in kept.items()):
            raise DPAlignError(
                f"reward {name!r} scores a completion differently when other completions or earlier calls change "
                f"({company}; whitening, ranking, running statistics or randomness): score every completion by itself."
            )
