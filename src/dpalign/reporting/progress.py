"""Progress on the terminal, in a job's log and in a tracker: public numbers, noised metrics and time, nothing else.

How long a step takes depends on who was drawn. So what is said of a private stage's speed follows from the seconds that
self-written units took before the first draw, and from the expected sample: time left, tokens per second, the steps
that a log shows, and what a heartbeat holds the time against that has passed since a step began. Nothing counts how far
a step has come among the units that were drawn.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from .heartbeat import EVERY, Heartbeat
from .numbers import at_most, duration, two_digits
from .terminal import Terminal, plain
from .trackers import Tracker

if TYPE_CHECKING:
    from ..evaluation.during import EvaluationReport
    from ..training import StagePlan, StepReport

QUIET = (10.0, 20.0)  # seconds without a line in a log, at least and at most: one in twenty of those that have passed
LINES = 50  # at most, where no time is known
SHORT = {"completion_length": "length"}
IN_A_LINE = {"loss": 3, "accuracy": 3, "nll": 3, "reward": 3, "kl": 2}  # of what is measured: decimals


class Reporter:
    """Prints to standard error, so that --json leaves standard output alone: a bar on a terminal, else whole lines."""

    def __init__(self, quiet: bool = False, console: Terminal | None = None) -> None:
        self.console = console or Terminal(stderr=True, quiet=quiet)
        self._progress: Progress | None = None
        self._tracker: Tracker | None = None
        self._heartbeat: Heartbeat | None = None  # of the stage that runs
        self._done = 0

    def note(self, message: str) -> None:
        self.console.say(message)

    @contextmanager
    def status(self, message: str) -> Iterator[None]:
        """Says what is being done, and now and then that it still is."""
        if self.console.quiet:
            yield
        elif self.console.is_terminal:
            with self.console.status(message) as shown:
                tell = lambda what, passed: shown.update(plain(f"{what}: {passed}"))  # noqa: E731
                with Heartbeat(tell, EVERY / 6) as heartbeat:
                    heartbeat.about(message)
                    yield
        else:
            self.note(f"{message} ...")
            with Heartbeat(self._still) as heartbeat:
                heartbeat.about(message)
                yield

    def _still(self, what: str, passed: str) -> None:
        self.note(f"{what}: {passed}")

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
        """Says before the first draw what a stage is about to spend.

        Args:
            units: of the stage's part of its data, expected. total: of all of it; default: the part is all.
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
        whose = f"{units:,.0f} units"
        if total is not None and total != units:  # who is in the part is nobody's to know, so that its size is expected
            whose = f"about {units:,.0f} units, which a secret hash takes of {total:,.0f}"
        self.note(
            f"{stage}: {plan.steps} steps, each a Poisson sample of about {plan.sampling_rate * units:,.0f} from "
            f"{whose} (unit: {unit}; probability {plan.sampling_rate:.4f}); {budget}"
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

    def begin(self, first: int, last: int) -> None:
        """Steps that are computed together begin."""
        if self._heartbeat is not None:
            steps = f"step {first}" if first == last else f"steps {first} to {last}"
            expected = self._pace.expected(last - first + 1)
            self._heartbeat.about(f"{self._stage}: {steps} of {self._pace.steps}", expected)

    def measuring(self) -> None:
        """The stage's model is measured on public records."""
        if self._heartbeat is not None:
            self._heartbeat.about(f"{self._stage}: measuring on public records")

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
            now: dict[str, Any] = {"now": "", "left": left, "spent": cost, "rest": rest}
            self._progress.update(self._task, completed=report.step, total=report.steps, **now)
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

    def _now(self, what: str, passed: str) -> None:
        if self._progress is not None:
            self._progress.update(self._task, now=passed)

    @contextmanager
    def showing(self, stage: str) -> Iterator[None]:
        """A progress bar while a stage runs; in a log, a line now and then where a step takes long."""
        self._stage = stage
        try:
            with bar(self.console) as self._progress:
                total = self._pace.steps
                fields: dict[str, Any] = {"now": "", "left": "", "spent": "epsilon 0.00", "rest": ""}
                self._task = self._progress.add_task(stage, total=total, **fields)
                if self.console.quiet:
                    yield
                    return
                on_terminal = self.console.is_terminal
                tell = self._now if on_terminal else self._still
                with Heartbeat(tell, EVERY / 6 if on_terminal else EVERY) as self._heartbeat:
                    self._heartbeat.about(f"{stage}: preparing")
                    yield
        finally:
            self._progress = self._heartbeat = None
            if self._tracker is not None:
                self._tracker.release()


def bar(console: Terminal) -> Progress:
    """One line; where it is too narrow, its end is cut and the counter stays."""
    kept = Column(no_wrap=True)
    return Progress(
        TextColumn("[bold]{task.description}", table_column=kept),
        BarColumn(bar_width=8, table_column=kept),
        TextColumn("{task.completed:.0f}/{task.total:.0f}", table_column=kept),
        TextColumn("{task.fields[now]}", table_column=kept),
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
        self.taken = 0  # steps of this process

    def after(self, step: int) -> tuple[str, str]:
        """Time left and tokens per second, in words; nothing where nobody may know."""
        taken = self._done(step)
        now = self._now(step)
        if now is None:
            return "done" if step == self.steps else "", ""
        each = max(now - self.began, 1e-9) / taken
        left = "done" if step == self.steps else f"{duration(each * (self.steps - step))} left"
        return left, f"{two_digits(self.tokens / each):,.0f} tokens/s"

    def expected(self, steps: int) -> float | None:
        """Seconds that so many steps may take; None where nobody knows."""
        if self.clock is None:
            return None if self.seconds is None else self.seconds * steps
        return None if self.first is None else (self.clock() - self.began) / self.taken * steps

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
        self.taken = step - self.first
        return self.taken

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
