"""TRL 0.11's loop: the script holds the rows, asks `generate` for completions and hands rewards to `step`.

Without privacy alone: see `trainer.THE_LOOP`. The first step writes into the ledger that the data was used without it.
"""

from __future__ import annotations

import dataclasses
import math
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..algorithms.completions import PROMPT_COLUMNS
from ..algorithms.ppo import PPO
from ..data.overlap import hash_texts, remember_contents
from ..data.units import UnitDataset, build_units
from ..errors import DPAlignError
from ..models import Policy, embedded
from ..models.objects import Given, folder_of
from ..models.policy import Rollouts
from ..models.prompt_format import PromptFormat
from ..privacy import accountant
from ..privacy.accountant import SampledGaussian
from ..privacy.gate import PrivateStep
from ..privacy.ledger import Ledger
from ..privacy.parts import Part
from ..privacy.statement import state_privacy
from ..release import write_release
from ..reporting.progress import Reporter
from ..settings.data import DataConfig
from ..settings.models import AdapterConfig, ModelConfig
from ..settings.privacy import Privacy
from ..trainers.base import adapter_from
from ..training.checkpoint import load_model, load_newest, load_optimizer, optimizer_tensors, save_checkpoint
from .config import PPOConfig
from .models import AutoModelForCausalLMWithValueHead, set_seed
from .trainer import OPEN, THE_LOOP, PPOTrainer
from .translate import as_list, check_reference, read_rows
from .update import Batch, Coefficient, RunningMoments, collected, losses

PLAIN = {"do_sample", "max_new_tokens", "min_new_tokens", "min_length", "temperature", "top_k", "top_p", "pad_token_id"}


class LoopTrainer(PPOTrainer):
    """TRL 0.11's `PPOTrainer`, without privacy: `dataloader`, `generate`, `step`, `log_stats`, `save_pretrained`.

    With `output_dir` in its config, it writes a checkpoint every `save_steps` steps, and the same script goes on from
    it: the dataloader passes over the batches that were done.

    Raises:
        DPAlignError: what cannot be honoured, by name; `privacy`, for nobody can vouch for a loop.
    """

    def __init__(
        self,
        config: PPOConfig | None = None,
        model: AutoModelForCausalLMWithValueHead | None = None,
        ref_model: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dataset: Any = None,
        optimizer: Any = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        num_shared_layers: int | None = None,
        lr_scheduler: Any = None,
        training_data_collator: Any = None,
        *,
        privacy: Privacy | None = None,
        quiet: bool = False,
    ) -> None:
        if privacy is not None:
            raise DPAlignError(f"privacy with TRL 0.11's loop: {THE_LOOP}.")
        if not isinstance(config, PPOConfig) or not isinstance(model, AutoModelForCausalLMWithValueHead):
            raise DPAlignError(
                "PPOTrainer(config, model, ref_model, tokenizer, ...) needs a PPOConfig and an "
                "AutoModelForCausalLMWithValueHead, both of dpalign.trl."
            )
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise DPAlignError(f"tokenizer must be a transformers tokenizer, and it is a {type(tokenizer).__name__}.")
        _refuse_parts(optimizer, lr_scheduler, num_shared_layers, training_data_collator)
        config.resolve("loop")
        check_reference(model, ref_model)
        set_seed(int(config.seed or 0))
        self.config = self.args = config
        self.tokenizer = self.processing_class = tokenizer
        self.accelerator = Accelerator(
            log_with=config.log_with,
            project_config=ProjectConfiguration(**config.project_kwargs),
            **config.accelerator_kwargs,
        )
        self.accelerator.init_trackers(config.tracker_project_name, init_kwargs=config.tracker_kwargs)
        self._reporter = Reporter(quiet=quiet)
        self._reporter.note(OPEN.partition(" Give ")[0])
        self._value_head_model, self.ref_model, self.dataset = model, ref_model, dataset
        self.policy = _policy_of(model, tokenizer, self.accelerator.device, config, self._reporter)
        model.follow(self.policy)
        self._trained = [p for p in self.policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self._trained, lr=float(config.learning_rate or 0.0))
        target = config.target if config.adap_kl_ctrl else None
        self.kl_ctl = Coefficient(config.init_kl_coef, target, config.horizon)
        self.running = RunningMoments()
        self.steps_done = 0
        self._is_recorded = False
        self._folder = Path(config.output_dir) / "private" / "loop" if config.output_dir else None
        self._resume()
        self._loader = None if dataset is None else Batches(dataset, data_collator, config, self.steps_done)

    @property
    def model(self) -> AutoModelForCausalLMWithValueHead:
        """What was given; its `generate` samples from what is trained."""
        return self._value_head_model

    @property
    def dataloader(self) -> Any:
        """Batches of `batch_size` rows in random order, as the collator makes them; None without a dataset."""
        return self._loader

    @property
    def current_device(self) -> torch.device:
        return self.policy.device

    def train(self, *args: Any, **options: Any) -> NoReturn:
        raise DPAlignError(
            "train: TRL 0.11's loop is the script's own: call generate and step, or use TRL 0.12's trainer."
        )

    # Completions -----------------------------------------------------------------------------------------------------

    def generate(
        self,
        query_tensor: Tensor | list[Tensor],
        length_sampler: Callable[[], int] | None = None,
        batch_size: int = 4,
        return_prompt: bool = True,
        generate_ref_response: bool = False,
        **generation_kwargs: Any,
    ) -> Any:
        """As TRL's: a response `(1, length)` to a query `(length,)`, or a list of responses to a list of queries.

        Rows are sampled `batch_size` at a time, or `mini_batch_size` where that is more: training holds as many.
        """
        is_list = isinstance(query_tensor, list)
        queries = query_tensor if isinstance(query_tensor, list) else [query_tensor]
        if any(query.dim() != 1 for query in queries):
            raise DPAlignError("generate: a query is one tensor of token ids, of shape (length,); several are a list.")
        at_once = max(batch_size, int(self.config.mini_batch_size or 1))

        def answered() -> list[Tensor]:
            found: list[Tensor] = []
            for start in range(0, len(queries), at_once):
                options = generation_kwargs | ({} if length_sampler is None else {"max_new_tokens": length_sampler()})
                found += self._sample(queries[start : start + at_once], options)
            return [torch.cat([q.to(r), r]) if return_prompt else r for q, r in zip(queries, found, strict=True)]

        responses: Any = answered()
        responses = responses if is_list else responses[0][None]
        if not generate_ref_response:
            return responses
        with self.policy.reference():
            theirs: Any = answered()
        return responses, theirs if is_list else theirs[0][None]

    @torch.no_grad()
    def _sample(self, queries: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
        policy = self.policy
        ids, mask = policy.encode_prompts([as_list(q) for q in queries], max(len(q) for q in queries))
        if _is_plain(options, policy):
            rollouts = policy.sample(
                ids,
                mask,
                int(options.get("max_new_tokens", 20)),
                min_new_tokens=int(options.get("min_new_tokens") or 0),
                temperature=float(options.get("temperature", 1.0)),
                rows_at_once=len(ids),
            )
            lengths = rollouts.completion_mask.sum(1).int().tolist()
            return [row[:length] for row, length in zip(rollouts.completion_ids, lengths, strict=True)]
        if options.get("top_k") is not None:
            options = options | {"top_k": int(options["top_k"])}  # TRL's examples write 0.0
        with policy.merged():
            sequences = policy.model.generate(input_ids=ids, attention_mask=mask, **options)
        return [_until_stop(row, policy) for row in sequences[:, ids.shape[1] :]]

    # Steps -----------------------------------------------------------------------------------------------------------

    def step(
        self,
        queries: list[Tensor],
        responses: list[Tensor],
        scores: list[Tensor],
        response_masks: list[Tensor] | None = None,
    ) -> dict[str, Any]:
        """One PPO step on `batch_size` rows, as TRL's; returns its statistics.

        Raises:
            DPAlignError: another number of rows, or a score that is not one number.
        """
        config, started = self.config, time.perf_counter()
        self._check_rows(queries, responses, scores)
        self._record(queries)
        with torch.no_grad():
            rollouts = self._rollouts(queries, responses)
            mask = rollouts.completion_mask
            if response_masks is not None:
                mask = mask * _padded([m.float() for m in response_masks], mask)
            logprobs, values = self._in_minibatches(rollouts)
            with self.policy.reference():
                ref_logprobs, _ = self._in_minibatches(rollouts, with_values=False)
            scaled = self._scaled(torch.tensor([float(s) for s in scores], device=mask.device))
            batch = collected(config, scaled, logprobs, ref_logprobs, values, mask, self.kl_ctl.value)
        forward = time.perf_counter()
        parts = self._optimize(rollouts, batch)
        ended = time.perf_counter()
        stats = _statistics(batch, parts, queries, responses, self.kl_ctl.value)
        stats["ppo/learning_rate"] = self.optimizer.param_groups[0]["lr"]
        self.kl_ctl.update(float(stats["objective/kl"]), len(queries))
        times = {"forward_pass": forward - started, "optimize_step": ended - forward, "total": ended - started}
        stats |= {f"time/ppo/{name}": seconds for name, seconds in times.items()}
        self.steps_done += 1
        if self._folder is not None and self.steps_done % max(1, int(config.save_steps)) == 0:
            self._save(self._folder)
        return stats

    def _check_rows(self, queries: Any, responses: Any, scores: Any) -> None:
        for name, rows in {"queries": queries, "responses": responses, "scores": scores}.items():
            if not isinstance(rows, list) or not all(isinstance(row, Tensor) for row in rows):
                raise DPAlignError(f"step: {name} must be a list of tensors.")
            if len(rows) != self.config.batch_size:
                raise DPAlignError(f"step: {name} has {len(rows)} rows, and batch_size is {self.config.batch_size}.")
        if any(score.numel() != 1 for score in scores):
            raise DPAlignError("step: a score must be one number.")
        if any(len(response) == 0 for response in responses):
            raise DPAlignError("step: a response has no token: sample at least one (min_new_tokens).")

    def _rollouts(self, queries: list[Tensor], responses: list[Tensor]) -> Rollouts:
        """Queries padded on the left, responses on the right."""
        policy = self.policy
        ids, mask = policy.encode_prompts([as_list(q) for q in queries], max(len(q) for q in queries))
        width = torch.zeros(len(responses), max(len(r) for r in responses), device=policy.device)
        inside = _padded([torch.ones(len(r)) for r in responses], width)
        tokens = _padded(responses, width.long(), fill=policy.tokenizer.pad_token_id)
        return Rollouts(torch.cat([ids, tokens], 1), torch.cat([mask, inside.to(mask)], 1), inside)

    def _in_minibatches(self, rollouts: Rollouts, *, with_values: bool = True) -> tuple[Tensor, Tensor]:
        size = int(self.config.mini_batch_size or 1)
        parts = [
            self.policy.completion_logprobs(rollouts[start : start + size], with_values=with_values)
            for start in range(0, len(rollouts.input_ids), size)
        ]
        return torch.cat([p for p, _ in parts]), torch.cat([v for _, v in parts])

    def _scaled(self, scores: Tensor) -> Tensor:
        config = self.config
        if config.use_score_scaling:
            self.running.update(scores)
            mean = self.running.mean if config.use_score_norm else 0.0
            scores = (scores - mean) / (self.running.std + torch.finfo(scores.dtype).eps)
        return scores if config.score_clip is None else scores.clamp(-config.score_clip, config.score_clip)

    def _optimize(self, rollouts: Rollouts, batch: Batch) -> list[dict[str, float]]:
        """`ppo_epochs` passes in random order; one update each `mini_batch_size * gradient_accumulation_steps` rows."""
        config, parts = self.config, []
        size, accumulated = int(config.mini_batch_size or 1), config.gradient_accumulation_steps
        for _ in range(config.ppo_epochs):
            order = torch.split(torch.randperm(len(batch.scores)), size)
            for number, rows in enumerate(order, 1):
                rows = rows.to(batch.mask.device)
                logprobs, values = self.policy.completion_logprobs(rollouts[rows])
                found = losses(config, batch, rows, logprobs, values)
                loss = (found["loss/policy"] + config.vf_coef * found["loss/value"]) / accumulated
                loss.backward()  # type: ignore[no-untyped-call]
                if number % accumulated == 0:
                    if config.max_grad_norm is not None:
                        torch.nn.utils.clip_grad_norm_(self._trained, config.max_grad_norm)
                    self.optimizer.step()
                    self.optimizer.zero_grad(set_to_none=True)
                parts.append({name: float(value.detach()) for name, value in found.items()})
            if config.early_stopping and parts[-1]["policy/policykl"] > 1.5 * config.target_kl:
                break
        return parts

    def log_stats(
        self,
        stats: dict[str, Any],
        batch: dict[str, Any],
        rewards: list[Tensor],
        columns_to_log: tuple[str, ...] = ("query", "response"),
    ) -> None:
        """Hands a step's numbers to the tracker that `log_with` names, and with wandb the texts, as TRL does."""
        scored = torch.tensor([float(reward) for reward in rewards])
        logs = {name: value for name, value in stats.items() if isinstance(value, int | float)}
        logs |= {"env/reward_mean": float(scored.mean()), "env/reward_std": float(scored.std())}
        if self.config.log_with == "wandb" and all(column in batch for column in columns_to_log):
            import wandb

            rows = [list(row) for row in zip(*(batch[c] for c in columns_to_log), scored.tolist(), strict=True)]
            logs["game_log"] = wandb.Table(columns=[*columns_to_log, "reward"], rows=rows)
        self.accelerator.log(logs, step=self.steps_done)

    # What is kept ----------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str) -> None:
        """Writes adapter, tokenizer, a card and a privacy statement, which says that nothing of it is private."""
        base = embedded.resolve(folder_of(self.model.pretrained_model))
        ledger = Ledger()
        rows = max(2, int(self.config.batch_size or 2))
        delta = accountant.default_delta(len(self.dataset) if self.dataset is not None else rows)
        declared = [f"what model {base!r} was made from is not known"]
        statement = state_privacy(self._run(), ledger, delta, [], declared, set())
        statement.private = False
        with tempfile.TemporaryDirectory() as folder:
            write_release(
                Path(folder) / "release", self.policy, statement, base, Path(save_directory).name, PromptFormat()
            )
            shutil.copytree(Path(folder) / "release", save_directory, dirs_exist_ok=True)
        for parameter in self._trained:  # writing an adapter freezes it, and the loop may go on
            parameter.requires_grad_(True)

    def _run(self) -> str:
        """The loop's name in the ledger."""
        if not hasattr(self, "_name"):
            self._name = f"{self._data_name()}-loop-{time.time_ns():x}"
        return self._name

    def _data_name(self) -> str:
        return Path(self.config.output_dir).resolve().name if self.config.output_dir else self.config.exp_name

    def _record(self, queries: list[Tensor]) -> None:
        """Into the ledger, once and before the first update: all rows, without noise."""
        if self._is_recorded:
            return
        ledger, name = Ledger(), self._data_name()
        if self.dataset is None:
            data = UnitDataset(Part(name), [[{}]] * len(queries), [], float(len(queries)), "record", "none")
        else:
            records = [_named(row) for row in read_rows(self.dataset, self.tokenizer, checked=False)]
            data = build_units(records, DataConfig(name=name), ledger)
            columns = [column for columns in PROMPT_COLUMNS for column in columns]
            texts = hash_texts(records, columns, ledger, name=name, is_public=False, source=name)
            remember_contents([texts], ledger)
        everything = PrivateStep(SampledGaussian(1.0, 0.0, 1, 1), 1.0, data.declared_units, "none")
        data.gate(ledger, run=self._run(), stage=PPO.name, config_hash="loop").draw([everything], 0, 0)
        self._is_recorded = True

    def _save(self, folder: Path) -> None:
        tensors = {f"model/{n}": t for n, t in self.policy.stage_state().items()}
        tensors |= optimizer_tensors(self.optimizer, self._names()) | _coins()
        numbers = {"kl": self.kl_ctl.value, **dataclasses.asdict(self.running)}
        state = {"fingerprint": self._run(), "config_hash": self._settings(), "algorithm": numbers}
        save_checkpoint(folder, self.steps_done, tensors, state)

    def _resume(self) -> None:
        loaded = None if self._folder is None else load_newest(self._folder)
        if loaded is None or self._folder is None:
            return
        tensors, state = loaded
        if state["config_hash"] != self._settings():
            raise DPAlignError(
                f"{self.config.output_dir} holds a loop with other settings: restore them, or choose another "
                "output_dir."
            )
        load_model(self.policy, tensors, self._folder)
        load_optimizer(self.optimizer, self._names(), tensors, self._folder)
        numbers = state["algorithm"]
        self.kl_ctl.value, self.running = numbers.pop("kl"), RunningMoments(**numbers)
        self.steps_done, self._name, self._is_recorded = state["step"], state["fingerprint"], True
        _put_coins_back(tensors)
        self._reporter.note(f"the loop goes on after step {self.steps_done}.")

    def _names(self) -> list[str]:
        return [name for name, p in self.policy.named_parameters() if p.requires_grad]

    def _settings(self) -> str:
        kept = {name: getattr(self.config, name) for name in sorted(set(self.config.given()) - {"save_steps"})}
        return repr({name: value for name, value in kept.items() if name != "output_dir"})


class Batches:
    """The rows in batches of `batch_size`, in an order that the seed fixes, epoch by epoch.

    done: batches of an earlier process, which are passed over: epochs that were finished have none left.
    """

    def __init__(
        self, dataset: Any, collate: Callable[[list[Any]], Any] | None, config: PPOConfig, done: int = 0
    ) -> None:
        if config.remove_unused_columns and hasattr(dataset, "remove_columns"):
            kept = {"input_ids", "attention_mask", "label", "query", "response"}
            dataset = dataset.remove_columns([name for name in dataset.column_names if name not in kept])
        self.dataset, self.size, self.seed = dataset, int(config.batch_size or 1), int(config.seed or 0)
        self.collate = collate or torch.utils.data.default_collate
        self.done, self.epoch = done, 0

    def __len__(self) -> int:
        return len(self.dataset) // self.size

    def __iter__(self) -> Iterator[Any]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        order = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(self.seed + epoch)).tolist()
        for number in range(max(0, self.done - epoch * len(self)), len(self)):
            rows = order[number * self.size : (number + 1) * self.size]
            yield self.collate([self.dataset[row] for row in rows])


def _refuse_parts(optimizer: Any, scheduler: Any, shared: Any, collator: Any) -> None:
    if optimizer is not None or scheduler is not None:
        raise DPAlignError(
            "optimizer and lr_scheduler cannot be honoured: what is trained is made by the trainer; it is Adam with "
            "config.learning_rate."
        )
    if shared is not None:
        raise DPAlignError("num_shared_layers cannot be honoured: the whole model is frozen under the adapter.")
    if collator is not None:
        raise DPAlignError("training_data_collator cannot be honoured: rows are padded to the batch's longest.")


def _policy_of(
    model: AutoModelForCausalLMWithValueHead,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    config: PPOConfig,
    reporter: Reporter,
) -> Policy:
    """A policy with a new adapter and value head, on the frozen weights of a model that is not changed."""
    base = model.pretrained_model
    dtype: Any = str(base.dtype).removeprefix("torch.")
    remote = type(base).__module__.startswith("transformers_modules")
    given = ModelConfig(folder_of(base), is_public=True, dtype=dtype, trust_remote_code=remote)
    policy = Policy.load(given, device, Given(base, tokenizer))
    policy.to(device)
    if model.peft_config is None:
        reporter.note("no peft_config: the weights stay frozen, and an adapter of rank 4 is trained on the attention.")
    policy.add_adapter(PPO.name, _adapter(model.peft_config))
    policy.add_value_head()
    model.value_head.prepare(policy.heads()[0])
    if config.gradient_checkpointing:
        policy.checkpoint_activations(True)
    return policy


def _adapter(peft_config: LoraConfig | None) -> AdapterConfig:
    return AdapterConfig() if peft_config is None else adapter_from(peft_config)


def _is_plain(options: dict[str, Any], policy: Policy) -> bool:
    """Whether generation asks for the policy's own law, which `Policy.sample` draws from faster than `generate`."""
    stop = options.get("eos_token_id")
    return (
        options.get("do_sample") is True
        and set(options) <= PLAIN | {"eos_token_id"}
        and options.get("top_k") in (0, 0.0)
        and options.get("top_p", 1.0) == 1
        and (options.get("min_length") or 0) <= 0
        and (stop is None or stop in policy.stop_ids)
    )


def _until_stop(row: Tensor, policy: Policy) -> Tensor:
    stops = policy.stops(row).nonzero()
    return row[: int(stops[0]) + 1] if len(stops) else row


def _padded(rows: list[Tensor], like: Tensor, fill: float = 0) -> Tensor:
    """`rows` on the left of a tensor of `like`'s shape."""
    out = torch.full_like(like, fill)
    for place, row in enumerate(rows):
        out[place, : len(row)] = row.to(out)
    return out


def _named(row: dict[str, Any]) -> dict[str, Any]:
    """A row as a private run would read it: TRL 0.11's scripts call the prompt `query`."""
    return {"prompt": row.get("prompt", row.get("query", ""))}


def _statistics(
    batch: Batch, parts: list[dict[str, float]], queries: list[Tensor], responses: list[Tensor], coefficient: float
) -> dict[str, Any]:
    """Under TRL's names; means of the minibatches' numbers."""
    mask, kl = batch.mask, batch.kl.sum(1)
    lengths = {"queries": [float(len(q)) for q in queries], "responses": [float(len(r)) for r in responses]}
    stats: dict[str, Any] = {
        "objective/kl": float(kl.mean()),
        "objective/kl_dist": kl.cpu().numpy(),
        "objective/logprobs": batch.logprobs.cpu().numpy(),
        "objective/ref_logprobs": batch.ref_logprobs.cpu().numpy(),
        "objective/kl_coef": coefficient,
        "objective/entropy": float((-batch.logprobs * mask).sum(1).mean()),
        "ppo/mean_non_score_reward": float((batch.penalties * mask).sum() / mask.sum()),
        "ppo/mean_scores": float(batch.scores.mean()),
        "ppo/std_scores": float(batch.scores.std()),
    }
    for name, found in lengths.items():
        stats |= {
            f"tokens/{name}_len_mean": float(np.mean(found)),
            f"tokens/{name}_len_std": float(np.std(found, ddof=1)),
        }
    stats |= {f"ppo/{name}": float(np.mean([part[name] for part in parts])) for name in parts[0]}
    spread = stats["ppo/returns/var"]
    stats["ppo/val/var_explained"] = 1 - stats["ppo/val/error"] / spread if spread else math.nan
    return stats


def _coins() -> dict[str, Tensor]:
    """The state of the three generators that a script may use."""
    python, array = random.getstate(), np.random.get_state(legacy=True)
    return {
        "coins/torch": torch.get_rng_state(),
        "coins/numpy": torch.tensor([*array[1].tolist(), array[2]], dtype=torch.int64),  # type: ignore[index]
        "coins/python": torch.tensor(python[1], dtype=torch.int64),
    }


def _put_coins_back(tensors: dict[str, Tensor]) -> None:
    torch.set_rng_state(tensors["coins/torch"])
    numpy = tensors["coins/numpy"].tolist()
    np.random.set_state(("MT19937", np.array(numpy[:-1], dtype=np.uint32), numpy[-1], 0, 0.0))
    random.setstate((3, tuple(tensors["coins/python"].tolist()), None))
