"""`dpalign run` and a command for each stage that trains: one recipe, all of its stages or one."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

from ..data.load import check_there
from ..domains import check_settings
from ..errors import DPAlignError
from ..parsing import recipe_from
from ..recipe import Recipe
from ..reporting.numbers import duration
from ..reporting.progress import Reporter
from ..reporting.terminal import Terminal
from ..settings.prompts import PromptedConfig
from ..stages import STAGES, kind
from . import manual

COMPARE, AUDIT = "--compare", "--audit"


def run(arguments: list[str], as_json: bool) -> dict[str, Any] | str:
    """Returns what summary.json holds, or the help that is asked for."""
    command, given = arguments[0], arguments[1:]
    compare = command not in STAGES and COMPARE in given
    rest = [word for word in given if word != AUDIT and not (compare and word == COMPARE)]
    text = manual.asked(command, rest, _example(command))
    if text is not None:
        return text
    recipe = recipe_from(command, rest)
    check_settings(recipe) if command in STAGES else recipe.check()
    for name in [command] if command in STAGES else recipe.stages:
        section = recipe.stages.get(name)
        prompts = section.public_prompts if isinstance(section, PromptedConfig) else None
        check_there((recipe.data_of(name).path if section is None or section.draws else prompts) or "")
        check_there(recipe.data_of(name).eval_path or "")

    reporter = Reporter()
    with reporter.status("loading the libraries"):
        from ..compared import run_compared  # these import torch
        from ..reporting.tables import print_compared, print_results
        from ..run import run_recipe
        from .audit_recipe import before_drawing

    if command in STAGES:
        recipe = only_stage(recipe, command)
    typed = shlex.join(["dpalign", *arguments])
    tried = before_drawing(reporter, as_json, is_asked=AUDIT in given)
    compared = run_compared(recipe, reporter, typed, audit=tried) if compare else None
    results = compared.results if compared else run_recipe(recipe, reporter=reporter, command=typed, audit=tried)
    if not as_json:
        print_results(results)
        if compared is not None:
            print_compared(compared.rows, compared.said, results.outside_the_guarantee)
        folder = Path(recipe.output_dir)
        for sentence in (f"report: {folder / 'report.html'}", *ends(folder, results.release, Terminal().is_terminal)):
            Terminal().say(sentence)
    return results.to_json() | ({} if compared is None else {"comparison": compared.as_dict()})


def ends(run: Path, release: Path | None, is_terminal: bool) -> list[str]:
    """What a data holder wants to know when a run has ended, and the next command to type.

    Args:
        is_terminal: whether they read it there. Time, memory and what was cut are functions of the records without any
            noise: a log that others may read names the files in private/ instead.
    """
    from ..release import RELEASE
    from ..survey import Survey

    private = run / "private"
    if is_terminal:
        resources = json.loads((private / "resources.json").read_text(encoding="utf-8"))
        surveys = json.loads((private / "data.json").read_text(encoding="utf-8"))
        said = [f"{duration(resources['seconds'])}, {resources['peak_memory_mb']:,.0f} MB at the peak"]
        said += [f"{stage}: {text}" for stage, found in surveys.items() for text in Survey(**found).sentences()]
        said = [f"for the data holder alone: {sentence}." for sentence in said]
    else:
        said = [f"time, memory and what the data did: resources.json and data.json in {private} (the data holder's)"]
    if release is None:
        return said
    place = shlex.quote(str(release))
    if release.name == RELEASE:
        return [*said, f"next: dpalign generate {place} --prompt 'What to complete'"]
    return [*said, f"next: a stage that samples completions, with reward.source reward_model:{place}"]


def _example(command: str) -> str:
    if command not in STAGES:
        return f"dpalign {command} recipe.yaml --output_dir runs/first"
    return f"dpalign {command} recipe.yaml --{command}.expected_batch_size 256 --output_dir runs/{command}"


def only_stage(recipe: Recipe, name: str) -> Recipe:
    """The recipe with one stage, which takes the same units as it would in the whole recipe."""
    from ..plan import split_parts

    present, own = list(recipe.drawing), recipe.stages.get(name)
    if (own is None or own.draws) and recipe.composition == "sequential" and len(present) > 1:
        raise DPAlignError(
            f"the stages {', '.join(present)} share one budget, which only `dpalign run` can divide: use it, or write "
            "a recipe for this stage alone."
        )
    if name not in recipe.stages:
        recipe = dataclasses.replace(recipe, **{name: kind(name).Config()})
    part = split_parts(recipe).get(name, (0.0, 1.0))  # of a stage that draws nothing there is none
    split: Any = None if part == (0.0, 1.0) else {name: list(part)}
    others = {section for stage in STAGES if stage != name for section in (stage, f"{stage}_data")}
    left_out: dict[str, Any] = {f.name: None for f in dataclasses.fields(recipe) if f.name in others}
    return dataclasses.replace(recipe, split=split, **left_out)
