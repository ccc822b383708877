"""Files to privacy units: formats, grouping, disjoint splits by keyed hash.

Units are imported on first use: they need torch, and a data file that is not there can be missed without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..settings.data import DataConfig
from .load import read_records

if TYPE_CHECKING:
    from .units import UnitDataset, build_units, check_disjoint

__all__ = ["DataConfig", "UnitDataset", "build_units", "check_disjoint", "read_records"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import units

    return getattr(units, name)
