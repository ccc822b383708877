"""The only door to a unit: a private step is journaled, then drawn, then answered, all from one value.

The ledger's row, the sampler and the mechanism are made from the same `PrivateStep`, so that what is journaled cannot
differ from what is added. Nothing else calls the sampler or builds a mechanism.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import DPAlignError
from .accountant import SampledGaussian
from .entropy import NoEntropy, SeededEntropy, SystemEntropy
from .ledger import Intent, Ledger
from .mechanism import Clipping, GaussianMechanism, MetricRange
from .parts import Part
from .sampling import poisson_sample


@dataclass(frozen=True)
class PrivateStep:
    """One Poisson sample and all that is released about it.

    mechanism: what the accountant counts for it; its `steps` is 1. divisor: what noisy sums are divided by, a constant.
    metrics: declared ranges of the metrics block, which is released with the first pass.
    """

    mechanism: SampledGaussian
    max_grad_norm: float
    divisor: float
    clipping: Clipping = "automatic"
    clipping_gamma: float = 0.01
    metrics: tuple[MetricRange, ...] = ()

    def __post_init__(self) -> None:
        if self.mechanism.steps != 1:
            raise DPAlignError(f"a private step is one sample, not {self.mechanism.steps}.")

    def metrics_deviation(self) -> dict[str, float]:
        """Standard deviation of the noise on each released metric, in the metric's own unit."""
        scale = self.mechanism.metrics_noise_multiplier * math.sqrt(len(self.metrics)) / self.divisor
        return {m.name: scale * (m.high - m.low) / 2 for m in self.metrics}


class Sample:
    """The units of one step, and the step's mechanisms: as many as it was journaled for.

    units: sorted places of the drawn units among those that the gate was made for. coins: fresh secret randomness,
    for rollouts too: the law of a unit's coins ignores who else was drawn.
    """

    def __init__(self, step: PrivateStep, units: list[int], coins: SystemEntropy) -> None:
        self.step, self.units, self.coins = step, units, coins
        self._released = 0

    def mechanism(
        self,
        shapes: list[torch.Size],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        products: bool = False,
    ) -> GaussianMechanism:
        """For the gradients of the next pass over the sample, and with the first one the metrics block.

        Args:
            shapes: of every trainable parameter. dtype: of the sums, at least float32. products: whether gradients of
                some come as `Products`.

        Raises:
            DPAlignError: more passes than were journaled.
        """
        ran, first = self.step.mechanism, self._next_pass() == 0
        return GaussianMechanism(
            shapes,
            max_grad_norm=self.step.max_grad_norm,
            noise_multiplier=ran.noise_multiplier,
            divisor=self.step.divisor,
            entropy=self.coins,
            clipping=self.step.clipping,
            gamma=self.step.clipping_gamma,
            metrics=self.step.metrics if first else (),
            metrics_noise_multiplier=ran.metrics_noise_multiplier,
            device=device,
            dtype=dtype,
            products=products,
        )

    def measurement(self) -> GaussianMechanism:
        """For a step that releases no gradient: its metrics block gets the noise that was journaled for gradients.

        Raises:
            DPAlignError: a second release, or a step that has noise for a metrics block beside gradients.
        """
        ran = self.step.mechanism
        if self._next_pass() > 0 or math.isfinite(ran.metrics_noise_multiplier):
            raise DPAlignError("a measurement is the only release of its step.")
        return GaussianMechanism(
            [],
            max_grad_norm=self.step.max_grad_norm,
            noise_multiplier=0.0,
            divisor=self.step.divisor,
            entropy=self.coins,
            metrics=self.step.metrics,
            metrics_noise_multiplier=ran.noise_multiplier,
        )

    def _next_pass(self) -> int:
        if self._released == self.step.mechanism.passes:
            raise DPAlignError(f"the step was journaled for {self._released} release(s): one more was asked for.")
        self._released += 1
        return self._released - 1


class Share(Sample):
    """A sample as another process than the first one holds it: its mechanisms clip and sum, and release nothing."""

    def __init__(self, step: PrivateStep) -> None:
        super().__init__(step, [], NoEntropy())


class Gate:
    """Draws samples of one stage's units, each journaled before.

    Args:
        part: whose units these are. count: how many there are; fingerprint: keyed hash of their contents.
        unit, declared_units: kind and declared number of units, for the ledger.
        run, stage, config_hash: whose spending it is, under which settings.
        insecure_seed: makes samples and noise reproducible. NOT PRIVATE, and journaled as such.
    """

    def __init__(
        self,
        ledger: Ledger,
        part: Part,
        *,
        count: int,
        unit: str,
        declared_units: float,
        fingerprint: str,
        run: str,
        stage: str,
        config_hash: str,
        insecure_seed: int | None = None,
    ) -> None:
        self.ledger, self.part, self.count, self.unit = ledger, part, count, unit
        self.declared_units, self.fingerprint = declared_units, fingerprint
        self.run, self.stage, self.config_hash, self.insecure_seed = run, stage, config_hash, insecure_seed

    def intents(self) -> list[Intent]:
        """What the stage has journaled so far, by this attempt and earlier ones."""
        return self.ledger.intents(dataset=self.part.dataset, run=self.run, stage=self.stage)

    def spent(self) -> list[SampledGaussian]:
        """The same, counted."""
        spendings = self.ledger.spendings(dataset=self.part.dataset, run=self.run, stage=self.stage)
        return [s.mechanism for s in spendings]

    def draw(self, steps: Sequence[PrivateStep], first: int, attempt: int) -> list[Sample]:
        """Journals all `steps`, numbered from `first`, and only then samples for each of them.

        Raises:
            DPAlignError: the ledger cannot be written, or another copy of the run has gone on; nothing was drawn then.
        """
        numbers = range(first, first + len(steps))
        self.ledger.write([self._intent(step, n, attempt) for n, step in zip(numbers, steps, strict=True)])
        samples = []
        for number, step in zip(numbers, steps, strict=True):
            coins = self._coins(attempt, number)
            drawn = poisson_sample(self.count, step.mechanism.sampling_rate, coins)
            samples.append(Sample(step, drawn.tolist(), coins))
        return samples

    def _intent(self, step: PrivateStep, number: int, attempt: int) -> Intent:
        ran = step.mechanism
        return Intent(
            dataset=self.part.dataset,
            run=self.run,
            stage=self.stage,
            step=number,
            attempt=attempt,
            split=self.part.identity,
            low=self.part.low,
            high=self.part.high,
            sampling_rate=ran.sampling_rate,
            noise_multiplier=ran.noise_multiplier,
            metrics_noise_multiplier=ran.metrics_noise_multiplier,
            passes=ran.passes,
            max_grad_norm=step.max_grad_norm,
            unit=self.unit,
            units=self.declared_units,
            fingerprint=self.fingerprint,
            config_hash=self.config_hash,
            private=self.is_private(step),
        )

    def is_private(self, step: PrivateStep) -> bool:
        """Whether a step has a guarantee: noise from secret coins."""
        return self.insecure_seed is None and step.mechanism.noise_multiplier > 0

    def _coins(self, attempt: int, number: int) -> SystemEntropy:
        if self.insecure_seed is None:
            return SystemEntropy()
        return SeededEntropy(self.insecure_seed, f"{self.stage}/{attempt}/{number}")
