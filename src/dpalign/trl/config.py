"""Settings of a TRL PPO script, of TRL 0.11's loop and of the later trainer: each is honoured, or refused by name.

`PPOConfig` has every field of both, and of transformers' `TrainingArguments`, so that `HfArgumentParser` makes it from
a command line. Nothing is accepted and ignored: a field that changes no number here is listed in `TOLD`; one that
cannot be honoured is refused unless it is at its default, with the reason.
"""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from transformers import TrainingArguments

from ..errors import DPAlignError

Style = Literal["loop", "trainer"]  # of TRL up to 0.11 (`step`), and of TRL from 0.12 (`train`) and its PPOv2
VERSIONS: Mapping[Style, str] = {"loop": "TRL 0.11's loop (`step`)", "trainer": "TRL 0.12's trainer (`train`)"}

# What TRL fills in where nothing is given: the two differ.
DEFAULTS: Mapping[Style, Mapping[str, Any]] = {
    "loop": {"learning_rate": 1.41e-5, "seed": 0, "batch_size": 128, "mini_batch_size": 128},
    "trainer": {"learning_rate": 3e-6, "seed": 42},
}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_BOTH = """
    learning_rate seed gamma lam cliprange cliprange_value vf_coef gradient_accumulation_steps output_dir save_steps
    gradient_checkpointing max_grad_norm
"""
HONOURED: Mapping[Style, frozenset[str]] = {
    "loop": _names(f"""
        {_BOTH} batch_size mini_batch_size forward_batch_size ppo_epochs init_kl_coef adap_kl_ctrl target horizon
        kl_penalty early_stopping target_kl ratio_threshold use_score_scaling use_score_norm score_clip whiten_rewards
        steps log_with tracker_kwargs tracker_project_name accelerator_kwargs project_kwargs remove_unused_columns
    """),
    "trainer": _names(f"""
        {_BOTH} per_device_train_batch_size num_mini_batches total_episodes num_train_epochs num_ppo_epochs kl_coef
        response_length stop_token stop_token_id temperature missing_eos_penalty max_prompt_length lr_scheduler_type
        warmup_steps weight_decay adam_beta1 adam_beta2 adam_epsilon logging_steps report_to disable_tqdm
        num_sample_generations optim save_strategy eval_strategy eval_steps
    """),
}

# They name things, belong to the script, or cost memory and time: no number that is trained depends on them.
TOLD = _names("""
    exp_name run_name task_name model_name query_dataset reward_model sft_model_path reward_model_path dataset_num_proc
    local_rollout_forward_batch_size optimize_cuda_cache optimize_device_cache ds3_gather_for_generation
    gradient_checkpointing_kwargs activation_checkpointing_kwargs torch_empty_cache_steps use_cache
    per_device_eval_batch_size logging_strategy logging_first_step
    logging_nan_inf_filter log_level log_level_replica log_on_each_node project save_total_limit save_only_model
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context dataloader_in_order remove_unused_columns do_train do_eval do_predict
    skip_memory_metrics resume_from_checkpoint local_rank
""")

_PRECISION = "nothing is autocast here: load the model with dtype=torch.bfloat16 instead"
_ONE_PROCESS = "PPO runs in one process here, without DeepSpeed or FSDP"
_HUB = "output_dir holds private/, which is not for sharing: upload the folder that save_model writes"
_DERIVED = "it is computed from the other batch sizes: set per_device_train_batch_size and gradient_accumulation_steps"
_COUPLES = "it is computed over a batch, so that one row changes the others' updates, which no clip bounds"
REASONS: Mapping[str, str] = {
    **dict.fromkeys(("bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "tf32"), _PRECISION),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "parallelism_config", "accelerator_config"), _ONE_PROCESS),
    **dict.fromkeys(("world_size", "ddp_backend", "is_encoder_decoder"), _ONE_PROCESS),
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_token", "hub_private_repo", "hub_strategy"), _HUB),
    **dict.fromkeys(("hub_always_push", "hub_revision", "push_to_hub_if_best_kwargs"), _HUB),
    **dict.fromkeys(("num_total_batches", "micro_batch_size", "local_batch_size", "local_mini_batch_size"), _DERIVED),
    **dict.fromkeys(("backward_batch_size", "global_backward_batch_size", "global_batch_size"), _DERIVED),
    **dict.fromkeys(("batch_size", "mini_batch_size"), _DERIVED),
    **dict.fromkeys(("model_adapter_name", "ref_adapter_name"), "the policy trains one adapter, and without it is the "
                    "reference"),
    "is_peft_model": "the policy is always a LoRA adapter on a frozen model",
    "whiten_rewards": _COUPLES,
    "use_score_scaling": _COUPLES,
    "use_score_norm": _COUPLES,
    "early_stopping": _COUPLES,
    "kl_estimator": "the KL penalty is estimator k1 here, log pi - log pi_ref",
    "max_steps": "PPO's length is total_episodes, in TRL too",
    "compare_steps": "nothing is uploaded while it trains",
    "auto_find_batch_size": "a batch that is made smaller after an error depends on the rows in it",
    "load_best_model_at_end": "a release is what the last step made, and its statement is of that",
    "eval_delay": "a model is measured before the first step too: leave it out",
    "eval_strategy": "TRL 0.11's loop has no eval_dataset",
    "eval_steps": "TRL 0.11's loop has no eval_dataset",
    "neftune_noise_alpha": "completions are sampled from the policy itself, without noise on its embeddings",
}  # fmt: skip


@dataclass
class PPOConfig(TrainingArguments):
    """Settings under TRL's names, of both of TRL's PPO trainers; those of `TrainingArguments` too.

    Which of the two a script means is seen from how `PPOTrainer` is called. Two fields are ours: `max_prompt_length`,
    and in TRL 0.11's loop `output_dir`, `save_steps`, which let a killed loop go on.

    Args:
        output_dir: the run's folder; the same script resumes it.
        max_prompt_length: most tokens of a prompt. Default: that of the longest; needed with privacy, where the longest
            would tell of its record.
        save_steps: steps between checkpoints.
        max_grad_norm: C, the bound on one row's gradient, with privacy (default 1). In TRL 0.11's loop the bound on a
            minibatch's gradient, in its later trainer nothing, without.
        steps: TRL 0.11's number of samples; only says how many steps a script may make (`total_ppo_epochs`).

    Raises:
        DPAlignError: a name that neither TRL nor transformers has; it names the closest one that there is.
    """

    # Filled in by `resolve`: TRL's two versions have different defaults.
    learning_rate: float | None = None  # type: ignore[assignment]
    seed: int | None = None  # type: ignore[assignment]
    max_grad_norm: float | None = None  # type: ignore[assignment]
    batch_size: int | None = None
    mini_batch_size: int | None = None

    # Ours.
    max_prompt_length: int | None = None
    save_steps: float = 1
    logging_steps: float = 10

    # Both.
    exp_name: str = field(default_factory=lambda: Path(sys.argv[0]).stem or "script")
    gamma: float = 1.0
    lam: float = 0.95
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    whiten_rewards: bool = False
    world_size: int | None = None
    dataset_num_proc: int | None = None
    bf16: bool | None = None  # type: ignore[assignment]

    # TRL 0.12 and later.
    num_mini_batches: int = 1
    total_episodes: int | None = None
    local_rollout_forward_batch_size: int = 64
    num_sample_generations: int = 10
    response_length: int = 53
    stop_token: str | None = None
    stop_token_id: int | None = None
    temperature: float = 0.7
    missing_eos_penalty: float | None = None
    sft_model_path: str = "EleutherAI/pythia-160m"
    reward_model_path: str = "EleutherAI/pythia-160m"
    num_total_batches: int | None = None
    micro_batch_size: int | None = None
    local_batch_size: int | None = None
    local_mini_batch_size: int | None = None
    model_adapter_name: str | None = None
    ref_adapter_name: str | None = None
    num_ppo_epochs: int = 4
    kl_coef: float = 0.05
    kl_estimator: str = "k1"
    ds3_gather_for_generation: bool = True

    # TRL 0.11.
    log_with: str | None = None
    task_name: str | None = None
    model_name: str = "gpt2"
    query_dataset: str = "stanfordnlp/imdb"
    reward_model: str = "sentiment-analysis:lvwerra/distilbert-imdb"
    tracker_kwargs: dict[str, Any] = field(default_factory=dict)
    accelerator_kwargs: dict[str, Any] = field(default_factory=dict)
    project_kwargs: dict[str, Any] = field(default_factory=dict)
    tracker_project_name: str = "trl"
    push_to_hub_if_best_kwargs: dict[str, Any] = field(default_factory=dict)
    steps: int = 20000
    adap_kl_ctrl: bool = True
    init_kl_coef: float = 0.2
    kl_penalty: str = "kl"
    target: float = 6.0
    horizon: float = 10000.0
    forward_batch_size: int | None = None
    ppo_epochs: int = 4
    optimize_cuda_cache: bool | None = None
    optimize_device_cache: bool = False
    early_stopping: bool = False
    target_kl: float = 1.0
    compare_steps: int = 1
    ratio_threshold: float = 10.0
    use_score_scaling: bool = False
    use_score_norm: bool = False
    score_clip: float | None = None
    is_encoder_decoder: bool | None = None
    is_peft_model: bool | None = None
    backward_batch_size: int | None = None
    global_backward_batch_size: int | None = None
    global_batch_size: int | None = None

    def __new__(cls, *positional: Any, **given: Any) -> PPOConfig:
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                close = difflib.get_close_matches(name, known, 1, 0.5)
                hint = f"; the closest is {close[0]}" if close else ""
                raise DPAlignError(f"PPOConfig has no field {name}, here as in TRL and transformers{hint}.")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        # Not that of TrainingArguments: it sets up devices and processes that nothing here uses.
        given = set(self.given())
        if given & (HONOURED["loop"] - HONOURED["trainer"]):
            self._fill("loop")
        elif given & (HONOURED["trainer"] - HONOURED["loop"]):
            self._fill("trainer")

    def given(self) -> Iterator[str]:
        """Fields that are not at their default."""
        return (f.name for f in fields(self) if getattr(self, f.name) != _default(f))

    def resolve(self, style: Style) -> None:
        """Fills in the defaults of one of TRL's versions.

        Raises:
            DPAlignError: a field that it does not have, or that cannot be honoured; by name, with the reason.
        """
        for name in self.given():
            value = getattr(self, name)
            filled = value == DEFAULTS[style].get(name, MISSING)
            if name in HONOURED[style] or name in TOLD or filled or _is_empty(value, name):
                continue
            other: Style = "trainer" if style == "loop" else "loop"
            if name in HONOURED[other] and name not in REASONS:
                raise DPAlignError(
                    f"{name}={value!r} is a setting of {VERSIONS[other]}, and this is {VERSIONS[style]}."
                )
            reason = REASONS.get(name, "nothing here does what it asks for")
            raise DPAlignError(f"{name}={value!r} cannot be honoured: {reason}.")
        self._fill(style)
        _check_values(self, style)

    def _fill(self, style: Style) -> None:
        if style == "loop" and self.forward_batch_size is not None:
            self.mini_batch_size = self.forward_batch_size
        for name, value in DEFAULTS[style].items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    @property
    def total_ppo_epochs(self) -> int:
        """How many steps `steps` samples are, in TRL 0.11's loop."""
        return math.ceil(self.steps / (self.batch_size or 128))


def _check_values(config: PPOConfig, style: Style) -> None:
    """Refuses values of honoured fields that have no counterpart."""
    if style == "loop":
        if config.kl_penalty not in ("kl", "abs", "mse"):
            raise DPAlignError(f"kl_penalty {config.kl_penalty!r} cannot be honoured: use kl, abs or mse.")
        batch, step = config.batch_size or 1, (config.mini_batch_size or 1) * config.gradient_accumulation_steps
        if batch % step:
            raise DPAlignError(
                f"batch_size {batch} must be a multiple of mini_batch_size * gradient_accumulation_steps, {step}."
            )
        return
    if config.stop_token not in (None, "eos"):
        raise DPAlignError(
            f"stop_token {config.stop_token!r} must be 'eos', or left out for completions of full length."
        )
    if not str(getattr(config.optim, "value", config.optim)).startswith("adamw_torch"):
        raise DPAlignError(f"optim {config.optim!r} cannot be honoured: the optimizer is AdamW, adamw_torch.")
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    if batch % config.num_mini_batches:
        raise DPAlignError(
            f"per_device_train_batch_size * gradient_accumulation_steps, {batch}, must be a multiple of "
            f"num_mini_batches, {config.num_mini_batches}."
        )
    if str(getattr(config.eval_strategy, "value", config.eval_strategy)) not in ("no", "steps"):
        raise DPAlignError(
            f"eval_strategy {config.eval_strategy!r} cannot be honoured: samples know no epochs; use steps or no."
        )
    if config.num_sample_generations not in (0, 10):
        raise DPAlignError(
            f"num_sample_generations={config.num_sample_generations} cannot be honoured: completions of eval_dataset "
            "are sampled once, at the end; 0 leaves that out."
        )


def _default(f: Field[Any]) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


def _is_empty(value: Any, name: str) -> bool:
    """Whether a value asks for nothing: False, None, an empty list; a whole number is something."""
    return name in REASONS and (value is None or value is False or value == "" or value in ([], {}))
