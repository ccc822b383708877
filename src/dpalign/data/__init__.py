"""Files to privacy units: formats, grouping, disjoint splits by keyed hash."""

from ..settings.data import DataConfig
from .load import read_records
from .units import UnitDataset, build_units, check_disjoint

__all__ = ["DataConfig", "UnitDataset", "build_units", "check_disjoint", "read_records"]
