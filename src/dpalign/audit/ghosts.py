"""White box, one run: canaries that only touch ghost coordinates, through the loop that trains on people.

A ghost is a scalar parameter without effect on the model. A canary is one unit more, outside the declared number,
whose only loss is a multiple of its own ghost: its clipped gradient has norm C in a direction that is nobody else's.
Fair coins say which canaries are in. Sampling, clipping, summing, noise, micro-batches, checkpoint and resume are the
real ones; no real unit is touched, and none is read: the other units are written by the run itself.

What is released about a ghost is C times how often its canary was drawn, and noise: the pair of laws that the
accountant composes, once for every canary. So whoever sees the releases and knows all but the coins can do no better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..algorithms.base import Algorithm, Coins, Rows
from ..data import UnitDataset
from ..data.load import Record
from ..data.text import Text
from ..errors import DPAlignError
from ..models import AdapterStack
from ..privacy.accountant import SampledGaussian
from ..privacy.entropy import SystemEntropy
from ..privacy.ledger import Ledger
from ..privacy.parts import Part
from ..rewards import Reward
from ..settings.base import TrainingConfig
from ..training import Stage, StagePlan, StepReport
from ..training.self_written import own_randomness, self_written
from .checks import Check, count, noise_scale, normal, uncorrelated

CANARY = "dpalign.canary"  # the column of a canary's record that says which one it is
COPIES = 2  # tensors that a canary's direction lies in: clipping each of them alone would let through 1.41 C
FACTOR = 1e4  # a canary's gradient is far larger than C
NAME = "audit"


class Ghosts(nn.Module):
    """`COPIES` layers of `count` weights each, whose outputs add up; zero at first."""

    def __init__(self, count: int, device: torch.device) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(count, 1, bias=False, device=device, dtype=torch.float32) for _ in range(COPIES)
        )
        for weight in self.weights():
            nn.init.zeros_(weight)

    def weights(self) -> list[nn.Parameter]:
        """One `(1, count)` a layer."""
        return list(self.parameters())

    def forward(self, inputs: Tensor) -> Tensor:
        """`(rows,)` of `(rows, count)`."""
        return torch.stack([layer(inputs) for layer in self.layers]).sum(0).squeeze(1)


@dataclass(frozen=True)
class Canaries:
    """What the attacker does not know (`included`), and what it does (`signs`).

    included: `(count,)` bool, fair coins. signs: `(count,)` float64, 1 or -1: which way along its ghost each pushes.
    """

    included: np.ndarray
    signs: np.ndarray

    @classmethod
    def draw(cls, count: int) -> Canaries:
        """From the operating system's entropy."""
        coins = SystemEntropy().uniforms(2 * count) > 0.5
        return cls(coins[:count], np.where(coins[count:], 1.0, -1.0))


class Haunting(Algorithm[Any, Any, Any], is_base=True):
    """What `haunted` mixes into an algorithm: ghosts on its model, canaries among its units, and what is released.

    releases: `(COPIES, count)` each, the noisy mean gradient of the ghosts as the optimiser is given it.
    """

    signs: Tensor  # `(count,)`
    releases: list[Tensor]
    stands_on: Any = None  # the example of a canary's record

    def setup(self, model: Any) -> None:
        inner: Any = super()
        inner.setup(model)
        ghosts = Ghosts(len(self.signs), model.device)
        model.ghosts = nn.ModuleDict({self.name: ghosts})  # by the stage's name, so that checkpoints hold it

    def encode(self, model: Any, record: Record) -> Any:
        inner: Any = super()
        if CANARY not in record:
            example = inner.encode(model, record)
        else:  # all stand on one record
            own = {column: value for column, value in record.items() if column != CANARY}
            example = self.stands_on = self.stands_on or inner.encode(model, own)
        return None if example is None else (example, record.get(CANARY, -1))

    def rows(self, model: Any, units: list[list[Any]], coins: Coins | None) -> Rows:
        inner: Any = super()
        rows: Rows = inner.rows(model, [[example for example, _ in unit] for unit in units], coins)
        which = torch.tensor([unit[0][1] if unit else -1 for unit in units], dtype=torch.int64, device=rows.unit.device)
        return Rows(rows.unit, {**rows.tensors, CANARY: which[rows.unit]})

    def row_losses(self, model: Any, rows: Rows) -> tuple[Tensor, Tensor]:
        which = rows.tensors[CANARY]
        own = {name: tensor for name, tensor in rows.tensors.items() if name != CANARY}
        inner: Any = super()
        losses, metrics = inner.row_losses(model, Rows(rows.unit, own))
        is_canary = which >= 0
        places = torch.nonzero(is_canary).flatten()
        inputs = torch.zeros(len(which), len(self.signs), device=which.device)
        inputs[places, which[places]] = self.signs.to(inputs)[which[places]]
        factor = FACTOR * (self.config.max_grad_norm + self.config.clipping_gamma)
        ghostly = factor * model.ghosts[self.name](inputs)
        return torch.where(is_canary, ghostly.to(losses), losses), metrics

    def add_gradient(self, model: Any, step: int) -> None:
        ghosts: Ghosts = model.ghosts[self.name]
        self.releases.append(torch.cat([w.grad.detach().clone().cpu() for w in ghosts.weights() if w.grad is not None]))
        super().add_gradient(model, step)


def haunted(
    kind: type[Algorithm[Any, Any, Any]], config: TrainingConfig, rewards: Mapping[str, Reward], canaries: Canaries
) -> Haunting:
    """The stage's algorithm, with ghosts."""
    made: Any = type(f"Haunted{kind.__name__}", (Haunting, kind), {})(config, **rewards)
    made.signs, made.releases = torch.from_numpy(canaries.signs), []
    algorithm: Haunting = made
    return algorithm


@dataclass(frozen=True)
class Seen:
    """What a run has released about its ghosts.

    signals: `(releases, canaries)` float64: along each canary's own direction, in units of C; one that is drawn adds 1.
    claims: what the ledger counts for the run. deviation: of the noise on a signal, as it was journaled.
    """

    signals: np.ndarray
    canaries: Canaries
    claims: tuple[SampledGaussian, ...]
    deviation: float

    def present(self) -> np.ndarray:
        """`(in,)` sums over all releases."""
        sums: np.ndarray = self.signals.sum(0)[self.canaries.included]
        return sums

    def absent(self) -> np.ndarray:
        """`(left out,)` sums over all releases."""
        sums: np.ndarray = self.signals.sum(0)[~self.canaries.included]
        return sums

    def expected(self) -> float:
        """What the sum of a canary that was in should be: how often it is drawn, times the passes."""
        return sum(claim.steps * claim.passes * claim.sampling_rate for claim in self.claims)

    def scores(self) -> np.ndarray:
        """`(canaries,)`: positive where "was in" is likelier than "was left out", and larger where it is surer."""
        scores: np.ndarray = self.signals.sum(0) - self.expected() / 2
        return scores


@dataclass(frozen=True)
class Subject:
    """What is audited: a stage with its settings, on a model.

    make_model: the model before the stage; asked again where the run is resumed. declared_units: N. written: how many
    units the run writes itself, beside the canaries. chats: whether these are chats. rewards: that enter the stage.
    own_texts: so many texts that the run's policy writes, for a stage that asks for them.
    """

    kind: type[Algorithm[Any, Any, Any]]
    config: TrainingConfig
    plan: StagePlan
    make_model: Callable[[], AdapterStack]
    declared_units: float
    written: int
    chats: bool
    rewards: Mapping[str, Reward]
    own_texts: Callable[[int], list[Text]] | None = None


def check_subject(subject: Subject) -> None:
    """Raises DPAlignError for a stage that adds no noise to private units."""
    if not subject.config.draws or subject.plan.noise_multiplier == 0:
        raise DPAlignError(f"stage {subject.kind.name} adds no noise to private units: there is no claim to audit.")
    if subject.config.insecure_seed is not None:
        raise DPAlignError(f"stage {subject.kind.name} has insecure_seed: it is not private, so there is no claim.")


class Pulled(KeyboardInterrupt):
    """The audit interrupts its own run."""


def run(subject: Subject, canaries: Canaries, folder: Path) -> Seen:
    """Trains the stage once, interrupted in the middle and resumed, with a ledger of its own in `folder`.

    Raises:
        DPAlignError: the stage takes no text that the run writes itself.
    """
    releases: list[Tensor] = []
    ledger = Ledger(folder / "ledger.sqlite")
    try:
        half = subject.plan.steps // 2 if subject.plan.steps > subject.plan.minibatches else 0
        data: UnitDataset | None = None
        for stop in [half, None] if half else [None]:
            model = subject.make_model()
            algorithm = haunted(subject.kind, subject.config, subject.rewards, canaries)
            algorithm.own_texts = subject.own_texts
            data = data or _units(subject, algorithm, model, canaries)
            running = Stage(
                model,
                algorithm,
                data,
                folder=folder / NAME,
                run=NAME,
                ledger=ledger,
                plan=subject.plan,
                report=_stopper(stop, subject.plan.minibatches),
            )
            with suppress(Pulled):
                running.train()
            releases += algorithm.releases
        claims = tuple(s.mechanism for s in ledger.spendings(dataset=NAME))
    finally:
        ledger.close()
    return _seen(subject, canaries, releases, claims)


def _stopper(stop: int | None, minibatches: int) -> Callable[[StepReport], None]:
    def report(told: StepReport) -> None:
        if stop is not None and told.step >= stop and told.step % minibatches == 0:
            raise Pulled

    return report


def _units(subject: Subject, algorithm: Haunting, model: AdapterStack, canaries: Canaries) -> UnitDataset:
    """Self-written units, and one more for each canary that is in, with a self-written record as what it stands on."""
    kind, config = subject.kind, subject.config
    plain = replace(config, adapter=replace(config.adapter, init_a="random"))
    with own_randomness(model.device):
        writer = kind(plain, **subject.rewards)
        written = self_written(writer, model, max(subject.written, 8), 1, subject.chats)
        usable = [unit for unit in written if unit and writer.encode(model, unit[0]) is not None]
    if not usable:
        raise DPAlignError(f"stage {kind.name} takes no text that a run writes itself, so it cannot be audited.")
    units: list[list[Record]] = [list(unit) for unit in written[: subject.written]]
    units += [[{**usable[0][0], CANARY: int(which)}] for which in np.flatnonzero(canaries.included)]
    order = np.argsort(SystemEntropy().uniforms(len(units)))
    return UnitDataset(
        part=Part(NAME),
        units=[units[place] for place in order],
        ids=[str(place).encode() for place in order],
        declared_units=subject.declared_units,
        unit="record",
        fingerprint=NAME,
    )


def _seen(subject: Subject, canaries: Canaries, releases: list[Tensor], claims: tuple[SampledGaussian, ...]) -> Seen:
    config, sigma = subject.config, subject.plan.noise_multiplier
    stacked = np.stack([release.double().numpy() for release in releases]) if releases else np.zeros((0, COPIES, 1))
    along = stacked.sum(1) / math.sqrt(COPIES) * canaries.signs
    return Seen(along * (config.expected_batch_size / config.max_grad_norm), canaries, claims, sigma)


def checks(seen: Seen) -> list[Check]:
    """What can be told of the run itself from its ghosts, whose every number has a known law."""
    empty = seen.signals[:, ~seen.canaries.included]
    journaled = sum(claim.steps * claim.passes for claim in seen.claims)
    rate, variance = seen.claims[0].sampling_rate, seen.deviation**2
    expected, present = seen.expected(), seen.present()
    spread = math.sqrt((journaled * variance + expected * (1 - rate)) / len(present))
    return [
        count("run: releases", "noisy updates beside those that the ledger holds", len(seen.signals), journaled),
        noise_scale(
            "run: noise", "standard deviation of the noise on empty ghosts, over sigma C", empty / seen.deviation
        ),
        uncorrelated("run: independence", "largest correlation between two updates on empty ghosts", empty),
        normal(
            "run: shares",
            "what a canary adds in the run, over what its rate says",
            float(present.mean()) / expected,
            1.0,
            spread / expected,
        ),
    ]
