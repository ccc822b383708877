"""A judge of films' reviews that nothing is trained against: what people would rate a text, by its words alone.

A ridge regression on words and pairs of words, of the mean ratings of those demo snippets whose ratings no pair of
`demo:movie-preferences` holds: the demo's texts and prompts, all of them public text. It knows nothing of a model's
features, so a policy that finds a gap in those does not please it. For demonstrations: its data is the demo's.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from ..data.demo import demo_file
from ..data.load import Record, read_records
from ..data.text import Text
from .own import words

LEARNED = ("demo:movie-preferences/texts", "demo:movie-preferences/prompts")
SCALED = "demo:movie-snippets/public"  # where its scores have mean 0 and deviation 1
RIDGE = 1.0  # of rows of length 1
FEWEST = 2  # texts that a gram must be in


def judge(prompts: Sequence[Text], completions: Sequence[Text], **columns: list[Any]) -> list[float]:
    """What people would rate each completion, in deviations of public snippets; about -4 to 4."""
    scores: list[float] = _learned().scores([words(completion) for completion in completions]).tolist()
    return scores


class Ridge:
    """Ridge regression of numbers on the words and word pairs of texts, weighted by how rare they are (TF-IDF)."""

    def __init__(self, texts: Sequence[str], values: Sequence[float]) -> None:
        counts = Counter(gram for text in texts for gram in grams(text))
        known = sorted(gram for gram, count in counts.items() if count >= FEWEST)
        self.places = {gram: place for place, gram in enumerate(known)}
        self.rarity = np.array([math.log(len(texts) / counts[gram]) for gram in known])
        rows, wanted = self._rows(texts), np.array(values)
        self.shift, self.scale = float(wanted.mean()), 1.0
        alike = (rows @ rows.T).toarray() + RIDGE * np.eye(len(wanted))  # (texts, texts)
        self.weights = rows.T @ np.linalg.solve(alike, wanted - self.shift)

    def scaled_on(self, texts: Sequence[str]) -> Ridge:
        """With mean 0 and deviation 1 on these."""
        found = self.scores(texts)
        deviation = float(found.std()) / self.scale
        self.shift, self.scale = self.shift - float(found.mean()), 1 / deviation
        return self

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """`(texts,)` float64."""
        found: np.ndarray = self.scale * (self._rows(texts) @ self.weights + self.shift)
        return found

    def _rows(self, texts: Sequence[str]) -> Any:
        """Sparse `(texts, grams)`, each of length 1, or 0 where no word is known."""
        numbers, places = [], []
        for number, text in enumerate(texts):
            known = sorted(self.places[gram] for gram in grams(text) if gram in self.places)
            numbers += [number] * len(known)
            places += known
        values = self.rarity[places]
        lengths = np.sqrt(np.bincount(numbers, values**2, len(texts)))[numbers].clip(min=1e-12)
        return csr_matrix((values / lengths, (numbers, places)), (len(texts), len(self.places)))


def grams(text: str) -> set[str]:
    """Words and pairs of neighbouring words."""
    found = re.findall(r"[a-z']+|[?!.,:]", text.lower())
    return {*found, *(f"{one} {two}" for one, two in pairwise(found))}


@cache
def _learned() -> Ridge:
    rated = [record for file in LEARNED for record in _read(file)]
    found = Ridge([record["text"] for record in rated], [record["mean"] for record in rated])
    return found.scaled_on([record["text"] for record in _read(SCALED)])


def _read(name: str) -> list[Record]:
    return read_records(str(demo_file(name)))
