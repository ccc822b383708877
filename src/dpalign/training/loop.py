"""One private stage: draw, journal, collect, clip, sum, noise, step, checkpoint.

The loop is the only caller of the mechanism and of the sampler. It shows and logs what the mechanism
released and what is public (steps, time, epsilon), and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..algorithms.base import Algorithm, unit_means
from ..data.units import UnitDataset
from ..errors import DPAlignError
from ..files import dumps, private_folder
from ..gradients import PerUnitGradients
from ..models.policy import Policy
from ..privacy import accountant
from ..privacy.accountant import SampledGaussian, with_metrics
from ..privacy.entropy import SeededEntropy, SystemEntropy
from ..privacy.ledger import Intent, Ledger
from ..privacy.mechanism import GaussianMechanism
from ..privacy.sampling import poisson_sample
from .checkpoint import load_newest, load_optimizer, optimizer_tensors, save_checkpoint

# After an interruption, steps whose noise would be more than this many times the planned one are dropped.
BEARABLE_NOISE = 4.0


@dataclass(frozen=True)
class StagePlan:
    """What a stage will spend, fixed before anything is drawn."""

    steps: int
    sampling_rate: float
    passes: int
    noise_multiplier: float
    metrics_noise_ratio: float
    target_epsilon: float
    target_delta: float
    epsilon: float

    def mechanism(self, steps: int) -> SampledGaussian:
        plain = SampledGaussian(self.sampling_rate, self.noise_multiplier, steps, self.passes)
        return with_metrics(plain, self.metrics_noise_ratio)


def plan_stage(algorithm: Algorithm, units: float) -> StagePlan:
    """Steps, rate and noise of a stage on `units` declared units.

    Raises:
        DPAlignError: settings that cannot be, or a target that cannot be reached.
    """
    config = algorithm.config
    config.validate()
    if config.expected_batch_size > units:
        raise DPAlignError(
            f"expected_batch_size {config.expected_batch_size} is larger than the {units:g} units of stage "
            f"{algorithm.name}: a Poisson sample cannot expect more units than there are."
        )
    rate = config.expected_batch_size / units
    steps = config.max_steps or max(1, math.ceil(config.num_train_epochs / rate))
    steps = math.ceil(steps / algorithm.minibatches) * algorithm.minibatches
    delta = config.target_delta if config.target_delta is not None else accountant.default_delta(math.ceil(units))
    if (config.target_epsilon is None) == (config.noise_multiplier is None):
        raise DPAlignError(
            f"stage {algorithm.name} needs exactly one of target_epsilon (inf for no privacy) and noise_multiplier."
        )
    accountant.check_delta(delta)
    if config.noise_multiplier is not None:
        sigma = config.noise_multiplier
    else:
        sigma = accountant.noise_multiplier(
            config.target_epsilon, delta, sampling_rate=rate, steps=steps, passes=algorithm.passes,
            metrics_noise_ratio=config.metrics_noise_ratio,
        )  # fmt: skip
    if sigma > 0 and config.clipping == "none":
        raise DPAlignError("clipping none has unbounded sensitivity: it is only for target_epsilon inf.")
    plan = StagePlan(steps, rate, algorithm.passes, sigma, config.metrics_noise_ratio, 0.0, delta, 0.0)
    reached = accountant.epsilon([plan.mechanism(steps)], delta)
    target = config.target_epsilon if config.target_epsilon is not None else reached
    return StagePlan(steps, rate, algorithm.passes, sigma, config.metrics_noise_ratio, target, delta, reached)


@dataclass(frozen=True)
class StepReport:
    """What may be shown after a step: public numbers and noised metrics."""

    stage: str
    step: int
    steps: int
    epsilon: float
    metrics: dict[str, float] | None


class Stage:
    """Runs one algorithm on one part of a dataset, from its newest checkpoint if there is one.

    Args:
        policy: the policy with all earlier stages frozen.
        folder: the run's `private/<stage>` folder.
        run: the run's identity in the ledger.
        log: file for the noised metrics, one JSON a line; outside private/ because they are private by construction.
    """

    def __init__(
        self,
        policy: Policy,
        algorithm: Algorithm,
        data: UnitDataset,
        *,
        folder: Path,
        run: str,
        ledger: Ledger,
        log: Path | None = None,
        report: Callable[[StepReport], None] = lambda report: None,
        tell: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.policy, self.algorithm, self.data = policy, algorithm, data
        self.folder, self.run, self.ledger, self.log = private_folder(folder), run, ledger, log
        self.report, self.tell = report, tell
        self.config = algorithm.config
        self.plan = plan_stage(algorithm, data.declared_units)
        self.end = self.plan.steps  # earlier if interruptions have spent part of the budget
        self.config_hash = hash_of(asdict(self.config) | {"units": data.declared_units, "part": (data.low, data.high)})
        self.private = self.config.insecure_seed is None and self.plan.noise_multiplier > 0

    def train(self) -> None:
        """Trains to the end and leaves the adapter frozen in the policy; private/<stage>/final holds it.

        Raises:
            DPAlignError: other data or settings under this run's name, a corrupt checkpoint, a full disk, or
                a budget that crashes have used up.
        """
        self._check_same_run()
        torch.manual_seed(self.config.seed)
        self.algorithm.setup(self.policy)
        if self.config.gradient_checkpointing:
            self.policy.checkpoint_activations(True)
        self.gradients = PerUnitGradients(self.policy)
        config = self.config
        self.optimizer = torch.optim.AdamW(
            self.gradients.parameters, lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon, weight_decay=config.weight_decay,
        )  # fmt: skip
        step = self._resume()
        attempt, sigma = self._refit(step)
        self.algorithm.encode(self.policy, self.data.units)
        while step < self.end:
            step = self._phase(step, attempt, sigma)
        self._save(step, "final")
        if config.gradient_checkpointing:
            self.policy.checkpoint_activations(False)
        self.policy.finish_stage()

    def load_final(self) -> None:
        """Puts a finished stage's adapter into the policy instead of training it."""
        loaded = load_newest(self.folder / "final")
        assert loaded is not None
        torch.manual_seed(self.config.seed)
        self._check_same_run()
        self._check_checkpoint(loaded[1])
        self.algorithm.setup(self.policy)
        self._load_tensors(loaded[0])
        self.policy.finish_stage()

    @property
    def is_finished(self) -> bool:
        return any((self.folder / "final").glob("step-*"))

    # One phase: K samples, one collection, K steps of `passes` releases ---------------------------------

    def _phase(self, step: int, attempt: int, sigma: float) -> int:
        algorithm, plan = self.algorithm, self.plan
        steps = range(step, step + algorithm.minibatches)
        self.ledger.write([self._intent(s, attempt, sigma) for s in steps])  # before anything is drawn
        entropies = [self._entropy(attempt, s) for s in steps]
        samples = [poisson_sample(len(self.data.units), plan.sampling_rate, e).tolist() for e in entropies]
        union = sorted(set().union(*samples))
        self.policy.coins = entropies[0]  # secret rollout coins: their law ignores who else is here
        phase = algorithm.collect(self.policy, union)
        self.policy.coins = None
        place = {unit: position for position, unit in enumerate(union)}
        for step, units, entropy in zip(steps, samples, entropies, strict=True):
            released = self._step(phase, [place[u] for u in units], sigma, entropy, step)
            step += 1
            self._tell(step, sigma, attempt, released)
        if step % self.config.save_steps < algorithm.minibatches or step == self.end:
            self._save(step, ".")
        return step

    def _step(self, phase: Any, positions: list[int], sigma: float, entropy: SystemEntropy, step: int):
        config, algorithm = self.config, self.algorithm
        released = None
        for passed in range(algorithm.passes):
            mechanism = GaussianMechanism(
                [p.shape for p in self.gradients.parameters],
                max_grad_norm=config.max_grad_norm,
                noise_multiplier=sigma,
                divisor=config.expected_batch_size,
                entropy=entropy,
                clipping=config.clipping,
                gamma=config.clipping_gamma,
                metrics=algorithm.metrics if passed == 0 and config.metrics_noise_ratio > 0 else (),
                metrics_noise_multiplier=config.metrics_noise_ratio * sigma,
                device=self.policy.device,
            )
            for chunk, count in self.policy.chunks(len(positions), config.micro_batch_size):
                self._accumulate(mechanism, phase, [positions[i] for i in chunk], count)
            noisy, metrics = mechanism.release()
            for p, gradient in zip(self.gradients.parameters, noisy, strict=True):
                p.grad = gradient.to(p.dtype)
            self.optimizer.param_groups[0]["lr"] = config.learning_rate * self._schedule(step)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            released = metrics if passed == 0 else released
        algorithm.after_step(released)
        return released

    def _accumulate(self, mechanism: GaussianMechanism, phase: Any, positions: list[int], count: int) -> None:
        # Units beyond the first `count` only fill the micro-batch up, and are dropped.
        batch = self.algorithm.batch(phase, positions)
        if len(batch.row_unit) == 0:
            return  # no unit here has a usable row: its gradient is zero, and it still counts
        units = len(positions)
        with self.gradients.collect(batch.row_unit, units):
            losses, metrics = self.algorithm.row_losses(self.policy, batch, phase)
            unit_means(losses, batch.row_unit, units).sum().backward()
        with torch.no_grad():
            rowless = torch.bincount(batch.row_unit, minlength=units) == 0  # NaN adds zero, as it would alone
            means = unit_means(metrics, batch.row_unit, units).masked_fill(rowless.unsqueeze(1), torch.nan)
            mechanism.add([g[:count] for g in self.gradients.grads()], means[:count])

    def _schedule(self, step: int) -> float:
        config, steps = self.config, self.plan.steps
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        return {
            "constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))
        }[config.lr_scheduler_type]  # fmt: skip

    # Ledger ----------------------------------------------------------------------------------------------

    def _intent(self, step: int, attempt: int, sigma: float) -> Intent:
        config, data, plan = self.config, self.data, self.plan
        metrics_sigma = config.metrics_noise_ratio * sigma if config.metrics_noise_ratio > 0 else math.inf
        return Intent(
            dataset=data.name, run=self.run, stage=self.algorithm.name, step=step, attempt=attempt, split=data.split, low=data.low,
            high=data.high, sampling_rate=plan.sampling_rate, noise_multiplier=sigma,
            metrics_noise_multiplier=metrics_sigma, passes=plan.passes, max_grad_norm=config.max_grad_norm,
            unit=data.unit, units=data.declared_units, fingerprint=data.fingerprint,
            config_hash=self.config_hash, private=self.private,
        )  # fmt: skip

    def _check_same_run(self) -> None:
        for intent in self.ledger.intents(dataset=self.data.name, run=self.run, stage=self.algorithm.name):
            if (intent.fingerprint, intent.units) != (self.data.fingerprint, self.data.declared_units):
                raise DPAlignError(
                    f"the data of stage {self.algorithm.name} has changed since this run began: a resumed run must "
                    "see the same records; restore them, or start a run under another output folder."
                )
            if intent.config_hash != self.config_hash:
                raise DPAlignError(
                    f"the settings of stage {self.algorithm.name} have changed since this run began: restore them, "
                    "or start a run under another output folder."
                )

    def _refit(self, step: int) -> tuple[int, float]:
        # Steps that were journaled but lost in a crash are spent: the remaining ones get more noise.
        intents = self.ledger.intents(dataset=self.data.name, run=self.run, stage=self.algorithm.name)
        attempt = max((i.attempt for i in intents), default=-1) + 1
        remaining = self.plan.steps - step
        if len(intents) <= step or self.plan.noise_multiplier == 0 or remaining == 0:
            sigma = self._last_sigma(intents) if intents else self.plan.noise_multiplier
            return attempt, sigma
        spent = [
            s.mechanism for s in self.ledger.spendings(dataset=self.data.name, run=self.run, stage=self.algorithm.name)
        ]

        def sigma_for(steps: int) -> float:
            try:
                return accountant.noise_multiplier(
                    self.plan.target_epsilon, self.plan.target_delta, sampling_rate=self.plan.sampling_rate,
                    steps=steps, passes=self.plan.passes, metrics_noise_ratio=self.config.metrics_noise_ratio, spent=spent,
                )  # fmt: skip
            except DPAlignError:
                return math.inf

        # A few steps of bearable noise are worth more than all of them drowned in it.
        phase = self.algorithm.minibatches
        bearable = BEARABLE_NOISE * self.plan.noise_multiplier
        kept = phase * accountant.largest_where(lambda n: sigma_for(n * phase) <= bearable, 1, remaining // phase)
        if kept == 0 and step == 0:
            raise DPAlignError(
                f"interruptions have spent the budget of stage {self.algorithm.name} before its first checkpoint: start a "
                "run in another output folder."
            )
        self.end = step + kept
        sigma = sigma_for(kept) if kept else self._last_sigma(intents)
        self.tell(
            f"{len(intents) - step} drawn steps were lost by an interruption and stay spent: {kept} of the remaining "
            f"{remaining} steps run, at noise multiplier {sigma:.4f} (planned: {self.plan.noise_multiplier:.4f})."
        )
        return attempt, sigma

    def _last_sigma(self, intents: list[Intent]) -> float:
        return intents[-1].noise_multiplier

    def epsilon_spent(self) -> float:
        """Epsilon of this stage's intents so far, on the accountant's coarse grid."""
        spent = self.ledger.spendings(dataset=self.data.name, run=self.run, stage=self.algorithm.name)
        return accountant.epsilon([s.mechanism for s in spent], self.plan.target_delta, quick=True)

    def _entropy(self, attempt: int, step: int) -> SystemEntropy:
        if self.config.insecure_seed is None:
            return SystemEntropy()
        return SeededEntropy(self.config.insecure_seed, f"{self.algorithm.name}/{attempt}/{step}")

    # Reports and checkpoints -------------------------------------------------------------------------------

    def _tell(self, step: int, sigma: float, attempt: int, metrics: dict[str, float] | None) -> None:
        every = max(1, self.plan.steps // 100)  # the accountant is too slow to be asked at each of many steps
        if step % every == 0 or step == self.end or not hasattr(self, "_epsilon"):
            self._epsilon = self.epsilon_spent()
        self.report(StepReport(self.algorithm.name, step, self.plan.steps, self._epsilon, metrics))
        if self.log is not None and (step % self.config.logging_steps == 0 or step == self.end):
            line = {
                "private": self.private,
                "stage": self.algorithm.name,
                "step": step,
                "attempt": attempt,
                "epsilon": self._epsilon,
            }
            line |= {
                "noise_multiplier": sigma,
                "metrics_noise_multiplier": self.config.metrics_noise_ratio * sigma,
                "noised_metrics": metrics,
            }
            try:
                with open(self.log, "a", encoding="utf-8") as file:
                    file.write(dumps(line, indent=None) + "\n")
            except OSError as error:
                raise DPAlignError(f"{self.log} cannot be written ({error.strerror}).") from None

    def _save(self, step: int, where: str) -> None:
        tensors = {f"model/{n}": t for n, t in self.policy.stage_state().items()}
        tensors |= optimizer_tensors(self.optimizer, self.gradients.names)
        state = {"algorithm": self.algorithm.state(), "fingerprint": self.data.fingerprint}
        save_checkpoint(self.folder / where, step, tensors, state)

    def _resume(self) -> int:
        loaded = load_newest(self.folder)
        if loaded is None:
            return 0
        tensors, state = loaded
        self._check_checkpoint(state)
        self._load_tensors(tensors)
        load_optimizer(self.optimizer, self.gradients.names, tensors)
        self.algorithm.load_state(state["algorithm"])
        self.tell(f"stage {self.algorithm.name} resumes after step {state['step']} of {self.plan.steps}.")
        return int(state["step"])

    def _check_checkpoint(self, state: dict[str, Any]) -> None:
        if state["fingerprint"] != self.data.fingerprint:
            raise DPAlignError("the checkpoint belongs to other data: restore the data or use another output folder.")
        drawn = {i.step for i in self.ledger.intents(dataset=self.data.name, run=self.run, stage=self.algorithm.name)}
        if not set(range(int(state["step"]))) <= drawn:
            raise DPAlignError(
                f"the ledger {self.ledger.path} does not hold all draws of stage {self.algorithm.name}: a run can only "
                "go on with the ledger that recorded it."
            )

    def _load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        current = self.policy.stage_state()
        for name, value in current.items():
            if f"model/{name}" not in tensors or tensors[f"model/{name}"].shape != value.shape:
                raise DPAlignError(f"the checkpoint in {self.folder} has no fitting {name}: it is of another model.")
            value.copy_(tensors[f"model/{name}"])


def hash_of(settings: dict[str, Any]) -> str:
    """Short SHA-256 of settings, which hold no data."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]
