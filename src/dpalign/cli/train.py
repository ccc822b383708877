"""`dpalign run` and a command for each stage that trains: one recipe, all of its stages or one."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

from ..errors import DPAlignError
from ..parsing import recipe_from
from ..plan import split_parts
from ..recipe import Recipe
from ..reporting.progress import Reporter
from ..reporting.tables import print_results
from ..run import run_recipe
from ..stages import STAGES, kind

ALL = "Runs all stages of a recipe under one (epsilon, delta). The same command resumes an interrupted run."


def run(arguments: list[str], as_json: bool) -> dict[str, Any]:
    """Returns what summary.json holds."""
    command, rest = arguments[0], arguments[1:]
    recipe = recipe_from(command, rest, description(command))
    if command in STAGES:
        recipe = only_stage(recipe, command)
    results = run_recipe(recipe, reporter=Reporter(), command=shlex.join(["dpalign", *arguments]))
    if not as_json:
        print_results(results)
    return results.to_json()


def description(command: str) -> str:
    """What `--help` says first."""
    if command not in STAGES:
        return ALL
    columns = " or ".join(" + ".join(f"`{c}`" for c in names) for names in kind(command).columns)
    says = STAGES[command].help
    return f"{says[0].upper()}{says[1:]}. Records have {columns}; fields of a stage: --{command}.help"


def only_stage(recipe: Recipe, name: str) -> Recipe:
    """The recipe with one stage, which takes the same units as it would in the whole recipe."""
    present = list(recipe.stages)
    if recipe.composition == "sequential" and len(present) > 1:
        raise DPAlignError(
            f"the stages {', '.join(present)} share one budget, which only `dpalign run` can divide: use it, or write "
            "a recipe for this stage alone."
        )
    if name not in recipe.stages:
        recipe = dataclasses.replace(recipe, **{name: kind(name).Config()})
    low, high = split_parts(recipe)[name]
    split: Any = None if (low, high) == (0.0, 1.0) else {name: [low, high]}
    others = {section for stage in STAGES if stage != name for section in (stage, f"{stage}_data")}
    left_out: dict[str, Any] = {f.name: None for f in dataclasses.fields(recipe) if f.name in others}
    return dataclasses.replace(recipe, split=split, **left_out)
