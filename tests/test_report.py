"""The report of a run: what it says, whom it may be shown to, and how it looks on a phone."""

from __future__ import annotations

import json
import math
import re
import shutil
import statistics
from html.parser import HTMLParser
from pathlib import Path

import pytest

from browser import needs_chromium, too_wide
from dpalign.privacy.accountant import SampledGaussian
from dpalign.privacy.entropy import SystemEntropy
from dpalign.privacy.gate import PrivateStep, Sample
from dpalign.privacy.mechanism import MetricRange
from dpalign.reporting.charts import Measured, Series, curves, intervals
from dpalign.reporting.html import write_report
from finished import DELTA, LONG, finished_run, statement
from helpers import call


class Reading(HTMLParser):
    """What a page says, what it would fetch, and the commands in it."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.words: list[str] = []
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [
            v for k, v in attrs if k in ("src", "href", "xlink:href", "action", "data") and not v.startswith("#")
        ]

    def handle_data(self, data):
        if self.tags[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def public(folder: Path, *beside: Path) -> Reading:
    return Reading(write_report(folder, beside))


def private(folder: Path) -> Reading:
    return Reading(folder / "private" / "report.html")


@pytest.fixture
def run(tmp_path) -> Path:
    return finished_run(tmp_path / "support")


def test_it_says_what_was_spent_on_whom_and_how(run):
    said = public(run).text
    spent = statement("").epsilon
    assert f"ε ≤ {math.ceil(spent * 1000) / 1000:.3f}, δ = 1e-5" in said and "all data of any one customer" in said
    for name, value in {
        "unit": "customer", "data set": "support-chats", "units N (declared)": "12,500.5", "sampling rate q": "0.32000",
        "expected sample qN": "4,000", "samples drawn (steps)": "60", "passes over a sample": "1", "noise multiplier σ": "4.0000",
        "σ of the metrics": "40.0000", "clipping bound C": "0.5", "part of the units": "50% to 100% of the hash range",
        "dpalign": "0.2",
    }.items():  # fmt: skip
        assert f"{name} {value}" in said, name
    assert "private RLOO" in said and "assumed of support-chats" in said and "hyperparameters chosen by looking" in said
    assert "support-chats: 3 run(s), together epsilon 7.322 at δ 1e-5; 1 of them ran WITHOUT privacy" in said


def test_it_says_what_was_measured_with_intervals(run):
    said = public(run).text
    assert (
        "1000 prompts" in said.replace(",", "")
        and "0.562 ± 0.050" in said
        and "reference reward (outside the guarantee)" in said
    )
    assert "0.750 ± 0.125" in said and said.count("12.25") >= 3
    assert re.findall(r"(?:pretrained|sft|rloo) (free|ε ≤) ?[0-9.]* 0", said) == ["free", "ε ≤", "ε ≤"]


def test_what_was_not_to_be_had_is_a_dash(run):
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    summary["evaluation"]["rloo"] |= dict.fromkeys(("reward", "reward_ci95", "kl"))
    summary["sft"] = dict.fromkeys(summary["sft"]) | {"pairs": 80}
    (run / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    assert "accuracy - ± -" in public(run).text


def test_a_prompt_stands_once_and_completions_are_whole(run):
    long = json.loads((run / "completions.json").read_text(encoding="utf-8"))
    long[0]["rloo"] = "It is\n\n  as long as it is " + "and so on " * 200
    (run / "completions.json").write_text(json.dumps(long), encoding="utf-8")
    said = public(run).text
    assert [said.count(f"support-chats asks {i}?") for i in range(3)] == [1, 1, 1]
    assert said.count("and so on") == 200 and "support-chats base 2" in said and "support-chats aligned 1" in said


def test_every_noised_metric_has_a_curve_and_a_band(run):
    page = public(run)
    drawn = (run / "report.html").read_text(encoding="utf-8")
    assert drawn.count('class="line own"') == 6 and drawn.count('class="band own"') == 4  # epsilon, twice, has no noise
    for title in ("loss", "reward", "KL (nats per completion)", "support-chats", "ε of the stage"):
        assert f"<figcaption>{title}</figcaption>" in drawn
    assert page.tags.count("svg") == 4 + 6


def test_the_command_that_it_gives_computes_the_stages_epsilon(run, capsys):
    commands = re.findall(r"Recompute: dpalign (plan [^\n]+?)(?= rloo| Measured)", public(run).text)
    assert len(commands) == 2
    plan = call(capsys, *commands[0].split(), "--json").json
    assert plan["epsilon"] == pytest.approx(statement("").epsilon, rel=1e-6) and plan["delta"] == DELTA


def test_the_band_is_the_noise_that_the_mechanism_adds():
    """Mutant: the deviation of a metric without the others beside it (no square root of their number)."""
    ranges = (MetricRange("reward", -1.0, 1.0), MetricRange("kl", 0.0, 40.0), MetricRange("length", 0.0, 10.0))
    step = PrivateStep(SampledGaussian(0.5, 1.0, 1, 1, 6.0), max_grad_norm=1.0, divisor=32.0, metrics=ranges)
    mechanism = Sample(step, [], SystemEntropy()).mechanism([])
    released = [mechanism.release()[1] for _ in range(3000)]
    for name, deviation in step.metrics_deviation().items():
        assert statistics.stdev(metrics[name] for metrics in released) == pytest.approx(deviation, rel=0.1)


# Whom it may be shown to -----------------------------------------------------------------------------------------


def test_what_is_published_is_made_from_what_lies_outside_private(run):
    """Mutant: the data holder's section on the public page."""
    write_report(run)
    with_private = (run / "report.html").read_bytes()
    shutil.rmtree(run / "private")
    write_report(run)
    assert (run / "report.html").read_bytes() == with_private and not (run / "private").exists()


def test_the_data_holder_reads_more(run):
    theirs, ours = public(run).text, private(run).text
    only = (
        "dpalign run support-chats",
        "1,234 s",
        "988 MB",
        "records that are cut 4,321",
        "units that teach nothing 11",
        "0.812 ± 0.031",
    )
    for words in (*only, "Stays with the data holder"):
        assert words in ours and words not in theirs, words
    assert (run / "private" / "report.html").stat().st_mode & 0o777 == 0o600


def test_a_run_without_privacy_is_shown_beside_to_the_data_holder_alone(run, tmp_path):
    bare = finished_run(tmp_path / "bare", private=False)
    theirs, ours = public(run, bare).text, private(run).text
    assert "rloo, bare (without privacy) not covered" in ours and "bare" not in theirs
    # One with a guarantee is compared with in public, and so is demo data.
    other = finished_run(tmp_path / "other")
    assert "rloo, other ε ≤" in public(run, other).text
    demo, bare = finished_run(tmp_path / "demo", demo=True), finished_run(tmp_path / "plain", private=False, demo=True)
    page = public(demo, bare)
    assert "rloo, plain (without privacy) not covered" in page.text and 'class="line bare"' in (
        demo / "report.html"
    ).read_text("utf-8")
    assert page.text.count("support-chats aligned 0") == 2 and page.text.count("support-chats asks 0?") == 1
    # Private data beside demo data: the public baseline of it is none.
    assert "plain" not in public(run, bare).text


def test_a_run_without_privacy_says_so_first(tmp_path):
    said = public(finished_run(tmp_path / "bare", private=False)).text
    assert (
        said.index("NOT PRIVATE") < said.index("private supervised") and "ε ≤" not in said and "Recompute" not in said
    )


def test_nothing_is_fetched_or_run(run):
    page = public(run)
    assert not page.fetched and not {"script", "link", "img", "iframe", "object", "form"} & set(page.tags)
    assert "default-src 'none'" in (run / "report.html").read_text(encoding="utf-8")


# The command -------------------------------------------------------------------------------------------------------


def test_the_command(run, tmp_path, capsys):
    bare = finished_run(tmp_path / "bare", private=False)
    made = call(capsys, "report", run, "--beside", bare, "--json").json
    assert made == {
        "report": str(run / "report.html"), "private_report": str(run / "private" / "report.html"), "only_private": [str(bare)],
    }  # fmt: skip
    assert "is in the data holder's report only" in call(capsys, "report", run, "--beside", bare).out


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("summary.json", None, "holds no finished run"),
        ("summary.json", "{", "is no JSON"),
        ("summary.json", "[" * 100_000, "is no JSON"),
        ("completions.json", "nothing", "is no JSON"),
        ("summary.json", '{"epsilon": 4}', "older dpalign"),
        ("summary.json", '{"not_covered": [], "epsilon": "x"}', "files that no run writes"),
        ("summary.json", "[]", "older dpalign"),
        ("summary.json", ("assumptions", 1), "files that no run writes"),
        ("summary.json", ("versions", True), "files that no run writes"),
        ("summary.json", ("passes", 0), "files that no run writes"),
        ("completions.json", "{}", None),
        ("completions.json", "[3]", "files that no run writes"),
        ("metrics.jsonl", '{"stage": "sft", "noised_metrics": 3}\n', "files that no run writes"),
        ("private/data.json", "[]", "files that no run writes"),
        ("private/data.json", "{", "is no JSON"),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_finished_run(run, file, content, sentence, capsys):
    if content is None:
        (run / file).unlink()
    elif isinstance(content, tuple):
        changed = json.loads((run / file).read_text(encoding="utf-8"))
        mechanism = {"passes": 0, "metrics_noise_multiplier": "inf"}
        changed |= dict([content])
        changed["stages"][0]["mechanisms"][0] |= mechanism if content[0] == "passes" else {}
        (run / file).write_text(json.dumps(changed), encoding="utf-8")
    else:
        (run / file).write_text(content, encoding="utf-8")
    called = call(capsys, "report", run)
    assert called.status == 0 if sentence is None else sentence in called.error


# How it looks ------------------------------------------------------------------------------------------------------


def test_the_geometry_by_hand():
    chart = curves("loss", [Series("a", "own", [(1, 2.0, 1.0), (3, 4.0, 1.0), (2, math.nan, 1.0)])])
    (line,) = chart.lines
    # Steps 1 to 3 with 6% room lie between 46 and 328, values 1 to 5 between 166 and 12.
    assert line.dots[0] == pytest.approx((46 + 0.12 / 2.24 * 282, 166 - 1.24 / 4.48 * 154))
    assert line.dots[1] == pytest.approx((328 - 0.12 / 2.24 * 282, 166 - 3.24 / 4.48 * 154))
    assert line.band.endswith("Z") and line.band.count("L") == 3
    assert [tick.label for tick in chart.across] == ["1", "2", "3"]
    assert curves("loss", [Series("a", "own", [])]) is None
    many = curves("loss", [Series("a", "own", [(i, 0.0, 0.0) for i in range(4001)])])
    assert (
        many.lines[0].path.count("L") <= 400 and many.every == 11 and not many.lines[0].band and not many.lines[0].dots
    )
    bars = intervals("reward", [Measured("a", "own", 1.0, 1.0, "1"), Measured("b", "free", 2.0, 0.0, "2")])
    assert [(round(b.low), round(b.high)) for b in bars.bars] == [(25, 311), (311, 311)]


@needs_chromium
def test_nothing_has_to_be_scrolled_sideways(tmp_path):
    """Mutant: a page that does not break long words, or keeps its tables as they are, is too wide for a phone."""
    run = finished_run(tmp_path / LONG[:100], said=LONG, unit=LONG)
    write_report(run)
    page = run / "report.html"
    assert too_wide([page, run / "private" / "report.html"], tmp_path) == []
    unbroken = tmp_path / "unbroken.html"
    unbroken.write_text(page.read_text(encoding="utf-8").replace("overflow-wrap: anywhere", ""), encoding="utf-8")
    assert len(too_wide([unbroken], tmp_path, (420,))) == 1
