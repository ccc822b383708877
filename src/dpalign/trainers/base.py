"""What the trainers share: one private stage on in-memory records, with its run folder and ledger."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable, MutableMapping, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, ClassVar, TypeAlias
from weakref import WeakKeyDictionary

import datasets
import torch
from peft import LoraConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

from ..algorithms import Algorithm, TrainingConfig
from ..data.load import Record, with_system
from ..data.table import table_of
from ..domains import check_settings
from ..errors import DPAlignError
from ..hub import Repository, base_of, share
from ..launched import place
from ..models import AdapterConfig, ModelConfig, Policy, RewardModel, embedded
from ..models.bases import base_path
from ..models.loading import device_of
from ..models.lora import check_to_train
from ..models.objects import Given, check_tokenizer, folder_of
from ..models.quantized import kind_of, quantization_config
from ..privacy.statement import read_statement
from ..recipe import Recipe
from ..release import RELEASE, REWARD_MODEL
from ..run import run_recipe
from ..settings.data import DataConfig
from ..settings.privacy import Privacy
from ..settings.rollouts import samples
from ..settings.trainers import RolloutArguments, TrainerArguments, one_tracker
from .asked import (
    Asked,
    ask_for_names,
    ask_for_units,
    ask_what_is_public,
    chosen,
    draws,
    recipe_target,
    with_reward,
)
from .callbacks import Telling
from .rewards import Function, RewardFuncs, read_reward_funcs, reward_function

Model: TypeAlias = str | PreTrainedModel | PeftModel
Dataset: TypeAlias = Any  # a `datasets.Dataset`, or an iterable of dicts

# The releases that were trained from a model object, oldest first: another trainer on it goes on from the newest.
_TRAINED: MutableMapping[PreTrainedModel | PeftModel, list[Path]] = WeakKeyDictionary()


class Trainer:
    """One private stage. Everything that is missing or contradicts itself is asked for at construction, at once."""

    algorithm: ClassVar[type[Algorithm[Any, Any, Any]]]
    Arguments: ClassVar[type[TrainerArguments]]

    def __init__(
        self,
        model: Model,
        args: TrainerArguments,
        train_dataset: Dataset | None,
        eval_dataset: Dataset | None,
        processing_class: PreTrainedTokenizerBase | None,
        peft_config: LoraConfig | None,
        privacy: Privacy | None,
        quiet: bool,
        reward_funcs: RewardFuncs | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
    ) -> None:
        if not isinstance(args, self.Arguments):
            raise DPAlignError(
                f"args of {type(self).__name__} must be a dpalign.{self.Arguments.__name__}, and it is a "
                f"{type(args).__module__}.{type(args).__name__}."
            )
        privacy = privacy or Privacy()
        check_settings(privacy, "Privacy")
        check_settings(args)
        self.args, self._privacy = args, privacy
        asked = Asked(type(self).__name__)
        name = asked.attempt(lambda: model if isinstance(model, str) else _start_of(model, args.output_dir or ""))
        self._records = asked.attempt(lambda: _read(train_dataset, args)) or []
        section = self._section(asked, reward_funcs, peft_config)
        ask_for_names(asked, args, privacy)
        if eval_dataset is None and section is not None and section.eval_steps is not None:
            asked.say("eval_dataset: the public records that eval_steps measures on (or leave eval_steps out)")
        ask_what_is_public(asked, privacy, name, section.reward if samples(section) else None, eval_dataset is not None)
        shown = None if eval_dataset is None else asked.attempt(lambda: list(_records(eval_dataset, "eval_dataset")))
        self._public = {} if shown is None else {self.algorithm.name: shown}
        config = None if name is None else asked.attempt(lambda: self._model_config(model, name))
        ask_for_units(asked, args, privacy)
        asked.answer()
        assert config is not None and section is not None  # else it was asked for
        self._given = Given(None if isinstance(model, str) else model, processing_class)
        self._is_classifier = type(self._given.base).__name__.endswith("ForSequenceClassification")
        self._recipe = self._recipe_of(section, config)
        self._recipe.check()
        if args.push_to_hub:
            self._repository.check(self._base())
        self._reporter = Telling(args, callbacks or (), quiet)
        self.summary: dict[str, Any] | None = None
        self._trained: PeftModel | None = None

    # From a trainer's arguments to a recipe -----------------------------------------------------------------------

    def _section(
        self, asked: Asked, reward_funcs: RewardFuncs | None, peft_config: LoraConfig | None
    ) -> TrainingConfig | None:
        """The settings of the recipe's only stage; None if they contradict each other, which is then said."""
        budget = chosen(asked, self.args, self._privacy)
        section = asked.attempt(self.args.section)
        if section is None:
            return None
        section = dataclasses.replace(section, **budget)
        if peft_config is not None:
            has_head = self.algorithm.model_kind is RewardModel
            adapter = asked.attempt(lambda: adapter_from(peft_config, has_head))
            section = section if adapter is None else dataclasses.replace(section, adapter=adapter)
        self._rewards: list[Function | str] = []
        if samples(section):
            weights, reward = self._weights(), section.reward
            if reward_funcs is not None:
                read = asked.attempt(lambda: read_reward_funcs(reward_funcs, weights, reward, self._records))
                if read is not None:
                    section, self._rewards = dataclasses.replace(section, reward=read[0]), read[1]
            elif weights is not None:
                asked.say("reward_weights is for reward_funcs: args.reward is one reward")
            section = with_reward(section, self._privacy, asked)
        elif reward_funcs is not None or self._weights() is not None:
            asked.say(
                "reward_funcs is for completions, and with args.prompts private none are sampled here: leave it out"
            )
        return section

    def _weights(self) -> list[float] | None:
        return self.args.reward_weights if isinstance(self.args, RolloutArguments) else None

    def _model_config(self, model: Model, name: str) -> ModelConfig:
        """How the model is loaded.

        Raises:
            DPAlignError: bf16 or model_init_kwargs contradict it.
        """
        args, is_public = self.args, self._privacy.model_is_public
        options = dict(args.model_init_kwargs or {})
        if isinstance(model, str):
            plain = "float32" if "quantization_config" in options else "auto"
            dtype = str(options.pop("dtype", "bfloat16" if args.bf16 else plain)).removeprefix("torch.")
            trust = options.pop("trust_remote_code", False)
            if args.bf16 and dtype != "bfloat16":
                raise DPAlignError(f"bf16=True contradicts model_init_kwargs dtype {dtype}: give one")
            kind = kind_of(options.pop("quantization_config", None), dtype)
            if options:
                raise DPAlignError(
                    "model_init_kwargs takes dtype, quantization_config and trust_remote_code, not "
                    f"{', '.join(options)}"
                )
            config = ModelConfig(name, is_public, dtype, trust, kind)  # type: ignore[arg-type]
            check_settings(config, "model_init_kwargs")
            return config
        dtype = str(model.dtype).removeprefix("torch.")
        if options:
            raise DPAlignError("model_init_kwargs is for a model that is given by name: this one is loaded already")
        if args.bf16 and dtype != "bfloat16":
            raise DPAlignError(
                f"bf16=True and a model object in {dtype}: load it with dtype=torch.bfloat16, or pass its name"
            )
        remote = type(Given(model).base).__module__.startswith("transformers_modules")
        kind = kind_of(getattr(Given(model).base.config, "quantization_config", None), dtype)
        return ModelConfig(name, is_public, dtype, remote, kind)  # type: ignore[arg-type]

    def _recipe_of(self, section: TrainingConfig, model: ModelConfig) -> Recipe:
        args, privacy = self.args, self._privacy
        target = section.target_epsilon
        if privacy.composition == "sequential":  # the run's target is what the stage and the model's past may spend
            section = dataclasses.replace(section, target_epsilon=None)
        stages: dict[str, Any] = {self.algorithm.name: section}
        return Recipe(
            output_dir=args.output_dir or "",
            model=model,
            data=DataConfig(
                name=privacy.dataset_name or "",
                unit=privacy.unit,
                version=privacy.dataset_version,
                declared_units=privacy.declared_units,
                max_records_per_unit=privacy.max_records_per_unit,
            ),
            target_epsilon=recipe_target(target),
            target_delta=section.target_delta,
            units_disjoint=privacy.units_disjoint,
            composition=privacy.composition,
            shared_texts=privacy.shared_texts,
            ledger=privacy.ledger,
            report_to=one_tracker(args.report_to),  # type: ignore[arg-type]
            **stages,
        )

    # What a caller does ----------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: bool | None = None) -> dict[str, Any]:
        """Trains or resumes; returns the summary (epsilon, delta, stages, release).

        Args:
            resume_from_checkpoint: None and True go on from the newest checkpoint of output_dir; False
                demands that there is none.
        """
        folder, is_first = Path(self._recipe.output_dir), place().rank == 0
        if is_first and resume_from_checkpoint is False and (folder / "private" / "run.json").exists():
            raise DPAlignError(f"{folder} holds a run already: choose another output_dir, or resume it.")
        policy, reward_model = self._models()
        function = None
        if self._rewards:
            config, device = self._recipe.rollouts, device_of(self._recipe.device)
            assert config is not None
            function = reward_function(self._rewards, self._weights(), config.reward, device)
        results = run_recipe(
            self._recipe,
            reporter=self._reporter,
            records={self.algorithm.name: self._records} if self._records else {},
            public=self._public,
            policy=policy,
            reward_model=reward_model,
            reward_function=function,
        )
        self.summary = results.to_json()
        given = self._given.model
        if given is not None and self._is_classifier == (self.algorithm.model_kind is RewardModel):
            history, release = _TRAINED.setdefault(given, []), self._release().resolve()
            if release not in history:
                history.append(release)
        if is_first:
            self._reporter.end()  # last: whatever a callback raises, what was trained is known
        if is_first and self.args.push_to_hub:
            self.push_to_hub()
        return self.summary

    def _models(self) -> tuple[Policy | None, RewardModel | None]:
        """What the given objects stand for; the recipe loads the rest."""
        given, config = self._given, self._recipe.model
        if given.model is None:
            check_tokenizer(given.tokenizer, config.name_or_path)
            return None, None
        if self._is_classifier:
            return None, RewardModel.load(config, given.base.device, given=given)
        return Policy.load(config, given.base.device, given), None

    @property
    def model(self) -> PeftModel:
        """The trained model, as plain peft loads the release; another trainer goes on from it.

        Raises:
            DPAlignError: nothing is trained yet.
        """
        if self._trained is None:
            release, dtype = self._release(), self._dtype()
            base = base_path(release)
            scores = self.algorithm.model_kind is RewardModel
            options: dict[str, Any] = {"num_labels": 1} if scores else {}
            quantized = quantization_config(self._recipe.model.quantization, dtype)
            options |= {} if quantized is None else {"quantization_config": quantized}
            auto = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
            plain = auto.from_pretrained(base, dtype=getattr(torch, dtype), **options)
            self._trained = PeftModel.from_pretrained(plain, release).eval()
            _TRAINED[self._trained] = [release.resolve()]
        return self._trained

    def _dtype(self) -> str:
        """Of the frozen weights that the release was trained on."""
        asked = self._recipe.model.dtype
        return asked if asked != "auto" else str(self.privacy.get("dtypes", {}).get("model", "float32"))

    def save_model(self, output_dir: str) -> None:
        """Copies the release (adapter, tokenizer, card, privacy statement) to `output_dir`."""
        shutil.copytree(self._release(), output_dir, dirs_exist_ok=True)

    def push_to_hub(self) -> str:
        """Sends a copy of the release to `args.hub_model_id`; returns the repository's full name.

        Raises:
            DPAlignError: nothing is trained yet, the base has no name on the Hub, or the Hub refuses or is not reached.
        """
        release = self._release()
        return share(release, self._repository, partial(shutil.copytree, release, dirs_exist_ok=True))

    @property
    def _repository(self) -> Repository:
        name = self.args.hub_model_id or Path(self._recipe.output_dir).resolve().name
        return Repository(name, self.args.hub_private_repo)

    def _base(self) -> str:
        """The model that the release's adapter will be for."""
        name = embedded.resolve(self._recipe.model.name_or_path)
        return base_of(Path(name)) or name

    def _release(self) -> Path:
        trains = self.algorithm.model_kind
        release = Path(self._recipe.output_dir) / (REWARD_MODEL if trains is RewardModel else RELEASE)
        if not (release / "privacy.json").is_file():
            raise DPAlignError("there is no release yet: call train() first.")
        return release

    @property
    def privacy(self) -> dict[str, Any]:
        """The release's privacy statement."""
        stated = read_statement(self._release())
        return {} if stated is None else stated[0]


def adapter_from(config: LoraConfig, has_head: bool = False) -> AdapterConfig:
    """The fields of a plain LoRA; anything else is refused by name.

    Raises:
        DPAlignError: a field that cannot be honoured.
    """
    check_to_train(config, has_head)
    targets, layers = config.target_modules, config.layers_to_transform
    return AdapterConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        target_modules=sorted(targets) if isinstance(targets, set | list) else targets,
        layers=[layers] if isinstance(layers, int) else layers,
    )


def _start_of(model: PreTrainedModel | PeftModel, output_dir: str) -> str:
    """What a trainer on this object begins with: what the last one made of it, or else the folder it was loaded from.

    Of the trainer whose run lies in `output_dir` (a resumed one): what that one began with.
    """
    own = Path(output_dir).resolve()
    trained = _TRAINED.get(model, []) if isinstance(model, torch.nn.Module) else []
    history = list(takewhile(lambda release: release.parent != own, trained))
    return str(history[-1]) if history else folder_of(model)


def _read(dataset: Dataset | None, args: TrainerArguments) -> Sequence[Record]:
    """The private records; none, of a stage whose prompts are no one's.

    Raises:
        DPAlignError: there are some where none are read, or the other way round.
    """
    if draws(args):
        return _records([] if dataset is None else dataset, "train_dataset")
    if dataset is not None:
        raise DPAlignError(f"train_dataset is private, and with prompts {args.prompts} no record is read: leave it out")  # type: ignore[attr-defined]
    return []


def _records(dataset: Iterable[Any], name: str) -> Sequence[Record]:
    """The rows of a dataset; those of a `datasets.Dataset` stay where they are.

    Raises:
        DPAlignError: it has none, or they are no dicts.
    """
    if isinstance(dataset, datasets.Dataset) and len(dataset):
        return table_of(dataset, name)
    records = list(dataset)
    if not records or not all(isinstance(r, dict) for r in records):
        raise DPAlignError(f"{name} must be a datasets.Dataset or a non-empty list of dicts")
    return with_system(records, name)
