"""A recipe over epsilons and seeds, as in the paper's tables and figure; each run in a process of its own."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from .algorithms import TrainingConfig
from .algorithms.completions import check_prompts
from .algorithms.rollouts import CompletionAlgorithm
from .compared import caveats, free_recipe
from .data.load import read_records
from .errors import DPAlignError
from .evaluation import evaluate_policy, public_prompts
from .evaluation.guarantee import is_outside_the_guarantee
from .files import append_line, dumps, mend_lines, owner_only, sweep_temporaries, write_json
from .inputs import are_chats
from .loaded import public_models
from .models import Policy, RewardModel
from .parsing import recipe_from
from .privacy import accountant
from .privacy.ledger import Ledger
from .privacy.statement import account
from .provenance import check_provenance
from .recipe import Recipe
from .records import (
    check_shared_texts,
    read_by,
    read_public,
    read_public_prompts,
    read_stage_records,
    stages_without_data,
)
from .reporting.progress import Reporter
from .reporting.sweep import plot_sweep, spent_sentence, summarize_sweep, write_markdown
from .reporting.sweep_page import write_sweep_report
from .results import FREE, PRETRAINED, Finished, Key, SweepResult, Trial
from .rewards import RewardConfig, is_reward_model, load_reward
from .run import measure_texts
from .settings.rollouts import CompletionConfig, samples
from .stages import STAGES, kind

Epsilon: TypeAlias = str | float  # text is kept as it is written


# The sweep -----------------------------------------------------------------------------------------------------------


def run_sweep(
    recipe: str | Path,
    *,
    epsilons: Iterable[Epsilon] | Mapping[Epsilon, int] = (0, 1, 2, 4, 8, math.inf),
    seeds: int = 3,
    vary: tuple[str, Sequence[object]] | None = None,
    at: Mapping[Epsilon, Mapping[str, object]] | None = None,
    public_proxy: str | Path | None = None,
    overrides: Sequence[str] = (),
    output_dir: str | Path = "runs/sweep",
    reporter: Reporter | None = None,
    compare: bool = False,
) -> SweepResult:
    """Runs a recipe once for each epsilon and seed, and reports means and 95% intervals over seeds.

    A finished run is a line of runs.jsonl and is not run again, so that the same call goes on after an interruption.
    Each is in the ledger too: on private data all of them add up, and `spent_by_tuning` says to what.

    Args:
        recipe: its file. It measures on public prompts: data.eval_path, data.eval_is_public.
        epsilons: 0 is the pretrained model, inf the run without privacy, "free" what no private data is needed for (see
            `free_recipe`); a mapping gives each its number of seeds.
        seeds: of each epsilon, where that is no mapping.
        vary: a field of the recipe, and the values that it takes in turn.
        at: fields of the recipe for one epsilon alone (a learning rate that is tuned for it, say).
        public_proxy: public file that takes the place of all private data: tuning on it is free.
        overrides: fields of the recipe for all runs, as on the command line: ["--target_delta", "1e-5"].
        output_dir: where all runs and the report go.
        compare: adds 0, free and inf to the epsilons where they are missing: what did the private data buy?

    Raises:
        DPAlignError: before any run, a trial that would not be what its label says, or a folder that holds runs of
            another sweep; or a run that failed.
    """
    reporter = reporter or Reporter(quiet=True)
    sweep = _Sweep(str(recipe), (*overrides, *_proxy(public_proxy)), Path(output_dir))
    counts = _counts(epsilons, seeds)
    measured = _measurable(sweep.asked())
    counts = _with_ends(measured, counts, reporter) if compare else counts
    trials = _trials(measured, counts, vary, _fields_at(at or {}, counts))
    recipes = [sweep.asked(trial) for trial in trials]
    for trial, asked in zip(trials, recipes, strict=True):
        _check(trial, asked)
    _check_contents(recipe_from("sweep", [str(recipe), *overrides]), public_proxy, reporter)
    done = sweep.finished(trials)
    with owner_only():
        sweep.folder.mkdir(parents=True, exist_ok=True)
    sweep_temporaries(sweep.folder)
    for number, (trial, asked) in enumerate(zip(trials, recipes, strict=True), 1):
        if trial.key not in done:
            varied = f", {vary[0]} {trial.value}" if vary else ""
            reporter.note(f"run {number} of {len(trials)}: epsilon {trial.epsilon}, seed {trial.seed}{varied}")
            done[trial.key] = sweep.finish(trial, asked, reporter)
    command = _command(sweep, counts, vary, at or {}, public_proxy, overrides)
    return _written(sweep, [done[trial.key] for trial in trials], vary[0] if vary else None, command, recipes)


def _written(
    sweep: _Sweep, runs: list[Finished], varied: str | None, command: str, recipes: list[Recipe]
) -> SweepResult:
    rows, spent = summarize_sweep([run.to_json() for run in runs]), _spent(recipes, max(r.delta or 0.0 for r in runs))
    result = SweepResult(sweep.folder, sweep.recipe, sweep.overrides, varied, command, tuple(runs), rows, spent)
    value, folder = result.to_json(), result.folder
    write_json(folder / "sweep.json", value)
    write_markdown(folder / "sweep.md", value)
    plot_sweep(value, folder / "sweep.png")
    write_sweep_report(folder)
    return result


@dataclass(frozen=True)
class _Sweep:
    """What all trials share: the recipe's file, overrides and the folder."""

    recipe: str
    overrides: tuple[str, ...]
    folder: Path

    @property
    def log(self) -> Path:
        return self.folder / "runs.jsonl"

    def asked(self, trial: Trial | None = None) -> Recipe:
        """The recipe of a trial, or the one that all of them start from."""
        own = () if trial is None else trial.overrides
        return recipe_from("sweep", [self.recipe, *self.overrides, *own])

    def finished(self, trials: list[Trial]) -> dict[Key, Finished]:
        """The runs that are there already.

        Raises:
            DPAlignError: they are of another sweep, or a line is damaged.
        """
        done: dict[Key, Finished] = {}
        mend_lines(self.log)
        lines = self.log.read_text(encoding="utf-8").split("\n")[:-1] if self.log.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                run = Finished.from_json(json.loads(line))
            except (AttributeError, KeyError, TypeError, ValueError):
                raise DPAlignError(
                    f"line {number} of {self.log} is damaged: delete that line, and its run is made again."
                ) from None
            if (run.recipe, run.overrides) != (self.recipe, self.overrides):
                raise DPAlignError(
                    f"{self.log} holds runs of another recipe or other overrides: choose another --output_dir."
                )
            done[run.trial.key] = run
        for trial in trials:
            if trial.key in done and done[trial.key].trial != trial:
                raise DPAlignError(
                    f"epsilon {trial.epsilon}, seed {trial.seed} was run with other settings (--at, --vary): delete "
                    f"its line in {self.log} and its folder to run it again, or choose another --output_dir."
                )
        return done

    def finish(self, trial: Trial, asked: Recipe, reporter: Reporter) -> Finished:
        """Runs a trial, and appends its line to the log."""
        if trial.epsilon == PRETRAINED:
            run = self.pretrained(trial, asked, reporter)
        else:
            run = self.run(trial, asked)
        append_line(self.log, run.to_json())
        return run

    def run(self, trial: Trial, asked: Recipe) -> Finished:
        """A run in a process of its own."""
        output = self.folder / "runs" / trial.folder
        words = ["run", self.recipe, "--json", *self.overrides, *trial.overrides, "--output_dir", str(output)]
        if trial.epsilon == FREE:
            with owner_only():
                output.mkdir(parents=True, exist_ok=True)
            write_json(output / "recipe.json", asdict(free_recipe(asked)))  # JSON is YAML
            words = ["run", str(output / "recipe.json"), "--json", "--output_dir", str(output)]
        status, out = _in_fresh_process(words)
        if status:
            raise DPAlignError(
                f"the run in {output} failed (above): mend it and call the sweep again; finished runs stay."
            )
        scoring = next((name for name in asked.stages if kind(name).model_kind is RewardModel), None)
        return Finished.of_run(self.recipe, self.overrides, trial, json.loads(out), scoring)

    def pretrained(self, trial: Trial, asked: Recipe, reporter: Reporter) -> Finished:
        """The model as it comes, measured like the runs."""
        name, config = _sampling(asked)
        data, policy = asked.data_of(name), Policy.load(asked.model)
        path = data.eval_path or ""
        records = read_records(path, data.eval_split)
        policy.asks_in_chats = are_chats(records, asked.kind_of(name).columns)
        reward = load_reward(_reward_of_pretrained(asked), policy.device, public=public_models(asked, policy))
        check_prompts(policy.tokenizer, records, config, path)
        prompts = public_prompts(policy, records, config, asked.eval_prompts)
        with reporter.status("measuring the pretrained model"):
            found, _ = evaluate_policy(policy, prompts, reward, config, seed=trial.seed)
        if is_reward_model(config.reward):
            found = replace(found, reference_reward=found.reward)
        public = {n: (read_by(asked, n, rows), source) for n, (rows, source) in read_public(asked).items()}
        found = found.with_text(measure_texts(asked, public, policy).get("pretrained"))
        return Finished.of_pretrained(self.recipe, self.overrides, trial, found)


def _in_fresh_process(words: list[str]) -> tuple[int, str]:
    """Exit status and standard output of a command. It is told to end, and waited for, if this process is."""
    with subprocess.Popen([sys.executable, "-m", "dpalign", *words], stdout=subprocess.PIPE, text=True) as process:
        try:
            out, _ = process.communicate()
        except BaseException:
            process.terminate()
            process.communicate()  # it saves what it has
            raise
        return process.returncode, out


# The trials ----------------------------------------------------------------------------------------------------------


def _text(value: object) -> str:
    """A value as on the command line; text as it is."""
    if isinstance(value, str):
        return value
    return repr(value).removesuffix(".0") if isinstance(value, float) else dumps(value, indent=None)


def _epsilon(given: Epsilon) -> str:
    text = _text(given)
    if text == FREE:
        return FREE
    try:
        number = float(text)
    except ValueError:
        raise DPAlignError(f"expected an epsilon (0, 4, inf), got {text!r}.") from None
    if math.isinf(number) and "inf" not in text.lower():
        raise DPAlignError(f"epsilon {text} is larger than a number can be: without privacy it is inf.")
    if number != 0:
        accountant.check_epsilon(number)
    return {0.0: PRETRAINED, math.inf: "inf"}.get(number, text)


def _counts(epsilons: Iterable[Epsilon] | Mapping[Epsilon, int], seeds: int) -> dict[str, int]:
    """Number of seeds by epsilon."""
    given = epsilons if isinstance(epsilons, Mapping) else dict.fromkeys(epsilons, seeds)
    counts = {_epsilon(epsilon): count for epsilon, count in given.items()}
    if not counts:
        raise DPAlignError("a sweep needs at least one epsilon.")
    few = next((epsilon for epsilon, count in counts.items() if count < 1), None)
    if few is not None:
        raise DPAlignError(f"epsilon {few} is asked for with {counts[few]} seeds: give at least 1.")
    return counts


def _with_ends(recipe: Recipe, counts: Mapping[str, int], reporter: Reporter) -> dict[str, int]:
    """These epsilons with the rows that a comparison needs; the free one, if there is any."""
    most = max(counts.values())
    first = {PRETRAINED: most, FREE: most}
    try:
        free_recipe(recipe)
        for caveat in caveats(recipe):
            reporter.note(caveat)
    except DPAlignError as error:
        reporter.note(str(error))
        first.pop(FREE)
    return {**first, **counts, "inf": counts.get("inf", most)}


def _fields_at(at: Mapping[Epsilon, Mapping[str, object]], counts: Mapping[str, int]) -> dict[str, list[str]]:
    """Overrides by epsilon."""
    own = {_epsilon(e): [w for n, v in given.items() for w in (f"--{n}", _text(v))] for e, given in at.items()}
    unknown = next((epsilon for epsilon in own if epsilon not in counts), None)
    if unknown is not None:
        raise DPAlignError(f"--at {unknown} is none of the swept epsilons.")
    return own


def _trials(
    recipe: Recipe, counts: Mapping[str, int], vary: tuple[str, Sequence[object]] | None, at: Mapping[str, list[str]]
) -> list[Trial]:
    field_name, values = (vary[0], [*dict.fromkeys(map(_text, vary[1]))]) if vary else ("", [None])
    if not values:
        raise DPAlignError(f"--vary needs a field and at least one value, such as {field_name} 1 2 4.")
    stages = [name for name, config in recipe.stages.items() if isinstance(config, TrainingConfig)]
    trials = []
    for epsilon, count in counts.items():
        for value in values:
            for seed in range(count):
                words = [] if epsilon in (PRETRAINED, FREE) else ["--target_epsilon", epsilon]
                words += [word for stage in stages for word in (f"--{stage}.seed", str(seed))]
                words += [] if value is None else [f"--{field_name}", value]
                words += ["--eval_seed", str(seed), *at.get(epsilon, [])]
                trials.append(Trial(epsilon, seed, value, tuple(words)))
    return trials


def _proxy(path: str | Path | None) -> list[str]:
    # Declared public: its runs go under a name of their own, and cost the private data nothing.
    if path is None:
        return []
    fields_of = {"name": "public-proxy", "path": str(path), "is_demo": "true", "declared_units": "null"}
    words = [word for stage in STAGES for word in (f"--{stage}_data", "null")]
    return words + [word for name, value in fields_of.items() for word in (f"--data.{name}", value)]


def _command(
    sweep: _Sweep,
    counts: Mapping[str, int],
    vary: tuple[str, Sequence[object]] | None,
    at: Mapping[Epsilon, Mapping[str, object]],
    public_proxy: str | Path | None,
    overrides: Sequence[str],
) -> str:
    most = max(counts.values())
    words = ["dpalign", "sweep", sweep.recipe, "--epsilons"]
    words += [epsilon if count == most else f"{epsilon}:{count}" for epsilon, count in counts.items()]
    words += ["--seeds", str(most)]
    if vary:
        words += ["--vary", vary[0], *map(_text, vary[1])]
    for epsilon, given in at.items():
        words += ["--at", _epsilon(epsilon), *(f"{name}={_text(value)}" for name, value in given.items())]
    words += ["--public_proxy", str(public_proxy)] if public_proxy is not None else []
    return shlex.join([*words, "--output_dir", str(sweep.folder), *overrides])


# What is refused -----------------------------------------------------------------------------------------------------


def _check_contents(recipe: Recipe, public_proxy: str | Path | None, reporter: Reporter) -> None:
    """Compares the recipe's own data, its public prompts and the proxy: what is shown must not be what is protected.

    Raises:
        DPAlignError: they share texts, which nobody declares to be all right.
    """
    missing = stages_without_data(recipe)
    for name in missing if public_proxy is not None else ():
        path = recipe.data_of(name).path
        reporter.note(f"the data of stage {name} ({path or 'no path'}) is not here: nothing was compared with it.")
    own = {n: read_by(recipe, n, rows) for n, rows in read_stage_records(recipe, leaving=missing).items()}
    shown = [read_public(recipe), read_public_prompts(recipe)]
    if public_proxy is not None:
        shown += [dict.fromkeys(recipe.drawing, (read_records(str(public_proxy)), f"the proxy {public_proxy}"))]
    with closing(Ledger.copy_of(recipe.ledger)) as ledger:
        for public in shown:
            read = {name: (read_by(recipe, name, rows), source) for name, (rows, source) in public.items()}
            check_shared_texts(recipe, own, read.items(), ledger)


def _sampling(recipe: Recipe) -> tuple[str, CompletionConfig]:
    """The stage that samples completions, and its settings."""
    for name, config in recipe.stages.items():
        if samples(config):
            return name, config
    names = " or ".join(name for name in STAGES if issubclass(kind(name), CompletionAlgorithm))
    raise DPAlignError(f"a sweep measures what a stage that samples has trained: the recipe has none ({names}).")


def _measurable(recipe: Recipe) -> Recipe:
    data = recipe.data_of(_sampling(recipe)[0])
    if not data.eval_path or not data.eval_is_public:
        raise DPAlignError("a sweep compares runs on public prompts: set data.eval_path and data.eval_is_public: true.")
    return recipe


def _check(trial: Trial, recipe: Recipe) -> None:
    """Refuses rows that would not be what their label says.

    Raises:
        DPAlignError: an inf with noise, or a pretrained model that has seen private data or needs a private reward.
    """
    if trial.epsilon == "inf":
        fixed = [n for n, c in recipe.stages.items() if c.target_epsilon is not None or c.noise_multiplier is not None]
        if fixed:
            raise DPAlignError(
                f"stage {fixed[0]} has a target_epsilon or noise_multiplier of its own, so a run at inf would not be "
                "without privacy: leave inf out, or the stage's own setting."
            )
    if trial.epsilon == FREE:
        free_recipe(recipe)
    if trial.epsilon != PRETRAINED:
        return
    if check_provenance(recipe)["model"].stages:
        raise DPAlignError(
            f"epsilon 0 is the pretrained model, and {recipe.model.name_or_path} has been trained on private data "
            "already: leave 0 out, or start from its base model."
        )
    reference = _reward_of_pretrained(recipe)
    if not is_reward_model(_sampling(recipe)[1].reward):
        return
    is_demo = all(recipe.data_of(name).is_demo for name in recipe.drawing)
    if is_outside_the_guarantee(reference) and not is_demo:
        raise DPAlignError(
            f"the reference reward {reference.source!r} has no guarantee, so its numbers on epsilon 0 are not shown: "
            "leave 0 out, or give a reference_reward that is public or a private release."
        )


def _reward_of_pretrained(recipe: Recipe) -> RewardConfig:
    # A reward model is trained by a run, and the pretrained model has none: the reference reward stands in.
    reward = _sampling(recipe)[1].reward
    if not is_reward_model(reward):
        return reward
    if recipe.reference_reward is None:
        raise DPAlignError(
            "epsilon 0 has no reward model of its own: give the recipe a reference_reward, or leave 0 out."
        )
    return recipe.reference_reward


# What was spent ------------------------------------------------------------------------------------------------------


def _spent(recipes: list[Recipe], delta: float) -> list[dict[str, Any]]:
    """What the ledger knows of each dataset: this sweep and everything else that ran on it."""
    ledger = Ledger(recipes[0].ledger)
    datasets = {config.name: config for recipe in recipes for config in map(recipe.data_of, recipe.drawing)}
    entries = [account(ledger, name, delta or 1e-5, demo=config.is_demo) for name, config in datasets.items()]
    ledger.close()
    return [entry | {"sentence": spent_sentence(entry)} for entry in entries]
