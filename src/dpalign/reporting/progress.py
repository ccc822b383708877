"""Progress on the terminal and in a tracker: public numbers and noised metrics, nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import DPAlignError
from .numbers import at_most
from .terminal import Terminal

if TYPE_CHECKING:
    from ..training import StagePlan, StepReport


class Reporter:
    """Prints to standard error, so that --json leaves standard output alone."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Terminal(stderr=True, quiet=quiet)
        self._progress: Progress | None = None
        self._tracker = None

    def note(self, message: str) -> None:
        self.console.say(message)

    def status(self, message: str) -> AbstractContextManager[object]:
        return self.console.status(message) if self.console.is_terminal else nullcontext()

    def start(self, stage: str, plan: StagePlan, units: float, unit: str, private: bool) -> None:
        """Says before the first draw what a stage is about to spend."""
        budget = (
            f"epsilon {at_most(plan.epsilon)} at delta {plan.target_delta:.2g}, "
            f"noise multiplier {plan.noise_multiplier:.4f}"
            if private
            else "NOT PRIVATE (no noise, or a known seed)"
        )
        self.note(
            f"{stage}: {plan.steps} steps, each a Poisson sample of {plan.sampling_rate:.4f} of {units:g} units "
            f"(unit: {unit}); {budget}"
        )

    def step(self, report: StepReport) -> None:
        if self._tracker is not None and report.metrics is not None:
            values = {f"{report.stage}/noised_{k}": v for k, v in report.metrics.items()}
            self._tracker.log({**values, f"{report.stage}/epsilon": report.epsilon}, step=report.step)
        if self._progress is None:
            return
        short = {"completion_length": "tokens"}
        noised = " ".join(f"{short.get(k, k)} {v:.2f}" for k, v in (report.metrics or {}).items())
        spent = at_most(report.epsilon, 2)
        self._progress.update(self._task, completed=report.step, total=report.steps, epsilon=spent, noised=noised)

    @contextmanager
    def tracking(self, report_to: str, folder: Path, stage: str) -> Iterator[None]:
        """A progress bar, and the tracker if one is asked for, while a stage runs."""
        accelerator = None
        if report_to != "none":
            from accelerate import Accelerator

            try:
                accelerator = Accelerator(cpu=True, log_with=report_to, project_dir=str(folder))
                accelerator.init_trackers(stage)
            except (ImportError, ValueError):
                raise DPAlignError(
                    f"report_to {report_to} needs its package: pip install 'dpalign[{report_to}]'."
                ) from None
            self._tracker = accelerator
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("left, stage's epsilon {task.fields[epsilon]}"),
            TextColumn("[dim]noised: {task.fields[noised]}"),
        )
        try:
            with Progress(*columns, console=self.console) as self._progress:
                self._task = self._progress.add_task(stage, total=None, epsilon="0.00", noised="")
                yield
        finally:
            self._progress = None
            if accelerator is not None:
                accelerator.end_training()
                self._tracker = None
