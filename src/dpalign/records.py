"""The records of each stage, those that are declared public, and the units that a stage may sample."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from .data.load import Record, read_records, unread_columns
from .data.overlap import DECLARED, Texts, check_contents, hash_texts
from .data.units import UnitDataset, build_units, check_disjoint, count_units
from .errors import DPAlignError
from .evaluation.during import MEASURED
from .plan import Units, split_parts
from .privacy.ledger import Ledger
from .recipe import Recipe
from .rewards import RewardConfig
from .rewards.load import asked_columns
from .settings.prompts import PromptedConfig

Records = Mapping[str, list[Record]]  # by stage
Public = Mapping[str, tuple[list[Record], str]]  # by stage, with their source


def read_stage_records(recipe: Recipe, cache: Path | None = None, leaving: Collection[str] = ()) -> Records:
    """Records by stage; a file that several stages share is read once.

    Args:
        leaving: stages that are left out.

    Raises:
        DPAlignError: no path, or what `read_records` refuses.
    """
    by_source: dict[tuple[str, str], list[Record]] = {}
    names = [name for name in recipe.drawing if name not in leaving]
    for name in names:
        config = recipe.data_of(name)
        if not config.path:
            raise DPAlignError(f"the recipe names no data for stage {name}: set data.path (and data.name).")
        if (config.path, config.split) not in by_source:
            by_source[config.path, config.split] = read_records(config.path, config.split, cache)
    return {n: by_source[recipe.data_of(n).path, recipe.data_of(n).split] for n in names}


def stages_without_data(recipe: Recipe) -> list[str]:
    """Those whose data is not here: no path, or a file that does not exist."""
    paths = {name: recipe.data_of(name).path for name in recipe.drawing}
    is_file = {name: bool(Path(path).suffix) and ":" not in path for name, path in paths.items()}
    return [name for name, path in paths.items() if not path or (is_file[name] and not Path(path).exists())]


def stage_units(recipe: Recipe, records: Records, ledger: Ledger) -> tuple[dict[str, UnitDataset], set[str]]:
    """The units that each stage may sample, and the assumptions that remain unchecked.

    Raises:
        DPAlignError: stages share units that they must not share (it says how many), or cannot be compared.
    """
    configs = {name: recipe.data_of(name) for name in recipe.drawing}
    assumptions = check_disjoint(
        {name: (records[name], config) for name, config in configs.items()}, recipe.units_disjoint == "declared"
    )
    if recipe.shared_texts == "declared":
        assumptions.append(DECLARED)
    parts = split_parts(recipe)
    # A record is the same unit in all stages, whichever of its columns each of them reads.
    units = {n: build_units(records[n], configs[n], ledger, *parts[n]) for n in configs}
    unread = {n: unread_columns(records[n], recipe.kind_of(n).columns, kept_by(recipe, n)) for n in configs}
    return {n: units[n].without(unread[n]) for n in configs}, set(assumptions)


def kept_by(recipe: Recipe, name: str) -> set[str]:
    """Columns that a stage is given whether or not it reads them as text: its unit's and its rewards'."""
    stage = recipe.kind_of(name)
    entering = stage.entering(stage.completed(recipe.stages[name], recipe.stages.values()))
    rewards = [entry for entry in entering.values() if isinstance(entry, RewardConfig)]
    return {recipe.data_of(name).unit or "", *(column for reward in rewards for column in asked_columns(reward))}


def count_undeclared(recipe: Recipe) -> dict[str, int]:
    """Units in the files of stages whose dataset declares no number of them; reads no other file."""
    undeclared = [name for name in recipe.drawing if recipe.data_of(name).declared_units is None]
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
        if data.eval_path and data.eval_is_public and issubclass(recipe.kind_of(name), MEASURED):
            public[name] = (read_records(data.eval_path, data.eval_split), data.eval_path)
    return public


def read_public_prompts(recipe: Recipe) -> dict[str, tuple[list[Record], str]]:
    """Prompts that are declared public, and their file, for the stages that learn from them."""
    sections = {name: config for name, config in recipe.stages.items() if isinstance(config, PromptedConfig)}
    paths = {name: config.public_prompts for name, config in sections.items()}
    return {name: (read_records(path), path) for name, path in paths.items() if path is not None}


def check_shared_texts(
    recipe: Recipe,
    records: Records,
    public: Iterable[tuple[str, tuple[list[Record], str]]],
    ledger: Ledger,
) -> list[Texts]:
    """Compares the contents of all datasets, whatever their columns say, with each other, with records that are
    declared public, and with what the ledger has drawn from under other names.

    Args:
        public: a stage whose columns they have, the records and their source.

    Returns:
        What `remember_contents` is to put into the ledger before the first draw.

    Raises:
        DPAlignError: texts are in two of them, and nobody declares that they are different units'.
    """
    read = {name: [c for columns in recipe.kind_of(name).columns for c in columns] for name in recipe.stages}
    private, shown, seen = [], [], set()
    for name in records:
        data = recipe.data_of(name)
        if (data.name, id(records[name]), tuple(read[name])) in seen:
            continue  # a file that several stages share
        seen.add((data.name, id(records[name]), tuple(read[name])))
        source = f"{data.name!r} ({name})"
        private.append(
            hash_texts(records[name], read[name], ledger, name=data.name, is_public=data.is_demo, source=source)
        )
    for name, (rows, source) in public:
        source = f"{source} (declared public)"
        shown.append(hash_texts(rows, read[name], ledger, name=None, is_public=True, source=source))
    if recipe.shared_texts != "declared":
        check_contents([*private, *shown], ledger)
    return private
