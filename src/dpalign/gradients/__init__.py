"""One gradient per privacy unit, for the trainable linear layers of a model."""

from .per_unit import PerUnitGradients, UnitLinear

__all__ = ["PerUnitGradients", "UnitLinear"]
