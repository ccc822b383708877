"""What stages that sample share: prompts (of records, or self-written), completions and rewards.

A unit is a prompt with its rollouts, or all prompts of a person. Nothing here is computed across units.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

from ..data.load import Record
from ..engines import Generator, Local
from ..errors import DPAlignError
from ..models import Policy
from ..models.generation import Prompt, answers, longest_written, write_prompts
from ..models.kernels import chunks
from ..models.policy import Rollouts
from ..privacy.mechanism import MetricRange
from ..rewards import Reward
from ..settings.rollouts import CompletionConfig, RolloutConfig, SamplingConfig, ScoredConfig
from .anchor import Anchor
from .base import Algorithm, Coins, Entering, Reading, Rows, Tokenizer, Tokens
from .basis import add_adapter, align_inputs
from .completions import PROMPT_COLUMNS, check_prompt, columns_of, read_prompt

W = TypeVar("W", bound=CompletionConfig)
S = TypeVar("S", bound=ScoredConfig)
C = TypeVar("C", bound=RolloutConfig)


class CompletionAlgorithm(Algorithm[W, Policy, Prompt], is_base=True):
    """Prompts to scored completions; a subclass adds what is learned of them."""

    model_kind = Policy
    columns = PROMPT_COLUMNS

    @classmethod
    def entering(cls, config: W) -> Entering:
        return {"reward": config.reward}

    @classmethod
    def assumptions(cls, config: W) -> set[str]:
        found, engine = super().assumptions(config), config.engine
        if engine.url is not None and config.draws:
            where = "the same machine" if engine.is_here else "another machine, which was declared trusted,"
            found.add(
                f"stage {cls.name} sent private prompts to a server on {where} that sampled their completions: nobody "
                "else reads what it is sent, it treats every prompt by itself, and it draws each completion from a "
                "secret seed of its own, of which it may use 32 bits"
            )
        return found

    @classmethod
    def longest(cls, config: W) -> int:
        return config.positions

    @classmethod
    def tokens(cls, config: W) -> Tokens:
        length = config.num_generations * config.positions
        return Tokens(trained=length * config.passes, read=2 * length)  # sampled, and read by the reference

    @classmethod
    def check(cls, config: W, tokenizer: Tokenizer, record: Record) -> Reading:
        return check_prompt(tokenizer, record, config)

    def __init__(self, config: W, reward: Reward) -> None:
        super().__init__(config)
        self.rows_per_example = config.num_generations
        self.reward = reward
        self.anchor = Anchor(config)
        self.generator: Generator = Local()

    def setup(self, policy: Policy) -> None:
        config = self.config
        add_adapter(policy, self.name, config, self.longest(config))
        if config.adapter.init_a == "synthetic_gradient":
            align_inputs(
                policy,
                self._score,
                rows=config.adapter.init_rows,
                prompt_tokens=config.prompt_tokens,
                max_new_tokens=config.max_completion_length,
                min_new_tokens=config.min_completion_length,
                micro_batch_size=config.micro_batch_size,
            )

    def _score(self, prompts: list[Prompt], rollouts: Rollouts, policy: Policy) -> Tensor:
        texts = [prompt.text for prompt in prompts]
        return self.reward(texts, answers(policy, prompts, rollouts), columns_of(prompts, self.config))

    # 1. Prompts ----------------------------------------------------------------------------------------

    def encode(self, policy: Policy, record: Record) -> Prompt | None:
        """None for a text that is too short for a prompt: its unit then adds nothing."""
        return read_prompt(policy.tokenizer, record, self.config)

    @classmethod
    def check_writing(cls, config: W, policy: Policy) -> None:
        needed = longest_written(policy, config.prompt_tokens)
        if needed > config.max_prompt_length:
            raise DPAlignError(
                f"a prompt that the model writes itself has {needed} tokens with what stands around it, more than "
                f"max_prompt_length {config.max_prompt_length}: raise that, or lower prompt_max_tokens."
            )

    def write(self, policy: Policy, count: int) -> list[Prompt]:
        """Written by what the stage started from. Synthetic text for private training: Yu et al. 2024 (arXiv
        2402.13659); here it is the model's own, so that it costs nothing beyond the model."""
        config = self.config
        with policy.reference():
            written = write_prompts(policy, count, config.prompt_tokens, config.micro_batch_size)
        return [prompt for prompt in written if len(prompt.ids) <= config.max_prompt_length]

    # 2. Rollouts ---------------------------------------------------------------------------------------

    def rows(self, policy: Policy, units: list[list[Prompt]], coins: Coins | None) -> Rows:
        """Samples `num_generations` completions per prompt, scores them, and keeps what later passes need."""
        config = self.config
        drawn = [
            (number, prompt)
            for number, prompts in enumerate(units)
            for prompt in prompts
            for _ in range(config.num_generations)
        ]
        unit = torch.tensor([number for number, _ in drawn], dtype=torch.int64, device=policy.device)
        ids, mask = policy.encode_prompts([prompt.ids for _, prompt in drawn], config.max_prompt_length)
        rollouts = self.sampled(policy, ids, mask, None if coins is None else [coins[number] for number, _ in drawn])
        scores = self._score([prompt for _, prompt in drawn], rollouts, policy)
        tensors = {
            "input_ids": rollouts.input_ids,
            "attention_mask": rollouts.attention_mask,
            "completion_mask": rollouts.completion_mask,
            "scores": scores.to(policy.device) - config.missing_eos_penalty * (1 - _has_eos(policy, rollouts)),
            "prompt": torch.arange(len(scores), device=policy.device) // config.num_generations,
        }
        rows = self.learned(Rows(unit, tensors))
        with torch.no_grad(), policy.reference():
            ref_logprobs = in_micro_batches(policy, rollouts_of(rows), config)[0]
        return self.prepare(policy, Rows(rows.unit, rows.tensors | {"ref_logprobs": ref_logprobs}))

    def before_draw(self, policy: Policy) -> None:
        with self.sampling(policy):
            self.generator.push(policy)

    def sampled(self, policy: Policy, ids: Tensor, mask: Tensor, coins: Coins | None) -> Rollouts:
        """Completions of `(rows, prompt)` ids, each with its own of `coins`."""
        with self.sampling(policy):
            return self.generator.sample(policy, ids, mask, self.config, coins)

    def sampling(self, policy: Policy) -> AbstractContextManager[None]:
        """Within the block the policy is what completions are sampled from: as it is."""
        return nullcontext()

    def learned(self, rows: Rows) -> Rows:
        """The scored rows that are learned from: all of them."""
        return rows

    def prepare(self, policy: Policy, rows: Rows) -> Rows:
        """Adds what later passes over the same rollouts need; nothing, on-policy."""
        return rows

    # 3. What is to be kept -------------------------------------------------------------------------------

    def add_gradient(self, policy: Policy, step: int) -> None:
        if self.config.sft_coefficient > 0:
            self.anchor.add_gradient(policy, step)


class ScoredAlgorithm(CompletionAlgorithm[S], is_base=True):
    """All completions of a prompt are learned from; a subclass adds what each is worth, and the loss."""

    def __init__(self, config: S, reward: Reward) -> None:
        super().__init__(config, reward)
        self.metrics = (
            self.range_of_rewards("reward"),
            MetricRange("kl", *config.kl_range),
            MetricRange("completion_length", 0.0, float(config.max_completion_length)),
        )

    def range_of_rewards(self, name: str) -> MetricRange:
        """Of a metric that is a mean of rewards."""
        return MetricRange(name, self.reward.low - self.config.missing_eos_penalty, self.reward.high)


class RolloutAlgorithm(ScoredAlgorithm[C], is_base=True):
    """Rollouts of the policy itself, held by a KL penalty to what the stage started from; a subclass adds the loss."""

    def __init__(self, config: C, reward: Reward) -> None:
        super().__init__(config, reward)
        self.beta = config.beta

    # What adapts, to noised metrics only

    def adapt(self, noised: Mapping[str, float]) -> None:
        config = self.config
        if config.adaptive_kl_target is not None:
            error = max(-0.2, min(0.2, noised["kl"] / config.adaptive_kl_target - 1))
            self.beta *= 1 + error * config.expected_batch_size / config.adaptive_kl_horizon

    def state(self) -> dict[str, float]:
        return {"beta": self.beta}

    def load_state(self, state: dict[str, float]) -> None:
        self.beta = state["beta"]


def rollouts_of(rows: Rows) -> Rollouts:
    """The rollouts among the tensors of rows."""
    return Rollouts(*(rows.tensors[name] for name in ("input_ids", "attention_mask", "completion_mask")))


def groups_of(rows: Rows) -> Tensor:
    """`(rows,)` int64: the prompt of a unit that each row completes; rows that fill up are another unit's."""
    return rows.tensors["prompt"] * (rows.unit.max() + 1) + rows.unit


def in_micro_batches(policy: Policy, rollouts: Rollouts, config: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Log-probabilities and values `(rows, completion)` of rollouts, `micro_batch_size` rows at a time."""
    parts = [
        (policy.completion_logprobs(rollouts[chunk], config.min_completion_length, config.temperature), count)
        for chunk, count in chunks(len(rollouts.input_ids), config.micro_batch_size)
    ]
    if not parts:
        return rollouts.completion_mask.clone(), rollouts.completion_mask.clone()
    return torch.cat([p[0][:count] for p, count in parts]), torch.cat([p[1][:count] for p, count in parts])


def _has_eos(policy: Policy, rollouts: Rollouts) -> Tensor:
    ended = policy.stops(rollouts.completion_ids) & (rollouts.completion_mask > 0)
    return ended.any(1).float()
