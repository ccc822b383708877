"""What private data bought: (private - free) / (non-private - free), with an interval, and in words.

`free` is the best that needs no private data; a run that does not beat it has bought nothing, whatever it gains over
the pretrained model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Mean:
    """A mean, and the half-width of its 95% interval."""

    value: float
    half: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.half:.3f}"

    def minus(self, other: Mean) -> Mean:
        """The difference, as of independent means: wider than it need be where both are of the same prompts."""
        return Mean(self.value - other.value, math.hypot(self.half, other.half))


@dataclass(frozen=True)
class ClosedGap:
    """Means of one measure. nonprivate: None where nothing was run without privacy."""

    measure: str
    free: Mean
    private: Mean
    nonprivate: Mean | None = None

    @property
    def bought(self) -> Mean:
        """What the private run has over the free one."""
        return self.private.minus(self.free)

    @property
    def share(self) -> Mean | None:
        """By the delta method; None where the non-private run does not beat the free one by more than its error."""
        if self.nonprivate is None:
            return None
        whole = self.nonprivate.minus(self.free)
        if not whole.value > whole.half:
            return None
        share = self.bought.value / whole.value
        parts = (self.private.half, share * self.nonprivate.half, (share - 1) * self.free.half)
        return Mean(share, math.hypot(*parts) / whole.value)

    @property
    def bought_something(self) -> bool:
        """Whether it is more than the error."""
        return self.bought.value > self.bought.half

    def sentences(self) -> list[str]:
        """For people."""
        if self.bought_something:
            first = f"The private data bought {self.bought} of {self.measure} over what is free ({self.free})."
        elif self.bought.value < -self.bought.half:
            first = f"WARNING: the private data bought nothing: what is free has {self.measure} {self.free}, "
            first += f"more than the {self.private} of the private run."
        else:
            first = f"WARNING: the private data bought nothing that shows: what is free has {self.measure} "
            first += f"{self.free}, the private run {self.private}."
        if self.nonprivate is None:
            return [first]
        if self.share is None:
            return [
                first,
                f"The closed gap is not defined: without privacy ({self.nonprivate}) the {self.measure} is not better "
                "than free.",
            ]
        return [first, f"Closed of the gap between free and without privacy ({self.nonprivate}): {self.share}."]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; closed_gap is None where it is not defined."""
        means = {"free": self.free, "private": self.private, "nonprivate": self.nonprivate}
        found: dict[str, Any] = {"measure": self.measure}
        for name, mean in means.items():
            if mean is not None:
                found |= {name: mean.value, f"{name}_ci95": mean.half}
        share = self.share
        return found | {
            "closed_gap": None if share is None else share.value,
            "closed_gap_ci95": None if share is None else share.half,
        }


def closed_gap(
    measure: str, free: dict[str, Any], private: dict[str, Any], nonprivate: dict[str, Any] | None
) -> ClosedGap | None:
    """Of three rows of public evaluations; None where one was not measured so.

    Args:
        measure: `reward`, or `reference_reward` where the reward itself has another scale in every run.
    """
    rows = [free, private, *([] if nonprivate is None else [nonprivate])]
    if any(row.get(measure) is None or row.get(f"{measure}_ci95") is None for row in rows):
        return None
    means = [Mean(float(row[measure]), float(row[f"{measure}_ci95"])) for row in rows]
    if any(math.isnan(number) for mean in means for number in (mean.value, mean.half)):
        return None
    return ClosedGap(measure.replace("_", " "), *means)
