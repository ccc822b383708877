"""From TRL's PPO settings and objects to ours: nothing is drawn or written here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from ..data.load import Record
from ..errors import DPAlignError
from ..models import embedded
from ..models.objects import folder_of
from ..models.reward_model import FORMAT_FILE
from ..settings.rewards import RELEASED, RewardConfig
from ..settings.trainers import PPOConfig as Settings
from ..settings.trainers import one_tracker
from .config import PPOConfig

OUTPUT = "trainer_output"  # transformers' own default
SCORES = (-1e6, 1e6)  # range of a reward without privacy, where nothing needs one


@dataclass(frozen=True)
class Scored:
    """The reward: its settings, and the function if it is one."""

    config: RewardConfig
    function: Callable[..., list[float]] | None = None


# Settings ------------------------------------------------------------------------------------------------------------


def settings(config: PPOConfig, rows: int, longest: int, reward: RewardConfig) -> Settings:
    """Our settings of a run without privacy: no noise and no clipping of rows.

    Args:
        config: resolved as those of a trainer. rows: of the dataset. longest: tokens of the longest prompt.
    """
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    episodes = config.total_episodes or int(config.num_train_epochs * rows)
    updates = math.ceil(episodes / batch) * config.num_mini_batches
    scheduler = str(getattr(config.lr_scheduler_type, "value", config.lr_scheduler_type))
    warmup = config.warmup_steps if config.warmup_steps >= 1 else config.warmup_steps * updates
    if scheduler not in ("constant", "constant_with_warmup", "linear", "cosine"):
        raise DPAlignError(f"lr_scheduler_type {scheduler!r} cannot be honoured: use constant, linear or cosine.")
    return Settings(
        output_dir=str(config.output_dir or OUTPUT),
        report_to=one_tracker(config.report_to),
        expected_batch_size=batch // config.num_mini_batches,
        max_steps=updates,
        micro_batch_size=config.per_device_train_batch_size,
        num_mini_batches=config.num_mini_batches,
        num_ppo_epochs=config.num_ppo_epochs,
        learning_rate=float(config.learning_rate or 0.0),
        lr_scheduler_type=scheduler.removesuffix("_with_warmup"),  # type: ignore[arg-type]
        warmup_steps=int(warmup),
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_epsilon=config.adam_epsilon,
        gradient_checkpointing=bool(config.gradient_checkpointing),
        save_steps=updates if _word(config.save_strategy) == "no" else _every(config.save_steps, updates),
        logging_steps=_every(config.logging_steps, updates),
        eval_steps=eval_steps(config, updates),
        seed=int(config.seed or 0),
        max_length=longest + config.response_length,
        max_prompt_length=longest,
        max_completion_length=config.response_length,
        min_completion_length=0 if stops(config) else config.response_length,
        temperature=config.temperature,
        missing_eos_penalty=config.missing_eos_penalty or 0.0,
        beta=config.kl_coef,
        gamma=config.gamma,
        lam=config.lam,
        cliprange=config.cliprange,
        cliprange_value=config.cliprange_value,
        vf_coef=config.vf_coef,
        reward=reward,
        clipping="none",
    )


def stops(config: PPOConfig) -> bool:
    """Whether EOS ends a completion; in TRL it does only if the script says so."""
    return config.stop_token is not None or config.stop_token_id is not None


def check_stop(config: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises DPAlignError for a stop token that is not the tokenizer's EOS."""
    if config.stop_token and config.stop_token_id is not None:
        raise DPAlignError("stop_token and stop_token_id are two names of one thing: give one of them.")
    if config.stop_token_id not in (None, tokenizer.eos_token_id):
        raise DPAlignError(
            f"stop_token_id={config.stop_token_id} cannot be honoured: completions end at the tokenizer's EOS, "
            f"{tokenizer.eos_token_id}."
        )


def eval_steps(config: PPOConfig, updates: int) -> int | None:
    """Steps between measurements of eval_dataset, of `updates` in all: as often as logs, where nothing else is said."""
    if config.eval_steps is None and _word(config.eval_strategy) == "no":
        return None
    return _every(config.logging_steps if config.eval_steps is None else config.eval_steps, updates)


def _every(steps: float, updates: int) -> int:
    """A number of steps, that may be given as a share of them all."""
    return max(1, math.ceil(steps * updates) if 0 < steps < 1 else int(steps))


def _word(value: Any) -> str:
    return str(getattr(value, "value", value))


# Prompts -------------------------------------------------------------------------------------------------------------


def read_rows(dataset: Any, tokenizer: PreTrainedTokenizerBase, *, checked: bool = True) -> list[Record]:
    """Records with a `prompt`: as they are, or what the tokens of `input_ids` say.

    checked: whether the text has to have these very tokens.

    Raises:
        DPAlignError: no rows, neither column, or tokens that are not those of any text: it says which row.
    """
    rows = [dict(row) for row in dataset] if dataset is not None else []
    if not rows:
        raise DPAlignError("train_dataset has no rows.")
    return [_read_row(row, number if checked else 0, tokenizer) for number, row in enumerate(rows, 1)]


def _read_row(row: dict[str, Any], number: int, tokenizer: PreTrainedTokenizerBase) -> Record:
    kept = {name: value for name, value in row.items() if name not in ("input_ids", "attention_mask")}
    if "prompt" in row or "input_ids" not in row:
        return kept
    ids = as_list(row["input_ids"])
    mask = as_list(row.get("attention_mask", [1] * len(ids)))
    ids = [token for token, there in zip(ids, mask, strict=True) if there]
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if number and tokenizer(text, add_special_tokens=False).input_ids != ids:
        raise DPAlignError(
            f"row {number}: its input_ids are not what the tokenizer makes of the text that they say, so that a reward "
            "would read something else: give the dataset a column `prompt` (text or messages) instead of input_ids."
        )
    return kept | {"prompt": text}


def as_list(value: Any) -> list[int]:
    """Of a tensor, an array or a list."""
    return [int(token) for token in (value.tolist() if hasattr(value, "tolist") else value)]


# The reward ----------------------------------------------------------------------------------------------------------


def read_reward(given: Any, max_length: int) -> Scored:
    """What TRL calls reward_model: a model, its name or folder, or a function of texts.

    Raises:
        DPAlignError: neither, or a model that is not what its folder holds.
    """
    if isinstance(given, nn.Module):
        given = _folder_of_scorer(given)
    if isinstance(given, str):
        folder = embedded.resolve(given)
        if (Path(folder) / FORMAT_FILE).is_file():
            return Scored(RewardConfig(source=f"{RELEASED}:{given}", text="prompt+completion"))
        config = RewardConfig(
            source=f"classifier:{given}", text="prompt+completion", use_logit=True, max_length=max_length
        )
        return Scored(config)
    if callable(given):
        name = f"{getattr(given, '__module__', '?')}:{getattr(given, '__qualname__', type(given).__name__)}"
        return Scored(RewardConfig(source=name), given)
    raise DPAlignError(
        f"reward_model is a {type(given).__name__}: give a sequence classifier, its folder, the release of a dpalign "
        "reward model, or a function f(prompts, completions, **columns) -> list[float]."
    )


def _folder_of_scorer(model: nn.Module) -> str:
    """Where a sequence classifier was loaded from, if it is still what lies there: it is loaded again to read text."""
    folder = folder_of(model)
    held: Any
    held, loading = AutoModelForSequenceClassification.from_pretrained(
        embedded.resolve(folder),
        num_labels=getattr(model.config, "num_labels", 1),
        output_loading_info=True,
    )
    missing = loading["missing_keys"]
    if missing or not same_weights(model.state_dict(), held.state_dict()):
        raise DPAlignError(
            f"reward_model is not what {folder!r} holds ({', '.join(sorted(missing)[:2]) or 'other weights'}): save it "
            "and its tokenizer with save_pretrained, and pass that folder."
        )
    return folder


def check_reference(model: Any, ref_model: Any) -> None:
    """Refuses a reference that is not what the policy starts from: it is the policy without its adapter here.

    Raises:
        DPAlignError: another model.
    """
    if ref_model is None:
        return
    if ref_model is model:
        raise DPAlignError("model and ref_model are the same object: pass ref_model=None, or a copy.")
    plain = [getattr(m, "pretrained_model", m) for m in (model, ref_model)]
    if not same_weights(*({k: t for k, t in m.state_dict().items() if ".lora_" not in k} for m in plain)):
        raise DPAlignError(
            "ref_model holds other weights than model: the reference is always what the policy starts from here, so "
            "pass ref_model=None."
        )


def same_weights(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Whether two models hold the same numbers, by peft's names or without."""
    ours, theirs = _plainly(ours), _plainly(theirs)
    return ours.keys() == theirs.keys() and all(
        t.shape == theirs[k].shape and torch.equal(t.float().cpu(), theirs[k].float().cpu()) for k, t in ours.items()
    )


def _plainly(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace("base_model.model.", "", 1).replace(".base_layer.", "."): t for key, t in weights.items()}
