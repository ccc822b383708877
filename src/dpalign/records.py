"""The records of each stage, those that are declared public, and the units that a stage may sample."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .algorithms.pairs import PairAlgorithm
from .algorithms.rollouts import RolloutAlgorithm
from .data.load import Record, read_records
from .data.units import UnitDataset, build_units, check_disjoint, count_units
from .errors import DPAlignError
from .plan import Units, split_parts
from .privacy.ledger import Ledger
from .recipe import Recipe
from .stages import kind

Records = Mapping[str, list[Record]]  # by stage


def read_stage_records(recipe: Recipe, cache: Path | None = None) -> Records:
    """Records by stage; a file that several stages share is read once.

    Raises:
        DPAlignError: no path, or what `read_records` refuses.
    """
    by_source: dict[tuple[str, str], list[Record]] = {}
    for name in recipe.stages:
        config = recipe.data_of(name)
        if not config.path:
            raise DPAlignError(f"the recipe names no data for stage {name}: set data.path (and data.name).")
        if (config.path, config.split) not in by_source:
            by_source[config.path, config.split] = read_records(config.path, config.split, cache)
    return {n: by_source[recipe.data_of(n).path, recipe.data_of(n).split] for n in recipe.stages}


def stage_units(recipe: Recipe, records: Records, ledger: Ledger) -> tuple[dict[str, UnitDataset], set[str]]:
    """The units that each stage may sample, and the assumptions that remain unchecked.

    Raises:
        DPAlignError: stages share units that they must not share (it says how many), or cannot be compared.
    """
    configs = {name: recipe.data_of(name) for name in recipe.stages}
    assumptions = check_disjoint(
        {name: (records[name], config) for name, config in configs.items()}, recipe.units_disjoint == "declared"
    )
    parts = split_parts(recipe)
    return {n: build_units(records[n], configs[n], ledger, *parts[n]) for n in configs}, set(assumptions)


def count_undeclared(recipe: Recipe) -> dict[str, int]:
    """Units in the files of stages whose dataset declares no number of them; reads no other file."""
    undeclared = [name for name in recipe.stages if recipe.data_of(name).declared_units is None]
    records = read_stage_records(recipe) if undeclared else {}
    return {name: count_units(records[name], recipe.data_of(name)) for name in undeclared}


def units_of(recipe: Recipe, records: Records, data: Mapping[str, UnitDataset]) -> dict[str, Units]:
    """What is public about the units of each stage."""
    found = {}
    for name, units in data.items():
        config = recipe.data_of(name)
        total = float(count_units(records[name], config))
        found[name] = Units(units.part, units.declared_units, units.unit, total, config.declared_units is None)
    return found


def read_public(recipe: Recipe) -> dict[str, tuple[list[Record], str]]:
    """Records that are declared public, and their source, for the stages whose result can be measured on them."""
    public = {}
    for name in recipe.stages:
        data = recipe.data_of(name)
        if data.eval_path and data.eval_is_public and issubclass(kind(name), PairAlgorithm | RolloutAlgorithm):
            public[name] = (read_records(data.eval_path, data.eval_split), data.eval_path)
    return public
