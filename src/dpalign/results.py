"""What a run leaves for people: its guarantee, where the releases are, and what was measured on public data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .evaluation import Evaluation, PairEvaluation
from .privacy.statement import PrivacyStatement


@dataclass
class Results:
    """What `summary.json` holds.

    release: the folder to share. reward_model_release: the reward model's, if the run has trained one. pairs: by stage,
    agreement with public pairs. evaluation: by stage, measured on public prompts; `pretrained` is the base model.
    measurements: by stage, noised, on held-out private units; None for one that an interruption lost.
    outside_the_guarantee: columns of `evaluation` that no guarantee covers. resources: seconds and memory, where no
    data is private.
    """

    statement: PrivacyStatement
    release: Path | None = None
    reward_model_release: Path | None = None
    pairs: dict[str, PairEvaluation] = field(default_factory=dict)
    evaluation: dict[str, Evaluation] = field(default_factory=dict)
    measurements: dict[str, dict[str, Any] | None] = field(default_factory=dict)
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
                    "units": s.declared_units,
                    "epsilon": s.epsilon_alone,
                    "mechanisms": [asdict(m) for m in s.mechanisms],
                }
                for s in statement.stages
            ],
            "assumptions": statement.assumptions,
            "ledger": statement.ledger,
        }
        if self.release is not None:
            value["release"] = str(self.release)
        value |= {stage: found.as_dict() for stage, found in self.pairs.items()}
        value |= self.measurements
        if self.reward_model_release is not None:
            value["reward_model_release"] = str(self.reward_model_release)
        if self.evaluation:
            value["evaluation"] = {stage: found.as_dict() for stage, found in self.evaluation.items()}
        if self.outside_the_guarantee:
            value["outside_the_guarantee"] = self.outside_the_guarantee
        return value | self.resources
