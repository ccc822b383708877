"""The trainers' configs: each algorithm's settings, and beside them what a TRL config has.

A name that TRL or transformers has and these lack is refused with the reason, where one is known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any, ClassVar, Literal, TypeVar

from ..domains import COUNT, SCALE, within
from ..errors import DPAlignError
from ..names import instead
from . import dpo, grpo, offline, ppo, reward_model, rloo, sft
from .base import TrainingConfig

T = TypeVar("T")
ONCE = "the release is sent once, when it is written"
QUANTIZED = 'say model_init_kwargs={"quantization_config": BitsAndBytesConfig(...)}'
WHOLE = "every process of a script holds the whole base; a recipe has model.sharding"
FOR_A_TRAINER = {  # what is otherwise here than in a recipe
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config"), WHOLE),
    "eval_on_start": "with eval_steps, eval_dataset is measured before the first step too",
    "evaluation_strategy": "say eval_strategy='steps' and eval_steps",
    "load_in_4bit": QUANTIZED,
    "load_in_8bit": QUANTIZED,
    "quantization_config": QUANTIZED,
    "hub_always_push": ONCE,
    "hub_revision": ONCE,
    "hub_strategy": ONCE,
    "hub_token": "huggingface_hub reads its own login, or $HF_TOKEN: a token in a script is read by others",
    "fp16": "the base is frozen, so there is no mixed precision: bf16=True loads it in bfloat16",
    "greater_is_better": "a run's release is what its last step made: compare runs by evaluations.jsonl",
    "load_best_model_at_end": (
        "a run's release is what its last step made, and its statement is of that: read evaluations.jsonl, and say "
        "max_steps in the next run"
    ),
    "metric_for_best_model": "a run's release is what its last step made: compare runs by evaluations.jsonl",
    "missing_eos_penalty": "only stages that sample completions have one",
    "per_device_eval_batch_size": "eval_dataset is measured in parts of a fixed size",
    "per_gpu_train_batch_size": "say per_device_train_batch_size",
    "resume_from_checkpoint": "it is an argument of train()",
    "reward_model_path": "give it to the trainer as reward_funcs",
    "sft_model_path": "give it to the trainer as the model",
}


@dataclass(kw_only=True)
class TrainerArguments:
    """What a trainer's config has beside its algorithm's settings.

    Args:
        output_dir: the run's folder; the same script resumes it. release/ (or reward_model/) in it is for sharing.
        per_device_train_batch_size: rows per forward and backward pass: `micro_batch_size` by its name in TRL.
        gradient_accumulation_steps: the units that a sample is expected to have are this many times
            per_device_train_batch_size: `expected_batch_size` by its names in TRL. A private update wants hundreds.
        bf16: loads the frozen base in bfloat16; adapters, clipping and noise stay float32. Without it: float32 or
            bfloat16, by what this device computes faster (`model_init_kwargs` names one).
        eval_strategy: `steps` asks for eval_steps, `no` for none; eval_steps alone says it, too.
        model_init_kwargs: of a model that is given by name, `dtype`, `trust_remote_code` and `quantization_config` (a
            BitsAndBytesConfig: 4 bits, or 8 with llm_int8_threshold=0.0).
        report_to: a tracker that accelerate knows (`wandb`, `trackio`, `mlflow`, `tensorboard`, ...), which is told
            noised metrics, public measurements and epsilon, those of a private stage when the stage ends; `none`.
        push_to_hub: sends the release, and nothing else of the run, to the Hub when training ends.
        hub_model_id: the repository, `USER/NAME`; default: the name of output_dir, in your account.
        hub_private_repo: nobody else may see it; False makes it public, which must be said.
    """

    Section: ClassVar[type[TrainingConfig]]  # the same settings in a recipe

    output_dir: str | None = None
    per_device_train_batch_size: int | None = within(None, "[1, 65536]")
    gradient_accumulation_steps: int | None = within(None, "[1, 1000000]")
    expected_batch_size: int | None = within(None, COUNT)
    micro_batch_size: int | None = within(None, "[1, 65536]")
    bf16: bool = False
    eval_strategy: Literal["no", "steps"] | None = None
    model_init_kwargs: dict[str, Any] | None = None
    report_to: str | list[str] = "none"
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private_repo: bool = True

    def as_section(self) -> TrainingConfig:
        """The settings that a recipe has.

        Raises:
            DPAlignError: one is given that belongs elsewhere in a recipe.
        """
        shared = {*BATCHES, *(f.name for f in fields(self.Section))}
        mine = {f.name: f.default for f in fields(self) if f.name not in shared}
        given = [name for name, default in mine.items() if getattr(self, name) != default]
        if given:
            raise DPAlignError(
                f"{type(self).__name__}: {', '.join(given)} is for the trainers; a recipe says it outside its stages."
            )
        return self.section()

    def section(self) -> TrainingConfig:
        """The algorithm's settings, with TRL's names for sizes in ours.

        Raises:
            DPAlignError: sizes that contradict each other.
        """
        names = {f.name for f in fields(self.Section) if f.init} - set(BATCHES)
        settings = {name: getattr(self, name) for name in names}
        expected, micro = self._batches()
        settings |= {} if expected is None else {"expected_batch_size": expected}
        settings |= {} if micro is None else {"micro_batch_size": micro}
        steps = settings["eval_steps"]
        if self.eval_strategy is not None and (self.eval_strategy == "no") != (steps is None):
            raise DPAlignError(
                f"eval_strategy {self.eval_strategy!r} contradicts eval_steps {steps}: give eval_steps alone."
            )
        return self.Section(**settings)

    def _batches(self) -> tuple[int | None, int | None]:
        """Units expected in a sample, and in a pass; None where nothing says it."""
        device, times = self.per_device_train_batch_size, self.gradient_accumulation_steps
        expected, micro = self.expected_batch_size, self.micro_batch_size
        if device is not None and micro is not None and device != micro:
            raise DPAlignError(
                f"per_device_train_batch_size {device} and micro_batch_size {micro} are two names of one size: "
                "give one."
            )
        if times is not None and device is None:
            raise DPAlignError(
                f"gradient_accumulation_steps {times} is a multiple of per_device_train_batch_size: give that too, or "
                "expected_batch_size instead of both."
            )
        if device is None:
            return expected, micro
        product = device * (times or 1)
        if expected is not None and times is not None and expected != product:
            raise DPAlignError(
                f"expected_batch_size {expected} contradicts per_device_train_batch_size {device} x "
                f"gradient_accumulation_steps {times} = {product}: a sample is expected to have that many units."
            )
        return (product if expected is None else expected), device


BATCHES = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "expected_batch_size", "micro_batch_size"
)  # fmt: skip


def one_tracker(report_to: str | list[str] | None) -> str:
    """What transformers' `report_to` names, which may be a list.

    Raises:
        DPAlignError: several.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to or ["none"])
    if len(names) > 1:
        raise DPAlignError(f"report_to={names!r}: name one tracker.")
    return str(names[0])


def answering(config: type[T]) -> type[T]:
    """Lets a config say of an argument that it lacks what else to do."""
    known = [f.name for f in fields(config)]  # type: ignore[arg-type]
    plain: Callable[..., None] = config.__init__

    @wraps(plain)
    def init(self: T, **given: Any) -> None:
        for name in given:
            if name not in known:
                raise DPAlignError(f"{config.__name__} has no {name}: {_instead(name, known)}.")
        plain(self, **given)

    config.__init__ = init  # type: ignore[assignment, method-assign]
    return config


def _instead(name: str, known: list[str]) -> str:
    return FOR_A_TRAINER.get(name) or instead(name, known) or "leave it out"


@dataclass(kw_only=True)
class RolloutArguments(TrainerArguments):
    """Beside those of every trainer, of one that samples completions.

    Args:
        reward_weights: of the reward functions, in their order; default: 1 each.
    """

    reward_weights: list[float] | None = within(None, SCALE)


@answering
@dataclass(kw_only=True)
class SFTConfig(TrainerArguments, sft.SFTConfig):  # type: ignore[misc]
    """Those of `settings.sft` and of `TrainerArguments`."""

    Section = sft.SFTConfig


@answering
@dataclass(kw_only=True)
class RewardModelConfig(TrainerArguments, reward_model.RewardModelConfig):  # type: ignore[misc]
    """Those of `settings.reward_model` and of `TrainerArguments`."""

    Section = reward_model.RewardModelConfig


@answering
@dataclass(kw_only=True)
class DPOConfig(RolloutArguments, dpo.DPOConfig):  # type: ignore[misc]
    """Those of `settings.dpo` and of `RolloutArguments`."""

    Section = dpo.DPOConfig


@answering
@dataclass(kw_only=True)
class PPOConfig(RolloutArguments, ppo.PPOConfig):  # type: ignore[misc]
    """Those of `settings.ppo` and of `RolloutArguments`."""

    Section = ppo.PPOConfig


@answering
@dataclass(kw_only=True)
class RLOOConfig(RolloutArguments, rloo.RLOOConfig):  # type: ignore[misc]
    """Those of `settings.rloo` and of `RolloutArguments`."""

    Section = rloo.RLOOConfig


@answering
@dataclass(kw_only=True)
class GRPOConfig(RolloutArguments, grpo.GRPOConfig):  # type: ignore[misc]
    """Those of `settings.grpo` and of `RolloutArguments`."""

    Section = grpo.GRPOConfig


@answering
@dataclass(kw_only=True)
class OfflineConfig(RolloutArguments, offline.OfflineConfig):  # type: ignore[misc]
    """Those of `settings.offline` and of `RolloutArguments`."""

    Section = offline.OfflineConfig
