"""Trainers in TRL's shape; the same pipeline as the command, from Python objects."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, MutableMapping
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from peft import LoraConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .algorithms import DPO, PPO, RLOO, SFT, Algorithm, DPOConfig, RewardModelConfig, RewardModelling, SFTConfig
from .algorithms.pairs import PairAlgorithm
from .data import DataConfig
from .data.load import Record
from .errors import DPAlignError
from .models import AdapterConfig, ModelConfig, Policy, RewardModel
from .models.lora import check_to_train
from .models.objects import Given, check_tokenizer, folder_of
from .privacy.statement import read_statement
from .recipe import Recipe
from .release import RELEASE, REWARD_MODEL
from .reporting.progress import Reporter
from .run import run_recipe

# The releases that were trained from a model object, oldest first: another trainer on it goes on from the newest.
_TRAINED: MutableMapping[PreTrainedModel | PeftModel, list[Path]] = WeakKeyDictionary()


class _DPTrainer:
    """What the trainers share: one private stage on in-memory records, with its run folder and ledger."""

    algorithm: type[Algorithm[Any, Any, Any]]

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: Any,
        train_dataset: Any,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: LoraConfig | None = None,
        *,
        dataset_name: str,
        output_dir: str,
        model_is_public: bool = False,
        unit: str | None = None,
        declared_units: int | None = None,
        max_records_per_unit: int = 1,
        units_disjoint: Literal["checked", "declared"] = "checked",
        composition: Literal["parallel", "sequential"] = "parallel",
        dataset_version: str = "",
        shared_texts: Literal["checked", "declared"] = "checked",
        ledger: str | None = None,
        eval_is_public: bool = False,
        report_to: str = "none",
        quiet: bool = False,
    ) -> None:
        if eval_dataset is not None and not (eval_is_public and issubclass(self.algorithm, PairAlgorithm)):
            raise DPAlignError(
                "eval_dataset would be measured without noise: declare it public with eval_is_public=True (pairs), or "
                "evaluate the release on public prompts with `dpalign evaluate --eval_is_public`."
            )
        if peft_config is not None:
            args = dataclasses.replace(args, adapter=adapter_from(peft_config))
        self.args = args
        self._records = _records(train_dataset)
        self._eval_records = _records(eval_dataset) if eval_dataset is not None else None
        self._given = Given(None if isinstance(model, str) else model, processing_class)
        self._is_classifier = type(self._given.base).__name__.endswith("ForSequenceClassification")
        shares = composition == "sequential"
        stages: dict[str, Any] = {
            self.algorithm.name: dataclasses.replace(args, target_epsilon=None) if shares else args
        }
        counted: dict[str, Any] = {"declared_units": declared_units, "max_records_per_unit": max_records_per_unit}
        self._recipe = Recipe(
            output_dir=output_dir,
            model=_config_of(model, output_dir, model_is_public),
            data=DataConfig(name=dataset_name, unit=unit, version=dataset_version, **counted),
            target_epsilon=args.target_epsilon if args.target_epsilon is not None else float("inf"),
            target_delta=args.target_delta,
            units_disjoint=units_disjoint,
            composition=composition,
            shared_texts=shared_texts,
            ledger=ledger,
            report_to=report_to,  # type: ignore[arg-type]
            **stages,
        )
        self._reporter = Reporter(quiet=quiet)
        self._reward_function: Callable[..., list[float]] | None = None
        self.summary: dict[str, Any] | None = None
        self._trained: PeftModel | None = None

    def train(self, resume_from_checkpoint: bool | None = None) -> dict[str, Any]:
        """Trains or resumes; returns the summary (epsilon, delta, stages, release).

        Args:
            resume_from_checkpoint: None and True go on from the newest checkpoint of output_dir; False
                demands that there is none.
        """
        if self.args.target_epsilon is None and self.args.noise_multiplier is None:
            raise DPAlignError("give args a target_epsilon (inf for no privacy) or a noise_multiplier.")
        folder = Path(self._recipe.output_dir)
        if resume_from_checkpoint is False and (folder / "private" / "run.json").exists():
            raise DPAlignError(f"{folder} holds a run already: choose another output_dir, or resume it.")
        policy, reward_model = self._models()
        results = run_recipe(
            self._recipe,
            reporter=self._reporter,
            records={self.algorithm.name: self._records},
            public={} if self._eval_records is None else {self.algorithm.name: self._eval_records},
            policy=policy,
            reward_model=reward_model,
            reward_function=self._reward_function,
        )
        self.summary = results.to_json()
        given = self._given.model
        if given is not None and self._is_classifier == (self.algorithm.model_kind is RewardModel):
            history, release = _TRAINED.setdefault(given, []), self._release().resolve()
            if release not in history:
                history.append(release)
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
            release, dtype = self._release(), getattr(torch, self._recipe.model.dtype)
            base = str(LoraConfig.from_pretrained(str(release)).base_model_name_or_path)
            options = {"num_labels": 1} if self.algorithm.model_kind is RewardModel else {}
            auto = AutoModelForSequenceClassification if options else AutoModelForCausalLM
            plain = auto.from_pretrained(base, dtype=dtype, **options)
            self._trained = PeftModel.from_pretrained(plain, release).eval()
            _TRAINED[self._trained] = [release.resolve()]
        return self._trained

    def save_model(self, output_dir: str) -> None:
        """Copies the release (adapter, tokenizer, card, privacy statement) to `output_dir`."""
        shutil.copytree(self._release(), output_dir, dirs_exist_ok=True)

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


class DPSFTTrainer(_DPTrainer):
    """Private supervised fine-tuning.

    Args:
        model: name, folder, dpalign release, or a model object that holds what its folder holds. The object is never
            changed; another trainer on it, or on the trainer's `model`, goes on from what was trained.
        args: an `SFTConfig` with target_epsilon set.
        train_dataset: `datasets.Dataset` or list of dicts with `text`, or `prompt` and `completion`.
        peft_config: plain LoRA; without one, `args.adapter`.
        processing_class: the tokenizer of a model object; default: its folder's.
        dataset_name: the ledger's key; every run on one name adds up.
        unit: column that names the privacy unit.
        units_disjoint: `declared` takes your word that this dataset shares no unit with those of the model's past.
        composition: `sequential` makes args.target_epsilon the target of this stage and the model's past together.
        dataset_version, shared_texts: `data.version` and `shared_texts` of a recipe.
    """

    algorithm = SFT

    def __init__(
        self, model: str | PreTrainedModel | PeftModel, args: SFTConfig, train_dataset: Any, *rest: Any, **options: Any
    ):
        super().__init__(model, args, train_dataset, *rest, **options)


class DPRewardTrainer(_DPTrainer):
    """Private reward model. Arguments as for `DPSFTTrainer`, with `args` a `RewardModelConfig`.

    Args:
        model: a causal LM, which gets a head, or a sequence-classification model with num_labels=1.
        train_dataset: dicts with `chosen` and `rejected`, perhaps `prompt`, `margin`, `preference` (0.5 for a tie).
        eval_dataset: pairs that `eval_is_public` declares public; train() then reports accuracy, calibration and
            margins on them.
        unit: column that names whom to protect (a judge, say); without one, each pair is a unit.
    """

    algorithm = RewardModelling

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: RewardModelConfig,
        train_dataset: Any,
        *rest: Any,
        **options: Any,
    ):
        super().__init__(model, args, train_dataset, *rest, **options)


class DPDPOTrainer(_DPTrainer):
    """Private DPO. Arguments as for `DPSFTTrainer`, with `args` a `DPOConfig`.

    Args:
        train_dataset: dicts with `chosen` and `rejected`, perhaps `prompt`, `margin`, `preference` (0.5 for a tie).
        eval_dataset: pairs that `eval_is_public` declares public; train() then reports how often the policy's implicit
            reward agrees with them.
        unit: column that names whom to protect (a judge, say); without one, each pair is a unit.
    """

    algorithm = DPO

    def __init__(
        self, model: str | PreTrainedModel | PeftModel, args: DPOConfig, train_dataset: Any, *rest: Any, **options: Any
    ):
        super().__init__(model, args, train_dataset, *rest, **options)


class _RolloutTrainer(_DPTrainer):
    """A trainer that samples completions and scores them with `reward_funcs`, or as `args.reward` says."""

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: Any,
        train_dataset: Any,
        *rest: Any,
        reward_funcs: Callable[..., list[float]] | None = None,
        **options: Any,
    ):
        if reward_funcs is not None:
            source = f"{reward_funcs.__module__}:{reward_funcs.__qualname__}"
            args = dataclasses.replace(args, reward=dataclasses.replace(args.reward, source=source))
        super().__init__(model, args, train_dataset, *rest, **options)
        self._reward_function = reward_funcs


class DPPPOTrainer(_RolloutTrainer):
    """Private PPO. Arguments as for `DPSFTTrainer`, with `args` a `PPOConfig`.

    Args:
        reward_funcs: a function f(prompts, completions, **columns) -> list[float] that scores every row by
            itself; its range is `args.reward.low` to `args.reward.high`. Without one, `args.reward`.
    """

    algorithm = PPO


class DPRLOOTrainer(_RolloutTrainer):
    """Private RLOO. Arguments as for `DPPPOTrainer`, with `args` an `RLOOConfig`."""

    algorithm = RLOO


def adapter_from(config: LoraConfig) -> AdapterConfig:
    """The fields of a plain LoRA; anything else is refused by name.

    Raises:
        DPAlignError: a field that cannot be honoured.
    """
    check_to_train(config)
    targets, layers = config.target_modules, config.layers_to_transform
    return AdapterConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        target_modules=sorted(targets) if isinstance(targets, set | list) else targets,
        layers=[layers] if isinstance(layers, int) else layers,
    )


def _config_of(model: str | PreTrainedModel | PeftModel, output_dir: str, is_public: bool) -> ModelConfig:
    if isinstance(model, str):
        return ModelConfig(model, is_public)
    start = _start_of(model, output_dir)
    dtype: Any = str(model.dtype).removeprefix("torch.")
    return ModelConfig(
        start,
        is_public,
        dtype=dtype,
        trust_remote_code=type(Given(model).base).__module__.startswith("transformers_modules"),
    )


def _start_of(model: PreTrainedModel | PeftModel, output_dir: str) -> str:
    """What a trainer on this object begins with: what the last one made of it, or else the folder it was loaded from.

    Of the trainer whose run lies in `output_dir` (a resumed one): what that one began with.
    """
    own = Path(output_dir).resolve()
    trained = _TRAINED.get(model, []) if isinstance(model, torch.nn.Module) else []
    history = list(takewhile(lambda release: release.parent != own, trained))
    return str(history[-1]) if history else folder_of(model)


def _records(dataset: Any) -> list[Record]:
    records = dataset.to_list() if hasattr(dataset, "to_list") else list(dataset)
    if not records or not all(isinstance(r, dict) for r in records):
        raise DPAlignError("train_dataset must be a datasets.Dataset or a non-empty list of dicts.")
    return records
