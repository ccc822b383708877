"""A run beside what it has to beat: the free policy, which reads no private data, and the run without privacy."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import DPAlignError
from .evaluation.closed_gap import ClosedGap, closed_gap
from .files import write_json
from .loaded import REWARDS
from .models import embedded
from .plan import Plan, declared_units
from .privacy.statement import read_statement
from .recipe import Recipe
from .records import count_undeclared
from .release import say_in_card
from .reporting.html import write_report
from .reporting.progress import Reporter
from .results import Results
from .rewards import RewardConfig, is_reward_model
from .run import run_recipe
from .settings.data import DataConfig
from .settings.prompts import SELF_WRITTEN
from .settings.reward_query import RewardQueryConfig
from .settings.rollouts import CompletionConfig, samples
from .stages import STAGES

FREE, NONPRIVATE = "free", "nonprivate"  # folders of a run that it is compared with
FLATTERED = "The free policy was trained against the reward that this compares by, and the private one was not."


# What there is to compare with --------------------------------------------------------------------------------------


def free_recipe(recipe: Recipe) -> Recipe:
    """The best that needs no private data: the policy stage alone, on prompts that the public model writes itself,
    against the recipe's public reward or the one that it names free.

    Raises:
        DPAlignError: there is none; why, in words.
    """
    name, config = _sampling(recipe)
    stated = read_statement(embedded.resolve(recipe.model.name_or_path))
    if stated is not None and stated[1]:
        raise DPAlignError(
            f"there is no free policy to compare with: {recipe.model.name_or_path} has been trained on private data."
        )
    changes: dict[str, Any] = {"reward": free_reward(recipe)}
    if config.draws:
        fields = {f.name: f for f in dataclasses.fields(config)}
        changes |= {unread: fields[unread].default for unread in config.of_private_prompts}
        changes |= {"prompts": SELF_WRITTEN, "max_steps": _steps(recipe, name, config)}
        changes |= {"max_prompt_length": max(config.max_prompt_length, config.prompt_tokens + 1)}  # BOS in front
    shown, is_demo = recipe.data_of(name), is_all_demo(recipe)
    data = DataConfig(
        eval_path=shown.eval_path, eval_split=shown.eval_split, eval_is_public=shown.eval_is_public, is_demo=is_demo
    )
    others: dict[str, Any] = {section: None for stage in STAGES for section in (stage, f"{stage}_data")}
    others |= {"split": None, "allocation": "equal", "composition": "parallel", "data": data}
    others |= {"eval_best_of": None}  # of the free reward the recipe's own run says it too
    others[name] = dataclasses.replace(config, **changes)
    found = dataclasses.replace(recipe, output_dir=f"{recipe.output_dir}/{FREE}", **others)
    try:
        found.check()
    except DPAlignError as error:
        raise DPAlignError(f"there is no free policy to compare with: {error}") from None
    return found


def free_reward(recipe: Recipe) -> RewardConfig:
    """What the free policy is trained against.

    Raises:
        DPAlignError: the recipe names none that needs no people.
    """
    _, config = _sampling(recipe)
    learned_from = [c.free_mean for c in recipe.stages.values() if isinstance(c, RewardQueryConfig)]
    given = [recipe.free_reward, config.reward, *learned_from, recipe.reference_reward]
    public = [reward for reward in given if reward is not None and not is_reward_model(reward)]
    if not public or (recipe.free_reward is not None and is_reward_model(recipe.free_reward)):
        raise DPAlignError(
            "there is no free reward to compare with: the reward is learned from people, and the recipe names no "
            "free_reward that is not (nor a reference_reward)."
        )
    return public[0]


def nonprivate_recipe(recipe: Recipe) -> Recipe:
    """The same steps, samples, settings and code without noise."""
    stages: dict[str, Any] = {
        name: dataclasses.replace(config, target_epsilon=None, noise_multiplier=None)
        for name, config in recipe.drawing.items()
    }
    return dataclasses.replace(
        recipe, output_dir=f"{recipe.output_dir}/{NONPRIVATE}", target_epsilon=math.inf, **stages
    )


def is_all_demo(recipe: Recipe) -> bool:
    """Whether no record that it draws is really private."""
    return all(recipe.data_of(name).is_demo for name in recipe.drawing)


def measure_of(recipe: Recipe) -> str:
    """What runs of a recipe are compared by: a learned reward has another scale in every run."""
    return "reference_reward" if is_reward_model(_sampling(recipe)[1].reward) else "reward"


def caveats(recipe: Recipe) -> list[str]:
    """What a reader of the comparison has to know."""
    free = free_reward(recipe)
    if free == _sampling(recipe)[1].reward:
        return []
    other = f"What is free was trained against {free.source}: its reward is on another scale than the other rows'."
    return [other, FLATTERED] if free == recipe.reference_reward else [other]


def _sampling(recipe: Recipe) -> tuple[str, CompletionConfig]:
    for name, config in recipe.stages.items():
        if samples(config):
            return name, config
    raise DPAlignError("there is no free policy to compare with: the recipe has no stage that samples completions.")


def _steps(recipe: Recipe, name: str, config: CompletionConfig) -> int:
    units = declared_units(recipe, count_undeclared(recipe))[name].count
    return config.schedule(name, units).steps


# A run and those beside it ------------------------------------------------------------------------------------------


@dataclass
class Compared:
    """A run beside others. rows: public evaluations by label. folders: of the others. said: what it comes to."""

    results: Results
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)
    summaries: dict[str, dict[str, Any]] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    gap: ClosedGap | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return ({} if self.gap is None else self.gap.as_dict()) | {"said": self.said}


def run_compared(
    recipe: Recipe,
    reporter: Reporter,
    command: str = "",
    audit: Callable[[Plan, Path], None] | None = None,
) -> Compared:
    """Runs a recipe's free policy, the recipe, and the recipe without privacy where all data is demo data; writes what
    they say together into the recipe's summary, reports and card.

    Args:
        audit: of the recipe's own run.

    Raises:
        DPAlignError: as `run_recipe`.
    """
    beside: dict[str, dict[str, Any]] = {}
    said, notes = [], []
    try:
        free, notes = free_recipe(recipe), caveats(recipe)
    except DPAlignError as error:
        said.append(_capital(str(error)))
    else:
        reporter.note("what is free, for comparison: no private data is read")
        beside[FREE] = run_recipe(free, reporter=reporter).to_json()
        _hand_on(free, recipe)
        reporter.note("the recipe itself")
    found = Compared(run_recipe(recipe, reporter=reporter, command=command, audit=audit))
    if is_all_demo(recipe):
        reporter.note("the same without privacy, for comparison")
        bare = nonprivate_recipe(recipe)
        _hand_on(recipe, bare)
        beside[NONPRIVATE] = run_recipe(bare, reporter=reporter).to_json()
    else:
        said.append(
            "Nothing was run without privacy: on private data that stays in the ledger, and its numbers have no "
            "guarantee; `dpalign sweep` does it where you ask for epsilon inf."
        )
    found.summaries, found.folders = beside, {name: Path(recipe.output_dir) / name for name in beside}
    _add_up(found, recipe, said, notes)
    _write(found, Path(recipe.output_dir))
    return found


def _hand_on(done: Recipe, following: Recipe) -> None:
    """What one run found for rewards that need nobody's data, for the next: the same text would give the same again."""
    found, wanted = Path(done.output_dir) / REWARDS, Path(following.output_dir) / REWARDS
    if found.is_dir() and not wanted.exists():
        shutil.copytree(found, wanted)


def _add_up(found: Compared, recipe: Recipe, said: list[str], notes: list[str]) -> None:
    """Rows, the closed gap and its words."""
    own = found.results.to_json().get("evaluation", {})
    last = {name: [*summary["evaluation"].items()][-1][1] for name, summary in found.summaries.items() if own}
    found.rows = own | last
    if FREE in last:
        measure = measure_of(recipe)
        found.gap = closed_gap(measure, last[FREE], [*own.values()][-1], last.get(NONPRIVATE))
        if found.gap is None:
            unknown = f"What the private data bought is not known: no {measure.replace('_', ' ')} was measured."
            said = [unknown, *notes, *said]
        else:
            said = [*found.gap.sentences(), *notes, *said]
    elif FREE in found.summaries:
        said = ["What the private data bought is not known: no public prompts to measure on (data.eval_path).", *said]
    found.said = said


def _write(found: Compared, folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    summary["comparison"] = found.as_dict()
    write_json(folder / "summary.json", summary)
    write_report(folder, [*found.folders.values()])
    if found.results.release is not None:
        say_in_card(found.results.release, found.said)


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
