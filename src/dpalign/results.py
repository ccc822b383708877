"""What a run leaves for people: its guarantee, where the releases are, and what was measured on public data; and what a
sweep of runs leaves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from .evaluation import BestOf, Evaluation, PairEvaluation, TextEvaluation
from .privacy.statement import PrivacyStatement

PRETRAINED = "0"  # the epsilon of a trial in which nothing is trained
FREE = "free"  # that of a trial that reads no private data
MEASURED = ("reward", "reference_reward", "kl", "perplexity", "distinct_2", "completion_length", "text_loss")
PAIRS = "reward_model"  # field of a line of runs.jsonl, no stage: how a run's own reward model agrees with public pairs
Key: TypeAlias = tuple[str, int, str | None]  # epsilon, seed and varied value of a trial
T = TypeVar("T")


@dataclass
class Results:
    """What `summary.json` holds.

    release: the folder to share. reward_model_release: the reward model's, if the run has trained one. pairs: by stage,
    agreement with public pairs. evaluation: by stage, measured on public prompts, or on public texts where nothing
    samples; `pretrained` is the base model.
    best_of: what the reward is worth where it is used, and the free ones that it starts from, in a judge's eyes.
    measurements: by stage, noised, on held-out private units; None for one that an interruption lost.
    outside_the_guarantee: columns of `evaluation` that no guarantee covers. resources: seconds and memory, where no
    data is private.
    """

    statement: PrivacyStatement
    release: Path | None = None
    reward_model_release: Path | None = None
    pairs: dict[str, PairEvaluation] = field(default_factory=dict)
    evaluation: dict[str, Evaluation | TextEvaluation] = field(default_factory=dict)
    measurements: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    best_of: dict[str, BestOf] = field(default_factory=dict)
    outside_the_guarantee: list[str] = field(default_factory=list)
    resources: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """With one key for each stage that measured, or was measured on pairs; nothing of what was not measured."""
        statement = self.statement
        value: dict[str, Any] = {
            "private": statement.private,
            "epsilon": statement.epsilon,
            "delta": statement.delta,
            "stages": [
                {
                    "stage": s.stage,
                    "dataset": s.dataset,
                    "unit": s.unit,
                    "units": s.declared_units,
                    "part": s.part,
                    "max_grad_norm": s.max_grad_norm,
                    "private": s.private,
                    "epsilon": s.epsilon_alone,
                    "mechanisms": [asdict(m) for m in s.mechanisms],
                }
                for s in statement.stages
            ],
            "assumptions": statement.assumptions,
            "ledger": statement.ledger,
            "adjacency": statement.adjacency,
            "accountant": statement.accountant,
            "versions": statement.versions,
            "not_covered": statement.not_covered,
            "dtypes": statement.dtypes,
            "attack_success": statement.attack_success,
        }
        if self.release is not None:
            value["release"] = str(self.release)
        value |= {stage: found.as_dict() for stage, found in self.pairs.items()}
        value |= self.measurements
        if self.reward_model_release is not None:
            value["reward_model_release"] = str(self.reward_model_release)
        if self.evaluation:
            value["evaluation"] = {stage: found.as_dict() for stage, found in self.evaluation.items()}
        if self.best_of:
            value["best_of"] = {name: found.as_dict() for name, found in self.best_of.items()}
        if self.outside_the_guarantee:
            value["outside_the_guarantee"] = self.outside_the_guarantee
        return value | self.resources


# A sweep -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: its epsilon as written, its seed, the value of the varied field, and its overrides."""

    epsilon: str
    seed: int
    value: str | None
    overrides: tuple[str, ...]

    @property
    def key(self) -> Key:
        """What tells it from the sweep's other trials."""
        return self.epsilon, self.seed, self.value

    @property
    def folder(self) -> str:
        """Its run's, below runs/."""
        varied = "" if self.value is None else "-" + "".join(c if c.isalnum() or c in ".-" else "_" for c in self.value)
        return f"epsilon-{self.epsilon}{varied}-seed-{self.seed}"


@dataclass(frozen=True)
class Finished:
    """A finished run, one line of runs.jsonl: means over public prompts, as in `Evaluation`, and what it has spent.

    recipe, overrides: of the whole sweep. before: the base model, and the policy after each stage but the last. pairs:
    agreement of the reward model that the run has trained with public pairs. spent_epsilon, delta: of the run and all
    that its model rests on. noise_multipliers: by stage. seconds: where no data is private. The pretrained model has
    spent nothing, and lacks the rest.
    """

    recipe: str
    overrides: tuple[str, ...]
    trial: Trial
    reward: float
    reward_ci95_prompts: float
    kl: float
    perplexity: float
    distinct_2: float
    completion_length: float
    reference_reward: float | None = None
    reference_reward_ci95_prompts: float | None = None
    text_loss: float | None = None
    before: Mapping[str, Evaluation] = field(default_factory=dict)
    pairs: PairEvaluation | None = None
    spent_epsilon: float = 0.0
    delta: float | None = None
    noise_multipliers: Mapping[str, float] = field(default_factory=dict)
    seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The line."""
        trial = self.trial
        line: dict[str, Any] = {"recipe": self.recipe, "overrides": list(self.overrides)}
        line |= {"of_trial": list(trial.overrides), "epsilon": trial.epsilon, "seed": trial.seed, "value": trial.value}
        line |= {name: value for name in MEASURED if (value := getattr(self, name)) is not None}
        line["reward_ci95_prompts"] = self.reward_ci95_prompts
        if self.reference_reward_ci95_prompts is not None:
            line["reference_reward_ci95_prompts"] = self.reference_reward_ci95_prompts
        if trial.epsilon == PRETRAINED:
            return line | {"spent_epsilon": self.spent_epsilon}
        return line | {
            "before": {stage: found.as_dict() for stage, found in self.before.items()},
            PAIRS: self.pairs and self.pairs.as_dict(),
            "spent_epsilon": self.spent_epsilon,
            "delta": self.delta,
            "noise_multipliers": dict(self.noise_multipliers),
            "seconds": self.seconds,
        }

    @classmethod
    def of_run(
        cls, recipe: str, overrides: tuple[str, ...], trial: Trial, summary: dict[str, Any], scoring: str | None
    ) -> Finished:
        """From what the run's summary.json holds; `scoring` is the stage that trained a reward model."""
        before = {stage: _known(Evaluation, found) for stage, found in summary["evaluation"].items()}
        _, last = before.popitem()  # of the stage that samples
        pairs = summary.get(scoring) if scoring is not None else None
        return cls(
            recipe,
            overrides,
            trial,
            **_measured(last),
            before=before,
            pairs=None if pairs is None else _known(PairEvaluation, pairs),
            spent_epsilon=_number(summary["epsilon"]),
            delta=summary["delta"],
            noise_multipliers={s["stage"]: s["mechanisms"][0]["noise_multiplier"] for s in summary["stages"]},
            seconds=summary.get("seconds"),
        )

    @classmethod
    def of_pretrained(cls, recipe: str, overrides: tuple[str, ...], trial: Trial, found: Evaluation) -> Finished:
        """From what was measured of it."""
        return cls(recipe, overrides, trial, **_measured(found))

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> Finished:
        """From the line; fields that it does not know are passed over.

        Raises:
            AttributeError, KeyError, TypeError, ValueError: it is none.
        """
        numbers = (*MEASURED, "reward_ci95_prompts", "reference_reward_ci95_prompts", "spent_epsilon")
        pairs = line.get(PAIRS)
        return cls(
            line["recipe"],
            tuple(line["overrides"]),
            Trial(line["epsilon"], line["seed"], line["value"], tuple(line["of_trial"])),
            **{name: _number(line[name]) for name in numbers if name in line},
            before={stage: _known(Evaluation, found) for stage, found in line.get("before", {}).items()},
            pairs=None if pairs is None else _known(PairEvaluation, pairs),
            delta=line.get("delta"),
            noise_multipliers={stage: _number(s) for stage, s in line.get("noise_multipliers", {}).items()},
            seconds=line.get("seconds"),
        )


def _measured(found: Evaluation) -> dict[str, Any]:
    halves = {"reward_ci95_prompts": found.reward_ci95, "reference_reward_ci95_prompts": found.reference_reward_ci95}
    return {name: getattr(found, name) for name in MEASURED} | halves


def _known(of: type[T], value: dict[str, Any]) -> T:
    names = {f.name for f in fields(of)}  # type: ignore[arg-type]
    return of(**{name: _number(number) for name, number in value.items() if name in names})


def _number(value: Any) -> Any:
    """Of JSON: null is NaN, and infinity the string "inf"."""
    if isinstance(value, str):
        return float(value)
    return math.nan if value is None else value


@dataclass(frozen=True)
class SweepResult:
    """What all runs of a sweep say together.

    folder: has runs.jsonl, sweep.json, sweep.md and sweep.png. varied: the field that was varied. command: the `dpalign
    sweep` that does the same. runs: one for each trial. rows: one for each epsilon and varied value, by
    `summarize_sweep`. spent_by_tuning: what the ledger knows of each dataset, with a `sentence`.
    """

    folder: Path
    recipe: str
    overrides: tuple[str, ...]
    varied: str | None
    command: str
    runs: tuple[Finished, ...]
    rows: list[dict[str, Any]]
    spent_by_tuning: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """What sweep.json holds."""
        return {
            "recipe": self.recipe,
            "overrides": list(self.overrides),
            "varied": self.varied,
            "command": self.command,
            "rows": self.rows,
            "spent_by_tuning": self.spent_by_tuning,
        }
