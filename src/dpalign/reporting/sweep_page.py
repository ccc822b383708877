"""The report of a sweep: `report.html`, which may be published, and the data holder's `private/report.html`.

A sweep on private data may have runs without privacy in it, for comparison. The page to publish leaves them out, and
what is computed from them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DPAlignError
from ..files import private_folder, read_lines, write_text
from ..printable import printable
from ..results import FREE as READS_NOTHING
from ..results import PRETRAINED, Finished
from .charts import Intervals, Measured, intervals
from .html import REPORT, UNWRITABLE, ledger_line, read_json, render
from .numbers import at_most
from .sweep import bought_sentences, grid

SWEEP, RUNS = "sweep.json", "runs.jsonl"
CHARTED = {"reward": ("reward_mean", "reward_ci95"), "reference reward": ("reference_reward", "reference_reward_ci95"),
           "KL (nats)": ("kl", "kl_ci95")}  # fmt: skip
LABEL = 34  # characters that fit beside a number in a chart
FREE, OWN, BARE = "free", "own", "bare"  # styles of what nothing private was used for, of private runs, and of others


@dataclass(frozen=True)
class Setting:
    """A row of the table: an epsilon and a varied value, over seeds."""

    name: str
    style: str
    cost: str
    row: Mapping[str, Any]
    cells: Mapping[str, str]


def write_sweep_report(folder: Path) -> tuple[Path, list[str]]:
    """Writes a sweep's two pages; returns the one that may be published, and settings that only the other one shows.

    Raises:
        DPAlignError: there is no finished sweep, or it has files that no sweep writes.
    """
    found = read_json(folder / SWEEP, None)
    try:
        found["rows"] = [{k: math.nan if v is None else v for k, v in row.items()} for row in found["rows"]]
        runs = [Finished.from_json(line) for line in read_lines(folder / RUNS)]
        settings = settings_of(found, runs)
        is_demo = all(entry["demo_data"] for entry in found["spent_by_tuning"])
        hidden = [] if is_demo else [setting.name for setting in settings if setting.style == BARE]
        name = folder.resolve().name
        pages = page_of(name, found, runs, is_public=not is_demo), page_of(name, found, runs, is_public=False)
        page = render(pages[0], "sweep.html.jinja")
        own = render(pages[1] | {"holder": bool(hidden), "command": found["command"]}, "sweep.html.jinja")
    except UNWRITABLE:
        raise DPAlignError(
            f"{folder} holds files that no sweep writes: call the sweep again, no run is repeated."
        ) from None
    write_text(folder / REPORT, page)
    write_text(private_folder(folder / "private") / REPORT, own)
    return folder / REPORT, hidden


def page_of(name: str, sweep: Mapping[str, Any], runs: Sequence[Finished], *, is_public: bool) -> dict[str, Any]:
    """Everything that the template shows.

    Args:
        is_public: what no guarantee covers is left out.
    """
    settings = [s for s in settings_of(sweep, runs, is_public=is_public) if not (is_public and s.style == BARE)]
    shown = [run for run in runs if not (is_public and style_of(run) == BARE)]
    columns = [heading for heading in grid(dict(sweep))[0] if any(heading in s.cells for s in settings)]
    entries = sweep["spent_by_tuning"]
    count = sum(1 for run in shown if run.trial.epsilon != PRETRAINED)
    return {
        "name": name,
        "counted": f"{_counted(count, 'run')}, {_counted(len(settings), 'setting')}",
        "spent": [] if is_public else [entry["sentence"] for entry in entries],
        "rows": settings,
        "columns": columns,
        "has_share": "share" in columns,
        "has_gap": "closed gap" in columns,
        "bought": bought_sentences(dict(sweep), without_nonprivate=is_public),
        "has_bare": any(s.style == BARE for s in settings),
        "intervals": [chart for title in CHARTED if (chart := chart_of(title, settings)) is not None],
        "runs": [run_of(run) for run in shown],
        "ledger": [ledger_line({"unit_kinds": []} | entry) for entry in entries],
        "command": "",
        "holder": False,
    }


def settings_of(sweep: Mapping[str, Any], runs: Sequence[Finished], *, is_public: bool = False) -> list[Setting]:
    """The rows of sweep.json, with what a run of each cost."""
    left_out = {"epsilon", "value", "sigma"} | ({"share", "closed gap"} if is_public else set())
    found = []
    for row, cells in zip(sweep["rows"], grid(dict(sweep))[1], strict=True):
        epsilon = cells["epsilon"]
        own = [r for r in runs if is_of(r, row)]
        styles = {style_of(run) for run in own}
        style = BARE if epsilon == "inf" or BARE in styles else FREE if styles == {FREE} or epsilon == "0" else OWN
        kept = {k: v for k, v in cells.items() if k not in left_out}
        found.append(Setting(_name(epsilon, row.get("value"), sweep["varied"]), style, cost_of(own, style), row, kept))
    return found


def is_of(run: Finished, row: Mapping[str, Any]) -> bool:
    """Whether a run is one of those that a row is the mean of."""
    return _epsilon(run.trial.epsilon) == _epsilon(row["epsilon"]) and run.trial.value == row.get("value")


def _epsilon(given: Any) -> float | str:
    return READS_NOTHING if given == READS_NOTHING else float(given)


def style_of(run: Finished) -> str:
    if run.trial.epsilon in (PRETRAINED, READS_NOTHING):
        return FREE
    return OWN if math.isfinite(float(run.trial.epsilon)) and math.isfinite(run.spent_epsilon) else BARE


def cost_of(runs: Sequence[Finished], style: str) -> str:
    """Of the dearest of some runs; lines of before version 0.2 do not say it."""
    if style == FREE:
        return "free"
    if style == BARE:
        return "not covered"
    spent = max((run.spent_epsilon for run in runs), default=0.0)
    if spent == 0:
        return "as asked for"
    delta = max((run.delta or 0.0 for run in runs), default=0.0)
    return f"ε ≤ {at_most(spent)}" + (f", δ {delta:.3g}".replace("e-0", "e-") if delta else "")


def run_of(run: Finished) -> dict[str, str]:
    """A line of the table of runs."""
    half = "" if math.isnan(run.reward_ci95_prompts) else f" ± {run.reward_ci95_prompts:.3f}"
    return {
        "name": f"pretrained, seed {run.trial.seed}" if run.trial.epsilon == PRETRAINED else run.trial.folder,
        "cost": cost_of([run], style_of(run)),
        "reward": f"{run.reward:.3f}{half}",
        "kl": f"{run.kl:.2f}",
    }


def chart_of(title: str, settings: Sequence[Setting]) -> Intervals | None:
    """One measure of all settings; None where it was not measured."""
    name, half = CHARTED[title]
    found = [(s, _number(s.row[name]), _number(s.row.get(half))) for s in settings if name in s.row]
    shown = [(s, middle, ci if math.isfinite(ci) else 0.0) for s, middle, ci in found if math.isfinite(middle)]
    bars = [
        Measured(printable(s.name, longest=LABEL), s.style, middle, ci, s.cells.get(title, f"{middle:.3f}"))
        for s, middle, ci in shown
    ]
    return intervals(title, bars) if bars else None


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _name(epsilon: str, value: str | None, varied: str | None) -> str:
    names = {"0": "pretrained", "inf": "without privacy", READS_NOTHING: "free"}
    return names.get(epsilon, f"epsilon {epsilon}") + ("" if value is None else f", {varied} {value}")
