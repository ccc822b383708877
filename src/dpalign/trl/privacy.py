"""What privacy adds to a TRL script, in one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..domains import SCALE, within


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """What a private run has to be told beyond what TRL asks for.

    Args:
        target_epsilon: epsilon of the run. target_delta: default: min(1e-5, 1/(10 units)).
        noise_multiplier: sigma instead of target_epsilon; the epsilon that follows is reported.
        dataset_name: the ledger's key; every run on one name adds up.
        dataset_version: names a changed version of records that have no unit column.
        unit: column that names whom to protect; without one, each record is a unit.
        declared_units: the number of units, which is public; default: the count of train_dataset becomes public.
        max_records_per_unit: most records of one unit that are used.
        model_is_public, reward_is_public, eval_is_public: declare that these were made without the private data.
        reward_range: declared range of the reward; it is clipped to it.
        units_disjoint, composition, shared_texts, ledger: as in a recipe.
    """

    target_epsilon: float | None = within(None, "(0, 1000]", or_inf=True)
    target_delta: float | None = within(None, "(0, 1)")
    noise_multiplier: float | None = within(None, "[0, 100000]")
    dataset_name: str | None = None
    dataset_version: str = ""
    unit: str | None = None
    declared_units: int | None = within(None, "[1, 1000000000000]")
    max_records_per_unit: int = within(1, "[1, 1000000]")
    model_is_public: bool = False
    reward_is_public: bool = False
    reward_range: tuple[float, float] | None = within(None, SCALE, ordered=True)
    eval_is_public: bool = False
    units_disjoint: Literal["checked", "declared"] = "checked"
    composition: Literal["parallel", "sequential"] = "parallel"
    shared_texts: Literal["checked", "declared"] = "checked"
    ledger: str | None = None
