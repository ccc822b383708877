"""transformers' callbacks, told what a run makes public: steps, epsilon, noised metrics, what public records say.

What one raises ends the run: it has seen nothing but releases and public numbers, so when it raises is a function of
them (post-processing). It is given no model, optimizer or data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from ..errors import DPAlignError
from ..evaluation.during import EvaluationReport
from ..reporting.progress import Reporter
from ..settings.trainers import TrainerArguments
from ..training import StagePlan, StepReport


class Telling(Reporter):
    """A reporter that tells callbacks, too."""

    def __init__(self, args: TrainerArguments, callbacks: Sequence[TrainerCallback], quiet: bool) -> None:
        super().__init__(quiet=quiet)
        self.args, self.callbacks = args, list(callbacks)
        for callback in self.callbacks:
            if not isinstance(callback, TrainerCallback):
                raise DPAlignError(
                    f"callbacks: a {type(callback).__name__} is no transformers.TrainerCallback object: make it one."
                )
        self.state, self.control = TrainerState(), TrainerControl()
        self._rate = 0.0

    def start(
        self,
        stage: str,
        plan: StagePlan,
        units: float,
        unit: str,
        private: bool,
        tokens: float,
        seconds: float | None = None,
        done: int = 0,
        total: float | None = None,
    ) -> None:
        super().start(stage, plan, units, unit, private, tokens, seconds, done, total)
        self._rate, self.state.max_steps = plan.sampling_rate, plan.steps
        self._tell("on_train_begin")

    def start_own_text(self, stage: str, steps: int, prompts: int, read: str, tokens: float, done: int = 0) -> None:
        super().start_own_text(stage, steps, prompts, read, tokens, done)
        self._rate, self.state.max_steps = 0.0, steps  # there is no number of records that epochs could go by
        self._tell("on_train_begin")

    def step(self, report: StepReport) -> None:
        super().step(report)
        self.state.global_step, self.state.epoch = report.step, report.step * self._rate
        self._tell("on_step_end")
        if report.step % getattr(self.args, "logging_steps", 1) == 0 or report.step == report.steps:
            logs = {**(report.metrics or {}), "epsilon": report.epsilon or 0.0, "epoch": self.state.epoch}
            self.state.log_history.append({**logs, "step": report.step})
            self._tell("on_log", logs=dict(logs))

    def evaluated(self, report: EvaluationReport) -> None:
        """As transformers does it: logged, and told by the names `eval_*`."""
        super().evaluated(report)
        metrics = {f"eval_{name}": value for name, value in report.numbers.items()} | {"epoch": self.state.epoch or 0.0}
        self.state.log_history.append({**metrics, "step": report.step})
        self._tell("on_log", logs=dict(metrics))
        self._tell("on_evaluate", metrics=dict(metrics))

    def end(self) -> None:
        """The run is over, and its release is written."""
        self._tell("on_train_end")

    def _tell(self, event: str, **more: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self.args, self.state, self.control, **more)
            wishes = [f.name for f in fields(TrainerControl) if getattr(self.control, f.name)]
            if wishes:
                raise DPAlignError(
                    f"the callback {type(callback).__name__} sets {', '.join(wishes)}: callbacks are told, and steer "
                    "nothing; say max_steps, save_steps and logging_steps beforehand."
                )
