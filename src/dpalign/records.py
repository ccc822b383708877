"""The records of each stage, those that are declared public, and the units that a stage may sample."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import overload

from .data.columns import LOOKED_AT, only_columns
from .data.hashes import RecordHashes
from .data.load import Record, read_chunks, read_records
from .data.overlap import DECLARED, PROMPT, Texts, check_contents, hash_texts
from .data.table import Table, write_table
from .data.units import UnitDataset, build_units, check_disjoint, count_units
from .errors import DPAlignError
from .evaluation.during import MEASURED
from .plan import Units, split_parts
from .privacy.ledger import Ledger
from .recipe import Recipe
from .rewards import RewardConfig
from .rewards.load import asked_columns
from .settings.prompts import PromptedConfig

Records = Mapping[str, Sequence[Record]]  # by stage
Public = Mapping[str, tuple[list[Record], str]]  # by stage, with their source


def read_stage_records(
    recipe: Recipe,
    ledger: Ledger | None = None,
    folder: Path | None = None,
    leaving: Collection[str] = (),
) -> Records:
    """Records by stage, with the columns that a stage may read; a file that several stages share is read once.

    Args:
        ledger: whose hashes of the whole records are taken; None takes none.
        folder: private, where the records lie while this process runs, and what a hub gives is cached; None keeps the
            records in memory.
        leaving: stages that are left out.

    Raises:
        DPAlignError: no path, or what `read_chunks` refuses.
    """
    sources: dict[tuple[str, str], list[str]] = {}
    for name in recipe.drawing:
        if name not in leaving:
            sources.setdefault(source_of(recipe, name), []).append(name)
    found, cache = dict[str, Table](), None if folder is None else folder / "cache"
    for source, names in sources.items():
        keep = {column for name in names for column in columns_read(recipe, name)}
        configs = {(c.name, c.unit): c for c in map(recipe.data_of, names)}
        hashes = {} if ledger is None else {of: RecordHashes(c, ledger) for of, c in configs.items() if c.name}
        found |= dict.fromkeys(names, write_table(read_chunks(*source, cache), keep, folder, hashes))
    return found


def source_of(recipe: Recipe, name: str) -> tuple[str, str]:
    """Path and split of a stage's records.

    Raises:
        DPAlignError: no path.
    """
    config = recipe.data_of(name)
    if not config.path:
        raise DPAlignError(f"the recipe names no data for stage {name}: set data.path (and data.name).")
    return config.path, config.split


def columns_read(recipe: Recipe, name: str) -> set[str]:
    """Columns that a stage may read, if the records have them."""
    stage = recipe.kind_of(name)
    kept = {column.partition(".")[0] for column in kept_by(recipe, name)} | kept_by(recipe, name) - {""}
    return {column for columns in stage.columns for column in columns} | {*stage.optional, *LOOKED_AT, PROMPT} | kept


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
    return {n: units[n].reading(read_by(recipe, n, records[n])) for n in configs}, set(assumptions)


@overload
def read_by(recipe: Recipe, name: str, records: list[Record], more: Collection[str] = ...) -> list[Record]: ...
@overload
def read_by(recipe: Recipe, name: str, records: Sequence[Record], more: Collection[str] = ...) -> Sequence[Record]: ...
def read_by(recipe: Recipe, name: str, records: Sequence[Record], more: Collection[str] = ()) -> Sequence[Record]:
    """A stage's records without the texts that it does not read; its unit's column, its rewards' and `more` stay."""
    return only_columns(records, recipe.kind_of(name).columns, kept_by(recipe, name).union(more))


def kept_by(recipe: Recipe, name: str) -> set[str]:
    """Columns that a stage is given whether or not it reads them as text: its unit's and its rewards'."""
    stage = recipe.kind_of(name)
    entering = stage.entering(stage.completed(recipe.stages[name], recipe.stages.values()))
    rewards = [entry for entry in entering.values() if isinstance(entry, RewardConfig)]
    return {recipe.data_of(name).unit or "", *(column for reward in rewards for column in asked_columns(reward))}


def count_undeclared(recipe: Recipe) -> dict[str, int]:
    """Units in the files of stages whose dataset declares no number of them; reads no other file, and keeps nothing."""
    counted: dict[tuple[str, str, str | None], int] = {}
    found = {}
    for name in recipe.drawing:
        config = recipe.data_of(name)
        if config.declared_units is None:
            source = (*source_of(recipe, name), config.unit)
            if source not in counted:
                read = (record for chunk in read_chunks(*source[:2]) for record in chunk.records)
                counted[source] = count_units(read, config)
            found[name] = counted[source]
    return found


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
        rows = records[name]
        which = (data.name, rows.contents if isinstance(rows, Table) else id(rows), tuple(read[name]))
        if which in seen:
            continue  # a file that several stages share
        seen.add(which)
        source = f"{data.name!r} ({name})"
        private.append(hash_texts(rows, read[name], ledger, name=data.name, is_public=data.is_demo, source=source))
    for name, (rows, source) in public:
        source = f"{source} (declared public)"
        shown.append(hash_texts(rows, read[name], ledger, name=None, is_public=True, source=source))
    if recipe.shared_texts != "declared":
        check_contents([*private, *shown], ledger)
    return private
