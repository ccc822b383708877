"""How often one model's completions are better than another's on the same prompts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DPAlignError
from ..rewards.foreign import Raised, contained, import_function

Judge = Callable[[list[str], list[str], list[str]], list[float]]
SIGNATURE = "f(prompts, completions_a, completions_b) -> list of probabilities that a is better"


@dataclass(frozen=True)
class WinRate:
    """Share of prompts that are won, ties counting half, and its 95% Wilson interval.

    position_bias: mean probability that a judge gives to the completion shown first, minus 1/2; None without a judge.
    """

    win_rate: float
    low: float
    high: float
    pairs: int
    position_bias: float | None = None


def win_rate(wins: Tensor, position_bias: float | None = None) -> WinRate:
    """Mean of wins `(prompts,)` in [0, 1]; NaN (a completion that could not be scored) is left out.

    Fractions (ties, a judge's probabilities) vary less than the Bernoulli variables that the interval is made for, so
    it is then too wide rather than too narrow.
    """
    decided = wins[~wins.isnan()].double()
    count = len(decided)
    if not count:
        return WinRate(math.nan, math.nan, math.nan, 0, position_bias)
    return WinRate(float(decided.mean()), *wilson(float(decided.sum()), count), count, position_bias)


def wilson(wins: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927); unlike p ± z se it is right near 0 and 1."""
    p = wins / count
    center = (p + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * math.sqrt(p * (1 - p) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return max(0.0, center - half), min(1.0, center + half)


def higher_wins(ours: Tensor, theirs: Tensor) -> Tensor:
    """The reward as judge: 1 where ours is higher, 1/2 where equal, NaN where either is NaN; `(prompts,)`."""
    wins = (ours > theirs).double() + 0.5 * (ours == theirs).double()
    return torch.where(ours.isnan() | theirs.isnan(), torch.nan, wins)


def judged(judge: Judge, name: str, prompts: list[str], ours: list[str], theirs: list[str]) -> tuple[Tensor, float]:
    """Probability that ours is better, averaged over both orders of showing the two, and the judge's position bias.

    A judge that always prefers the first completion thus gives 1/2 everywhere, and has a bias of 1/2.

    Raises:
        DPAlignError: the judge raises, or returns something else than one number in [0, 1] per prompt.
    """
    ours_first = _ask(judge, name, prompts, ours, theirs)
    theirs_first = _ask(judge, name, prompts, theirs, ours)
    return (ours_first + 1 - theirs_first) / 2, float((ours_first + theirs_first).mean() / 2 - 0.5)


def _ask(judge: Judge, name: str, prompts: list[str], first: list[str], second: list[str]) -> Tensor:
    try:
        answers = contained(lambda: list(judge(list(prompts), list(first), list(second))))
    except Raised as raised:
        reason = (str(raised.error).splitlines() or [""])[0]  # the prompts are public, so it may be shown
        raise DPAlignError(f"judge {name!r} raised {type(raised.error).__name__}: {reason}") from None
    if len(answers) != len(prompts):
        raise DPAlignError(f"judge {name!r} returned {len(answers)} answers for {len(prompts)} prompts.")
    try:
        values = [float(a) for a in answers]
    except (TypeError, ValueError):
        raise DPAlignError(f"judge {name!r} must return numbers: {SIGNATURE}.") from None
    for number, value in enumerate(values, 1):
        if not 0 <= value <= 1:
            raise DPAlignError(f"judge {name!r} returned {value:g} for pair {number}: expected a number in [0, 1].")
    return torch.tensor(values, dtype=torch.float64)


def load_judge(source: str) -> Judge:
    """The function that `module:function` names, a file in the working folder included.

    Raises:
        DPAlignError: it cannot be imported, or is no function.
    """
    module, _, name = source.partition(":")
    if not (module and name):
        raise DPAlignError(f"judge {source!r} is not module:function, with the signature {SIGNATURE}.")
    return import_function(source, "judge")
