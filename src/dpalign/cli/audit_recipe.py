"""The private stages of a recipe as subjects of an audit, and a run's audit before its first draw; reads no record."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.text import Text
from ..errors import DPAlignError, FoundError
from ..files import write_json
from ..loaded import Models, public_models
from ..models import Policy, RewardModel
from ..models.loading import device_of
from ..plan import Plan, PlannedStage
from ..recipe import Recipe
from ..reporting.html import AUDIT, read_json
from ..reporting.progress import Reporter
from ..rewards import Reward
from ..rewards.learned import own_texts
from ..rewards.load import load_reward
from ..settings.rewards import RELEASED, RewardConfig
from ..version import __version__

if TYPE_CHECKING:
    from ..audit import Audit, Subject  # imports scipy.stats, which takes most of a second: not before it is needed

WRITTEN = 64  # units that the audit writes itself, at most


def audits_of(
    subjects: Sequence[Subject],
    reporter: Reporter,
    *,
    canaries: int = 1000,
    confidence: float = 0.999,
    with_black_box: bool = False,
    as_json: bool = False,
) -> list[Audit]:
    """Of one subject after the other, shown as they end; the ledgers are temporary ones."""
    from ..audit import audit_stage
    from ..reporting.audits import print_audit

    audits = []
    for subject in subjects:
        with (
            tempfile.TemporaryDirectory(prefix="dpalign-audit-") as folder,
            reporter.status(f"auditing stage {subject.kind.name}"),
        ):
            audits.append(
                audit_stage(
                    subject,
                    Path(folder),
                    canaries=canaries,
                    confidence=confidence,
                    with_black_box=with_black_box,
                )
            )
        if not as_json:
            print_audit(audits[-1])
    return audits


def shown_of(audits: Sequence[Audit]) -> dict[str, Any]:
    """What audit.json holds."""
    return {"stages": [audit.to_json() for audit in audits], "passed": all(audit.passed for audit in audits)}


def stop_if_found(shown: Mapping[str, Any]) -> None:
    """Raises FoundError if an audit has found anything."""
    if not shown["passed"]:
        stages = [stage for stage in shown["stages"] if not stage["passed"]]
        found = [f"{s['stage']}: {', '.join([*s['exceeded'], *s['rejected']])}" for s in stages]
        message = f"the audit found something ({'; '.join(found)}): the claim must not be relied on."
        raise FoundError(message, dict(shown))


def before_drawing(reporter: Reporter, as_json: bool, *, is_asked: bool) -> Callable[[Plan, Path], None]:
    """What a run does before it draws: with `--audit` its private stages are audited, and what was found is left in its
    folder. The same claims of the same version are not audited again, unless something was found. Without `--audit`
    what was found of other claims is taken away, so that no report shows it."""

    def audit(plan: Plan, folder: Path) -> None:
        claims = {stage.name: _claim(stage) for stage in plan.stages.values() if not stage.is_measurement}
        known = read_json(folder / AUDIT, {})
        stated = known.get("claims") if isinstance(known, dict) else None
        if not is_asked:
            if stated != claims:
                (folder / AUDIT).unlink(missing_ok=True)
        elif stated == claims and known["passed"] is True and known["version"] == __version__:
            reporter.note("audited before: the same claims are not audited again")
        else:
            shown = shown_of(audits_of(subjects_of(plan), reporter, as_json=as_json))
            write_json(folder / AUDIT, shown | {"claims": claims, "version": __version__})
            stop_if_found(shown)

    return audit


def _claim(stage: PlannedStage) -> dict[str, Any]:
    """What of a stage its audit is about."""
    plan = stage.plan
    numbers = {"steps": plan.steps, "sampling_rate": plan.sampling_rate, "noise_multiplier": plan.noise_multiplier}
    settings = hashlib.sha256(json.dumps(asdict(stage.config), sort_keys=True, default=str).encode()).hexdigest()
    return numbers | {"target_delta": plan.target_delta, "settings": settings}


def subjects_of(plan: Plan, only: str | None = None) -> list[Subject]:
    """Those that draw and train, or the one that is named.

    Raises:
        DPAlignError: the recipe has no such stage, or one that is not private.
    """
    stages = [stage for stage in plan.stages.values() if not stage.is_measurement and only in (None, stage.name)]
    if not stages:
        raise DPAlignError(
            f"the recipe has no stage {only or ''} that trains on private units: there is nothing to audit."
        )
    return [_subject(plan.recipe, stage) for stage in stages]


def _subject(recipe: Recipe, stage: PlannedStage) -> Subject:
    from ..audit import Subject

    config: Any = stage.config
    models = Models.load(recipe)
    rewards = {
        name: _reward(recipe, entering, models)
        for name, entering in stage.kind.entering(config).items()
        if isinstance(entering, RewardConfig)
    }
    return Subject(
        kind=stage.kind,
        config=replace(config, save_steps=stage.plan.steps, eval_steps=None),
        plan=replace(stage.plan, beside=((),), target_epsilon=stage.plan.epsilon),
        make_model=lambda: Models.load(recipe).of(stage.kind.model_kind),
        declared_units=stage.units.count,
        written=min(WRITTEN, int(stage.units.count)),
        chats=False,
        rewards=rewards,
        own_texts=partial(_written, models.get(Policy), config) if stage.kind.model_kind is RewardModel else None,
    )


def _written(policy: Policy | None, config: Any, count: int) -> list[Text]:
    """As the run's policy writes them for a reward model to read."""
    if policy is None:
        raise DPAlignError("the stage takes its directions from text that a policy writes, and the recipe has none.")
    return own_texts(policy, count, prompt_tokens=8, max_new_tokens=config.max_length // 2, seed=config.seed)


def _reward(recipe: Recipe, config: RewardConfig, models: Models) -> Reward:
    """As it is loaded for a run; for one that the run has still to train, a constant with its range."""
    if config.source == RELEASED:
        low, high = -4.0 if config.low is None else config.low, 4.0 if config.high is None else config.high
        return Reward(lambda prompts, completions, **_: [low] * len(completions), low, high, rows_at_once=None)
    policy = models.of(Policy)
    return load_reward(config, device_of(recipe.device), public=public_models(recipe, policy))
