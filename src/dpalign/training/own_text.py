"""One stage on prompts that are no one's: self-written, or of a file that is declared public.

It reads no record, draws nothing and journals nothing. What enters it is a release or public: the model so far (public,
or made of noised sums), the reward (public, or a model that was made so), and the prompts. So all that it does, shows
and logs is post-processing, and needs neither noise nor a clip for each unit; its rows may share what they like.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..algorithms.base import Algorithm, Rows
from ..data.load import Record
from ..errors import DPAlignError
from ..files import append_line, private_folder
from ..models import AdapterStack
from ..privacy.context import own_context
from ..settings.prompts import PromptedConfig
from .checkpoint import (
    is_finished,
    load_model,
    load_newest,
    load_optimizer,
    model_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from .loop import MACHINE_SETTINGS, StepReport, hash_of, is_due
from .optimizer import adam, share_of_rate


class OwnTextStage:
    """Runs one algorithm without records, from its newest checkpoint if there is one; the same seed, the same result.

    Args:
        model: with all earlier stages frozen.
        prompts: records that are declared public; None where the model writes its prompts itself.
        folder: the run's `private/<stage>` folder.
        rests_on_private: whether all that the model has learned from private data so far has a guarantee.
        log: file for the metrics, one JSON a line.
        evaluate: measures the model on public records; told the step, attempt 0, and whether all of it has a guarantee.
        begins: told the first and the last of the updates that are computed together.
    """

    def __init__(
        self,
        model: AdapterStack,
        algorithm: Algorithm[Any, Any, Any],
        prompts: list[Record] | None,
        *,
        folder: Path,
        log: Path | None = None,
        evaluate: Callable[[int, int, bool], None] | None = None,
        rests_on_private: bool = True,
        begins: Callable[[int, int], None] = lambda first, last: None,
        report: Callable[[StepReport], None] = lambda report: None,
        tell: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.model, self.algorithm, self.prompts = model, algorithm, prompts
        self.folder, self.log, self.rests_on_private = private_folder(folder), log, rests_on_private
        self.begins, self.report, self.tell, self.evaluate = begins, report, tell, evaluate
        self.config: PromptedConfig = algorithm.config
        self.steps = self.config.updates
        settings = {name: v for name, v in asdict(self.config).items() if name not in MACHINE_SETTINGS}
        self.config_hash = hash_of(settings)
        self.fingerprint = hashlib.sha256(json.dumps(prompts, sort_keys=True, default=str).encode()).hexdigest()[:16]

    @property
    def is_finished(self) -> bool:
        return is_finished(self.folder)

    @own_context()
    def train(self) -> None:
        """Trains to the end and leaves the adapter frozen in the model; private/<stage>/final holds it.

        Raises:
            DPAlignError: other prompts or settings than the run began with, or a corrupt checkpoint.
        """
        config = self.config
        self._begin()
        if config.gradient_checkpointing:
            self.model.checkpoint_activations(True)
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.names, self.trained = [*trained], [*trained.values()]
        self.optimizer = adam(self.trained, config, 0.0)
        step = self._resume()
        self.examples = None if self.prompts is None else self._encoded(self.prompts)
        self._evaluate(step)
        while step < self.steps:
            step = self._phase(step)
            self._evaluate(step)
        self._save(step, "final")
        if config.gradient_checkpointing:
            self.model.checkpoint_activations(False)
        self.model.finish_stage()

    @own_context()
    def load_final(self) -> None:
        """Puts a finished stage's adapter into the model instead of training it."""
        loaded = load_newest(self.folder / "final")
        if loaded is None:
            raise DPAlignError(f"stage {self.algorithm.name} has no finished adapter in {self.folder}: train it first.")
        self._check(loaded[1])
        self._begin()
        load_model(self.model, loaded[0], self.folder)
        self.model.finish_stage()

    def _begin(self) -> None:
        torch.manual_seed(self.config.seed)
        self.algorithm.setup(self.model)

    def _encoded(self, records: list[Record]) -> list[Any]:
        encoded = [self.algorithm.encode(self.model, record) for record in records]
        return [example for example in encoded if example is not None]

    # One phase: prompts, one collection of rows, `minibatches` updates of `passes` steps ---------------------------

    def _phase(self, step: int) -> int:
        config, algorithm = self.config, self.algorithm
        self.begins(step + 1, step + config.minibatches)
        algorithm.before_draw(self.model)
        torch.manual_seed(_seed_of(config.seed, step))  # of each phase its own: whoever resumes gets the same
        examples = self._some(config.expected_batch_size * config.minibatches)
        rows = scored(algorithm.rows(self.model, [[example] for example in examples], None))
        for number in range(config.minibatches):
            first = number * config.expected_batch_size
            units = [*range(first, min(len(examples), first + config.expected_batch_size))]
            metrics = self._update(rows, units, step)
            step += 1
            self._tell(step, metrics)
        if step % config.save_steps < config.minibatches or step == self.steps:
            self._save(step, ".")
        return step

    def _some(self, count: int) -> list[Any]:
        """Examples of a phase: written for it, or drawn from the public ones without replacement."""
        if self.examples is None:
            return self.algorithm.write(self.model, count)
        return [self.examples[place] for place in torch.randperm(len(self.examples))[:count].tolist()]

    def _update(self, rows: Rows, units: list[int], step: int) -> dict[str, float] | None:
        config, metrics = self.config, None
        for passed in range(config.passes):
            found = self._gradient(rows, units)
            self.algorithm.add_gradient(self.model, step)
            norm = torch.nn.utils.clip_grad_norm_(self.trained, config.max_grad_norm)
            if norm.isfinite():
                self.optimizer.param_groups[0]["lr"] = config.learning_rate * share_of_rate(config, step, self.steps)
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            metrics = found if passed == 0 else metrics
        if metrics is not None:
            self.algorithm.adapt(metrics)
        return metrics

    def _gradient(self, rows: Rows, units: list[int]) -> dict[str, float] | None:
        """Adds the gradient of the mean loss of the units' rows up; their mean metrics, None where no row is left."""
        algorithm = self.algorithm
        batch = rows.of(units)
        count, total = len(batch.unit), torch.zeros(len(algorithm.metrics), dtype=torch.float64)
        for start in range(0, len(units), algorithm.examples_at_once):
            part = rows.of(units[start : start + algorithm.examples_at_once])
            if len(part.unit) == 0:
                continue
            losses, metrics = algorithm.row_losses(self.model, part)
            (losses.sum() / count).backward()  # type: ignore[no-untyped-call]
            total += metrics.detach().double().sum(0).cpu()
        names = [metric.name for metric in algorithm.metrics]
        return dict(zip(names, (total / count).tolist(), strict=True)) if count else None

    # Reports and checkpoints -------------------------------------------------------------------------------

    def _tell(self, step: int, metrics: dict[str, float] | None) -> None:
        name = self.algorithm.name
        self.report(StepReport(name, step, self.steps, None, metrics))
        if self.log is not None and (step % self.config.logging_steps == 0 or step == self.steps):
            line = {"private": self.rests_on_private, "stage": name, "step": step, "own_text_metrics": metrics}
            append_line(self.log, line)

    def _evaluate(self, step: int) -> None:
        if self.evaluate is not None and is_due(self.config.eval_steps, step, self.config.minibatches, self.steps):
            self.evaluate(step, 0, self.rests_on_private)

    def _save(self, step: int, where: str) -> None:
        tensors = model_tensors(self.model) | optimizer_tensors(self.optimizer, self.names)
        state = {"algorithm": self.algorithm.state(), "fingerprint": self.fingerprint, "config_hash": self.config_hash}
        save_checkpoint(self.folder / where, step, tensors, state)

    def _resume(self) -> int:
        loaded = load_newest(self.folder)
        if loaded is None:
            return 0
        tensors, state = loaded
        self._check(state)
        load_model(self.model, tensors, self.folder)
        load_optimizer(self.optimizer, self.names, tensors, self.folder)
        self.algorithm.load_state(state["algorithm"])
        self.tell(f"stage {self.algorithm.name} resumes after step {state['step']} of {self.steps}.")
        return int(state["step"])

    def _check(self, state: dict[str, Any]) -> None:
        what = "settings" if state["config_hash"] != self.config_hash else "public prompts"
        if (state["config_hash"], state["fingerprint"]) != (self.config_hash, self.fingerprint):
            raise DPAlignError(
                f"the {what} of stage {self.algorithm.name} have changed since this run began: restore them, or start "
                "a run under another output folder."
            )


def scored(rows: Rows) -> Rows:
    """The rows of the units that have only finite numbers: one whose reward is none is left out, with its group."""
    spoilt = torch.zeros(len(rows.unit), dtype=torch.bool, device=rows.unit.device)
    for tensor in rows.tensors.values():
        if tensor.is_floating_point():
            spoilt |= ~tensor.flatten(1).isfinite().all(1) if tensor.dim() > 1 else ~tensor.isfinite()
    kept = ~torch.isin(rows.unit, rows.unit[spoilt])
    return Rows(rows.unit[kept], {name: tensor[kept] for name, tensor in rows.tensors.items()})


def _seed_of(seed: int, step: int) -> int:
    digest = hashlib.sha256(f"{seed}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
