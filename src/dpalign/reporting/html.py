"""The report of a finished run: `report.html`, made from what lies outside private/ and nothing else, and
`private/report.html`, which says more and stays with the data holder. Each is one file that fetches nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ..errors import DPAlignError
from ..files import read_lines, write_text
from ..printable import printable
from ..stages import STAGES
from .charts import Curves, Intervals, Measured, Series, curves, intervals
from .numbers import all_runs, at_most, attacks
from .tables import FULL, OUTSIDE, about_texts, cell, unscored

REPORT, AUDIT = "report.html", "audit.json"
BASE = "pretrained"  # the public model, before anything was trained
CHARTED = ("reward", "reference_reward", "kl", "perplexity", "text_loss")  # of the table's columns
EVALUATED = ("loss", "accuracy", "nll", "reward", "kl", "completion_length")  # of what is measured while a stage trains
METRICS = {"kl": "KL (nats per completion)", "completion_length": "completion length (tokens)"}
SURVEYED = {
    "records": "records",
    "limit": "tokens read of each",
    "cut": "records that are cut",
    "nine_in_ten": "length that holds nine in ten",
    "longest": "longest (tokens)",
    "empty": "records that teach nothing",
    "units": "units",
    "idle_units": "units that teach nothing",
}
# What files that no run writes make of a page.
UNWRITABLE = (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, jinja2.TemplateError)


@dataclass(frozen=True)
class FoundRun:
    """What a finished run has left outside private/.

    log: lines of metrics.jsonl. samples: of completions.json. evaluated: lines of evaluations.jsonl. audit: audit.json,
    of a run that was audited.
    """

    folder: Path
    summary: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, str]]
    evaluated: Sequence[Mapping[str, Any]] = ()
    audit: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> FoundRun:
        """From its folder.

        Raises:
            DPAlignError: there is no finished run, or an older version finished it.
        """
        if not (folder / "summary.json").is_file():
            raise DPAlignError(f"{folder} holds no finished run (no summary.json): run its recipe to the end first.")
        summary = read_json(folder / "summary.json", {})
        if not isinstance(summary, dict) or "not_covered" not in summary:
            raise DPAlignError(
                f"{folder} was finished by an older dpalign, whose summary says too little: run its recipe again with "
                "this one, nothing is drawn."
            )
        log, evaluated = (read_lines(folder / name) for name in ("metrics.jsonl", "evaluations.jsonl"))
        samples, audit = read_json(folder / "completions.json", []), read_json(folder / AUDIT, {})
        return cls(folder, summary, log, samples, evaluated, audit)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def is_private(self) -> bool:
        """Whether everything that it made has a guarantee."""
        return bool(self.summary["private"]) and math.isfinite(float(self.summary["epsilon"]))

    @property
    def is_demo(self) -> bool:
        """Whether no data of it is really private."""
        return all(entry["demo_data"] for entry in self.summary["ledger"])

    def may_be_shown_beside(self, run: FoundRun) -> bool:
        """Whether a page that is published may compare a run with this one."""
        return self.is_private or (self.is_demo and run.is_demo)

    @property
    def evaluation(self) -> Mapping[str, Mapping[str, Any]]:
        found: Mapping[str, Mapping[str, Any]] = self.summary.get("evaluation", {})
        return found

    @property
    def last(self) -> str:
        """The stage that its last model was made in."""
        return [*self.evaluation][-1]

    def rows_of(self, stage: str) -> list[Mapping[str, Any]]:
        """Noised metrics of a stage, the last attempt at each update, in order."""
        rows = {row["step"]: row for row in self.log if row.get("stage") == stage and row.get("noised_metrics")}
        return [rows[step] for step in sorted(rows)]

    def measured_in(self, stage: str) -> list[Mapping[str, Any]]:
        """What was measured while a stage trained, the last attempt at each update, in order."""
        rows = {row["step"]: row for row in self.evaluated if row.get("stage") == stage}
        return [rows[step] for step in sorted(rows)]


@dataclass(frozen=True)
class Model:
    """A row of the table of results. style: `own`, `free` or `bare` (without privacy)."""

    name: str
    style: str
    cost: str
    row: Mapping[str, Any]
    cells: Mapping[str, str] = field(default_factory=dict)


def write_report(folder: Path, beside: Sequence[Path] = ()) -> Path:
    """Writes `report.html` into a finished run's folder, and the data holder's into its private/ if there is one.

    Args:
        beside: folders of other runs to compare with. One without privacy on private data is shown in private/ only.

    Returns:
        The report that may be published.

    Raises:
        DPAlignError: no finished run, or one with files that no run writes.
    """
    run, others = FoundRun.read(folder), [FoundRun.read(other) for other in beside]
    try:
        covered = [other for other in others if other.may_be_shown_beside(run)]
        page = render(page_of(run, covered))
        own = render(page_of(run, others) | {"holder": for_the_holder(folder / "private")})
    except UNWRITABLE:
        raise DPAlignError(
            f"{folder} holds files that no run writes: run its recipe again, nothing is drawn."
        ) from None
    write_text(folder / REPORT, page)
    if (folder / "private").is_dir():
        write_text(folder / "private" / REPORT, own)
    return folder / REPORT


def render(page: Mapping[str, Any], template: str = "report.html.jinja") -> str:
    """The page's HTML: all text is made printable and escaped."""
    return _template(template).render(page=page)


@cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_fit,
    )
    return environment.get_template(name)


def _fit(value: Any) -> Any:
    return printable(value, lines=True) if isinstance(value, str) and not isinstance(value, Markup) else value


# What a page holds ---------------------------------------------------------------------------------------------------


def page_of(run: FoundRun, beside: Sequence[FoundRun]) -> dict[str, Any]:
    """Everything that the template shows, from what lies outside private/."""
    summary = run.summary
    models, outside = models_of(run, beside), summary.get("outside_the_guarantee", [])
    columns = {
        key: f"{header} ({OUTSIDE})" if key in outside else header
        for key, (header, _) in FULL.items()
        if any(key in model.row for model in models)
    }
    return {
        "name": run.name,
        "private": run.is_private,
        "epsilon": at_most(float(summary["epsilon"])),
        "delta": _short(summary["delta"]),
        "attacks": attacks(summary.get("attack_success", [])),
        "units": " or ".join(sorted({stage["unit"] for stage in summary["stages"]})),
        "stages": [stage_of(stage, summary["delta"]) for stage in summary["stages"]],
        "models": [Model(m.name, m.style, m.cost, m.row, cells_of(m.row, columns)) for m in models],
        "columns": [*columns.values()],
        "prompts": next((f"{model.row['prompts']:,}" for model in models if "prompts" in model.row), ""),
        "texts": about_texts({model.name: model.row for model in models}),
        "notes": unscored({model.name: dict(model.row) for model in models}),
        "intervals": [chart for key in CHARTED if (chart := interval_chart(key, columns, models)) is not None],
        "pairs": {s["stage"]: pairs_of(summary[s["stage"]]) for s in summary["stages"] if _has(summary, s, "pairs")},
        "chosen": [chosen_of(name, found) for name, found in summary.get("best_of", {}).items()],
        "measured": {s: measurement_of(summary[s]) for s in _measuring(summary)},
        "curves": curves_of(run, beside),
        "evaluated": evaluated_of(run, beside),
        "curve_labels": [("own" if run.is_private else "bare", run.name), *((style_of(o), o.name) for o in beside)]
        if beside
        else [],
        "samples": samples_of(run, beside),
        "ledger": [ledger_line(entry) for entry in summary["ledger"]],
        "audits": audits_in(run),
        "bought": summary.get("comparison", {}).get("said", []),
        "assumptions": summary["assumptions"],
        "not_covered": summary["not_covered"],
        "accountant": summary["accountant"],
        "adjacency": summary["adjacency"],
        "versions": summary["versions"],
        "holder": None,
    }


def audits_in(run: FoundRun) -> list[dict[str, Any]]:
    """What was found of each stage, where the audit's claim is the one that the stage has drawn with."""

    def claim(name: str, numbers: Mapping[str, Any]) -> tuple[str, float, float]:
        return name, float(numbers["noise_multiplier"]), float(numbers["sampling_rate"])

    drawn = {claim(stage["stage"], m) for stage in run.summary["stages"] for m in stage["mechanisms"]}
    return [audit_of(stage) for stage in run.audit.get("stages", []) if claim(stage["stage"], stage) in drawn]


def audit_of(stage: Mapping[str, Any]) -> dict[str, Any]:
    """Lower bounds beside the claim, and what was found."""
    claim = float(stage["epsilon"])
    bounds = [*stage["bounds"], *(stage["attack"] or {"bounds": []})["bounds"]]
    rows = [Measured("the claim", "own", claim, 0.0, at_most(claim))]
    for bound in bounds:
        epsilon, label = float(bound["epsilon"]), f"{bound['method']} ({bound['source']})"
        place = min(epsilon, 2 * claim)  # an infinite one has none
        rows.append(Measured(label, "bare" if epsilon > claim else "free", place, 0.0, f"> {epsilon:.3f}"))
    checks = [check for found in stage["checks"].values() for check in found]
    return {
        "name": stage["stage"],
        "chart": intervals(f"lower bounds on epsilon at delta {_short(stage['delta'])}", rows),
        "facts": {
            "canaries": f"{stage['canaries']:,}",
            "confidence of each bound": f"{stage['confidence']:.4g}",
            "checks that passed": f"{sum(check['passed'] for check in checks)} of {len(checks)}",
        },
        "found": [*stage["exceeded"], *stage["rejected"]],
    }


def _has(summary: Mapping[str, Any], stage: Mapping[str, Any], key: str) -> bool:
    """Whether the summary has numbers of a stage, with `key` among them."""
    return isinstance(found := summary.get(stage["stage"]), dict) and key in found


def _measuring(summary: Mapping[str, Any]) -> list[str]:
    """Stages that measured held-out units; one that an interruption lost has no numbers."""
    names = [stage["stage"] for stage in summary["stages"] if stage["stage"] in summary]
    return [n for n in names if summary[n] is None or "noise_standard_deviation" in summary[n]]


def stage_of(stage: Mapping[str, Any], delta: float) -> dict[str, Any]:
    """A stage's mechanism, as a reviewer needs it."""
    low, high = stage["part"]
    return {
        "name": stage["stage"],
        "help": STAGES[stage["stage"]].help if stage["stage"] in STAGES else "",
        "unit": stage["unit"],
        "dataset": stage["dataset"],
        "units": f"{stage['units']:,.12g}",
        "part": "all" if (low, high) == (0, 1) else f"{100 * low:g}% to {100 * high:g}% of the hash range",
        "bound": f"{stage['max_grad_norm']:g}",
        "epsilon": at_most(float(stage["epsilon"])) if stage["private"] else "no bound",
        "mechanisms": [mechanism_of(stage, m, delta) for m in stage["mechanisms"]],
    }


def mechanism_of(stage: Mapping[str, Any], m: Mapping[str, Any], delta: float) -> dict[str, Any]:
    """One mechanism of a stage, with the command that computes its epsilon again if it is the only one."""
    sigma, metrics_sigma = float(m["noise_multiplier"]), float(m["metrics_noise_multiplier"])
    rate, again = float(m["sampling_rate"]), ""
    if stage["private"] and sigma > 0 and metrics_sigma > 0 and len(stage["mechanisms"]) == 1:
        joint = (m["passes"] / sigma**2 + 1 / metrics_sigma**2) ** -0.5
        again = (
            f"dpalign plan --units {stage['units']:.12g} --batch_size {rate * stage['units']:.12g} "
            f"--steps {m['steps']} --delta {delta:g} --noise_multiplier {joint:.9g}"
        )
    return {
        "rate": f"{rate:.5f}",
        "batch": f"{rate * stage['units']:,.4g}",
        "steps": f"{m['steps']:,}",
        "passes": str(m["passes"]),
        "sigma": f"{sigma:.4f}",
        "metrics_sigma": "none released" if math.isinf(metrics_sigma) else f"{metrics_sigma:.4f}",
        "again": again,
    }


# Results -------------------------------------------------------------------------------------------------------------


def models_of(run: FoundRun, beside: Sequence[FoundRun]) -> list[Model]:
    """The public model, the run's after each stage, and the last one of every run beside it."""
    own = ("own", cost_of(run)) if run.is_private else ("bare", "not covered")
    rows = [
        Model(name, "free", "free", row) if name == BASE else Model(name, *own, row)
        for name, row in run.evaluation.items()
    ]
    for other in (o for o in beside if o.evaluation):
        cost = cost_of(other) if other.is_private else "not covered"
        rows.append(Model(beside_name(other), style_of(other), cost, other.evaluation[other.last]))
    return rows


def cost_of(run: FoundRun) -> str:
    """Of a run with a guarantee."""
    return f"ε ≤ {at_most(float(run.summary['epsilon']))}" if run.summary["stages"] else "free"


def beside_name(other: FoundRun) -> str:
    """Of the last model of a run beside."""
    return f"{other.last}, {other.name}{'' if other.is_private else ' (without privacy)'}"


def style_of(other: FoundRun) -> str:
    """Of a run beside."""
    return "free" if other.is_private else "bare"


def cells_of(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, str]:
    """A row of the table of results by the columns' headers."""
    numbers = {name: _number(value) for name, value in row.items()}
    return {header: cell(numbers, key, FULL[key][1], full=True) for key, header in columns.items()}


def interval_chart(key: str, columns: Mapping[str, str], models: Sequence[Model]) -> Intervals | None:
    """One measure of all models; None where it was not measured."""
    found = [(m, _number(m.row[key]), _number(m.row.get(f"{key}_ci95", 0.0))) for m in models if key in m.row]
    shown = [(m, middle, half if math.isfinite(half) else 0.0) for m, middle, half in found if math.isfinite(middle)]
    if not shown:
        return None
    texts = [cell({k: _number(v) for k, v in m.row.items()}, key, FULL[key][1], full=True) for m, *_ in shown]
    return intervals(
        columns[key],
        [Measured(m.name, m.style, middle, half, text) for (m, middle, half), text in zip(shown, texts, strict=True)],
    )


def pairs_of(found: Mapping[str, Any]) -> dict[str, str]:
    """Agreement with public pairs."""
    free = "free_accuracy" in found
    alone = f"{_shown(found['free_accuracy'])} ± {_shown(found['free_accuracy_ci95'])}" if free else ""
    return {
        "pairs": f"{found['pairs']:,}",
        "accuracy": f"{_shown(found['accuracy'])} ± {_shown(found['accuracy_ci95'])}",
        **({"accuracy of the free rewards": alone} if free else {}),
        "calibration error": _shown(found["calibration_error"]),
        "negative log-likelihood": _shown(found["nll"]),
        "margin": f"{_shown(found['margin'])} (deviation {_shown(found['margin_std'])})",
        **(
            {
                "distance from what the policy writes itself": f"{_shown(found['shift'])} of its deviations",
                "farther out than 95% of that": f"{_shown(found['outside'])} (texts like its own: 0.05)",
            }
            if "shift" in found
            else {}
        ),
    }


def chosen_of(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """What a reward is worth where it is used: the judge's score of what it chooses among several completions."""
    return {
        "who": "The free rewards" if name == "free" else "The reward",
        "prompts": f"{found['prompts']:,}",
        "completions": f"{found['completions']:,}",
        "facts": {
            "reference reward of what is chosen": f"{_shown(found['judge'])} ± {_shown(found['judge_ci95'])}",
            "above the mean of all": f"{_shown(found['gain'])} ± {_shown(found['gain_ci95'])}",
            "KL of such a choice (nats)": f"at most {_shown(found['kl_at_most'])}",
        },
    }


def measurement_of(found: Mapping[str, Any] | None) -> dict[str, str] | None:
    """What one noisy release said."""
    if found is None:
        return None
    noise = found["noise_standard_deviation"]
    numbers = {name.replace("_", " "): f"{_shown(found[name])} ± {_shown(noise[name])}" for name in noise}
    return numbers | {"units": f"{found['units']:,.12g}", "ε": at_most(float(found["epsilon"]))}


def samples_of(run: FoundRun, beside: Sequence[FoundRun]) -> list[dict[str, Any]]:
    """Completions by prompt: the run's models, then those of other runs where they were given the same prompt."""
    said: list[dict[str, Any]] = [
        {"prompt": sample["prompt"], "answers": {k: text.strip() for k, text in sample.items() if k != "prompt"}}
        for sample in run.samples
    ]
    for other in beside:
        texts = {sample["prompt"]: sample for sample in other.samples}
        for sample in said:
            if sample["prompt"] in texts and other.evaluation:
                sample["answers"][beside_name(other)] = texts[sample["prompt"]][other.last].strip()
    return said


# Curves --------------------------------------------------------------------------------------------------------------


def curves_of(run: FoundRun, beside: Sequence[FoundRun]) -> dict[str, list[Curves]]:
    """By stage: every noised metric, and the stage's epsilon."""
    runs = [(run, "own" if run.is_private else "bare"), *((other, style_of(other)) for other in beside)]
    found = {}
    for stage in dict.fromkeys(row["stage"] for row in run.log if row.get("noised_metrics")):
        names = [*run.rows_of(stage)[0]["noised_metrics"]]
        charts = [_curve(METRICS.get(n, n.replace("_", " ")), stage, runs, _metric(n)) for n in names]
        charts.append(_curve("ε of the stage", stage, runs[:1], lambda row: (row["epsilon_of_stage"], 0.0)))
        found[stage] = [chart for chart in charts if chart is not None]
    return found


def _curve(
    title: str,
    stage: str,
    runs: Sequence[tuple[FoundRun, str]],
    read: Callable[[Mapping[str, Any]], tuple[Any, Any]],
) -> Curves | None:
    series = []
    for run, style in runs:
        values = [(row["step"], *map(_number, read(row))) for row in run.rows_of(stage)]
        series.append(Series(run.name, style, values))
    return curves(title, series)


def evaluated_of(run: FoundRun, beside: Sequence[FoundRun]) -> dict[str, list[Curves]]:
    """By stage: what was measured on public records while it trained, with 95% intervals."""
    runs = [(run, "own" if run.is_private else "bare"), *((other, style_of(other)) for other in beside)]
    found = {}
    for stage in dict.fromkeys(row["stage"] for row in run.evaluated):
        rows = {one.folder: one.measured_in(stage) for one, _ in runs}
        charts = []
        for name in (n for n in EVALUATED if n in rows[run.folder][0]["measured"]):
            series = [Series(one.name, style, _measured(rows[one.folder], name)) for one, style in runs]
            charts.append(curves(METRICS.get(name, name.replace("_", " ")), series))
        found[stage] = [chart for chart in charts if chart is not None]
    return found


def _measured(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float, float]]:
    """Step, value, half of its interval (0 where there is none)."""
    points = [(row["step"], row["measured"].get(name), row["measured"].get(f"{name}_ci95")) for row in rows]
    return [(step, _number(value), 0.0 if half is None else _number(half)) for step, value, half in points]


def _metric(name: str) -> Callable[[Mapping[str, Any]], tuple[Any, Any]]:
    def read(row: Mapping[str, Any]) -> tuple[Any, Any]:
        noise = row.get("noise_standard_deviation") or {}  # logs of before it was written have none
        return row["noised_metrics"].get(name), noise.get(name, 0.0)

    return read


# Terms ---------------------------------------------------------------------------------------------------------------


def ledger_line(entry: Mapping[str, Any]) -> str:
    """What all runs on one data set have spent."""
    said = f"{entry['dataset']}: {entry['runs']} run(s), together {all_runs(dict(entry))} at δ {_short(entry['delta'])}"
    if entry["runs_without_privacy"]:
        said += f"; {entry['runs_without_privacy']} of them ran WITHOUT privacy, and what was published of those is "
        said += "not covered"
    return said + (" (demo data: public text playing private)" if entry["demo_data"] else "") + "."


def for_the_holder(private: Path) -> dict[str, Any]:
    """What only the data holder may see: the command, time and memory, what the data does to each stage."""
    resources, surveys = read_json(private / "resources.json", {}), read_json(private / "data.json", {})
    reference = read_json(private / "reference_evaluation.json", {})
    facts = {}
    if "seconds" in resources:
        facts["time"] = f"{resources['seconds']:,.0f} s"
        facts["memory"] = f"{resources['peak_memory_mb']:,.0f} MB at the peak"
    return {
        "command": resources.get("command", ""),
        "facts": facts,
        "surveys": {
            stage: {label: f"{found[key]:,}" for key, label in SURVEYED.items() if key in found}
            for stage, found in surveys.items()
        },
        "reference": {
            name: f"{_shown(row['reference_reward'])} ± {_shown(row['reference_reward_ci95'])}"
            for name, row in reference.get("evaluation", {}).items()
            if reference["outside_the_guarantee"] and row.get("reference_reward") is not None
        },
    }


def read_json(path: Path, otherwise: Any) -> Any:
    """What a file holds, or `otherwise` if there is none.

    Raises:
        DPAlignError: it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else otherwise
    except (OSError, ValueError, RecursionError):
        raise DPAlignError(f"{path} is no JSON: run the recipe of that folder again, nothing is drawn.") from None


def _number(value: Any) -> float:
    """Of JSON: null is NaN, and infinity the string "inf"."""
    return math.nan if value is None else float(value)


def _shown(value: Any) -> str:
    """A number that was perhaps not to be had."""
    number = _number(value)
    return f"{number:.3f}" if math.isfinite(number) else "-"


def _short(delta: float) -> str:
    """1e-5 rather than 1e-05."""
    return f"{delta:.3g}".replace("e-0", "e-")
