"""The privacy statement: what was spent on whom, in numbers that a reviewer can recompute.

privacy.json lies in releases that others keep, so its format has the ledger's rule: a field is never removed and never
changes its meaning; a new one is optional, and leaving it out must not mean less spending. Readers pass over fields
that they do not know. What cannot be said under that rule gets another number in `format`, and older readers refuse it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..errors import DPAlignError
from . import parts
from .accountant import ACCOUNTANT, SampledGaussian, epsilon
from .ledger import Intent, Ledger
from .parts import Part, Spending

FORMAT = 1
UNNAMED = "unnamed "
ACCOUNT = (  # fields of what the ledger knows of a dataset: `account`
    "dataset", "unit_kinds", "runs", "runs_without_privacy", "epsilon_of_all_private_runs", "delta", "demo_data",
    "attack_success_of_all_private_runs",
)  # fmt: skip

NOT_COVERED = [
    "facts about a unit that other units, the public model or the public reward also reveal",
    "units that share text with each other (the guarantee is per unit as declared)",
    "the number of units, which is declared public",
    "hyperparameters chosen by looking at private results; the ledger says which other runs there were",
    "everything under private/, and the time and memory that training takes",
    "error messages before the first draw, which are for the data holder",
]


@dataclass(frozen=True)
class StageStatement:
    """One stage's mechanism.

    `part` is the range of a secret keyed hash that its units come from; `split` names key and identity, so that
    parts are compared only under one split.

    `attempts` says which attempt at the stage drew what: how many steps of each of `mechanisms`, by a random name that
    the attempt was given when it began. Whatever one attempt drew is counted once, wherever it is stated (a policy and
    its reward model may rest on one stage); what two attempts drew adds up, also where both go on from one folder's
    copies. `id` is the same only for the same attempts; in statements without attempts, of older releases, it names
    the training.
    """

    stage: str
    dataset: str
    part: tuple[float, float]
    split: str
    unit: str
    declared_units: float
    max_grad_norm: float
    epsilon_alone: float
    mechanisms: list[SampledGaussian]
    private: bool
    id: str = ""
    attempts: dict[str, list[int]] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether it can be added up: texts, numbers that can be, and noise wherever it says that it is private."""
        texts = (self.stage, self.dataset, self.split, self.unit, self.id)
        numbers = (*self.part, self.declared_units, self.max_grad_norm)
        counts = [n for m in self.mechanisms for n in (m.steps, m.passes)]
        return (
            all(isinstance(text, str) for text in texts)
            and all(isinstance(n, int | float) and math.isfinite(n) for n in numbers)
            and (len(self.part) == 2 and 0 <= self.part[0] < self.part[1] <= 1)
            and (self.declared_units > 0 and self.max_grad_norm > 0 and isinstance(self.private, bool))
            and (bool(self.mechanisms) and all(isinstance(n, int) and n >= 1 for n in counts))
            and not (self.private and any(m.effective_noise_multiplier == 0 for m in self.mechanisms))
        )

    def spendings(self) -> list[Spending]:
        """One spending for each mechanism."""
        part = Part(self.dataset, self.split, *self.part)
        return [Spending(part, mechanism, stage=self.stage) for mechanism in self.mechanisms]

    @staticmethod
    def from_json(value: dict[str, Any]) -> StageStatement:
        """From one of the `stages` of a privacy.json."""
        stage = _known(StageStatement, value)
        mechanisms = [SampledGaussian(**_known(SampledGaussian, m)) for m in value["mechanisms"]]
        stated = StageStatement(**stage | {"part": tuple(value["part"]), "mechanisms": mechanisms})
        stated.drawn("")
        if any(name.startswith(UNNAMED) for name in stated.attempts):
            raise ValueError("no name of an attempt")
        return stated

    def drawn(self, unnamed: str) -> dict[str, list[int]]:
        """Steps of each mechanism by attempt; those that no attempt accounts for are `unnamed`.

        Raises:
            ValueError: the attempts drew more than was spent.
        """
        named = dict(self.attempts)
        if not named and self.id:  # of a release of before there were attempts
            return {self.id: [m.steps for m in self.mechanisms]}
        rest = [m.steps for m in self.mechanisms]
        for steps in named.values():
            if min(steps, default=0) < 0:
                raise ValueError("negative steps")
            rest = [left - drawn for left, drawn in zip(rest, steps, strict=True)]
        if min(rest, default=0) < 0:
            raise ValueError("attempts beyond the mechanisms")
        return named | {unnamed: rest} if any(rest) or not named else named

    def only(self, names: set[str], unnamed: str) -> StageStatement:
        """What these attempts drew; itself if they are all. `epsilon_alone` stays that of the whole stage."""
        drawn = self.drawn(unnamed)
        if names == set(drawn):
            return self
        kept = {name: steps for name, steps in drawn.items() if name in names}
        counts = [sum(steps) for steps in zip(*kept.values(), strict=True)]
        mechanisms = [replace(m, steps=n) for m, n in zip(self.mechanisms, counts, strict=True) if n]
        named = {
            name: [n for n, total in zip(steps, counts, strict=True) if total]
            for name, steps in kept.items()
            if name != unnamed
        }
        return replace(self, mechanisms=mechanisms, attempts=named, id=_id_of(named, mechanisms))


@dataclass
class PrivacyStatement:
    """What privacy.json holds.

    dtypes: of the frozen weights that the run computed with, by the recipe's models. attack_success: for each rate of
    false positives the most true positives of any test of whether a unit took part; none in statements of before.
    """

    private: bool
    epsilon: float
    delta: float
    stages: list[StageStatement]
    adjacency: str = "add or remove one unit"
    accountant: str = ACCOUNTANT
    versions: dict[str, str] = field(default_factory=dict)
    assumptions: list[str] = field(default_factory=list)
    ledger: list[dict[str, Any]] = field(default_factory=list)
    not_covered: list[str] = field(default_factory=lambda: list(NOT_COVERED))
    dtypes: dict[str, str] = field(default_factory=dict)
    attack_success: list[dict[str, float]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}


def read_statement(folder: str | Path) -> tuple[dict[str, Any], list[StageStatement]] | None:
    """The privacy.json of a release and its stages; None of what has no statement.

    Raises:
        DPAlignError: it is damaged, or in a newer format than this code reads.
    """
    path = Path(folder) / "privacy.json"
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value.get("format", 1) > FORMAT:
            raise DPAlignError(
                f"{path} has format {value['format']}, written by a newer dpalign than this one, which reads "
                f"{FORMAT}: upgrade dpalign."
            )
        stages = _checked_stages(value)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError):
        raise DPAlignError(f"{path} is not a privacy statement: copy the release again.") from None
    return value, stages


def _checked_stages(value: dict[str, Any]) -> list[StageStatement]:
    """The stages of a privacy.json.

    Raises:
        ValueError, TypeError, KeyError: something in it that no dpalign writes: spending would be missed.
    """
    try:
        stages = [StageStatement.from_json(stage) for stage in value["stages"]]
    except DPAlignError as error:  # numbers that no mechanism has
        raise ValueError from error
    texts = value["assumptions"]
    is_whole = isinstance(value["private"], bool) and isinstance(texts, list) and all(isinstance(t, str) for t in texts)
    epsilon = float(value["epsilon"])
    drew_nothing = value["private"] and epsilon == 0  # a release of stages that read no record
    if not (is_whole and epsilon >= 0 and (stages or drew_nothing) and all(stage.is_whole for stage in stages)):
        raise ValueError
    if value["private"] and not all(stage.private for stage in stages):
        raise ValueError
    return stages


def merge_stages(stages: list[StageStatement]) -> list[StageStatement]:
    """What one attempt drew is counted once, in the statement that knows most of it; nothing else is left out.

    Statements without an id, of older releases, are all kept, and so counted again.
    """
    drawn = [stage.drawn(f"{UNNAMED}{number}") for number, stage in enumerate(stages)]
    owner: dict[str, int] = {}
    for number, attempts in enumerate(drawn):
        for name, steps in attempts.items():
            other = owner.setdefault(name, number)
            # An attempt only ever adds to what it drew; of equal ones the longer statement keeps it, so that one
            # which holds all of another takes its place.
            mine = (sum(steps), _steps(stages[number].mechanisms))
            if mine > (sum(drawn[other][name]), _steps(stages[other].mechanisms)):
                owner[name] = number
    owned = [{name for name in attempts if owner[name] == number} for number, attempts in enumerate(drawn)]
    return [stage.only(owned[n], f"{UNNAMED}{n}") for n, stage in enumerate(stages) if owned[n]]


def epsilon_of(stages: list[StageStatement], delta: float) -> float:
    """Epsilon of stages together: the largest over datasets, which are disjoint by check or declaration.

    Infinite if any stage is not private.
    """
    if not all(stage.private for stage in stages):
        return math.inf
    return parts.epsilon_of([spending for stage in stages for spending in stage.spendings()], delta)


def attack_success_of(stages: list[StageStatement]) -> list[dict[str, float]]:
    """How well anybody can tell who took part in stages together; certainty if any stage is not private."""
    found = parts.attack_success([spending for stage in stages for spending in stage.spendings()])
    return found if all(stage.private for stage in stages) else _certainty(found)


def _certainty(found: list[dict[str, float]]) -> list[dict[str, float]]:
    return [at | {"true_positives": 1.0} for at in found]


def unnamed_attempt(intent: Intent) -> str:
    """The name that all attempts at a stage of a run have where none was given to each."""
    return hashlib.sha256(json.dumps([intent.run, intent.dataset, intent.stage]).encode()).hexdigest()[:16]


def state_privacy(
    run: str,
    ledger: Ledger,
    delta: float,
    earlier: list[StageStatement],
    assumptions: list[str],
    demo: set[str],
    name_of: Callable[[Intent], str] = unnamed_attempt,
) -> PrivacyStatement:
    """Replays the ledger's intents of `run`, with those of an earlier release, into one statement.

    name_of: the random name of the attempt that an intent belongs to; "" for one that nobody knows.
    """
    stages = []
    by_stage: dict[tuple[str, str], list[Intent]] = {}
    for intent in ledger.intents(run=run):
        by_stage.setdefault((intent.dataset, intent.stage), []).append(intent)
    for (dataset, stage), intents in by_stage.items():
        first = intents[0]
        mechanisms = [s.mechanism for s in ledger.spendings(run=run, dataset=dataset, stage=stage)]
        attempts = _attempts(intents, mechanisms, name_of)
        stages.append(
            StageStatement(
                stage=stage,
                dataset=dataset,
                part=(first.low, first.high),
                split=first.split,
                unit=first.unit,
                declared_units=first.units,
                max_grad_norm=first.max_grad_norm,
                epsilon_alone=epsilon(mechanisms, delta),
                mechanisms=mechanisms,
                private=all(i.private for i in intents),
                id=_id_of(attempts, mechanisms),
                attempts=attempts,
            )
        )
    stages = merge_stages([*earlier, *stages])
    return PrivacyStatement(
        private=all(s.private for s in stages),
        epsilon=epsilon_of(stages, delta),
        delta=delta,
        stages=stages,
        versions={name: version(name) for name in ("dpalign", "dp-accounting", "torch", "transformers", "peft")},
        assumptions=assumptions,
        ledger=[account(ledger, name, delta, demo=name in demo) for name in sorted({s.dataset for s in stages})],
        attack_success=attack_success_of(stages),
    )


def account(ledger: Ledger, dataset: str, delta: float, *, demo: bool = False) -> dict[str, Any]:
    """What the ledger knows of all runs on one dataset together.

    Runs that protect different kinds of unit (a record, a person) have no epsilon together: for a person with many
    records, a run on records costs more than it says.
    """
    spendings = ledger.spendings(dataset=dataset)
    private = [s for s in spendings if s.mechanism.noise_multiplier > 0]
    kinds = sorted({intent.unit for intent in ledger.intents(dataset=dataset)})
    success = parts.attack_success(private)
    return {
        "dataset": dataset,
        "unit_kinds": kinds,
        "runs": len({s.run for s in spendings}),
        "runs_without_privacy": len({s.run for s in spendings if s.mechanism.noise_multiplier == 0}),
        "epsilon_of_all_private_runs": parts.epsilon_of(private, delta) if len(kinds) <= 1 else math.inf,
        "delta": delta,
        "demo_data": demo,
        "attack_success_of_all_private_runs": success if len(kinds) <= 1 else _certainty(success),
    }


def _attempts(
    intents: list[Intent], mechanisms: list[SampledGaussian], name_of: Callable[[Intent], str]
) -> dict[str, list[int]]:
    names = {number: name_of(intent) for number, intent in {i.attempt: i for i in intents}.items()}
    counted = Counter((names[intent.attempt], intent.mechanism) for intent in intents)
    return {name: [counted[name, replace(m, steps=1)] for m in mechanisms] for name in names.values() if name}


def _id_of(attempts: dict[str, list[int]], mechanisms: list[SampledGaussian]) -> str:
    """Older readers take statements of one id for the same: equal only for the same attempts, and "" if not all are."""
    names = sorted(attempts)
    if sum(map(sum, attempts.values())) < _steps(mechanisms):
        return ""
    return names[0] if len(names) == 1 else hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16] if names else ""


def _steps(mechanisms: list[SampledGaussian]) -> int:
    return sum(mechanism.steps for mechanism in mechanisms)


def _known(kind: type, value: dict[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass that JSON has; infinity is the string "inf" there."""
    names = {f.name for f in fields(kind)}
    return {k: math.inf if v == "inf" else v for k, v in value.items() if k in names}
