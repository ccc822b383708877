"""Progress on the terminal, in a job's log and in a tracker: public numbers, noised metrics and time, nothing else.

How long a step takes depends on who was drawn. So a private stage's clock is not read once it draws: time left, tokens
per second and the steps that a log shows follow from the seconds that self-written units took before the first draw,
and from the expected sample.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from ..errors import DPAlignError
from .numbers import at_most
from .terminal import Terminal

if TYPE_CHECKING:
    from ..training import StagePlan, StepReport

QUIET = (10.0, 60.0)  # seconds without a line in a log, at least and at most: one in twenty of those that have passed
LINES = 50  # at most, where no time is known
SHORT = {"completion_length": "length"}


class Reporter:
    """Prints to standard error, so that --json leaves standard output alone: a bar on a terminal, else whole lines."""

    def __init__(self, quiet: bool = False, console: Terminal | None = None) -> None:
        self.console = console or Terminal(stderr=True, quiet=quiet)
        self._progress: Progress | None = None
        self._tracker = None

    def note(self, message: str) -> None:
        self.console.say(message)

    def status(self, message: str) -> AbstractContextManager[object]:
        """Says what is being done, while it is done on a terminal."""
        if self.console.is_terminal:
            return self.console.status(message)
        self.note(f"{message} ...")
        return nullcontext()

    def start(
        self,
        stage: str,
        plan: StagePlan,
        units: float,
        unit: str,
        private: bool,
        tokens: float,
        seconds: float | None = None,
    ) -> None:
        """Says before the first draw what a stage is about to spend.

        Args:
            tokens: that a step reads and trains on, of the expected sample.
            seconds: that such a step is expected to take, if that is known before the first draw.
        """
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
        self._pace = Pace(plan.steps, tokens, seconds, None if private else time.monotonic)

    def step(self, report: StepReport) -> None:
        if self._tracker is not None and report.metrics is not None:
            values = {f"{report.stage}/noised_{k}": v for k, v in report.metrics.items()}
            self._tracker.log({**values, f"{report.stage}/epsilon": report.epsilon}, step=report.step)
        if self._progress is None:
            return
        left, speed = self._pace.after(report.step)
        noised = " ".join(f"{SHORT.get(k, k)} {v:.2f}" for k, v in (report.metrics or {}).items())
        spent = f"epsilon {at_most(report.epsilon, 2)}"
        if self.console.is_terminal:
            rest = ", ".join(filter(None, [noised and f"noised: {noised}", speed]))
            self._progress.update(
                self._task, completed=report.step, total=report.steps, left=left, spent=spent, rest=rest
            )
        elif self._pace.is_due(report.step):
            said = [f"{report.stage} {report.step}/{report.steps}", left, spent, noised and f"noised {noised}", speed]
            self.note(", ".join(filter(None, said)))

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
        try:
            with bar(self.console) as self._progress:
                total = self._pace.steps
                self._task = self._progress.add_task(stage, total=total, left="", spent="epsilon 0.00", rest="")
                yield
        finally:
            self._progress = None
            if accelerator is not None:
                accelerator.end_training()
                self._tracker = None


def bar(console: Terminal) -> Progress:
    """One line; where it is too narrow, its end is cut and the counter stays."""
    kept = Column(no_wrap=True)
    return Progress(
        TextColumn("[bold]{task.description}", table_column=kept),
        BarColumn(bar_width=8, table_column=kept),
        TextColumn("{task.completed:.0f}/{task.total:.0f}", table_column=kept),
        TextColumn("{task.fields[left]}", table_column=kept),
        TextColumn("{task.fields[spent]}", table_column=kept),
        TextColumn("[dim]{task.fields[rest]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
        console=console,
        disable=not console.is_terminal,
        expand=True,
    )


class Pace:
    """How fast a stage goes: as expected before its first draw, or, without privacy, as the mean since it began.

    Args:
        steps: of the stage. tokens: of a step with the expected sample. seconds: that it is expected to take, if that
            is known. clock: seconds; None where it would tell who was drawn.
    """

    def __init__(self, steps: int, tokens: float, seconds: float | None, clock: Callable[[], float] | None) -> None:
        self.steps, self.tokens, self.seconds, self.clock = steps, tokens, seconds, clock
        self.began = self.told = clock() if clock is not None else 0.0
        self.first: int | None = None  # the step at which this process goes on

    def after(self, step: int) -> tuple[str, str]:
        """Time left and tokens per second, in words; nothing where nobody may know."""
        taken = self._done(step)
        now = self._now(step)
        if now is None:
            return "done" if step == self.steps else "", ""
        each = max(now - self.began, 1e-9) / taken
        left = "done" if step == self.steps else f"{duration(each * (self.steps - step))} left"
        return left, f"{two_digits(self.tokens / each):,.0f} tokens/s"

    def is_due(self, step: int) -> bool:
        """Whether a log gets a line now: of the first and the last step, and in between now and then."""
        ends, now = self._done(step) == 1 or step == self.steps, self._now(step)
        if now is None:
            return ends or step % math.ceil(self.steps / LINES) == 0
        quiet = min(max(QUIET[0], (now - self.began) / 20), QUIET[1])
        if not ends and now - self.told < quiet:
            return False
        self.told = now
        return True

    def _done(self, step: int) -> int:
        """Steps of this process."""
        self.first = step - 1 if self.first is None else self.first
        return step - self.first

    def _now(self, step: int) -> float | None:
        if self.clock is not None:
            return self.clock()
        return None if self.seconds is None else self.seconds * self._done(step)


def two_digits(number: float) -> float:
    return float(f"{number:.2g}")


def duration(seconds: float) -> str:
    """In the unit that fits, to two digits."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{two_digits(seconds / size):g} {unit}"
    return f"{two_digits(seconds):g} s"
