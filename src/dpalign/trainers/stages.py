"""A trainer for each stage, in TRL's shape; the same pipeline as the command, from Python objects."""

from __future__ import annotations

from collections.abc import Sequence

from peft import LoraConfig
from transformers import PreTrainedTokenizerBase, TrainerCallback

from .. import algorithms
from ..settings.privacy import Privacy
from ..settings.trainers import (
    DPOConfig,
    GRPOConfig,
    OfflineConfig,
    PPOConfig,
    RewardModelConfig,
    RLOOConfig,
    SFTConfig,
)
from .base import Dataset, Model, Trainer
from .rewards import RewardFuncs


class DPSFTTrainer(Trainer):
    """Private supervised fine-tuning.

    Args:
        model: name, folder, dpalign release, or a model object that holds what its folder holds. The object is never
            changed; another trainer on it, or on the trainer's `model`, goes on from what was trained.
        args: an `SFTConfig`.
        train_dataset: `datasets.Dataset` or list of dicts with `messages`, `text`, or `prompt` and `completion`.
        processing_class: the tokenizer of a model object; default: its folder's.
        peft_config: plain LoRA; without one, `args.adapter`.
        callbacks: transformers' callbacks, told steps, epsilon and noised metrics, and nothing else.
        privacy: the budget, whom it protects, and what is public.
        quiet: no progress.
    """

    algorithm = algorithms.SFT
    Arguments = SFTConfig

    def __init__(
        self,
        model: Model,
        args: SFTConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: LoraConfig | None = None,
        *,
        callbacks: Sequence[TrainerCallback] | None = None,
        privacy: Privacy | None = None,
        quiet: bool = False,
    ) -> None:
        super().__init__(
            model, args, train_dataset, eval_dataset, processing_class, peft_config, privacy, quiet, None, callbacks
        )


class DPRewardTrainer(Trainer):
    """Private reward model. Arguments as for `DPSFTTrainer`.

    Args:
        model: a causal LM, which gets a head, or a sequence-classification model with num_labels=1.
        args: a `RewardModelConfig`.
        train_dataset: dicts with `chosen` and `rejected`, perhaps `prompt`, `margin`, `preference` (0.5 for a tie).
            Privacy(unit=...) names whom to protect (a judge, say); without one, each pair is a unit.
        eval_dataset: public pairs; train() then reports accuracy, calibration and margins on them.
    """

    algorithm = algorithms.RewardModelling
    Arguments = RewardModelConfig

    def __init__(
        self,
        model: Model,
        args: RewardModelConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: LoraConfig | None = None,
        *,
        callbacks: Sequence[TrainerCallback] | None = None,
        privacy: Privacy | None = None,
        quiet: bool = False,
    ) -> None:
        super().__init__(
            model, args, train_dataset, eval_dataset, processing_class, peft_config, privacy, quiet, None, callbacks
        )


class DPDPOTrainer(Trainer):
    """Private DPO. Arguments as for `DPSFTTrainer`.

    Args:
        args: a `DPOConfig`.
        train_dataset: dicts with `chosen` and `rejected`, perhaps `prompt`, `margin`, `preference` (0.5 for a tie).
            Privacy(unit=...) names whom to protect (a judge, say); without one, each pair is a unit. None, with
            `args.prompts` that are no one's: the policy writes the pairs, and a reward labels them.
        eval_dataset: public pairs; train() then reports how often the policy's implicit reward agrees with them. Public
            prompts, with `args.prompts`.
        reward_funcs: of `args.prompts` that are no one's: what labels the pairs, as for `DPPPOTrainer`.
    """

    algorithm = algorithms.DPO
    Arguments = DPOConfig

    def __init__(
        self,
        model: Model,
        args: DPOConfig,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: LoraConfig | None = None,
        *,
        reward_funcs: RewardFuncs | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        privacy: Privacy | None = None,
        quiet: bool = False,
    ) -> None:
        super().__init__(
            model,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            peft_config,
            privacy,
            quiet,
            reward_funcs,
            callbacks,
        )


class DPPPOTrainer(Trainer):
    """Private PPO. Arguments as for `DPSFTTrainer`.

    Args:
        args: a `PPOConfig`.
        train_dataset: dicts with `prompt`, or `messages`, or `text` whose first tokens become the prompt; none, with
            `args.prompts` that are no one's.
        reward_funcs: a function, an object that is called, a partial, the name or folder of a model, or a list of them
            with `args.reward_weights`. A function scores every row by itself: f(prompts, completions, **columns) or
            TRL's f(completions, **columns) -> list[float]. Without one, `args.reward`.
    """

    algorithm = algorithms.PPO
    Arguments = PPOConfig

    def __init__(
        self,
        model: Model,
        args: PPOConfig,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: LoraConfig | None = None,
        *,
        reward_funcs: RewardFuncs | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        privacy: Privacy | None = None,
        quiet: bool = False,
    ) -> None:
        super().__init__(
            model,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            peft_config,
            privacy,
            quiet,
            reward_funcs,
            callbacks,
        )


class DPRLOOTrainer(Trainer):
    """Private RLOO. Arguments as for `DPPPOTrainer`, with `args` an `RLOOConfig`."""

    algorithm = algorithms.RLOO
    Arguments = RLOOConfig

    def __init__(
        self,
        model: Model,
        args: RLOOConfig,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: LoraConfig | None = None,
        *,
        reward_funcs: RewardFuncs | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        privacy: Privacy | None = None,
        quiet: bool = False,
    ) -> None:
        super().__init__(
            model,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            peft_config,
            privacy,
            quiet,
            reward_funcs,
            callbacks,
        )


class DPGRPOTrainer(Trainer):
    """Private GRPO. Arguments as for `DPPPOTrainer`, with `args` an `GRPOConfig`."""

    algorithm = algorithms.GRPO
    Arguments = GRPOConfig

    def __init__(
        self,
        model: Model,
        args: GRPOConfig,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: LoraConfig | None = None,
        *,
        reward_funcs: RewardFuncs | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        privacy: Privacy | None = None,
        quiet: bool = False,
    ) -> None:
        super().__init__(
            model,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            peft_config,
            privacy,
            quiet,
            reward_funcs,
            callbacks,
        )


class DPOfflineTrainer(Trainer):
    """Private learning from scored completions. Arguments as for `DPPPOTrainer`, with `args` an `OfflineConfig`."""

    algorithm = algorithms.Offline
    Arguments = OfflineConfig

    def __init__(
        self,
        model: Model,
        args: OfflineConfig,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: LoraConfig | None = None,
        *,
        reward_funcs: RewardFuncs | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        privacy: Privacy | None = None,
        quiet: bool = False,
    ) -> None:
        super().__init__(
            model,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            peft_config,
            privacy,
            quiet,
            reward_funcs,
            callbacks,
        )
