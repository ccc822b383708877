"""A plan is carried out: its stages one after the other, under one budget. No stage's name is known here."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeGuard

import torch

from .algorithms.base import Algorithm, check_records
from .algorithms.completions import check_asked
from .algorithms.pairs import PairAlgorithm
from .algorithms.reward import both_texts
from .algorithms.texts import TextAlgorithm
from .data.load import Record
from .data.overlap import remember_contents
from .data.text import Text
from .data.units import UnitDataset
from .engines import Engine, reach
from .errors import DPAlignError
from .evaluation import (
    Apart,
    Evaluation,
    TextEvaluation,
    agreement_on,
    apart,
    best_of,
    evaluate_stages,
    of_each_stage,
    public_prompts,
    text_loss,
)
from .evaluation.during import Evaluations, measure_of
from .evaluation.guarantee import is_outside_the_guarantee
from .evaluation.private import measure_privately
from .files import write_json
from .following import Order, follow, quiet_libraries
from .inputs import are_chats, asked_as, chats_of, check_inputs, public_by
from .loaded import Models, Rewards, base_name, dtypes_of, with_dtypes
from .models import AdapterStack, ModelConfig, Normalization, Policy, RewardModel, embedded
from .models.bases import remember_base
from .models.prompt_format import PromptFormat
from .plan import Plan, PlannedStage, RecipeStage, beside, delta_of, make_plan
from .privacy.accountant import SampledGaussian
from .privacy.context import own_context
from .privacy.ledger import Ledger
from .privacy.statement import PrivacyStatement, state_privacy
from .provenance import past_stages
from .recipe import Recipe
from .records import (
    Public,
    Records,
    check_shared_texts,
    read_by,
    read_public,
    read_public_prompts,
    read_stage_records,
    stage_units,
    units_of,
)
from .release import MEASURED, RELEASE, REWARD_MODEL, say_in_card, write_release, write_reward_model
from .reporting.html import write_report
from .reporting.progress import Reporter
from .reporting.tables import agreement_line, chosen_line
from .reporting.trackers import check_installed
from .results import Results
from .rewards import Reward, RewardConfig, RewardFunction, load_reward, normalize
from .rewards.learned import own_texts
from .rewards.load import chat_writers, try_reward
from .settings.reward_model import RewardModelConfig
from .settings.rewards import RELEASED
from .settings.rollouts import CompletionConfig, samples
from .stages import kind
from .survey import Survey
from .training import OwnTextStage, Stage
from .training.self_check import check_stage
from .workspace import Workspace
from .world import ALONE, World, joined, lost_is_said

SURVEY = "data.json"  # in the private folder
FREE = "free"  # the setting that names rewards of which a stage learns a correction
SAMPLES = 20  # public completions that are kept for people to read
NORMALIZATION_ROWS = 512  # self-written texts that fix the scale of a reward model
APART_ROWS = 192  # texts of either kind, to say how far people's are from the policy's


@lost_is_said()
@own_context()
def run_recipe(
    recipe: Recipe,
    *,
    reporter: Reporter | None = None,
    records: Records | None = None,
    public: Mapping[str, list[Record]] | None = None,
    policy: Policy | None = None,
    reward_model: RewardModel | None = None,
    reward_function: RewardFunction | None = None,
    command: str = "",
    audit: Callable[[Plan, Path], None] | None = None,
) -> Results:
    """Runs, resumes or finishes a recipe.

    Args:
        records, public: by stage, instead of the data files (as the Python trainers do), private and declared public.
        policy, reward_model, reward_function: instead of those that the recipe names.
        command: what the data holder typed, for their report.
        audit: called before the first draw with plan and folder; ends the run by raising, and reads no record.

    Raises:
        DPAlignError: anything a person can mend, before the first draw wherever that is possible.
    """
    started = time.monotonic()
    quiet_libraries()
    world = joined()
    if not world.is_first:
        return follow(world, policy, reward_model, reward_function)
    if recipe.num_threads:
        torch.set_num_threads(recipe.num_threads)
    recipe.check()
    check_installed(recipe.report_to)
    reporter = reporter or Reporter(quiet=True)
    with Workspace.open(recipe) as workspace:
        origins = workspace.origins(recipe)
        with reporter.status("reading the data"):
            records = records or read_stage_records(recipe, workspace.ledger, workspace.private)
        data, assumptions = stage_units(recipe, records, workspace.ledger)
        units = units_of(recipe, records, data)
        records = {name: read_by(recipe, name, rows) for name, rows in records.items()}
        delta = delta_of(recipe, units, past_stages(origins))
        recipe = with_dtypes(recipe, workspace, policy, reward_model)
        world.share(recipe)
        plan = make_plan(recipe, units, workspace.past(recipe, origins, delta), assumptions)
        with reporter.status("loading the model"):
            models = Models.load(recipe, policy, reward_model)
        given = read_public(recipe) if public is None else {n: (rows, "eval_dataset") for n, rows in public.items()}
        shown, prompts = public_by(recipe, given), public_by(recipe, read_public_prompts(recipe))
        with reporter.status("checking the records"):
            surveys = check_inputs(plan, models, records, shown, prompts)
            write_json(workspace.private / SURVEY, {name: found.as_dict() for name, found in surveys.items()})
            texts = check_shared_texts(recipe, records, [*shown.items(), *prompts.items()], workspace.ledger)
        run = Run(plan, workspace, data, models, shown, prompts, reporter, reward_function, world)
        run.check(records, audit)
        workspace.remember(origins)
        remember_contents(texts, workspace.ledger)
        with closing(run), reporter.tracking(recipe.report_to if run.has_to_train() else "none", workspace.folder):
            for stage in plan.order.values():
                run.stage(stage)
            return run.finish(started, command)


def check_recipe(recipe: Recipe, plan: Plan) -> dict[str, Survey]:
    """Every check of a run on its models, data and rewards, without a run: nothing is drawn or written.

    Raises:
        DPAlignError: what `run_recipe` would refuse.
    """
    check_installed(recipe.report_to)
    with closing(Ledger.copy_of(recipe.ledger)) as ledger:
        given = read_stage_records(recipe, ledger)
        stage_units(recipe, given, ledger)
        records = {name: read_by(recipe, name, rows) for name, rows in given.items()}
        shown = public_by(recipe, read_public(recipe))
        prompts = public_by(recipe, read_public_prompts(recipe))
        models = Models.load(recipe)
        surveys = check_inputs(plan, models, records, shown, prompts)
        check_shared_texts(recipe, records, [*shown.items(), *prompts.items()], ledger)
    for stage in plan.order.values():
        for entering in stage.kind.entering(stage.config).values():
            if isinstance(entering, RewardConfig) and entering.source != RELEASED:
                try_reward(entering, models.reader(stage.kind.model_kind).device)
        if has_engine(stage.config):
            reach(stage.config, models.of(Policy)).close()
    return surveys


def has_engine(config: object) -> TypeGuard[CompletionConfig]:
    """Whether another process samples the completions of a stage with these settings."""
    return samples(config) and config.engine.url is not None


# The stages ----------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A plan that is being carried out."""

    plan: Plan
    workspace: Workspace
    data: Mapping[str, UnitDataset]
    models: Models
    public: Public
    prompts: Public
    reporter: Reporter
    reward_function: RewardFunction | None = None
    world: World = ALONE
    reference: Reward | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # that a step is expected to take, by stage
    engines: dict[str, Engine] = field(default_factory=dict)  # that sample, by stage
    written: dict[tuple[int, int], list[Text]] = field(default_factory=dict)  # own texts, by seed and number
    chats: dict[str, bool] = field(default_factory=dict)  # whether what a stage reads is chats

    def __post_init__(self) -> None:
        self.results = Results(self.statement())
        self.rewards = Rewards(self.plan.recipe, self.models, self.workspace.folder, self.reward_function)

    def statement(self) -> PrivacyStatement:
        """What has been spent so far."""
        plan, workspace = self.plan, self.workspace
        earlier = past_stages(plan.origins)
        stated = state_privacy(
            workspace.identity,
            workspace.ledger,
            plan.delta,
            earlier,
            list(plan.assumptions),
            plan.demo,
            workspace.name_of,
        )
        return replace(stated, dtypes=dtypes_of(plan.recipe))

    def check(self, records: Records, audit: Callable[[Plan, Path], None] | None = None) -> None:
        """Of its rewards and stages, before the first draw.

        Raises:
            DPAlignError: what would go wrong with them later.
        """
        self.chats = chats_of(self.plan, records, self.prompts)
        self.load_rewards()
        self.check_prompts_of_rewards(records)
        self.reach_engines()
        self.self_check(records)
        if audit is not None:
            audit(self.plan, self.workspace.folder)

    def load_rewards(self) -> None:
        """All that no stage of the run has to train first, so that what is wrong with one is said before a draw."""
        entering = [e for stage in self.plan.order.values() for e in stage.kind.entering(stage.config).values()]
        rewards = [e for e in entering if isinstance(e, RewardConfig)]
        wanted = [reward for reward in rewards if self.reward_function or reward.source != RELEASED]
        given = self.plan.recipe.reference_reward if self.plan.recipe.rollouts is not None else None  # else none scores
        if not wanted and given is None:
            return
        if self.plan.recipe.eval_best_of is not None:
            self.check_best_of()
        with self.reporter.status("loading the rewards"):
            for reward in wanted:
                self.rewards.of(reward)
            if given is not None:
                device = self.models.of(Policy).device
                self.reference = load_reward(given, device, public=self.rewards.public_models())

    def check_best_of(self) -> None:
        """Raises DPAlignError for a judge whose numbers no guarantee covers, and for no prompts to measure on."""
        given = self.plan.recipe.reference_reward
        if given is not None and is_outside_the_guarantee(given) and not self.plan.is_all_demo:
            raise DPAlignError(
                "eval_best_of is judged by the reference reward, whose numbers are outside the guarantee: name a "
                "public one, or leave eval_best_of out."
            )
        if not any(samples(s.config) and name in self.public for name, s in self.plan.order.items()):
            raise DPAlignError("eval_best_of needs public prompts: give data an eval_path and eval_is_public: true.")

    def check_prompts_of_rewards(self, records: Records) -> None:
        """Refuses prompts that a reward model cannot read: their completions would have no reward."""
        for name, stage in self.plan.order.items():
            source = self.plan.recipe.data_of(name)
            rows, path = self.prompts.get(name) or (records.get(name, []), source.path or source.name)
            for config in stage.kind.entering(stage.config).values():
                if not isinstance(config, RewardConfig) or not rows:
                    continue
                if config.source == RELEASED and self.reward_function is None:
                    reader = self.models.reader(RewardModel).tokenizer
                    writers = [] if config.text == "completion" else [reader]
                else:
                    writers = chat_writers(self.rewards.of(config).function)
                for tokenizer in writers:
                    check_records(rows, path, stage.kind.columns, partial(check_asked, tokenizer))

    def self_check(self, records: Records) -> None:
        """Tries every private stage that is still to come on text that the run writes itself, of the kind of its data.

        Raises:
            DPAlignError: one unit would change what another one contributes.
        """
        with self.reporter.status("trying the stages on self-written text"):
            for stage in self.plan.stages.values():
                if stage.plan.noise_multiplier == 0 or is_done(stage, self.workspace) or stage.is_measurement:
                    continue
                entering = stage.kind.entering(stage.config)
                rewards = {name: self.known(c) for name, c in entering.items() if isinstance(c, RewardConfig)}
                data, model = self.plan.recipe.data_of(stage.name), self.models.on_trial(stage.kind.model_kind)
                people = data.unit is not None and data.max_records_per_unit > 1
                chats = are_chats(records[stage.name], stage.kind.columns)
                each = check_stage(model, stage.kind, stage.config, rewards, people=people, chats=chats)
                self.seconds[stage.name] = each * stage.batch_size * stage.plan.passes / self.world.size

    def reach_engines(self) -> None:
        """Tries the servers that sample completions on public text.

        Raises:
            DPAlignError: one is not there, or is not what the stage needs.
        """
        for name, stage in self.plan.order.items():
            if has_engine(stage.config) and not is_done(stage, self.workspace):
                if self.world.size > 1:
                    raise DPAlignError(
                        f"{name}.engine: an engine samples for one process, and the run has {self.world.size}: start "
                        "one, or leave engine out."
                    )
                with self.reporter.status("trying the rollout engine"):
                    self.engines[name] = reach(stage.config, self.models.of(Policy))

    def close(self) -> None:
        """Has its engines forget what they were pushed."""
        for engine in self.engines.values():
            engine.close()

    def known(self, config: RewardConfig) -> Reward:
        """A reward that was loaded; for one that the run has still to train, a constant with its range."""
        loaded = self.rewards.known(config)
        if loaded is not None:
            return loaded
        low, high = -4.0 if config.low is None else config.low, 4.0 if config.high is None else config.high
        return Reward(lambda prompts, completions, **_: [low] * len(completions), low, high, rows_at_once=None)

    def stage(self, stage: RecipeStage) -> None:
        """Trains or measures; leaves a release of a reward model, and what public pairs say of the stage."""
        model, rewards = self.models.of(stage.kind.model_kind), self.rewards.entering(stage)
        if isinstance(stage, PlannedStage) and stage.is_measurement:
            self.measure(stage, rewards["reward"])
            return
        algorithm = stage.kind(stage.config, **rewards)
        if stage.name in self.engines:
            algorithm.generator = self.engines[stage.name]
        if isinstance(model, RewardModel):
            algorithm.own_texts = self.writer(model, algorithm.config.seed)
        with asked_as(model if isinstance(model, Policy) else None, self.chats.get(stage.name)):
            if isinstance(stage, PlannedStage):
                self.train(stage, algorithm, model)
            else:
                self.train_on_own_text(stage, algorithm, model)
        if isinstance(model, RewardModel):
            self.release_reward_model(stage, model, algorithm.config)
        if isinstance(algorithm, PairAlgorithm) and stage.name in self.public:
            pairs, _ = self.public[stage.name]
            with self.reporter.status("measuring on the public pairs"):
                own, free = algorithm.compared(model, pairs)
                found = agreement_on(own, pairs, free)
                if isinstance(model, RewardModel):
                    found = found.with_distance(self.distance(model, algorithm.config, pairs))
                self.results.pairs[stage.name] = found

    def train(self, planned: PlannedStage, algorithm: Algorithm[Any, Any, Any], model: AdapterStack) -> None:
        """One private stage, from its newest checkpoint if there is one."""
        name, workspace, reporter = planned.name, self.workspace, self.reporter
        stage = Stage(
            model,
            algorithm,
            self.data[name],
            folder=workspace.private / name,
            run=workspace.identity,
            ledger=workspace.ledger,
            plan=planned.plan,
            beside=still_beside(planned, self.plan, workspace),
            rests_on_private=self.rests_on_private(),
            log=workspace.log,
            evaluate=self.evaluations(planned, algorithm, model),
            begins=reporter.begin,
            report=reporter.step,
            tell=reporter.note,
            world=self.world,
        )
        cost = planned.kind.tokens(planned.config)
        tokens = planned.batch_size * (cost.trained + cost.read)
        units, done = planned.units, self.steps_until(name)
        about = units.count, units.unit, stage.private, tokens, self.seconds.get(name), done, units.total
        self.finish_stage(stage, name, lambda: reporter.start(name, stage.plan, *about))

    def train_on_own_text(self, section: RecipeStage, algorithm: Algorithm[Any, Any, Any], model: AdapterStack) -> None:
        """One stage that reads no record, from its newest checkpoint if there is one."""
        name, workspace, reporter = section.name, self.workspace, self.reporter
        stage = OwnTextStage(
            model,
            algorithm,
            self.prompts[name][0] if name in self.prompts else None,
            folder=workspace.private / name,
            rests_on_private=self.rests_on_private(),
            log=workspace.log,
            evaluate=self.evaluations(section, algorithm, model),
            begins=reporter.begin,
            report=reporter.step,
            tell=reporter.note,
        )
        cost, count = section.kind.tokens(section.config), algorithm.config.expected_batch_size
        about = stage.steps, count, stage.config.read_prompts, count * (cost.trained + cost.read)
        self.finish_stage(stage, name, lambda: reporter.start_own_text(name, *about, self.steps_until(name)))

    def finish_stage(self, stage: Stage | OwnTextStage, name: str, announce: Callable[[], None]) -> None:
        """Trains a stage to its end; of one that has come there already its adapter is taken."""
        is_shared = isinstance(stage, Stage) and not stage.is_finished
        self.order(self.plan.order[name], stage.algorithm, is_shared)
        if stage.is_finished:
            stage.load_final()
            self.reporter.note(f"stage {name} is already done.")
        else:
            announce()
            with self.reporter.showing(name):
                stage.train()
        self.world.spread([*stage.model.stage_state().values()])

    def order(self, stage: RecipeStage, algorithm: Algorithm[Any, Any, Any], is_shared: bool) -> None:
        """Tells the other processes of a stage that begins."""
        if self.world.size > 1:
            policy, plain = self.models.get(Policy), RecipeStage(stage.name, stage.config)
            chats, files = policy is not None and policy.asks_in_chats, self.rewards.files()
            numbers = algorithm.noise_multiplier, algorithm.declared_units
            self.world.share(Order(plain, chats, *numbers, files, is_shared))
            if is_shared:
                self.reporter.note(f"{self.world.size} processes share the work of stage {stage.name}.")

    def has_to_train(self) -> bool:
        """Whether a stage is not done yet."""
        stages = [stage for stage in self.plan.order.values() if not stage.is_measurement]
        return not all(is_done(stage, self.workspace) for stage in stages)

    def steps_until(self, name: str) -> int:
        """Planned steps of the stages before this one."""
        return sum(stage.steps for stage in takewhile(lambda stage: stage.name != name, self.plan.order.values()))

    def evaluations(
        self, planned: RecipeStage, algorithm: Algorithm[Any, Any, Any], model: AdapterStack
    ) -> Evaluations | None:
        """What measures a stage's model while it trains; None where nobody asks."""
        if algorithm.config.eval_steps is None:
            return None
        (records, _), recipe, reporter = self.public[planned.name], self.plan.recipe, self.reporter
        measure = measure_of(algorithm, model, records, at_most=recipe.eval_prompts, seed=recipe.eval_seed)
        log, steps = self.workspace.evaluations, planned.steps
        return Evaluations(log, planned.name, steps, model, measure, reporter.evaluated, reporter.measuring)

    def rests_on_private(self) -> bool:
        """Whether everything that the models have learned so far has a guarantee."""
        drawn = self.workspace.ledger.intents(run=self.workspace.identity)
        return all(s.private for s in self.plan.before) and all(intent.private for intent in drawn)

    def measure(self, stage: PlannedStage, reward: Reward) -> None:
        """One noisy release on held-out units."""
        workspace = self.workspace
        with self.reporter.status("measuring on held-out private units"):
            self.results.measurements[stage.name] = measure_privately(
                self.models.of(Policy),
                self.data[stage.name],
                stage.plan,
                reward,
                stage.kind.sampling(stage.config),
                folder=workspace.private / stage.name,
                run=workspace.identity,
                ledger=workspace.ledger,
                tell=self.reporter.note,
            )

    # The end -------------------------------------------------------------------------------------------------------

    def finish(self, started: float, command: str) -> Results:
        """Writes the release, the summary, measured on public prompts, and the reports."""
        plan, folder, results = self.plan, self.workspace.folder, self.results
        results.statement = statement = self.statement()
        trained = [stage.kind.model_kind for stage in plan.order.values() if not stage.is_measurement]
        if RewardModel in trained:
            results.release = results.reward_model_release = folder / REWARD_MODEL
        with self.reporter.status("measuring"):
            texts = measure_texts(plan.recipe, self.public, self.models.get(Policy))
        if Policy in trained:
            policy = self.models.of(Policy)
            how = "privately" if statement.stages else "without private data"
            title = f"{folder.name}, aligned {how if statement.private else 'WITHOUT privacy'}"
            results.release = folder / RELEASE
            with self.reporter.status("writing the release"):
                base, prompts = self.base_of(policy, plan.recipe.model), self.prompt_format(policy)
                remember_base(self.workspace.private, base)
                write_release(results.release, policy, statement, base, title, prompts, texts)
        self.measure_on_public_prompts(texts)
        self.say_what_the_reward_is_worth()
        resources = {"seconds": round(time.monotonic() - started, 1), "peak_memory_mb": peak_memory_mb()}
        write_json(self.workspace.private / "resources.json", resources | ({"command": command} if command else {}))
        if plan.is_all_demo:
            results.resources = resources  # of private data, time and memory would tell how long the longest record is
        write_json(folder / "summary.json", results.to_json())
        write_report(folder)
        self.publish()
        self.world.share(results)
        self.world.forget()
        return results

    def say_what_the_reward_is_worth(self) -> None:
        """Of a reward model that the run has trained, in its card; all of it public."""
        results, rollouts = self.results, self.plan.recipe.rollouts
        if results.reward_model_release is None:
            return
        is_used = rollouts is not None and rollouts.reward.source == RELEASED
        chosen = results.best_of if is_used else {}
        lines = [agreement_line(stage, found.as_dict()) for stage, found in results.pairs.items()]
        lines += [chosen_line(name, found.as_dict()) for name, found in chosen.items()]
        if lines:
            say_in_card(results.reward_model_release, lines, MEASURED)

    def publish(self) -> None:
        """What was measured in public, and what has been spent, for the tracker; as the summary has it."""
        steps, results = sum(stage.steps for stage in self.plan.order.values()), self.results
        for stage, pairs in results.pairs.items():
            self.reporter.publish(steps, f"pairs/{stage}", pairs.as_dict())
        for stage, found in results.evaluation.items():
            self.reporter.publish(steps, f"evaluation/{stage}", found.as_dict())
        self.reporter.publish(steps, "run", {"epsilon": results.statement.epsilon})

    def prompt_format(self, policy: Policy) -> PromptFormat:
        """As the last stage that trains the policy reads them."""
        configs = [stage.config for stage in self.plan.order.values() if stage.kind.model_kind is Policy]
        given = [config.prepend_bos for config in configs if hasattr(config, "prepend_bos")]
        return PromptFormat(bool(given and given[-1]), policy.asks_in_chats, policy.asked_with)

    def release_reward_model(self, stage: RecipeStage, model: RewardModel, config: RewardModelConfig) -> None:
        """Written once, when its stage ends, with its scale on text that the SFT model writes itself."""
        folder = self.workspace.folder / REWARD_MODEL
        if (folder / "privacy.json").exists():
            return
        own = stage.kind.entering(stage.config).get("model")
        base = self.base_of(model, own or self.plan.recipe.model)
        remember_base(self.workspace.private, base)
        with self.reporter.status("writing the reward model"):
            write_reward_model(
                folder,
                model,
                self.statement(),
                base,
                f"{self.workspace.folder.name}, reward model",
                self.normalization(model, config),
            )

    def normalization(self, model: RewardModel, config: RewardModelConfig) -> Normalization:
        """1 where no policy is at hand."""
        write = self.writer(model, config.seed)
        return Normalization() if write is None else normalize(model, write(config.scale_texts or NORMALIZATION_ROWS))

    def distance(self, model: RewardModel, config: RewardModelConfig, pairs: list[Record]) -> Apart | None:
        """How far the texts of public pairs are from the policy's own, as the reward model reads them."""
        write = self.writer(model, config.seed)
        if write is None:
            return None
        own = write(config.scale_texts or NORMALIZATION_ROWS)[:APART_ROWS]
        return apart(model.features(own), model.features(*both_texts(pairs[: APART_ROWS // 2])))

    def writer(self, model: RewardModel, seed: int) -> Callable[[int], list[Text]] | None:
        """Writes so many texts as the policy stages will, for a reward model to read, the same ones once; None if there
        is no policy."""
        policy, rollouts = self.models.get(Policy), self.plan.recipe.rollouts
        if policy is None:
            return None
        new = partial(
            own_texts,
            policy,
            seed=seed,
            prompt_tokens=rollouts.prompt_tokens if rollouts else 8,
            max_new_tokens=rollouts.max_completion_length if rollouts else model.text.max_length // 2,
            text=rollouts.reward.text if rollouts else None,
        )

        def write(count: int) -> list[Text]:
            if (seed, count) not in self.written:
                self.written[seed, count] = new(count)
            return self.written[seed, count]

        return write

    def base_of(self, model: AdapterStack, config: ModelConfig) -> str:
        """The model that a release's adapter is for."""
        return base_name(model, embedded.resolve(config.name_or_path))

    def measure_on_public_prompts(self, texts: Mapping[str, TextEvaluation]) -> None:
        """The base model, and the policy after each stage; completions to read in completions.json."""
        recipe, found = self.plan.recipe, self.sampled_public_prompts()
        if found is None:
            self.results.evaluation = dict(texts)
            return
        config, reward, records = found
        policy = self.models.of(Policy)
        prompts = public_prompts(policy, records, config, recipe.eval_prompts)
        with self.reporter.status("measuring on the public prompts"):
            measured = evaluate_stages(
                policy, prompts, reward, config, seed=recipe.eval_seed, reference_reward=self.reference
            )
        samples = [
            {"prompt": prompt, **{stage: measured[stage][1][i][1] for stage in measured}}
            for i, (prompt, _) in enumerate(measured["pretrained"][1][:SAMPLES])
        ]
        write_json(self.workspace.folder / "completions.json", samples)
        self.show({stage: found.with_text(texts.get(stage)) for stage, (found, _) in measured.items()})
        if recipe.eval_best_of is not None and self.reference is not None:
            rewards = {"reward": reward, **self.free_rewards()}
            with self.reporter.status("measuring what the reward chooses"), policy.reference():
                how = config, recipe.eval_best_of
                self.results.best_of = best_of(policy, prompts, rewards, self.reference, *how, seed=recipe.eval_seed)

    def free_rewards(self) -> dict[str, Reward]:
        """Those that a stage of the run learns a correction of."""
        stages = self.plan.order.values()
        found = [entering for stage in stages for entering in stage.kind.entering(stage.config).items()]
        return {name: self.rewards.of(c) for name, c in found if name == FREE and isinstance(c, RewardConfig)}

    def sampled_public_prompts(self) -> tuple[CompletionConfig, Reward, list[Record]] | None:
        """Those of the stage that samples, with its settings and its reward."""
        for name, stage in self.plan.order.items():
            if samples(stage.config) and name in self.public:
                return stage.config, self.rewards.of(stage.config.reward), self.public[name][0]
        return None

    def show(self, rows: dict[str, Evaluation]) -> None:
        """What the guarantee covers goes into the summary; of private data, the rest stays in private/."""
        given, results = self.plan.recipe.reference_reward, self.results
        results.evaluation = dict(rows)
        if given is None:
            return
        outside = is_outside_the_guarantee(given)
        written = {"outside_the_guarantee": outside, "evaluation": {name: row.as_dict() for name, row in rows.items()}}
        write_json(self.workspace.private / "reference_evaluation.json", written)
        if not outside:
            return
        if self.plan.is_all_demo:
            results.outside_the_guarantee = ["reference_reward"]
            return
        self.reporter.note(
            "the reference reward's numbers are outside the guarantee: private/reference_evaluation.json"
        )
        results.evaluation = {name: row.without_reference() for name, row in rows.items()}


def measure_texts(recipe: Recipe, public: Public, policy: Policy | None) -> dict[str, TextEvaluation]:
    """How well the base model, and the policy after each stage, predict the public texts of the stage that learns from
    texts; read as that stage reads them. Empty where there are none."""
    names = [name for name in recipe.stages if issubclass(kind(name), TextAlgorithm) and name in public]
    if policy is None or not names:
        return {}
    algorithm, (records, _) = kind(names[0])(recipe.stages[names[0]]), public[names[0]]
    return of_each_stage(policy, lambda: text_loss(*algorithm.nats(policy, records)))


def is_done(stage: RecipeStage, workspace: Workspace) -> bool:
    """Whether a stage has been trained to its end."""
    return any((workspace.private / stage.name / "final").glob("step-*"))


def still_beside(planned: PlannedStage, plan: Plan, workspace: Workspace) -> tuple[tuple[SampledGaussian, ...], ...]:
    """What a stage's units meet elsewhere: what other stages have drawn, and what they are still to draw."""
    if not any(planned.plan.beside):
        return ((),)  # parts of their own, and nothing spent on them before
    others = [sp for s in plan.before for sp in s.spendings()]
    for name, stage in plan.stages.items():
        if name == planned.name:
            continue
        drawn = workspace.ledger.spendings(run=workspace.identity, dataset=stage.part.dataset, stage=name)
        left = stage.plan.steps - sum(s.mechanism.steps for s in drawn)
        others += drawn
        if left > 0 and not is_done(stage, workspace):
            others.append(stage.at(replace(stage.plan, steps=left)))
    return beside(planned, others)


def peak_memory_mb() -> float:
    """Largest resident size of this process so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1024**2 if sys.platform == "darwin" else 1024), 1)
