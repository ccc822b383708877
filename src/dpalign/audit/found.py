"""What an audit found: lower bounds beside the claim, and the checks of each layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .checks import Check

NO_PROOF = (
    "Passing is no proof: an audit finds faults that move what it looks at, and says nothing of others. The guarantee "
    "rests on the argument and the code, not on this."
)


@dataclass(frozen=True)
class Bound:
    """A lower bound on epsilon by one method, and the paper that it is from."""

    method: str
    source: str
    epsilon: float


@dataclass(frozen=True)
class Attack:
    """What the trained model shows of canary texts.

    area: under the receiver operating characteristic; 0.5 tells nothing. bounds: lower bounds that follow.
    """

    area: float
    bounds: tuple[Bound, ...]


@dataclass(frozen=True)
class Audit:
    """One audited stage.

    epsilon, delta: the claim, replayed from the audit's own ledger. canaries: tried, in or left out by a fair coin.
    confidence: of each bound by itself. bounds: of the white box. checks: by layer.
    attack: of the black box, if it was asked for.
    """

    stage: str
    epsilon: float
    delta: float
    sampling_rate: float
    steps: int
    noise_multiplier: float
    canaries: int
    confidence: float
    bounds: tuple[Bound, ...]
    checks: dict[str, tuple[Check, ...]]
    attack: Attack | None = None

    @property
    def all_bounds(self) -> tuple[Bound, ...]:
        """Of the white box and of the black box."""
        return self.bounds + (() if self.attack is None else self.attack.bounds)

    @property
    def exceeded(self) -> list[str]:
        """Methods whose lower bound is above the claim."""
        return [bound.method for bound in self.all_bounds if bound.epsilon > self.epsilon]

    @property
    def rejected(self) -> list[str]:
        """Checks that honest code fails less than once in a million."""
        return [check.name for checks in self.checks.values() for check in checks if not check.passed]

    @property
    def passed(self) -> bool:
        """Whether no layer has found anything."""
        return not self.exceeded and not self.rejected

    def to_json(self) -> dict[str, Any]:
        """All of it, and in words what it is not."""
        shown = asdict(self)
        shown["checks"] = {
            layer: [asdict(check) | {"passed": check.passed} for check in checks]
            for layer, checks in self.checks.items()
        }
        return shown | {
            "exceeded": self.exceeded,
            "rejected": self.rejected,
            "passed": self.passed,
            "no_proof": NO_PROOF,
        }
