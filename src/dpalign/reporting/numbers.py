"""Numbers as text: of the guarantee, and seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def at_most(epsilon: float, digits: int = 3) -> str:
    """Epsilon rounded up, so that no text promises more than was computed; "inf" without a bound."""
    if math.isinf(epsilon):
        return "inf"
    scale = 10**digits
    return f"{math.ceil(epsilon * scale - 1e-6) / scale:.{digits}f}"  # 1e-6: what floats add to a round number


def attacks(success: Sequence[Mapping[str, Any]]) -> str:
    """What `attack_success` of a statement says, as a sentence; empty without a bound, or of a statement of before."""
    found = [(100 * float(at["false_positives"]), 100 * float(at["true_positives"])) for at in success]
    if not found or min(share for _, share in found) >= 100:
        return ""
    (wrong, right), *others = [(f"{rate:g}%", f"{at_most(share, 2)}%") for rate, share in found]
    more = f" ({', '.join(f'at {rate} {share}' for rate, share in others)})" if others else ""
    return (
        f"Whoever guesses whose data was used, and is wrong about {wrong} of the units whose data was not, is right "
        f"about at most {right} of those whose data was{more}."
    )


def all_runs(entry: dict[str, Any]) -> str:
    """What all private runs on a dataset have spent together, `entry` as `account` gives it."""
    if len(entry["unit_kinds"]) > 1:
        return f"no bound, for they protect different units ({', '.join(entry['unit_kinds'])})"
    return f"epsilon {at_most(float(entry['epsilon_of_all_private_runs']))}"


def two_digits(number: float) -> float:
    return float(f"{number:.2g}")


def duration(seconds: float) -> str:
    """In the unit that fits, to two digits."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{two_digits(seconds / size):g} {unit}"
    return f"{two_digits(seconds):g} s"
