"""The stages of a recipe, one after the other, under one budget."""

from __future__ import annotations

import fcntl
import json
import resource
import secrets
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from .algorithms import PPO, RLOO, SFT, Algorithm, RewardModelling
from .algorithms.reward import check_pair_columns, check_pair_texts
from .algorithms.rollouts import check_prompt_columns
from .algorithms.sft import check_sft_columns
from .data.load import Record, read_records
from .data.units import UnitDataset
from .errors import DPAlignError
from .evaluation import evaluate_pairs, evaluate_stages, public_prompts
from .evaluation.guarantee import is_outside_the_guarantee
from .evaluation.private import evaluate_privately
from .files import private_folder, write_json
from .models import AdapterStack, Normalization, Policy, RewardModel, embedded
from .models.reward_model import is_classifier, normalization_of
from .planning import (
    Origin,
    PlannedStage,
    beside,
    check_budget,
    check_lengths,
    check_provenance,
    past_assumptions,
    past_stages,
    plan_recipe,
    read_stage_records,
    run_delta,
    stage_units,
    stages_elsewhere,
)
from .privacy.accountant import SampledGaussian
from .privacy.ledger import Intent, Ledger
from .privacy.statement import PrivacyStatement, StageStatement, state_privacy
from .recipe import Recipe
from .reporting.progress import Reporter
from .reporting.release import write_release, write_reward_model
from .rewards import Reward, RewardFunction, load_reward, normalize
from .rewards.load import RELEASED
from .training import Stage

SAMPLES = 20  # public completions that are kept for people to read
NORMALIZATION_ROWS = 512  # self-written texts that fix the scale of a reward model


@dataclass
class Run:
    """A run in progress: what its stages share, and what they leave behind."""

    recipe: Recipe
    reporter: Reporter
    folder: Path
    private: Path
    identity: str
    ledger: Ledger
    delta: float
    origins: dict[str, Origin]
    earlier: list[StageStatement]
    before: list[StageStatement]
    planned: dict[str, PlannedStage]
    records: dict[str, list[Record]]
    data: dict[str, UnitDataset]
    assumptions: list[str]
    policy: Policy | None = None
    reward_model: RewardModel | None = None
    reward: Reward | None = None
    reference_reward: Reward | None = None
    public: dict[str, list[Record]] = field(default_factory=dict)  # prompts and pairs that are declared public
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def demo(self) -> set[str]:
        """Names of the datasets that are public data playing private."""
        configs = [self.recipe.data_of(name) for name in self.recipe.stages]
        return {c.name for c in configs if c.is_demo}

    @property
    def all_demo(self) -> bool:
        """Whether no dataset is really private."""
        return self.demo == {self.recipe.data_of(name).name for name in self.recipe.stages}

    def statement(self) -> PrivacyStatement:
        """What has been spent so far."""
        return state_privacy(self.identity, self.ledger, self.delta, self.earlier, self.assumptions, self.demo)


def run_recipe(
    recipe: Recipe,
    *,
    reporter: Reporter | None = None,
    records: dict[str, list[Record]] | None = None,
    policy: Policy | None = None,
    reward_model: RewardModel | None = None,
    reward_function: RewardFunction | None = None,
) -> dict[str, Any]:
    """Runs, resumes or finishes a recipe; returns what `summary.json` then holds.

    Args:
        records: records by stage instead of the data files (the Python trainers use this).
        policy, reward_model: loaded models instead of the recipe's.
        reward_function: a Python function instead of the one that the recipe's reward.source names.

    Raises:
        DPAlignError: anything a person can mend, before the first draw wherever that is possible.
    """
    started = time.monotonic()
    _quiet_libraries()
    if recipe.num_threads:
        torch.set_num_threads(recipe.num_threads)
    _check_stages(recipe)
    folder = Path(recipe.output_dir)
    with _locked(private_folder(folder / "private")), closing(_open_ledger(recipe)) as ledger:
        run = _begin(recipe, folder, ledger, records, reporter or Reporter(quiet=True))
        run.policy, run.reward_model = policy, reward_model
        _load_models(run, reward_function)
        _remember_origins(run.private, run.origins)  # from here on the run rests on them
        for name in run.planned:
            _STAGES[name](run)
        return _finish(run, started)


def _check_stages(recipe: Recipe) -> None:
    if not recipe.stages:
        raise DPAlignError("the recipe has no stage: give it a section sft, reward, ppo or rloo.")
    if recipe.ppo is not None and recipe.rloo is not None:
        raise DPAlignError("the recipe has both ppo and rloo: keep one of them.")
    if recipe.evaluation is not None and recipe.rollouts is None:
        raise DPAlignError("stage evaluation measures what ppo or rloo has trained: add one of them.")


def _begin(
    recipe: Recipe, folder: Path, ledger: Ledger, records: dict[str, list[Record]] | None, reporter: Reporter
) -> Run:
    """Everything about a run that needs no model: its past, its units and its budget."""
    private = folder / "private"
    identity = _run_identity(private, folder, ledger)
    origins = _same_origins(private, check_provenance(recipe), ledger.intents(run=identity))
    earlier = past_stages(origins)
    records = records or read_stage_records(recipe, private / "cache")
    data, assumptions = stage_units(recipe, records, ledger)
    delta = run_delta(recipe, records)
    before = [*earlier, *stages_elsewhere(identity, ledger, delta, recipe)]
    planned = plan_recipe(recipe, data, delta, before)
    check_budget(recipe, planned, before, delta)
    return Run(
        recipe=recipe,
        reporter=reporter,
        folder=folder,
        private=private,
        identity=identity,
        ledger=ledger,
        delta=delta,
        origins=origins,
        earlier=earlier,
        before=before,
        planned=planned,
        records=records,
        data=data,
        assumptions=sorted({*assumptions, *_assumed(recipe, origins)}),
    )


# Models and checks of the records ------------------------------------------------------------------------------------


def _load_models(run: Run, reward_function: RewardFunction | None) -> None:
    # All that can be refused is refused here, before the first draw.
    recipe, stages, records = run.recipe, run.recipe.stages, run.records
    device = _device(recipe.device)
    if recipe.reward is not None and run.reward_model is None:
        config = recipe.reward.model
        if config is None and set(stages) == {"reward"} and run.policy is None and is_classifier(recipe.model):
            config = recipe.model
        if config is not None:
            run.reward_model = RewardModel.load(config, device, recipe.reward.text)
    needs_policy = {"sft", "ppo", "rloo"} & set(stages) or run.reward_model is None
    if run.policy is None and needs_policy:
        run.policy = Policy.load(recipe.model, device)
    source = {name: recipe.data_of(name).path or recipe.data_of(name).name for name in stages}
    if "sft" in stages:
        assert run.policy is not None
        check_sft_columns(records["sft"], source["sft"])
        check_lengths("sft", stages["sft"], run.policy.model.config)
    if recipe.reward is not None:
        check_pair_columns(records["reward"], source["reward"])
        model = run.reward_model or run.policy
        assert model is not None
        check_lengths("reward", recipe.reward, model.model.config)
        check_pair_texts(model.tokenizer, records["reward"], source["reward"])
    if recipe.rollouts is not None:
        assert run.policy is not None
        for name in {"ppo", "rloo", "evaluation"} & set(stages):
            check_prompt_columns(run.policy, records[name], source[name], recipe.rollouts)
        check_lengths("ppo" if recipe.ppo is not None else "rloo", recipe.rollouts, run.policy.model.config)
        if reward_function is not None or recipe.rollouts.reward.source != RELEASED:
            run.reward = load_reward(recipe.rollouts.reward, run.policy.device, reward_function)
        if recipe.reference_reward is not None:
            run.reference_reward = load_reward(recipe.reference_reward, run.policy.device)
    _read_public(run)


def _read_public(run: Run) -> None:
    recipe = run.recipe
    data = recipe.data_of("reward")
    if recipe.reward is not None and data.eval_path and data.eval_is_public:
        run.public["pairs"] = read_records(data.eval_path, data.eval_split)
        check_pair_columns(run.public["pairs"], data.eval_path)
    data = recipe.data_of("ppo")
    if recipe.rollouts is not None and data.eval_path and data.eval_is_public:
        assert run.policy is not None
        run.public["prompts"] = read_records(data.eval_path, data.eval_split)
        check_prompt_columns(run.policy, run.public["prompts"], data.eval_path, recipe.rollouts)


# The stages ----------------------------------------------------------------------------------------------------------


def _run_sft(run: Run) -> None:
    assert run.policy is not None
    _train(run, SFT(run.planned["sft"].config), run.policy)


def _run_reward(run: Run) -> None:
    config = run.planned["reward"].config
    if run.reward_model is None:
        assert run.policy is not None
        run.reward_model = RewardModel.from_policy(run.policy, config.text)
    run.reward_model.text = config.text
    _train(run, RewardModelling(config), run.reward_model)
    path = run.folder / "reward_model"
    if not (path / "privacy.json").exists():
        normalization = _normalization(run)
        with run.reporter.status("writing the reward model"):
            base = _base_model(run, run.reward_model)
            write_reward_model(
                path, run.reward_model, run.statement(), base, f"{run.folder.name}, reward model", normalization
            )
    if "pairs" in run.public:
        run.results["reward_model"] = evaluate_pairs(run.reward_model, run.public["pairs"]).as_dict()


def _normalization(run: Run) -> Normalization:
    """The scale of the reward on text that the SFT model writes itself; 1 where no policy is at hand."""
    rollouts = run.recipe.rollouts
    if run.policy is None:
        return Normalization()
    assert run.reward_model is not None
    return normalize(
        run.reward_model,
        run.policy,
        rows=NORMALIZATION_ROWS,
        seed=run.planned["reward"].config.seed,
        prompt_tokens=rollouts.prompt_tokens if rollouts else 8,
        max_new_tokens=rollouts.max_completion_length if rollouts else run.planned["reward"].config.max_length // 2,
        text=rollouts.reward.text if rollouts else None,
    )


def _run_rollouts(run: Run, name: str, algorithm: type[PPO] | type[RLOO]) -> None:
    assert run.policy is not None
    config = run.planned[name].config
    if run.reward is None:
        assert run.reward_model is not None
        normalization = normalization_of(run.folder / "reward_model")
        run.reward = load_reward(config.reward, run.policy.device, trained=(run.reward_model, normalization))
    _train(run, algorithm(config, run.reward), run.policy)


def _run_evaluation(run: Run) -> None:
    assert run.policy is not None and run.reward is not None and run.recipe.rollouts is not None
    stage = run.planned["evaluation"]
    with run.reporter.status("measuring on held-out private units"):
        run.results["private_evaluation"] = evaluate_privately(
            run.policy,
            run.data["evaluation"],
            stage.plan,
            run.reward,
            run.recipe.rollouts,
            folder=run.private / "evaluation",
            run=run.identity,
            ledger=run.ledger,
            tell=run.reporter.note,
        )


_STAGES = {
    "sft": _run_sft,
    "reward": _run_reward,
    "ppo": lambda run: _run_rollouts(run, "ppo", PPO),
    "rloo": lambda run: _run_rollouts(run, "rloo", RLOO),
    "evaluation": _run_evaluation,
}


def _train(run: Run, algorithm: Algorithm[Any, Any], model: AdapterStack) -> None:
    name, data, reporter = algorithm.name, run.data[algorithm.name], run.reporter
    stage = Stage(
        model,
        algorithm,
        data,
        folder=run.private / name,
        run=run.identity,
        ledger=run.ledger,
        plan=run.planned[name].plan,
        beside=_beside(run, name),
        rests_on_private=_rests_on_private(run),
        log=run.folder / "metrics.jsonl",
        report=reporter.step,
        tell=reporter.note,
    )
    if stage.is_finished:
        stage.load_final()
        reporter.note(f"stage {name} is already done.")
        return
    reporter.start(name, stage.plan, data.declared_units, data.unit, stage.private)
    with reporter.tracking(run.recipe.report_to, run.folder / "logs", name):
        stage.train()


def _rests_on_private(run: Run) -> bool:
    drawn = run.ledger.intents(run=run.identity)
    return all(s.private for s in run.before) and all(intent.private for intent in drawn)


def _beside(run: Run, name: str) -> tuple[tuple[SampledGaussian, ...], ...]:
    """What a stage's units meet elsewhere: what other stages have drawn, and what they are still to draw."""
    if not any(run.planned[name].plan.beside):
        return ((),)  # parts of their own, and nothing spent on them before
    others = [sp for s in run.before for sp in s.spendings()]
    for other, stage in run.planned.items():
        if other == name:
            continue
        drawn = run.ledger.spendings(run=run.identity, dataset=stage.part.dataset, stage=other)
        left = stage.plan.steps - sum(s.mechanism.steps for s in drawn)
        others += drawn
        if left > 0 and not any((run.private / other / "final").glob("step-*")):
            others.append(stage.at(replace(stage.plan, steps=left)))
    return beside(run.planned[name], others)


# The end -------------------------------------------------------------------------------------------------------------


def _finish(run: Run, started: float) -> dict[str, Any]:
    statement = run.statement()
    released = run.folder / "reward_model"
    if run.policy is not None and {"sft", "ppo", "rloo"} & set(run.planned):
        title = f"{run.folder.name}, {'aligned privately' if statement.private else 'aligned WITHOUT privacy'}"
        released = run.folder / "release"
        with run.reporter.status("writing the release"):
            write_release(released, run.policy, statement, _base_model(run, run.policy), title)
    summary = summarize(statement, released) | run.results
    if run.recipe.reward is not None:
        summary["reward_model_release"] = str(run.folder / "reward_model")
    summary |= _evaluate(run)
    resources = {"seconds": round(time.monotonic() - started, 1), "peak_memory_mb": peak_memory_mb()}
    write_json(run.private / "resources.json", resources)
    if run.all_demo:
        summary |= resources  # of private data, time and memory would tell how long the longest record is
    write_json(run.folder / "summary.json", summary)
    return summary


def _base_model(run: Run, model: AdapterStack) -> str:
    if "earlier" in model.adapters:
        return str(model.model.peft_config["earlier"].base_model_name_or_path)
    own = run.recipe.reward.model if run.recipe.reward is not None and model is run.reward_model else None
    return embedded.resolve((own or run.recipe.model).name_or_path)


def summarize(statement: PrivacyStatement, release: Path) -> dict[str, Any]:
    """The private and public facts of a finished run."""
    return {
        "private": statement.private,
        "epsilon": statement.epsilon,
        "delta": statement.delta,
        "stages": [
            {
                "stage": s.stage,
                "dataset": s.dataset,
                "units": s.declared_units,
                "epsilon": s.epsilon_alone,
                "mechanisms": [asdict(m) for m in s.mechanisms],
            }
            for s in statement.stages
        ],
        "assumptions": statement.assumptions,
        "ledger": statement.ledger,
        "release": str(release),
    }


def _evaluate(run: Run) -> dict[str, Any]:
    recipe, config = run.recipe, run.recipe.rollouts
    if config is None or run.reward is None or "prompts" not in run.public:
        return {}
    assert run.policy is not None
    prompts = public_prompts(run.policy, run.public["prompts"], config, recipe.eval_prompts)
    reference = run.reference_reward
    with run.reporter.status("measuring on the public prompts"):
        results = evaluate_stages(
            run.policy, prompts, run.reward, config, seed=recipe.eval_seed, reference_reward=reference
        )
    texts = [
        {"prompt": prompt, **{stage: results[stage][1][i][1] for stage in results}}
        for i, (prompt, _) in enumerate(results["pretrained"][1][:SAMPLES])
    ]
    write_json(run.folder / "completions.json", texts)
    rows = {stage: result.as_dict() for stage, (result, _) in results.items()}
    if reference is None or recipe.reference_reward is None:
        return {"evaluation": rows}
    outside = is_outside_the_guarantee(recipe.reference_reward.source, recipe.reference_reward.is_public)
    write_json(run.private / "reference_evaluation.json", {"outside_the_guarantee": outside, "evaluation": rows})
    if run.all_demo or not outside:
        return {"evaluation": rows} | ({"outside_the_guarantee": ["reference_reward"]} if outside else {})
    run.reporter.note("the reference reward's numbers are outside the guarantee: private/reference_evaluation.json")
    hidden = {stage: {k: v for k, v in row.items() if not k.startswith("reference_")} for stage, row in rows.items()}
    return {"evaluation": hidden}


def peak_memory_mb() -> float:
    """Largest resident size of this process so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1024**2 if sys.platform == "darwin" else 1024), 1)


def _quiet_libraries() -> None:
    # Their warnings may quote lengths or texts of records.
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    warnings.simplefilter("ignore")


def _device(name: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _open_ledger(recipe: Recipe) -> Ledger:
    if recipe.ledger == ":memory:":
        raise DPAlignError("a ledger in memory forgets what was spent: give --ledger a file.")
    return Ledger(recipe.ledger)


def _run_identity(private: Path, folder: Path, ledger: Ledger) -> str:
    """The run's name in the ledger: readable, and new whenever the folder is made anew."""
    file = private / "run.json"
    if not file.exists():
        write_json(file, {"run": f"{folder.name}-{secrets.token_hex(4)}", "ledger": ledger.identity})
    value = json.loads(file.read_text(encoding="utf-8"))
    if value["ledger"] != ledger.identity:
        raise DPAlignError(
            f"{folder} was begun with another ledger than {ledger.path}: give that one with --ledger, or choose "
            "another output folder."
        )
    return str(value["run"])


def _same_origins(private: Path, origins: dict[str, Origin], drawn: list[Intent]) -> dict[str, Origin]:
    """The recipe's models, and those that the run used before the recipe dropped them: both stay in its statement.

    Raises:
        DPAlignError: a model is another one than when the run began.
    """
    value = json.loads((private / "run.json").read_text(encoding="utf-8"))
    if not drawn and not any(private.glob("*/step-*")):  # nothing rests on any of them yet
        return origins
    known = {name: Origin.from_json(origin) for name, origin in value.get("origins", {}).items()}
    for entry, origin in origins.items():
        if entry in known and origin.fingerprint != known[entry].fingerprint:
            old, new = known[entry].name, origin.name
            what = f"{entry} was {old!r} and is now {new!r}" if old != new else f"{entry} {old!r} itself has changed"
            raise DPAlignError(
                f"the models of the run in {private.parent} have changed since it began ({what}): its statement would "
                "miss what the old one was made of; restore it, or start a run under another output folder."
            )
    return known | origins


def _remember_origins(private: Path, origins: dict[str, Origin]) -> None:
    value = json.loads((private / "run.json").read_text(encoding="utf-8"))
    value["origins"] = {entry: asdict(origin) for entry, origin in sorted(origins.items())}
    write_json(private / "run.json", value)


def _assumed(recipe: Recipe, origins: dict[str, Origin]) -> set[str]:
    assumed = past_assumptions(origins)
    if recipe.rollouts is not None and recipe.rollouts.synthetic_steps:
        assumed.add(
            f"{recipe.rollouts.synthetic_steps} updates on prompts that the model wrote itself read no record: they "
            "rest on the model and the reward"
        )
    return assumed


@contextmanager
def _locked(private: Path) -> Iterator[None]:
    with open(private / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DPAlignError(
                f"another process is running in {private.parent}: wait for it, or choose another folder."
            ) from None
        yield
