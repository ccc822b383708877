"""What a terminal and a job's log show while a run goes on, and at its end: soon, whole, and public or noised."""

from __future__ import annotations

import io
import json
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from dpalign.cli import train
from dpalign.errors import DPAlignError
from dpalign.privacy import gate
from dpalign.reporting import heartbeat as heartbeat_module
from dpalign.reporting import progress
from dpalign.reporting.heartbeat import EVERY, Heartbeat
from dpalign.reporting.numbers import duration
from dpalign.reporting.progress import Pace, Reporter
from dpalign.reporting.terminal import Terminal
from dpalign.training import StagePlan, StepReport
from dpalign.training.self_check import check_stage
from helpers import call, write_recipe


class Clock:
    """Seconds that pass only when they are told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


PLAN = StagePlan(
    steps=60, sampling_rate=0.1, passes=1, minibatches=1, noise_multiplier=1.0, metrics_noise_ratio=10.0,
    target_epsilon=4.0, target_delta=1e-5, epsilon=3.9,
)  # fmt: skip
METRICS = {"reward": 0.3149, "kl": 12.5, "loss": -3.25, "completion_length": 15.75}


def told(monkeypatch, tmp_path: Path, seconds: float, steps: range = range(1, 61), width: int | None = None) -> str:
    """What a stage of 60 steps says, each expected to take so many seconds; on a terminal of that width, or in a log."""
    monkeypatch.setattr(progress.time, "monotonic", lambda: pytest.fail("a private stage's clock is read"))
    out = io.StringIO()
    options = {"force_terminal": True, "width": width} if width else {"force_terminal": False}
    reporter = Reporter(console=Terminal(file=out, **options))
    reporter.start("reward_model", PLAN, 1000, "user", True, tokens=1000 * seconds, seconds=seconds)
    with reporter.showing("reward_model"):
        for step in steps:
            reporter.step(StepReport("reward_model", step, 60, 4.0 * step / 60, METRICS))
    return out.getvalue()


# In a log --------------------------------------------------------------------------------------------------------------


def lines(text: str) -> dict[int, str]:
    """Lines of a log by step."""
    found = [line for line in text.splitlines() if line.startswith("reward_model ")]
    return {int(line.split()[1].partition("/")[0]): line for line in found}


def test_a_log_has_whole_lines_at_intervals(monkeypatch, tmp_path):
    text = told(monkeypatch, tmp_path, 4.0)
    shown = lines(text)
    assert list(shown)[:4] == [1, 4, 7, 10] and max(shown) == 60 and len(shown) < 25
    assert shown[1] == (
        "reward_model 1/60, 3.9 min left, epsilon 0.07, noised reward 0.31 kl 12.50 loss -3.25 length 15.75, "
        "1,000 tokens/s"
    )
    assert ", 3.5 min left, epsilon 0.47, " in shown[7] and shown[60].startswith(
        "reward_model 60/60, done, epsilon 4.00"
    )
    assert "\r" not in text and "\x1b" not in text and text.splitlines()[0].startswith("reward_model: 60 steps, each")


@pytest.mark.parametrize(("seconds", "gap"), [(0.01, 59), (4.0, 16), (50.0, 100), (600.0, 600)])
def test_a_log_is_neither_full_nor_silent(monkeypatch, tmp_path, seconds, gap):
    shown = list(lines(told(monkeypatch, tmp_path, seconds)))
    assert shown[0] == 1 and shown[-1] == 60
    waits = [(b - a) * seconds for a, b in pairwise(shown)]
    assert max(waits) <= gap
    assert min(waits[:-1], default=60.0) >= min(10.0, 60 * seconds)


def test_a_resumed_stage_counts_its_own_steps(monkeypatch, tmp_path):
    shown = lines(told(monkeypatch, tmp_path, 4.0, range(31, 61)))
    assert list(shown)[:2] == [31, 34] and "120 s left" in shown[31] and ", 1,000 tokens/s" in shown[31]


def test_durations_have_two_digits():
    said = [duration(seconds) for seconds in (0.4, 41.3, 119, 121, 3599, 7300, 123456)]
    assert said == ["0.4 s", "41 s", "120 s", "2 min", "60 min", "2 h", "34 h"]


# While a step goes on --------------------------------------------------------------------------------------------------


def test_what_takes_long_says_every_half_minute_that_it_lives():
    clock, said = Clock(), []
    heartbeat = Heartbeat(lambda what, passed: said.append(f"{what}: {passed}"), clock=clock)
    heartbeat.about("sft: step 3 of 8", 90.0)
    for clock.now in range(100):
        heartbeat.look()
    assert said == [f"sft: step 3 of 8: {passed} s of about 90 s" for passed in (30, 60, 90)]
    heartbeat.about("sft: step 4 of 8", None)  # begins again, whatever has passed
    for clock.now in range(100, 131):
        heartbeat.look()
    assert said[3:] == ["sft: step 4 of 8: 30 s so far"]
    clock.now = 255  # a machine that slept says once that it did, and by whole half minutes: not when it was asked
    heartbeat.look()
    assert said[4:] == ["sft: step 4 of 8: 2.5 min so far"]


def test_a_heartbeat_ends_with_what_it_is_about():
    before = threading.active_count()
    with pytest.raises(DPAlignError), Heartbeat(lambda what, passed: None) as heartbeat:
        heartbeat.about("sft: step 1 of 2", 1.0)
        assert threading.active_count() == before + 1
        raise DPAlignError("stopped")
    assert threading.active_count() == before


@pytest.mark.parametrize("broken", [BrokenPipeError, ValueError("I/O operation on closed file")])
def test_a_reader_who_has_gone_ends_the_heartbeat_and_nothing_else(broken, monkeypatch):
    def tell(what: str, passed: str) -> None:
        raise broken

    monkeypatch.setattr(heartbeat_module, "LOOK", 0.001)
    with Heartbeat(tell, every=0.0001) as heartbeat:
        heartbeat._thread.join(5)
        assert not heartbeat._thread.is_alive()


class Beats:
    """A heartbeat that is asked, and never asks the time itself."""

    def __init__(self, tell, every=EVERY):
        self.tell, self.every = tell, every
        BEATS.append(self)

    def about(self, what, expected=None):
        self.told = what, expected

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


BEATS: list[Beats] = []


@pytest.mark.parametrize("seconds", [45.0, None])
def test_a_private_step_is_held_against_self_written_units(monkeypatch, seconds):
    """The same at every step: nothing that was drawn, and no time that a step really took, comes into it."""
    monkeypatch.setattr(progress, "Heartbeat", Beats)
    monkeypatch.setattr(progress.time, "monotonic", lambda: pytest.fail("a private stage's clock is read"))
    out = io.StringIO()
    reporter = Reporter(console=Terminal(file=out, force_terminal=False))
    reporter.start("sft", PLAN, 1000, "user", True, tokens=1000, seconds=seconds)
    with reporter.showing("sft"):
        beats = BEATS[-1]
        assert beats.told == ("sft: preparing", None)
        for step in (1, 2):
            reporter.begin(step, step)
            assert beats.told == (f"sft: step {step} of 60", seconds)
            reporter.step(StepReport("sft", step, 60, 1.0, METRICS))
        reporter.begin(3, 6)
        assert beats.told == ("sft: steps 3 to 6 of 60", seconds and 4 * seconds)
        reporter.measuring()
        assert beats.told == ("sft: measuring on public records", None)
        beats.tell("sft: step 3 of 60", "30 s of about 90 s")
    assert out.getvalue().splitlines()[-1] == "sft: step 3 of 60: 30 s of about 90 s" and beats.every == EVERY


def test_without_private_data_a_step_is_held_against_those_before_it(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "Heartbeat", Beats)
    monkeypatch.setattr(progress.time, "monotonic", clock)
    reporter = Reporter(console=Terminal(file=io.StringIO(), force_terminal=False))
    reporter.start_own_text("ppo", 4, 8, "prompts", 100.0)
    with reporter.showing("ppo"):
        reporter.begin(1, 1)
        assert BEATS[-1].told == ("ppo: step 1 of 4", None)
        clock.now = 40.0
        reporter.step(StepReport("ppo", 1, 4, None, None))
        reporter.begin(2, 2)
        assert BEATS[-1].told == ("ppo: step 2 of 4", 40.0)


def test_every_step_says_that_it_begins_before_it_is_drawn(tmp_path, capsys, monkeypatch):
    said = []
    monkeypatch.setattr(Reporter, "begin", lambda self, first, last: said.append((first, last)))
    draw = gate.poisson_sample
    monkeypatch.setattr(gate, "poisson_sample", lambda *how: [said.append("drawn"), draw(*how)][1])
    stage = {"max_steps": 2, "expected_batch_size": 8}
    assert call(capsys, "sft", write_recipe(tmp_path, ppo=None, sft=stage)).status == 0
    assert said == [(1, 1), "drawn", (2, 2), "drawn"]


def test_a_status_lives_too(monkeypatch):
    monkeypatch.setattr(progress, "Heartbeat", Beats)
    out = io.StringIO()
    reporter = Reporter(console=Terminal(file=out, force_terminal=False))
    with reporter.status("loading the model"):
        BEATS[-1].tell(BEATS[-1].told[0], "30 s so far")
    assert out.getvalue() == "loading the model ...\nloading the model: 30 s so far\n"
    shown = io.StringIO()
    with Reporter(console=Terminal(file=shown, force_terminal=True, width=80)).status("loading the model"):
        BEATS[-1].tell(BEATS[-1].told[0], "5 s so far")
        time.sleep(0.2)  # the line is drawn by rich, some ten times a second
    assert "loading the model: 5 s so far" in shown.getvalue() and BEATS[-1].every < EVERY


def test_half_a_unit_is_not_told():
    """Half of 9,605 units: which ones, a secret hash decides, so that nobody knows how many it takes."""
    out = io.StringIO()
    reporter = Reporter(console=Terminal(file=out, force_terminal=False, width=400))
    reporter.start("sft", PLAN, 4802.5, "record", True, tokens=1.0, total=9605.0)
    reporter.start("sft", PLAN, 1000, "user", True, tokens=1.0, total=1000)
    first, second = out.getvalue().splitlines()
    assert first.startswith(
        "sft: 60 steps, each a Poisson sample of about 480 from about 4,802 units, which a secret hash takes of 9,605 "
        "(unit: record; probability 0.1000); epsilon 3.900"
    )
    assert "about 100 from 1,000 units (unit: user; probability 0.1000)" in second


# On a terminal ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 60, 140])
def test_the_counter_survives_a_narrow_terminal(monkeypatch, tmp_path, width):
    text = told(monkeypatch, tmp_path, 4.0, width=width)
    last = [line for line in Terminal(width=width).render_str(text).plain.splitlines() if "60/60" in line][-1]
    plain = "".join(part for part in last.split("\x1b") if part)
    assert "60/60" in plain and "epsilon 4.00" in text and "done" in text
    assert ("length 15.75" in text) == (width == 140)


# Public or noised ------------------------------------------------------------------------------------------------------


def test_what_is_shown_does_not_tell_who_was_drawn(tmp_path, capsys, monkeypatch):
    """Two runs that draw other units, other numbers of them, and take longer for more: every line is the same."""

    def expected(*stage, **how) -> float:
        assert check_stage(*stage, **how) > 0
        return 0.5  # seconds of a self-written unit, which are this machine's

    monkeypatch.setattr("dpalign.run.check_stage", expected)
    said = []
    for number, drawn in enumerate((3, 11)):
        folder = tmp_path / str(number)
        folder.mkdir()

        def draw(units, rate, entropy, drawn=drawn):
            time.sleep(drawn / 20)
            return np.sort(np.random.default_rng().permutation(units)[:drawn])

        monkeypatch.setattr("dpalign.privacy.gate.poisson_sample", draw)
        stage = {"max_steps": 2, "metrics_noise_ratio": 0, "expected_batch_size": 8}
        called = call(capsys, "sft", write_recipe(folder, ppo=None, sft=stage))
        assert called.status == 0 and f"next: dpalign generate {folder}/run/release --prompt" in called.out
        assert "data.json in" in called.out and " MB at the peak" not in called.out + called.err
        said.append(called.err.replace(str(folder), ""))
    assert said[0] == said[1]
    shown = said[0].splitlines()
    assert (
        shown[0] == "loading the libraries ..." and "reading the data ..." in shown and "loading the model ..." in shown
    )
    assert shown.index("reading the data ...") < shown.index("trying the stages on self-written text ...")
    (first,) = [line for line in shown if line.startswith("sft 1/2, ")]
    assert first.startswith("sft 1/2, 4 s left, epsilon ") and first.endswith(", 32 tokens/s")  # of 8 units x 16 tokens


def test_where_no_time_is_known_none_is_told_and_without_privacy_the_clock_is():
    private, open_ = Pace(120, 1000, None, None), Clock()
    assert [private.after(step) for step in (1, 120)] == [("", ""), ("done", "")]
    assert [step for step in range(1, 121) if private.is_due(step)] == [1, *range(3, 121, 3)]
    measured = Pace(120, 1000, 7.0, open_)
    open_.now = 4.0
    assert measured.after(1) == ("7.9 min left", "250 tokens/s")


# The end ---------------------------------------------------------------------------------------------------------------


def test_the_end_says_what_a_data_holder_wants_to_know(tmp_path):
    private = tmp_path / "a run" / "private"
    private.mkdir(parents=True)
    (private / "resources.json").write_text(json.dumps({"seconds": 754.2, "peak_memory_mb": 1234.5}))
    survey = {"records": 40, "limit": 7, "cut": 39, "longest": 30, "nine_in_ten": 20, "empty": 0, "units": 40}
    (private / "data.json").write_text(json.dumps({"sft": survey | {"idle_units": 0}}))
    run = private.parent
    here = train.ends(run, run / "release", is_terminal=True)
    assert here[0] == "for the data holder alone: 13 min, 1,234 MB at the peak."
    assert here[1].startswith("for the data holder alone: sft: 39 of 40 records are cut at 7 tokens")
    assert here[2] == f"next: dpalign generate '{run}/release' --prompt 'What to complete'"
    elsewhere = train.ends(run, run / "reward_model", is_terminal=False)
    said = elsewhere[0].replace(str(run), "RUN")  # the folder's own name may hold any number
    assert len(elsewhere) == 2 and not any(number in said for number in ("754", "13 min", "1,234", "39", "cut"))
    assert elsewhere[1].endswith(f"reward.source reward_model:'{run}/reward_model'")
