"""Private alignment from scored completions, without reinforcement learning (Hu, Tao, Yang and Zhou 2023, "Aligning
Language Models with Offline Learning from Human Feedback", arXiv 2308.12050).

A unit is a prompt with its completions, or all prompts of a person. All completions are sampled from the model that the
stage started from, so nothing that is learned changes what is learned from: it is supervised learning on weighted text,
whose optimum is at a known KL from the start. A completion's weight comes from the rewards of its own prompt alone.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

from ..data.load import Record
from ..data.text import Text, encode_prompt_text
from ..errors import DPAlignError, TooLongError
from ..models import Policy
from ..models.generation import Prompt, longest_written, with_words
from ..privacy.mechanism import MetricRange
from ..rewards import Reward
from ..settings.offline import CONDITIONAL, OfflineConfig
from .base import Coins, Reading, Rows, Tokenizer
from .completions import read_prompt
from .rollouts import ScoredAlgorithm, rollouts_of

TIE = 1e-5  # of a prompt's largest reward: the same text has the same one but for rounding


class Offline(ScoredAlgorithm[OfflineConfig]):
    """Negative log-likelihood of a prompt's completions, each with its weight."""

    name = "offline"
    Config = OfflineConfig

    def __init__(self, config: OfflineConfig, reward: Reward) -> None:
        super().__init__(config, reward)
        reward_range, kl_range, length_range = self.metrics
        learned = (self.range_of_rewards("learned_reward"), MetricRange("learned_share", 0.0, 1.0))
        self.metrics = (reward_range, replace(kl_range, name="forward_kl"), length_range, *learned)

    def setup(self, policy: Policy) -> None:
        super().setup(policy)
        if self.config.method == CONDITIONAL:
            policy.words[self.name] = self.config.good

    # 1. Prompts: see `ScoredAlgorithm`; there has to be room for the words in front ---------------------------

    @classmethod
    def check(cls, config: OfflineConfig, tokenizer: Tokenizer, record: Record) -> Reading:
        reading, prompt = super().check(config, tokenizer, record), read_prompt(tokenizer, record, config)
        needed = 0 if prompt is None else longest_with_words(tokenizer, prompt, config)
        if needed > config.max_prompt_length and not config.truncate_prompts:
            raise TooLongError(
                f"the prompt has {needed} tokens with the words in front of it, more than max_prompt_length "
                f"{config.max_prompt_length}: raise the limit",
                needed,
            )
        return reading

    @classmethod
    def check_writing(cls, config: OfflineConfig, policy: Policy) -> None:
        super().check_writing(config, policy)
        text: Text = [{"role": "user", "content": "Hello"}] if policy.asks_in_chats else "Hello"
        plain = Prompt(encode_prompt_text(policy.tokenizer, text), text)
        more = longest_with_words(policy.tokenizer, plain, config) - len(plain.ids)
        needed = longest_written(policy, config.prompt_tokens) + more
        if needed > config.max_prompt_length:
            raise DPAlignError(
                f"a prompt that the model writes itself has {needed} tokens with the words in front of it, more than "
                f"max_prompt_length {config.max_prompt_length}: raise that, or lower prompt_max_tokens."
            )

    def write(self, policy: Policy, count: int) -> list[Prompt]:
        most = self.config.max_prompt_length
        written = super().write(policy, count)
        return [prompt for prompt in written if longest_with_words(policy.tokenizer, prompt, self.config) <= most]

    # 2. Completions, of what the stage started from ------------------------------------------------------------

    def rows(self, policy: Policy, units: list[list[Prompt]], coins: Coins | None) -> Rows:
        """As `ScoredAlgorithm`; `conditional` puts words in front of what was sampled without."""
        rows, config = super().rows(policy, units, coins), self.config
        if config.method != CONDITIONAL:
            return rows
        drawn = [prompt for prompts in units for prompt in prompts for _ in range(config.num_generations)]
        words = [config.bad if weight < 0 else config.good for weight in rows.tensors["weights"].tolist()]
        asked = [with_words(policy.tokenizer, prompt, said) for prompt, said in zip(drawn, words, strict=True)]
        ids, mask = policy.encode_prompts(asked, config.max_prompt_length)
        width = config.max_completion_length
        put = {
            "input_ids": torch.cat([ids, rows.tensors["input_ids"][:, -width:]], 1),
            "attention_mask": torch.cat([mask, rows.tensors["attention_mask"][:, -width:]], 1),
        }
        return Rows(rows.unit, rows.tensors | put)

    def sampling(self, policy: Policy) -> AbstractContextManager[None]:
        return policy.reference()

    # 3. What each completion is worth ------------------------------------------------------------------------

    def prepare(self, policy: Policy, rows: Rows) -> Rows:
        """Adds the weights. A completion without a reward has none; a prompt without any adds exactly zero."""
        scores, count = rows.tensors["scores"], self.config.num_generations
        groups = scores.view(len(scores) // count, count)  # a prompt's completions are next to each other
        weights = self.weights(groups)
        told = summary(groups, weights.clamp(min=0.0))
        scored = {"scores": scores.nan_to_num(0.0), "weights": weights.flatten(), "told": told.flatten(0, 1)}
        return Rows(rows.unit, rows.tensors | scored)

    def weights(self, scores: Tensor) -> Tensor:
        """`(prompts, completions)` weights of rewards of that shape (NaN: there is none); every prompt by itself.

        One below zero is learned behind the words `bad`.
        """
        if self.config.method == CONDITIONAL:
            return halves(scores)
        if self.config.method == "filtered":
            return best(scores, self.config.keep)
        shares = (scores / self.config.reward_temperature).nan_to_num(nan=-torch.inf).softmax(1)
        return shares.nan_to_num(0.0)  # of a prompt without any

    # 4. Loss -------------------------------------------------------------------------------------------------

    def row_losses(self, policy: Policy, rows: Rows) -> tuple[Tensor, Tensor]:
        """-|weight| * log pi(completion), divided by the constant length; no row reads another."""
        config, rollouts = self.config, rollouts_of(rows)
        mask = rollouts.completion_mask
        logprobs, _ = policy.completion_logprobs(rollouts, config.min_completion_length, config.temperature)
        loss = -rows.tensors["weights"].abs() * (logprobs * mask).sum(1) / config.max_completion_length
        forward_kl = ((rows.tensors["ref_logprobs"] - logprobs.detach()) * mask).sum(1)
        reward, learned_reward, learned_share = rows.tensors["told"].unbind(1)
        return loss, torch.stack([reward, forward_kl, mask.sum(1), learned_reward, learned_share], 1)


def best(scores: Tensor, keep: int) -> Tensor:
    """`(prompts, completions)` weights: 1 for the `keep` best of a prompt, 0 for the others and for NaN.

    Equal rewards share the places that are left: who came first says nothing.
    """
    better, equal, _ = compared(scores)
    return ((keep - better) / equal.clamp(min=1)).clamp(0.0, 1.0).to(scores) * (equal > 0)


def halves(scores: Tensor) -> Tensor:
    """`(prompts, completions)`: 1 for the better half of a prompt, -1 for the worse one.

    0 in the middle: for one that beats as many of the others as beat it (all of equal rewards), and for NaN.
    """
    better, _, worse = compared(scores)
    return (worse - better).sign().to(scores)


def compared(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`(prompts, completions)` int64 each: how many of a prompt's completions are better than this one, as good, worse.

    A reward that is NaN is nobody's better, equal or worse.
    """
    tie = TIE * scores.nan_to_num(0.0).abs().amax(1)[:, None, None]
    difference = scores.unsqueeze(1) - scores.unsqueeze(2)  # (prompts, this, other)
    return (difference > tie).sum(2), (difference.abs() <= tie).sum(2), (difference < -tie).sum(2)


def longest_with_words(tokenizer: Tokenizer, prompt: Prompt, config: OfflineConfig) -> int:
    """Tokens of a prompt with the words that `conditional` puts in front of it; without them otherwise."""
    words = (config.good, config.bad) if config.method == CONDITIONAL else ("",)
    return max(len(with_words(tokenizer, prompt, said)) for said in words)


def summary(scores: Tensor, weights: Tensor) -> Tensor:
    """`(prompts, completions, 3)`: numbers whose mean over a prompt is the mean reward of its completions, the mean
    reward by weight, and the share of the completions that is learned: (sum of weights)^2 / (n * sum of squares).

    NaN of a prompt without any reward: it says nothing of them.

    Args:
        scores, weights: `(prompts, completions)`; a score is NaN where there is none, and the weight then 0.
    """
    known, count, total = scores.isfinite().to(scores), scores.shape[1], weights.sum(1, keepdim=True)
    every, learned = known / known.mean(1, keepdim=True), weights * count / total
    share = total.square() / (count * weights.square().sum(1, keepdim=True))
    return torch.stack([every * scores.nan_to_num(0.0), learned * scores.nan_to_num(0.0), share.expand_as(scores)], 2)
