"""Black box: what whoever has the trained model can tell of canary texts that the run wrote itself.

Canaries here are records like any other (random tokens; for stages on pairs, a random text preferred to another one),
in or left out by fair coins. The stage trains on them with its real loss; then each is scored by how much its loss has
fallen. For DPO's pairs that is the membership score of preference tuples (PREMIA, arXiv 2407.06443): the log-ratio to
the reference of the chosen answer minus that of the rejected one, through a monotone function.

A real loss fights real gradients and the noise of all coordinates, so this attack is far weaker than the white box's.
Stages that sample completions are not attacked: what they learn of a prompt is in no loss that can be asked for again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from ..algorithms.base import encode_units, rows_of_units, unit_means
from ..algorithms.rollouts import ScoredAlgorithm
from ..data import UnitDataset
from ..errors import DPAlignError
from ..models import AdapterStack
from ..privacy.entropy import SystemEntropy
from ..privacy.ledger import Ledger
from ..privacy.parts import Part
from ..training import Stage
from ..training.self_written import own_randomness, self_written
from . import bounds
from .found import Attack, Bound
from .ghosts import NAME, Canaries, Subject


@dataclass(frozen=True)
class Scored:
    """How much the loss of each canary has fallen, `(canaries,)` float64; larger for one that the model has learned."""

    falls: np.ndarray
    canaries: Canaries


def check_attackable(subject: Subject) -> None:
    """Raises DPAlignError for a stage whose loss on a record cannot be asked for."""
    if issubclass(subject.kind, ScoredAlgorithm):
        raise DPAlignError(
            f"stage {subject.kind.name} samples completions: the black box attacks stages that read texts."
        )


def train_and_score(subject: Subject, canaries: Canaries, folder: Path) -> Scored:
    """Trains the stage once, on self-written units and the canaries that are in; its ledger lies in `folder`."""
    count = len(canaries.included)
    model, before = subject.make_model(), subject.make_model()
    algorithm = subject.kind(subject.config, **subject.rewards)
    with own_randomness(model.device):
        written = self_written(algorithm, model, subject.written + count, 1, subject.chats)
    others, texts = written[: subject.written], written[subject.written :]
    members = others + [texts[which] for which in np.flatnonzero(canaries.included)]
    order = np.argsort(SystemEntropy().uniforms(len(members)))
    data = UnitDataset(
        part=Part(NAME),
        units=[members[place] for place in order],
        ids=[str(place).encode() for place in order],
        declared_units=subject.declared_units,
        unit="record",
        fingerprint=NAME,
    )
    torch.manual_seed(subject.config.seed)
    algorithm.setup(before)
    start = _losses(subject, algorithm, before, texts)
    ledger = Ledger(folder / "ledger.sqlite")
    try:
        Stage(model, algorithm, data, folder=folder / NAME, run=NAME, ledger=ledger, plan=subject.plan).train()
    finally:
        ledger.close()
    return Scored(start - _losses(subject, algorithm, model, texts), canaries)


@torch.no_grad()
def _losses(subject: Subject, algorithm: Any, model: AdapterStack, texts: list[list[Any]]) -> np.ndarray:
    """`(texts,)` float64 mean loss of each text's rows, as many texts at a time as the stage's micro-batches have."""
    size, found = subject.config.micro_batch_size, []
    for start in range(0, len(texts), size):
        units = encode_units(algorithm, model, texts[start : start + size])
        rows = rows_of_units(algorithm, model, units, None)
        losses, _ = algorithm.row_losses(model, rows)
        found.append(unit_means(losses.double(), rows.unit, len(units)).cpu())
    return torch.cat(found).numpy()


def attack_of(scored: Scored, delta: float, confidence: float) -> Attack:
    """How well members are told from others, and the lower bounds that follow; a guess is about the median fall."""
    included, falls = scored.canaries.included, scored.falls
    scores = bounds.Scores(falls - float(np.median(falls)), included)
    area = stats.mannwhitneyu(falls[included], falls[~included]).statistic / (included.sum() * (~included).sum())
    return Attack(
        area=float(area),
        bounds=(
            Bound(
                "black box, order statistics", "arXiv 2509.08704", bounds.order_statistics(scores, delta, confidence)
            ),
            Bound("black box, f-DP recursion", "arXiv 2410.22235", bounds.f_dp(scores, delta, confidence)),
            Bound("black box, Steinke et al.", "arXiv 2305.08846", bounds.steinke(scores, delta, confidence)),
        ),
    )
