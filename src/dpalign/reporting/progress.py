"""Progress on the terminal, in a job's log and in a tracker: public numbers, noised metrics and time, nothing else.

How long a step takes depends on who was drawn. So a private stage's clock is not read once it draws: time left, tokens
per second and the steps that a log shows follow from the seconds that self-written units took before the first draw,
and from the expected sample.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from .numbers import at_most
from .terminal import Terminal
from .trackers import Tracker

if TYPE_CHECKING:
    from ..evaluation.during import EvaluationReport
    from ..training import StagePlan, StepReport

QUIET = (10.0, 60.0)  # seconds without a line in a log, at least and at most: one in twenty of those that have passed
LINES = 50  # at most, where no time is known
SHORT = {"completion_length": "length"}
IN_A_LINE = {"loss": 3, "accuracy": 3, "nll": 3, "reward": 3, "kl": 2}  # of what is measured: decimals


class Reporter:
    """Prints to standard error, so that --json leaves standard output alone: a bar on a terminal, else whole lines."""

    def __init__(self, quiet: bool = False, console: Terminal | None = None) -> None:
        self.console = console or Terminal(stderr=True, quiet=quiet)
        self._progress: Progress | None = None
        self._tracker: Tracker | None = None
        self._done = 0

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
        done: int = 0,
    ) -> None:
        """Says before the first draw what a stage is about to spend.

        Args:
            tokens: that a step reads and trains on, of the expected sample.
            seconds: that such a step is expected to take, if that is known before the first draw.
            done: steps of the stages before this one.
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
        self._done = done
        if private and self._tracker is not None:
            self._tracker.hold()

    def start_own_text(self, stage: str, steps: int, prompts: int, read: str, tokens: float, done: int = 0) -> None:
        """Says what a stage that draws nothing is about to do; whoever watches its clock learns of no record.

        Args:
            prompts: of an update. read: where they are from, in words. tokens: that an update reads and trains on.
            done: steps of the run's stages before.
        """
        self.note(f"{stage}: {steps} updates of {prompts:,} prompts; it reads {read}, draws nothing and spends nothing")
        self._pace, self._done = Pace(steps, tokens, None, time.monotonic), done

    def step(self, report: StepReport) -> None:
        noised = "" if report.epsilon is None else "noised"
        numbers = {f"{noised and 'noised_'}{name}": value for name, value in (report.metrics or {}).items()}
        spent = {} if report.epsilon is None else {"epsilon": report.epsilon}
        self.publish(self._done + report.step, report.stage, numbers | spent)
        if self._progress is None:
            return
        left, speed = self._pace.after(report.step)
        said = " ".join(f"{SHORT.get(k, k)} {v:.2f}" for k, v in (report.metrics or {}).items())
        cost = "free" if report.epsilon is None else f"epsilon {at_most(report.epsilon, 2)}"
        if self.console.is_terminal:
            rest = ", ".join(filter(None, [said and f"{noised and 'noised: '}{said}", speed]))
            self._progress.update(
                self._task, completed=report.step, total=report.steps, left=left, spent=cost, rest=rest
            )
        elif self._pace.is_due(report.step):
            found = said and f"{noised} {said}".strip()
            line = [f"{report.stage} {report.step}/{report.steps}", left, cost, found, speed]
            self.note(", ".join(filter(None, line)))

    def publish(self, step: int, of: str, values: Mapping[str, Any]) -> None:
        """Numbers that anybody may see, for the tracker. step: of the whole run. of: what they are numbers of."""
        if self._tracker is not None:
            self._tracker.say(step, {f"{of}/{name}": value for name, value in values.items()})

    def evaluated(self, report: EvaluationReport) -> None:
        """What was measured on public records after a step."""
        numbers = {f"eval_{name}": value for name, value in report.numbers.items()}
        self.publish(self._done + report.step, report.stage, numbers)
        self.note(f"{report.stage} {report.step}/{report.steps} on public records: {measured(report.numbers)}")

    @contextmanager
    def tracking(self, report_to: str, folder: Path) -> Iterator[None]:
        """The tracker that is asked for, while a run lasts.

        Raises:
            DPAlignError: it cannot begin.
        """
        self._tracker = Tracker(report_to, folder, self.note) if report_to != "none" else None
        try:
            yield
        finally:
            if self._tracker is not None:
                self._tracker.end()
            self._tracker = None

    @contextmanager
    def showing(self, stage: str) -> Iterator[None]:
        """A progress bar while a stage runs."""
        try:
            with bar(self.console) as self._progress:
                total = self._pace.steps
                self._task = self._progress.add_task(stage, total=total, left="", spent="epsilon 0.00", rest="")
                yield
        finally:
            self._progress = None
            if self._tracker is not None:
                self._tracker.release()


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


def measured(numbers: Mapping[str, float]) -> str:
    """The numbers that a line has room for, with their intervals."""
    said = []
    for name, digits in IN_A_LINE.items():
        if (value := numbers.get(name)) is None:
            continue
        half = numbers.get(f"{name}_ci95", math.nan)
        said.append(f"{name} {value:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}"))
    return ", ".join(said)


def two_digits(number: float) -> float:
    return float(f"{number:.2g}")


def duration(seconds: float) -> str:
    """In the unit that fits, to two digits."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{two_digits(seconds / size):g} {unit}"
    return f"{two_digits(seconds):g} s"
