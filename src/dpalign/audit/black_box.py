"""Black box: what whoever has the trained model can tell of canary texts that the run wrote itself.

Canaries here are records like any other (random tokens; for stages on pairs, a random text preferred to another one),
in or left out by fair coins. The stage trains on them with its real loss; then each is scored by how much its loss has
fallen. For DPO's pairs that is the membership score of preference tuples (PREMIA, arXiv 2407.06443): the log-ratio to
the reference of the chosen answer minus that of the rejected one, through a monotone function.

A stage that samples has no such loss. There a canary is a trigger: a prompt whose completions are rewarded for words
that are its own (half of all words, by coins that follow from the prompt), so that nothing but its own drawing teaches
the model to say them. Its score is how far the log-probability of completions has moved along that reward.

A real loss fights real gradients and the noise of all coordinates, so this attack is far weaker than the white box's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from ..algorithms.base import encode_units, rows_of_units, unit_means
from ..algorithms.rollouts import CompletionAlgorithm, in_micro_batches
from ..data import UnitDataset
from ..data.load import Record
from ..data.text import Text
from ..engines import Local
from ..errors import DPAlignError
from ..models import AdapterStack, Policy
from ..models.generation import Prompt, answers, asked_again, padded
from ..models.policy import Rollouts
from ..privacy.entropy import SystemEntropy
from ..privacy.ledger import Ledger
from ..privacy.parts import Part
from ..rewards import Reward
from ..training import Stage
from ..training.self_written import own_randomness, self_written
from . import bounds
from .found import Attack, Bound
from .ghosts import NAME, Canaries, Subject

TRIED = 16  # completions of a trigger prompt that its score is from


@dataclass(frozen=True)
class Scored:
    """What the model shows of each canary, `(canaries,)` float64: larger for one that it has learned."""

    shown: np.ndarray
    canaries: Canaries


class Triggered(Reward):
    """The stage's reward, and another one for completions of the trigger prompts.

    `words_of` the prompt, from `low` to `high` of the stage's reward.
    """

    def __init__(self, reward: Reward, triggers: Collection[str]) -> None:
        super().__init__(reward.function, reward.low, reward.high, reward.scale, reward.shift, reward.rows_at_once)
        self.reward, self.triggers = reward, frozenset(triggers)

    def __call__(
        self, prompts: Sequence[Text], completions: list[str], columns: dict[str, list[Any]] | None = None
    ) -> torch.Tensor:
        plain = self.reward(prompts, completions, columns)
        own = self.low + (self.high - self.low) * words_of(prompts, completions)
        return torch.where(torch.tensor([str(prompt) in self.triggers for prompt in prompts]), own, plain)


def words_of(prompts: Sequence[Text], completions: Sequence[str]) -> torch.Tensor:
    """`(rows,)` float32 in [0, 1]: the share of a completion's words that are its prompt's own; a half of no words."""

    def is_own(prompt: Text, word: str) -> int:
        return hashlib.sha256(f"{prompt}\0{word}".encode()).digest()[0] % 2

    def share(prompt: Text, words: list[str]) -> float:
        return sum(is_own(prompt, word) for word in words) / len(words) if words else 0.5

    return torch.tensor([share(p, c.split()) for p, c in zip(prompts, completions, strict=True)], dtype=torch.float32)


def train_and_score(subject: Subject, canaries: Canaries, folder: Path) -> Scored:
    """Trains the stage once, on self-written units and the canaries that are in; its ledger lies in `folder`.

    Raises:
        DPAlignError: it takes too few texts that the run writes itself.
    """
    count = len(canaries.included)
    model: Any = subject.make_model()
    before: Any = subject.make_model()
    rewards = dict(subject.rewards)
    algorithm = subject.kind(subject.config, **rewards)
    with own_randomness(model.device):
        written = _written(subject, algorithm, model, subject.written + count)
    others, texts = written[: subject.written], written[subject.written :]
    if isinstance(algorithm, CompletionAlgorithm):
        triggers = _prompts(algorithm, model, texts)
        rewards = {name: Triggered(reward, [str(t.text) for t in triggers]) for name, reward in rewards.items()}
        algorithm = subject.kind(subject.config, **rewards)
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
    algorithm.own_texts = subject.own_texts
    torch.manual_seed(subject.config.seed)
    algorithm.setup(before)
    ledger = Ledger(folder / "ledger.sqlite")
    try:
        Stage(model, algorithm, data, folder=folder / NAME, run=NAME, ledger=ledger, plan=subject.plan).train()
    finally:
        ledger.close()
    if isinstance(algorithm, CompletionAlgorithm):
        return Scored(_moves(algorithm, model, _prompts(algorithm, model, texts)), canaries)
    falls = _losses(subject, algorithm, before, texts) - _losses(subject, algorithm, model, texts)
    return Scored(falls, canaries)


def _written(subject: Subject, algorithm: Any, model: AdapterStack, count: int) -> list[list[Record]]:
    """Units of one record each that the stage can use, no two alike."""
    found: dict[str, list[Record]] = {}
    asked = count
    while len(found) < count and asked <= 64 * count:  # each time from the start
        for unit in self_written(algorithm, model, asked, 1, subject.chats):
            if unit and algorithm.encode(model, unit[0]) is not None:
                found[repr(unit)] = unit
        asked *= 2
    if len(found) < count:
        raise DPAlignError(
            f"stage {subject.kind.name} takes {len(found)} different texts that a run writes itself, and the black box "
            f"needs {count}: ask for fewer canaries."
        )
    return [*found.values()][:count]


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


def _prompts(algorithm: CompletionAlgorithm[Any], policy: Policy, texts: list[list[Record]]) -> list[Prompt]:
    encoded = [algorithm.encode(policy, record) for (record,) in texts]
    return [prompt for prompt in encoded if prompt is not None]  # `_written` has kept no other


@torch.no_grad()
def _moves(algorithm: CompletionAlgorithm[Any], model: Policy, prompts: list[Prompt]) -> np.ndarray:
    """`(prompts,)` float64 covariance, over `TRIED` completions of what the stage started from, of the reward for a
    prompt's own words and of how far training has moved the completion's log-probability."""
    config, found = algorithm.config, []
    at_once = max(1, config.micro_batch_size // TRIED)

    def said_by(policy: Policy, rollouts: Rollouts) -> torch.Tensor:
        logprobs = in_micro_batches(policy, rollouts, config)[0]
        return (logprobs * rollouts.completion_mask).sum(1).double()

    for start in range(0, len(prompts), at_once):
        asked = [prompt for prompt in prompts[start : start + at_once] for _ in range(TRIED)]
        with model.reference():
            rollouts = Local().sample(model, *padded(model, asked), config, None)
            plain = said_by(model, rollouts)
        moved = (said_by(model, asked_again(model, asked, rollouts)) - plain).view(-1, TRIED)
        wanted = words_of([prompt.text for prompt in asked], answers(model, asked, rollouts)).view(-1, TRIED)
        wanted = wanted.to(moved)
        found.append(((wanted - wanted.mean(1, keepdim=True)) * moved).mean(1).cpu())
    return torch.cat(found).numpy()


def attack_of(scored: Scored, delta: float, confidence: float) -> Attack:
    """How well members are told from others, and the lower bounds that follow; a guess is about the median."""
    included, shown = scored.canaries.included, scored.shown
    scores = bounds.Scores(shown - float(np.median(shown)), included)
    area = stats.mannwhitneyu(shown[included], shown[~included]).statistic / (included.sum() * (~included).sum())
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
