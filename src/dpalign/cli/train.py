"""`dpalign run` and a command for each stage that trains: one recipe, all of its stages or one."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

from ..data.load import check_there
from ..domains import check_settings
from ..errors import DPAlignError
from ..parsing import recipe_from
from ..recipe import Recipe
from ..stages import STAGES, kind
from . import manual


def run(arguments: list[str], as_json: bool) -> dict[str, Any] | None:
    """Returns what summary.json holds."""
    command, rest = arguments[0], arguments[1:]
    text = manual.asked(command, rest, _example(command))
    if text is not None:
        print(text)
        return None
    recipe = recipe_from(command, rest)
    check_settings(recipe) if command in STAGES else recipe.check()
    for data in [recipe.data_of(name) for name in ([command] if command in STAGES else recipe.stages)]:
        check_there(data.path)
        check_there(data.eval_path or "")

    from ..reporting.progress import Reporter  # these import torch, which what is wrong with a recipe does without
    from ..reporting.tables import print_results
    from ..run import run_recipe

    if command in STAGES:
        recipe = only_stage(recipe, command)
    results = run_recipe(recipe, reporter=Reporter(), command=shlex.join(["dpalign", *arguments]))
    if not as_json:
        print_results(results)
    return results.to_json()


def _example(command: str) -> str:
    if command not in STAGES:
        return f"dpalign {command} recipe.yaml --output_dir runs/first"
    return f"dpalign {command} recipe.yaml --{command}.expected_batch_size 256 --output_dir runs/{command}"


def only_stage(recipe: Recipe, name: str) -> Recipe:
    """The recipe with one stage, which takes the same units as it would in the whole recipe."""
    from ..plan import split_parts

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
