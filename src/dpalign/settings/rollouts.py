"""Settings of sampling completions, and of the stages that do."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TypeGuard

from ..domains import LENGTH, SCALE, within
from ..errors import DPAlignError
from .engine import EngineConfig
from .prompts import SELF_WRITTEN, PromptedConfig
from .rewards import RewardConfig

MOST_ROWS = 256  # that are sampled together


@dataclass(kw_only=True)
class SamplingConfig:
    """How prompts are cut, completed and scored.

    Records have `prompt`, or `messages` whose last answer is left out, or `text` whose first tokens become the prompt.
    A chat's prompt is what the tokenizer's chat template writes, with the assistant's turn opened.

    Args:
        max_prompt_length: most tokens of a prompt; a longer one is an error.
        truncate_prompts: of a longer prompt the last tokens are read (and BOS, if it has one in front).
        prompt_min_tokens, prompt_max_tokens: cut `text` into a prompt of that many tokens (BOS not counted).
        prepend_bos: put the tokenizer's BOS in front of every prompt.
        max_completion_length: most tokens sampled per completion.
        min_completion_length: EOS is not sampled before this many tokens.
        temperature: the policy is softmax(logits / temperature): in sampling, in the loss and as its own reference.
        micro_batch_size: rows (a prompt with one completion) that are computed together; memory only, no effect on the
            result.
        reward: the reward function.
    """

    max_prompt_length: int = within(64, LENGTH)
    truncate_prompts: bool = False
    prompt_min_tokens: int | None = within(None, LENGTH)
    prompt_max_tokens: int | None = within(None, LENGTH)
    prepend_bos: bool = False
    max_completion_length: int = within(16, LENGTH)
    min_completion_length: int = within(0, "[0, 1000000]")
    temperature: float = within(1.0, "[0.01, 100]")
    micro_batch_size: int = within(32, "[1, 65536]")
    reward: RewardConfig = field(default_factory=RewardConfig)

    def validate(self) -> None:
        """Raises DPAlignError for lengths that cannot be together."""
        low, high = self.prompt_min_tokens, self.prompt_max_tokens
        if low is not None and high is not None and low > high:
            raise DPAlignError(f"prompt_min_tokens {low} is more than prompt_max_tokens {high}.")
        longest = high or low
        if longest is not None and longest > self.max_prompt_length:
            raise DPAlignError(
                f"prompts of {longest} tokens are longer than max_prompt_length {self.max_prompt_length}."
            )
        if self.min_completion_length > self.max_completion_length:
            raise DPAlignError(
                f"min_completion_length {self.min_completion_length} is more than max_completion_length "
                f"{self.max_completion_length}."
            )

    @property
    def prompt_tokens(self) -> int:
        """Tokens of a prompt that the model writes itself."""
        return self.prompt_max_tokens or self.prompt_min_tokens or 8

    @property
    def sampled_at_once(self) -> int:
        """Rows that are sampled together where memory allows: a constant, because rounding depends on it."""
        return self.micro_batch_size

    @property
    def positions(self) -> int:
        """That the model must hold."""
        return self.max_prompt_length + self.max_completion_length


@dataclass(kw_only=True)
class CompletionConfig(PromptedConfig, SamplingConfig):
    """Settings of a stage that samples completions and has them scored.

    Args:
        num_generations: completions per prompt, averaged inside the unit before the clip: less variance, no privacy
            cost.
        sft_coefficient: weight of the KL divergence, in nats per token, from the model that the stage started from, on
            texts that this writes itself: keeps what was learned before. Its gradient joins the noised one.
        missing_eos_penalty: subtracted from the reward of a completion without EOS.
        engine: a server that samples the completions, instead of this process.
    """

    inits = ("random", "synthetic_gradient")

    learning_rate: float = within(3e-3, "[0, 1000]")
    num_generations: int = within(1, "[1, 1024]")
    sft_coefficient: float = within(0.0, "[0, 1e6]")
    missing_eos_penalty: float = within(0.0, "[0, 1e6]")
    engine: EngineConfig = field(default_factory=EngineConfig)

    @property
    def samples(self) -> bool:
        """Whether it does so with these settings."""
        return True

    @property
    def sampled_at_once(self) -> int:
        """As many rows as split those of a phase evenly, if it has a standard deviation more units than expected."""
        units = self.expected_batch_size * self.minibatches
        rows = math.ceil((units + math.sqrt(units)) * self.num_generations)
        parts = math.ceil(rows / MOST_ROWS)
        return max(self.micro_batch_size, 8 * math.ceil(rows / parts / 8))

    def validate(self) -> None:
        super().validate()
        SamplingConfig.validate(self)
        if self.temperature != 1 and self.adapter.init_a == "synthetic_gradient":
            raise DPAlignError("init_a synthetic_gradient is of the policy itself: it needs temperature 1.")
        if self.adapter.r < 1:
            raise DPAlignError("adapter.r 0 leaves the policy nothing to train: give it a rank of at least 1.")
        columns = [name for reward in (self.reward, *self.reward.parts) for name in reward.columns]
        if columns and (self.prompts == SELF_WRITTEN or self.adapter.init_a == "synthetic_gradient"):
            what = "prompts self_written" if self.prompts == SELF_WRITTEN else "init_a synthetic_gradient"
            raise DPAlignError(
                f"reward.columns {', '.join(columns)}: what the model writes itself has no columns, and {what} has the "
                "reward score it."
            )


def samples(config: object) -> TypeGuard[CompletionConfig]:
    """Whether a stage with these settings has the policy complete prompts, and a reward score what it wrote."""
    return isinstance(config, CompletionConfig) and config.samples


@dataclass(kw_only=True)
class ScoredConfig(CompletionConfig):
    """Settings of a stage that learns from all completions of a prompt.

    Args:
        kl_range: declared range of the noised KL metric, in nats per completion.
    """

    of_private_prompts = (*CompletionConfig.of_private_prompts, "kl_range")

    kl_range: tuple[float, float] = within((-5.0, 15.0), SCALE, ordered=True)


@dataclass(kw_only=True)
class RolloutConfig(ScoredConfig):
    """Settings of a stage that learns from what the policy itself samples.

    Records have `prompt`, or `text` whose first tokens become it.

    Args:
        beta: coefficient of the KL penalty against the model the stage started from.
        adaptive_kl_target: nats per completion; adapts beta to the noised KL (Ziegler et al. 2019). Needs metrics.
        adaptive_kl_horizon: units after which beta has moved by a factor of at most e^0.2.
    """

    beta: float = within(0.2, "[0, 1e6]")
    adaptive_kl_target: float | None = within(None, "(0, 1e6]")
    adaptive_kl_horizon: float = within(10000.0, "(0, 1e12]")

    def validate(self) -> None:
        super().validate()
        if self.adaptive_kl_target is not None and self.metrics_noise_ratio == 0:
            raise DPAlignError("adaptive_kl_target needs the noised metrics: metrics_noise_ratio > 0.")
