"""The privacy statement: what was spent on whom, in numbers that a reviewer can recompute.

privacy.json lies in releases that others keep, so its format has the ledger's rule: a field is never removed and never
changes its meaning; a new one is optional, and leaving it out must not mean less spending. Readers pass over fields
that they do not know. What cannot be said under that rule gets another number in `format`, and older readers refuse it.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..errors import DPAlignError
from . import parts
from .accountant import ACCOUNTANT, SampledGaussian, epsilon
from .ledger import Intent, Ledger
from .parts import Part, Spending

FORMAT = 1

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
    parts are compared only under one split. `id` is the same wherever the same training of a stage is stated, so that
    a stage which a policy and its reward model both rest on is counted once.
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

    def spendings(self) -> list[Spending]:
        """One spending for each mechanism."""
        part = Part(self.dataset, self.split, *self.part)
        return [Spending(part, mechanism, stage=self.stage) for mechanism in self.mechanisms]

    @staticmethod
    def from_json(value: dict[str, Any]) -> StageStatement:
        """From one of the `stages` of a privacy.json."""
        stage = _known(StageStatement, value)
        mechanisms = [SampledGaussian(**_known(SampledGaussian, m)) for m in value["mechanisms"]]
        return StageStatement(**stage | {"part": tuple(value["part"]), "mechanisms": mechanisms})


@dataclass
class PrivacyStatement:
    """What privacy.json holds."""

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
        stages = [StageStatement.from_json(stage) for stage in value["stages"]]
        float(value["epsilon"])
        if not isinstance(value["private"], bool) or not isinstance(value["assumptions"], list):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DPAlignError(f"{path} is not a privacy statement: copy the release again.") from None
    return value, stages


def merge_stages(stages: list[StageStatement]) -> list[StageStatement]:
    """Statements of the same training of a stage become one: the one that spent most, if a later draw added to it.

    Statements without an id, of older releases, are all kept, and so counted again.
    """
    merged: dict[str, StageStatement] = {}
    for number, stage in enumerate(stages):
        key = stage.id or f"unnamed {number}"
        if key not in merged or _steps(stage) > _steps(merged[key]):
            merged[key] = stage
    return list(merged.values())


def epsilon_of(stages: list[StageStatement], delta: float) -> float:
    """Epsilon of stages together: the largest over datasets, which are disjoint by check or declaration.

    Infinite if any stage is not private.
    """
    if not all(stage.private for stage in stages):
        return math.inf
    return parts.epsilon_of([spending for stage in stages for spending in stage.spendings()], delta)


def state_privacy(
    run: str, ledger: Ledger, delta: float, earlier: list[StageStatement], assumptions: list[str], demo: set[str]
) -> PrivacyStatement:
    """Replays the ledger's intents of `run`, with those of an earlier release, into one statement."""
    stages = []
    by_stage: dict[tuple[str, str], list[Intent]] = {}
    for intent in ledger.intents(run=run):
        by_stage.setdefault((intent.dataset, intent.stage), []).append(intent)
    for (dataset, stage), intents in by_stage.items():
        first = intents[0]
        mechanisms = [s.mechanism for s in ledger.spendings(run=run, dataset=dataset, stage=stage)]
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
                id=hashlib.sha256(json.dumps([run, dataset, stage]).encode()).hexdigest()[:16],
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
    )


def account(ledger: Ledger, dataset: str, delta: float, *, demo: bool = False) -> dict[str, Any]:
    """What the ledger knows of all runs on one dataset together.

    Runs that protect different kinds of unit (a record, a person) have no epsilon together: for a person with many
    records, a run on records costs more than it says.
    """
    spendings = ledger.spendings(dataset=dataset)
    private = [s for s in spendings if s.mechanism.noise_multiplier > 0]
    kinds = sorted({intent.unit for intent in ledger.intents(dataset=dataset)})
    return {
        "dataset": dataset,
        "unit_kinds": kinds,
        "runs": len({s.run for s in spendings}),
        "runs_without_privacy": len({s.run for s in spendings if s.mechanism.noise_multiplier == 0}),
        "epsilon_of_all_private_runs": parts.epsilon_of(private, delta) if len(kinds) <= 1 else math.inf,
        "delta": delta,
        "demo_data": demo,
    }


def _steps(stage: StageStatement) -> int:
    return sum(mechanism.steps for mechanism in stage.mechanisms)


def _known(kind: type, value: dict[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass that JSON has; infinity is the string "inf" there."""
    names = {f.name for f in fields(kind)}
    return {k: math.inf if v == "inf" else v for k, v in value.items() if k in names}
