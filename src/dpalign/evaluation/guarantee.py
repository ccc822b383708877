"""What a model that is measured, or that measures, says of its own past."""

from __future__ import annotations

import json
import math
from pathlib import Path

from ..errors import DPAlignError


def stated_epsilon(name_or_path: str) -> float | None:
    """Epsilon in the privacy.json of a release, infinite if it is not private; None of what has no statement.

    Data that is declared public playing private changes nothing: the statement decides.

    Raises:
        DPAlignError: there is a privacy.json, and it is damaged.
    """
    path = Path(name_or_path) / "privacy.json"
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        private, epsilon = value["private"], float(value["epsilon"])
    except (OSError, ValueError, KeyError, TypeError):
        raise DPAlignError(f"{path} is not a privacy statement: copy the release again.") from None
    return epsilon if private is True and not math.isnan(epsilon) else math.inf
