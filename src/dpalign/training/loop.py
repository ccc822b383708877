"""One private stage: journal and draw, roll out, collect, clip, sum, noise, step, checkpoint.

The loop reaches units through the gate alone. It shows and logs what the mechanism released and what is public (steps,
time, epsilon), and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..algorithms.base import OUT_OF_MEMORY, Algorithm, Rows, micro_batches, rows_of_units, unit_means
from ..data.units import UnitDataset
from ..errors import DPAlignError, EngineError
from ..files import append_line, private_folder
from ..gradients import PerUnitGradients
from ..models import AdapterStack, checksums
from ..privacy import accountant
from ..privacy.accountant import SampledGaussian
from ..privacy.context import own_context
from ..privacy.entropy import SystemEntropy
from ..privacy.gate import PrivateStep, Sample, Share
from ..privacy.ledger import Ledger
from ..privacy.mechanism import GaussianMechanism, UnitGradients
from ..privacy.products import added
from ..privacy.refit import Budget, refit
from ..settings.prompts import PromptedConfig
from ..world import ALONE, LostProcess, World, check_alike
from .checkpoint import (
    is_finished,
    load_model,
    load_newest,
    load_optimizer,
    model_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from .examples import Examples
from .optimizer import adam, share_of_rate
from .plan import StagePlan, plan_stage

# Settings that cost memory or time and change nothing that is released: a run goes on with other ones.
MACHINE_SETTINGS = frozenset(
    {"micro_batch_size", "gradient_checkpointing", "save_steps", "logging_steps", "eval_steps"}
)
SHARDING = "sharding"  # of a model, wherever it is named: it changes nothing that is released either
LATER_SETTINGS: dict[str, Any] = {
    "batched": False,
    "completion_only_loss": None,
    "assistant_only_loss": False,
    "truncate_prompts": False,
    "temperature": 1.0,
    "eval_steps": None,
    "sft_coefficient": 0.0,
    "quantization": "none",
    "prompts": "private",
    "free": [],
    "questions": [],
    "wanted": None,
    "unwanted": None,
    "written_tokens": 40,
    "of": [],
    "weights": None,
    "base": None,
    "written_texts": 128,
    "written_seed": 0,
    "kind": "lora",
    "engine": {"url": None, "model": None, "is_trusted": False, "folder": None},
}  # that version 0.1.0 did not have, and what they are for a run of that version
# That older runs had and that changed nothing at these values.
GONE_SETTINGS = {"synthetic_steps": 0, "synthetic_batch_size": 256, "synthetic_learning_rate": 4e-3}


@dataclass(frozen=True)
class Work:
    """What one process is dealt of a phase.

    steps: the phase's samples, as all processes know them. examples, coins: of each unit that falls to it. places: for
    each sample, where its units are among these.
    """

    steps: tuple[PrivateStep, ...]
    examples: list[list[Any]]
    coins: list[SystemEntropy]
    places: list[list[int]]


@dataclass(frozen=True)
class StepReport:
    """What may be shown after a step: public numbers and metrics, which are noised wherever the stage draws.

    epsilon: of the stage so far; None of one that draws nothing.
    """

    stage: str
    step: int
    steps: int
    epsilon: float | None
    metrics: dict[str, float] | None


class Worker:
    """What every process of a private stage does: makes the rows of its units, clips their gradients and sums them."""

    def __init__(self, model: AdapterStack, algorithm: Algorithm[Any, Any, Any], world: World) -> None:
        self.model, self.algorithm, self.world = model, algorithm, world
        self.config = algorithm.config

    def _set_up(self) -> None:
        torch.manual_seed(self.config.seed)
        self.algorithm.setup(self.model)
        if self.config.gradient_checkpointing:
            self.model.checkpoint_activations(True)
        self.gradients = PerUnitGradients(self.model)

    def _start_alike(self) -> None:
        """Every process begins with the first one's adapter.

        Raises:
            DPAlignError: here lies another base than there.
        """
        if self.world.size == 1:
            return
        self.world.spread([*self.model.stage_state().values()])
        check_alike(self.world, checksums(self.model))

    def _tear_down(self) -> None:
        if self.config.gradient_checkpointing:
            self.model.checkpoint_activations(False)
        self.model.finish_stage()

    def _rows(self, work: Work) -> Rows:
        return rows_of_units(self.algorithm, self.model, work.examples, work.coins).kept()

    def _sum(self, sample: Sample, rows: Rows, positions: list[int]) -> GaussianMechanism:
        """A pass over a sample's units: those at `positions` are added here, and in the first process those of all."""
        algorithm = self.algorithm
        shapes, products = [p.shape for p in self.gradients.parameters], bool(self.gradients.whole)
        mechanism = sample.mechanism(shapes, self.model.device, products=products)
        for units in micro_batches(rows, positions, algorithm.examples_at_once, algorithm.rows_at_once):
            self._accumulate(mechanism, rows, units)
        mechanism.combine(self.world.sum)
        return mechanism

    def _accumulate(self, mechanism: GaussianMechanism, rows: Rows, units: list[int]) -> None:
        # Always the same number of units and rows: nobody's rounding may tell how many others there are.
        size, batch = self.algorithm.examples_at_once, rows.of(units)
        if len(batch.unit) == 0:
            return  # no unit here has a usable row: its gradient is zero, and it still counts
        try:
            grads, means = unit_gradients(self.model, self.algorithm, self.gradients, batch, size)
        except (DPAlignError, *OUT_OF_MEMORY):
            raise  # of the model's structure, or of sizes that are everyone's
        except Exception:
            self._accumulate_alone(mechanism, rows, units)
            return
        with torch.no_grad():
            mechanism.add(grads, means)

    def _accumulate_alone(self, mechanism: GaussianMechanism, rows: Rows, units: list[int]) -> None:
        """Something was raised for one of some units: each again by itself; that one adds zero."""
        if len(units) == 1:
            return
        for unit in units:
            self._accumulate(mechanism, rows, [unit])


class Follower(Worker):
    """A private stage in another process than the first one, which says what is to be done and when it ends."""

    @own_context()
    def follow(self) -> None:
        """Ends with the adapter frozen in the model."""
        self._set_up()
        self.algorithm.noise_multiplier, state = self.world.share()
        self.algorithm.load_state(state)
        self._start_alike()
        while (work := self.world.deal()) is not None:
            rows = self._rows(work)
            for step, positions in zip(work.steps, work.places, strict=True):
                share = Share(step)
                for _ in range(step.mechanism.passes):
                    self._sum(share, rows, positions)
                    self.world.spread(self.gradients.parameters)
                self.algorithm.load_state(self.world.share())
        self._tear_down()

    @own_context()
    def take_over(self) -> None:
        """The same for a stage that the first process does alone: its weights are still to come."""
        torch.manual_seed(self.config.seed)
        self.algorithm.setup(self.model)
        self.model.finish_stage()


class Stage(Worker):
    """Runs one algorithm on one part of a dataset, from its newest checkpoint if there is one.

    Args:
        model: the policy or reward model with all earlier stages frozen.
        plan: steps and noise; default: those of the stage alone.
        beside: what other stages have spent, or will, on the same units; default: as planned.
        rests_on_private: whether all that the model has learned from private data so far has a guarantee.
        folder: the run's `private/<stage>` folder.
        run: the run's identity in the ledger.
        log: file for the noised metrics, one JSON a line; outside private/ because they are private by construction.
        world: the processes that share the work; this one is the first.
        evaluate: measures the model on public records; told the step, the attempt that made it, and whether all of it
            has a guarantee. None: nobody does.
        begins: told the first and the last of the steps that are computed together, before they are drawn.
    """

    def __init__(
        self,
        model: AdapterStack,
        algorithm: Algorithm[Any, Any, Any],
        data: UnitDataset,
        *,
        folder: Path,
        run: str,
        ledger: Ledger,
        plan: StagePlan | None = None,
        beside: tuple[tuple[SampledGaussian, ...], ...] | None = None,
        log: Path | None = None,
        evaluate: Callable[[int, int, bool], None] | None = None,
        rests_on_private: bool = True,
        begins: Callable[[int, int], None] = lambda first, last: None,
        report: Callable[[StepReport], None] = lambda report: None,
        tell: Callable[[str], None] = lambda message: None,
        world: World = ALONE,
    ) -> None:
        super().__init__(model, algorithm, world)
        self.data = data
        self.folder, self.run, self.ledger, self.log = private_folder(folder), run, ledger, log
        self.begins, self.report, self.tell, self.evaluate = begins, report, tell, evaluate
        self.plan = plan or plan_stage(algorithm.name, algorithm.config, data.declared_units)
        self.beside = self.plan.beside if beside is None else beside
        algorithm.noise_multiplier, algorithm.declared_units = self.plan.noise_multiplier, data.declared_units
        self.whole: int | None = None  # steps that weights and optimiser hold; None within a phase that changes them
        self.end = self.plan.steps  # earlier if interruptions have spent part of the budget
        unread = self.config.of_other_prompts if isinstance(self.config, PromptedConfig) else ()
        settings = {name: v for name, v in asdict(self.config).items() if name not in unread}
        settings |= {"units": data.declared_units, "part": (data.part.low, data.part.high)}
        settings["mechanism"] = self.plan.mechanism().rounded()  # its noise may depend on the run's other stages
        released = {name: v for name, v in settings.items() if name not in MACHINE_SETTINGS}
        self.config_hash = hash_of(released)
        self.same_settings = {self.config_hash, hash_of(settings)}  # 0.1.0 told machines apart, too
        self.same_settings |= {hash_of(known | GONE_SETTINGS) for known in (settings, released)}
        self.gate = data.gate(
            ledger,
            run=run,
            stage=algorithm.name,
            config_hash=self.config_hash,
            insecure_seed=self.config.insecure_seed,
        )
        self.private = self.gate.is_private(self._private_step(self.plan.noise_multiplier))
        self.rests_on_private = rests_on_private

    @own_context()
    def train(self) -> None:
        """Trains to the end and leaves the adapter frozen in the model; private/<stage>/final holds it.

        Raises:
            DPAlignError: other data or settings under this run's name, a corrupt checkpoint, a full disk, or
                a budget that crashes have used up.
        """
        self._check_same_run()
        self._set_up()
        self.optimizer = self._optimizer()
        self.peak = self.optimizer.param_groups[0]["lr"]
        step = self._resume()
        if step is None:
            step = 0
            self._warm_up()
        attempt, sigma = self._refit(step)
        self.algorithm.noise_multiplier = sigma
        self.examples = Examples(self.algorithm, self.model, self.data.units)
        self.world.share((sigma, self.algorithm.state()))
        self._start_alike()
        self._evaluate(step, self._attempt_of(step))
        try:
            while step < self.end:
                step = self._phase(step, attempt, sigma)
        except (KeyboardInterrupt, BrokenPipeError, LostProcess, EngineError):
            if self.whole:  # in memory is what so many steps have made: fewer draws are lost
                self._save(self.whole, ".")
            raise
        self._save(step, "final")
        self.world.deal([None] * self.world.size)
        self._tear_down()

    def _optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        own = self.algorithm.optimizer(self.gradients.parameters)
        if own is not None:
            return own
        deviation = self.plan.noise_multiplier * config.max_grad_norm / config.expected_batch_size
        return adam(self.gradients.parameters, config, deviation)

    def _warm_up(self) -> None:
        if self.algorithm.warm_up(self.model):
            self._save(0, ".")  # what was learned without data is not learned again after an interruption

    @own_context()
    def load_final(self) -> None:
        """Puts a finished stage's adapter into the model instead of training it."""
        loaded = load_newest(self.folder / "final")
        if loaded is None:
            raise DPAlignError(f"stage {self.algorithm.name} has no finished adapter in {self.folder}: train it first.")
        torch.manual_seed(self.config.seed)
        self._check_same_run()
        self._check_checkpoint(loaded[1])
        self.algorithm.setup(self.model)
        load_model(self.model, loaded[0], self.folder)
        self.model.finish_stage()

    @property
    def is_finished(self) -> bool:
        return is_finished(self.folder)

    # One phase: K samples, one collection, K steps of `passes` releases ---------------------------------

    def _phase(self, step: int, attempt: int, sigma: float) -> int:
        self.begins(step + 1, step + self.plan.minibatches)
        self.algorithm.before_draw(self.model)
        steps = [self._private_step(sigma)] * self.plan.minibatches
        samples = self.gate.draw(steps, step, attempt)
        work = self.world.deal(dealt(samples, self.examples, self.data.ids, self.world.size))
        rows = self._rows(work)
        for sample, positions in zip(samples, work.places, strict=True):
            released = self._step(rows, positions, sample, step)
            step += 1
            self.whole = step if sample is samples[-1] else None
            self._tell(step, sample.step, attempt, released)
        if step % self.config.save_steps < self.plan.minibatches or step == self.end:
            self._save(step, ".")
        self._evaluate(step, attempt)
        return step

    def _evaluate(self, step: int, attempt: int) -> None:
        """Has the model measured on public records if it is time."""
        if self.evaluate is not None and is_due(self.config.eval_steps, step, self.plan.minibatches, self.end):
            self.evaluate(step, attempt, self.private and self.rests_on_private)

    def _attempt_of(self, step: int) -> int:
        """The attempt that made the weights of a checkpoint: the last one that drew its last step."""
        return max((intent.attempt for intent in self.gate.intents() if intent.step == step - 1), default=0)

    def _private_step(self, sigma: float) -> PrivateStep:
        """What each step spends and does at a noise multiplier."""
        config = self.config
        return PrivateStep(
            replace(self.plan, noise_multiplier=sigma).mechanism(1),
            max_grad_norm=config.max_grad_norm,
            divisor=config.expected_batch_size,
            clipping=config.clipping,
            clipping_gamma=config.clipping_gamma,
            metrics=self.algorithm.metrics if config.metrics_noise_ratio > 0 else (),
        )

    def _step(self, rows: Rows, positions: list[int], sample: Sample, step: int) -> dict[str, float] | None:
        config, algorithm = self.config, self.algorithm
        released = None
        for passed in range(self.plan.passes):
            noisy, metrics = self._sum(sample, rows, positions).release()
            for p, gradient in zip(self.gradients.parameters, noisy, strict=True):
                p.grad = gradient.to(p.dtype)
            algorithm.add_gradient(self.model, step)
            self.whole = None
            self.optimizer.param_groups[0]["lr"] = self.peak * share_of_rate(config, step, self.plan.steps)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.world.spread(self.gradients.parameters)
            released = metrics if passed == 0 else released
        if released is not None:
            algorithm.adapt(released)
        self.world.share(algorithm.state())
        return released

    # Ledger ----------------------------------------------------------------------------------------------

    def _check_same_run(self) -> None:
        for intent in self.ledger.intents(run=self.run, stage=self.algorithm.name):
            seen = (intent.dataset, intent.fingerprint, intent.units)
            if seen != (self.data.part.dataset, self.data.fingerprint, self.data.declared_units):
                raise DPAlignError(
                    f"the data of stage {self.algorithm.name} has changed since this run began: a resumed run must "
                    "see the same records; restore them, or start a run under another output folder."
                )
            if intent.config_hash not in self.same_settings:
                raise self._changed()

    def _changed(self) -> DPAlignError:
        return DPAlignError(
            f"the settings of stage {self.algorithm.name} have changed since this run began: restore them, or start a "
            "run under another output folder."
        )

    def _refit(self, step: int) -> tuple[int, float]:
        """Number of this attempt, and its steps' noise: as planned, unless draws were lost or others drew more."""
        intents, plan = self.gate.intents(), self.plan
        attempt = max((i.attempt for i in intents), default=-1) + 1
        remaining, lost = plan.steps - step, len(intents) - step
        sigma = intents[-1].noise_multiplier if intents else plan.noise_multiplier
        if plan.noise_multiplier == 0 or remaining == 0:
            return attempt, sigma
        budget = Budget(
            plan.mechanism(),
            self.config.metrics_noise_ratio,
            # Alone it keeps what it was given; together with what others spend on its units, the run's target.
            alone=plan.epsilon if any(plan.beside) else plan.target_epsilon,
            target=plan.target_epsilon,
            delta=plan.target_delta,
            beside=self.beside,
        )
        spent = self.gate.spent()
        as_planned = self.beside == plan.beside or budget.fits(spent, budget.at(sigma, remaining))
        if lost <= 0 and as_planned:
            return attempt, sigma
        kept, refitted = refit(budget, spent, remaining, plan.minibatches)
        if kept == 0 and step == 0:
            raise DPAlignError(
                f"interruptions, or other stages, have spent the budget of stage {self.algorithm.name} before its "
                "first checkpoint: start a run in another output folder."
            )
        self.end = step + kept
        sigma = refitted if kept else sigma
        why = f"{lost} drawn steps were lost by an interruption and stay spent" if lost else "other stages drew more"
        self.tell(
            f"{why}: {kept} of the remaining {remaining} steps run, at noise multiplier {sigma:.4f} (planned: "
            f"{plan.noise_multiplier:.4f})."
        )
        return attempt, sigma

    def epsilon_spent(self, ahead: int = 0, sigma: float = 0.0) -> float:
        """Epsilon of this stage's intents so far, and `ahead` more at `sigma`, on the accountant's coarse grid."""
        spent = self.gate.spent()
        if ahead:
            spent.append(replace(self.plan, noise_multiplier=sigma).mechanism(ahead))
        return accountant.epsilon(spent, self.plan.target_delta, quick=True)

    # Reports and checkpoints -------------------------------------------------------------------------------

    def _tell(self, step: int, taken: PrivateStep, attempt: int, metrics: dict[str, float] | None) -> None:
        ran = taken.mechanism
        # The accountant is too slow to be asked at each of many steps: what it says holds until it is asked again.
        every = max(1, self.plan.steps // 100)
        if step % every == 0 or step == self.end or not hasattr(self, "_epsilon"):
            until = min(self.end, step - step % every + every) - 1
            self._epsilon = self.epsilon_spent(ahead=max(0, until - step), sigma=ran.noise_multiplier)
        self.report(StepReport(self.algorithm.name, step, self.plan.steps, self._epsilon, metrics))
        if self.log is not None and (step % self.config.logging_steps == 0 or step == self.end):
            line = {
                "private": self.private and self.rests_on_private,
                "stage": self.algorithm.name,
                "step": step,
                "attempt": attempt,
                "epsilon_of_stage": self._epsilon,
            }
            line |= {
                "noise_multiplier": ran.noise_multiplier,
                "metrics_noise_multiplier": ran.metrics_noise_multiplier,
                "noised_metrics": metrics,
                "noise_standard_deviation": None if metrics is None else taken.metrics_deviation(),
            }
            append_line(self.log, line)

    def _save(self, step: int, where: str) -> None:
        tensors = model_tensors(self.model) | optimizer_tensors(self.optimizer, self.gradients.names)
        state = {
            "algorithm": self.algorithm.state(),
            "fingerprint": self.data.fingerprint,
            "config_hash": self.config_hash,
        }
        save_checkpoint(self.folder / where, step, tensors, state)

    def _resume(self) -> int | None:
        loaded = load_newest(self.folder)
        if loaded is None:
            return None
        tensors, state = loaded
        self._check_checkpoint(state)
        load_model(self.model, tensors, self.folder)
        load_optimizer(self.optimizer, self.gradients.names, tensors, self.folder)
        self.algorithm.load_state(state["algorithm"])
        self.tell(f"stage {self.algorithm.name} resumes after step {state['step']} of {self.plan.steps}.")
        return int(state["step"])

    def _check_checkpoint(self, state: dict[str, Any]) -> None:
        if state["fingerprint"] != self.data.fingerprint:
            raise DPAlignError("the checkpoint belongs to other data: restore the data or use another output folder.")
        if state["config_hash"] not in self.same_settings:  # before the first draw there is no intent to compare with
            raise self._changed()
        lacking = self.algorithm.state().keys() - state["algorithm"].keys()
        if lacking:
            raise DPAlignError(f"the checkpoint in {self.folder} lacks {', '.join(sorted(lacking))} of its stage.")
        drawn = {intent.step for intent in self.gate.intents()}
        if state["step"] > len(drawn) or not set(range(state["step"])) <= drawn:
            raise DPAlignError(
                f"the ledger {self.ledger.path} does not hold all draws of stage {self.algorithm.name}: a run can only "
                "go on with the ledger that recorded it."
            )


def process_of(identity: bytes, size: int) -> int:
    """Which of `size` processes a unit falls to: fixed by its keyed hash, whoever else is drawn.

    Devices need not round alike. Were units dealt out by their places in a sample, one more would move those behind it
    to other devices, and so their gradients by more than itself.
    """
    return int.from_bytes(identity[-6:], "big") % size


def dealt(samples: Sequence[Sample], examples: Sequence[list[Any]], ids: Sequence[bytes], size: int) -> list[Work]:
    """The units of a phase, for each of `size` processes.

    Args:
        examples, ids: of every unit that could be drawn.
    """
    union, shares = sorted(set().union(*(sample.units for sample in samples))), []
    for number in range(size):
        own = [unit for unit in union if process_of(ids[unit], size) == number]
        place = {unit: position for position, unit in enumerate(own)}
        shares.append(
            Work(
                tuple(sample.step for sample in samples),
                [examples[unit] for unit in own],
                [samples[0].coins.of_unit(unit) for unit in own],
                [[place[unit] for unit in sample.units if unit in place] for sample in samples],
            )
        )
    return shares


def is_due(every: int | None, step: int, minibatches: int, end: int) -> bool:
    """Whether a model is measured after `step`: the last one, or one whose phase of `minibatches` steps has reached a
    multiple of `every`; 0 is one."""
    return every is not None and (step == end or step // every > (step - minibatches) // every)


def unit_gradients(
    model: AdapterStack, algorithm: Algorithm[Any, Any, Any], gradients: PerUnitGradients, rows: Rows, units: int
) -> tuple[list[UnitGradients], torch.Tensor]:
    """Gradients `(units, *shape)` of every trainable, and raw metrics `(units, metrics)`, of at most `units` units.

    Computed with as many units and rows as a full micro-batch of `units` has. Where there are more rows, which are then
    of one unit, they take several turns, and what each adds to the unit's mean is summed.
    """
    size, example = algorithm.rows_per_example * units, algorithm.rows_per_example
    counts = torch.bincount(rows.unit, minlength=units + 1)  # the last one is of the rows that fill up, and dropped
    grads: list[UnitGradients] = []
    means = torch.zeros(units, len(algorithm.metrics), device=rows.unit.device)
    for part in rows.split(size):
        filled = part.filled(size, example, unit=units)
        places = units + (len(filled.unit) > len(part.unit))
        with gradients.collect(filled.unit, places):
            losses, metrics = algorithm.row_losses(model, filled)
            unit_means(losses, filled.unit, places, counts[:places]).sum().backward()  # type: ignore[no-untyped-call]
        found = [g[:units] for g in gradients.grads()]
        grads = [added(total, g) for total, g in zip(grads, found, strict=True)] if grads else found
        means = means + unit_means(metrics.detach(), filled.unit, places, counts[:places])[:units]
    rowless = counts[:units] == 0  # NaN adds zero, as it would alone
    return grads, means.masked_fill(rowless.unsqueeze(1), torch.nan)


def hash_of(settings: dict[str, Any]) -> str:
    """Short SHA-256 of settings, which hold no data."""
    known = _without_later(settings)
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _without_later(settings: dict[str, Any]) -> dict[str, Any]:
    kept = {name: v for name, v in settings.items() if name not in LATER_SETTINGS or v != LATER_SETTINGS[name]}
    kept.pop(SHARDING, None)
    return {name: _without_later(v) if isinstance(v, dict) else v for name, v in kept.items()}
