"""What somebody meant by a name that there is not: the same thing by its name here, or the closest name."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches

ONE_ROW = "it would let one record change another one's gradient, which no clip bounds"
POISSON = "every update draws a fresh Poisson sample"
ON_POLICY = "completions are sampled from the policy as it is (nothing is cut off)"
SHARDED = "several processes are started by torchrun, and model.sharding spreads the frozen base over them"
EOS = "completions end at the tokenizer's EOS, or where the chat template ends a turn"
CHOOSING = "choosing by a measurement on private data would have to be paid for"
OWN_TEXT = "prompts: self_written makes a stage's max_steps updates on prompts that the model writes itself"
ELSEWHERE = {  # names of TRL, transformers, peft and Opacus: what to say here instead, or why there is no such thing
    "auto_find_batch_size": "how much memory a record takes would show in the result; use micro_batch_size",
    "batch_size": "it is called expected_batch_size, the units that a sample is expected to have",
    "data_seed": "samples are drawn from the operating system's entropy",
    "dataloader_drop_last": POISSON,
    "dataset_name": "it is called data.path (a file, a folder or a hub name); data.name is the ledger's key",
    "dataset_num_proc": "records are read one by one",
    "dataset_text_field": "the column is `text` (or `messages`, or `prompt` and `completion`): rename it",
    "ddp_find_unused_parameters": "each process computes the gradients of its own units, and nothing averages them",
    "deepspeed": SHARDED,
    "disable_dropout": "dropout is always off: its coins would be shared by the rows of a micro-batch",
    "delta": "privacy's is target_delta, and a second clip of the ratio (delta of TRL's GRPO) there is none",
    "epochs": "it is called num_train_epochs",
    "epsilon": "privacy's is target_epsilon, and the clip of GRPO's ratio (epsilon in TRL) is cliprange",
    "epsilon_high": "it is called cliprange_high, for epsilon is privacy's here",
    "eval_on_start": "the base model is measured at the end, beside every stage",
    "eval_strategy": "stages are measured at their end, on data.eval_path",
    "evaluation_strategy": "stages are measured at their end, on data.eval_path",
    "fp16": "the base is frozen, so there is no mixed precision: model.dtype float16 loads it in half precision",
    "bf16": "the base is frozen, so there is no mixed precision: model.dtype bfloat16 loads it in half precision",
    "fsdp": SHARDED,
    "fsdp_config": SHARDED,
    "gradient_accumulation_steps": "expected_batch_size is the whole batch of an update, and micro_batch_size the part "
    "that is in memory at once",
    "group_by_length": POISSON,
    "generation_batch_size": "it is num_mini_batches times expected_batch_size",
    "importance_sampling_level": "the ratio is that of each token",
    "init_kl_coef": "it is called beta",
    "kl_coef": "it is called beta",
    "load_best_model_at_end": CHOOSING,
    "load_in_4bit": "it is called model.quantization: nf4, nf4_double, fp4 or fp4_double",
    "load_in_8bit": "it is called model.quantization: int8",
    "local_rollout_forward_batch_size": "it is called micro_batch_size",
    "loss_type": "it is called loss (and loss_type in grpo alone)",
    "lora_alpha": "it is called adapter.lora_alpha",
    "lora_dropout": "dropout is always off: its coins would be shared by the rows of a micro-batch",
    "lora_r": "it is called adapter.r",
    "lora_target_modules": "it is called adapter.target_modules",
    "lr": "it is called learning_rate",
    "mask_truncated_completions": "say missing_eos_penalty, which a completion without EOS pays",
    "max_new_tokens": "it is called max_completion_length",
    "max_physical_batch_size": "it is called micro_batch_size",
    "max_seq_length": "it is called max_length",
    "metric_for_best_model": CHOOSING,
    "mini_batch_size": "it is called expected_batch_size, with num_mini_batches of them for one phase of rollouts",
    "model_name_or_path": "it is called model.name_or_path",
    "missing_eos_penalty": "only stages that sample completions have one",
    "neftune_noise_alpha": "its coins would be shared by the rows of a micro-batch",
    "normalize_advantages": ONE_ROW,
    "optim": "the optimiser is AdamW (adam_beta1, adam_beta2, adam_epsilon, weight_decay)",
    "packing": f"two records in one row share a gradient: {ONE_ROW}",
    "padding_free": f"two records in one row share a gradient: {ONE_ROW}",
    "per_device_eval_batch_size": "public data is measured in parts of a fixed size",
    "per_device_train_batch_size": "it is called micro_batch_size (memory only); the expected batch of an update is "
    "expected_batch_size",
    "ppo_epochs": "it is called num_ppo_epochs",
    "remove_unused_columns": "a record's other columns are never read, and a reward is given those that it names",
    "response_length": "it is called max_completion_length",
    "resume_from_checkpoint": "the same command goes on from the newest checkpoint in output_dir",
    "per_gpu_train_batch_size": "it is called micro_batch_size (memory only)",
    "reward_funcs": "it is called reward.source",
    "reward_model_path": "it is called reward.source: reward_model:PATH, or classifier:PATH",
    "save_strategy": "say save_steps",
    "save_total_limit": "only the newest checkpoint is kept",
    "scale_rewards": f"only grpo scales them, by those of the same prompt: by those of a batch, {ONE_ROW}",
    "sft_model_path": "it is called model.name_or_path",
    "steps_per_generation": "it is called num_mini_batches: samples that are rolled out together",
    "stop_token": EOS,
    "sync_ref_model": "the reference is the model that the stage started from",
    "target_kl": "a stop that a batch decides would tell of it: use adaptive_kl_target, which sees noised numbers",
    "synthetic_batch_size": OWN_TEXT,
    "synthetic_learning_rate": OWN_TEXT,
    "synthetic_steps": OWN_TEXT,
    "temperature": "only stages that sample completions have one",
    "top_k": ON_POLICY,
    "top_p": ON_POLICY,
    "total_episodes": "say max_steps (of expected_batch_size prompts each) or num_train_epochs",
    "use_vllm": "it is called engine.url: the address of a server",
    "vllm_server_base_url": "it is called engine.url",
    "warmup_ratio": "say warmup_steps",
    "whiten_rewards": ONE_ROW,
}


def instead(name: str, known: Collection[str], inside: Collection[str] = ()) -> str:
    """What to say to somebody who gave a name that is not among `known`; nothing, if no guess is good.

    Args:
        known: names that there are in its place. inside: dotted names below that place, of which one may be meant.
    """
    places = [place for place in inside if place.endswith(f".{name}")]
    if places:
        return f"its place is {' or '.join(places)}"
    if name in ELSEWHERE:
        return ELSEWHERE[name]
    close = get_close_matches(name, known, 1)
    return f"did you mean {close[0]}" if close else ""
