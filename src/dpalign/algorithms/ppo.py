"""Private proximal policy optimisation (Wu et al. 2024, algorithm 1; PPO: Schulman et al. 2017).

A unit is a prompt with its rollouts. Nothing below is computed across units: no whitening of
advantages or rewards, no running statistics, no early stop; the only batch quantity that anything
adapts to is the noised KL.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..data.load import Record, require_columns
from ..data.text import cut_length, render, tokens
from ..errors import DPAlignError
from ..models.policy import Policy, Rollouts
from ..privacy.mechanism import MetricRange
from ..rewards import Reward, RewardConfig
from .base import Batch, TrainingConfig
from .basis import align_inputs


@dataclass(kw_only=True)
class PPOConfig(TrainingConfig):
    """Settings of DP-PPO. Records have `prompt`, or `text` whose first tokens become the prompt.

    Args:
        num_ppo_epochs: T_PPO, passes over one sample; each costs noise, and the paper found no gain above 1.
        num_mini_batches: K Poisson samples whose union is rolled out together; with 1 every update is on-policy.
        num_generations: rollouts per prompt, averaged inside the unit before the clip.
        max_prompt_length: most tokens of a prompt; a longer one is an error.
        prompt_min_tokens, prompt_max_tokens: cut `text` into a prompt of that many tokens (BOS not counted).
        prepend_bos: put the tokenizer's BOS in front of every prompt.
        max_completion_length: most tokens sampled per completion.
        min_completion_length: EOS is not sampled before this many tokens.
        beta: coefficient of the per-token KL penalty against the model the stage started from.
        adaptive_kl_target: nats per completion; adapts beta to the noised KL (Ziegler et al. 2019). Needs metrics.
        adaptive_kl_horizon: units after which beta has moved by a factor of at most e^0.2.
        gamma, lam: discount and lambda of generalised advantage estimation (Schulman et al. 2016).
        cliprange: clip of the probability ratio.
        cliprange_value: clip of the value update.
        vf_coef: weight of the value loss.
        noised_baseline: subtract the noised mean reward of earlier steps from the reward (needs metrics).
        missing_eos_penalty: subtracted from the reward of a completion without EOS.
        kl_range: declared range of the noised KL metric, in nats per completion.
        reward: the public reward function.
    """

    learning_rate: float = 3e-3
    num_ppo_epochs: int = 1
    num_mini_batches: int = 1
    num_generations: int = 1
    max_prompt_length: int = 64
    prompt_min_tokens: int | None = None
    prompt_max_tokens: int | None = None
    prepend_bos: bool = False
    max_completion_length: int = 16
    min_completion_length: int = 0
    beta: float = 0.2
    adaptive_kl_target: float | None = None
    adaptive_kl_horizon: float = 10000.0
    gamma: float = 1.0
    lam: float = 0.95
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    noised_baseline: bool = False
    missing_eos_penalty: float = 0.0
    kl_range: tuple[float, float] = (-5.0, 15.0)
    reward: RewardConfig = field(default_factory=RewardConfig)

    def validate(self) -> None:
        super().validate()
        for name in ("num_ppo_epochs", "num_mini_batches", "num_generations", "max_completion_length"):
            if getattr(self, name) < 1:
                raise DPAlignError(f"{name} {getattr(self, name)} must be at least 1.")
        if (self.adaptive_kl_target is not None or self.noised_baseline) and self.metrics_noise_ratio == 0:
            raise DPAlignError(
                "adaptive_kl_target and noised_baseline need the noised metrics: metrics_noise_ratio > 0."
            )


@dataclass
class Experience:
    """Rollouts of a phase and what was computed when they were sampled; first dimension rows.

    old_logprobs, advantages, returns, old_values are None on-policy with one pass: the current forward
    pass gives them.
    """

    rollouts: Rollouts
    ref_logprobs: Tensor  # (rows, completion)
    scores: Tensor  # (rows,), NaN where the reward could not be computed
    unit_rows: list[list[int]]  # rows of each unit of the phase
    old_logprobs: Tensor | None = None
    old_values: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None


class PPO:
    """The clipped surrogate with a per-token KL penalty in the reward and the score on the last token."""

    name = "ppo"

    def __init__(self, config: PPOConfig, reward: Reward) -> None:
        self.config = config
        self.reward = reward
        self.passes = config.num_ppo_epochs
        self.minibatches = config.num_mini_batches
        self.beta = config.beta
        self.baseline = 0.0
        self.metrics = (
            MetricRange("reward", reward.low - config.missing_eos_penalty, reward.high),
            MetricRange("kl", *config.kl_range),
            MetricRange("completion_length", 0.0, float(config.max_completion_length)),
        )

    def setup(self, policy: Policy) -> None:
        policy.add_adapter(self.name, self.config.adapter)
        if self.config.adapter.init_a == "synthetic_gradient":
            self._align_inputs(policy)
        policy.add_value_head()

    def _align_inputs(self, policy: Policy) -> None:
        config = self.config

        def score(rollouts: Rollouts) -> Tensor:
            prompts = rollouts.input_ids[:, : -config.max_completion_length]
            texts = policy.tokenizer.batch_decode(prompts, skip_special_tokens=True)
            return self.reward(texts, policy.decode(rollouts), {c: [None] * len(texts) for c in config.reward.columns})

        align_inputs(
            policy, score, rows=config.adapter.init_rows,
            prompt_tokens=config.prompt_max_tokens or config.prompt_min_tokens or 8,
            max_new_tokens=config.max_completion_length, min_new_tokens=config.min_completion_length,
            micro_batch_size=config.micro_batch_size,
        )  # fmt: skip

    # 1. Prompts ----------------------------------------------------------------------------------------

    def encode(self, policy: Policy, units: list[list[Record]]) -> None:
        self.records = units
        self.prompts = [[encode_prompt(policy, record, self.config) for record in unit] for unit in units]

    # 2. Rollouts ---------------------------------------------------------------------------------------

    def collect(self, policy: Policy, units: list[int]) -> Experience:
        """Samples `num_generations` completions per prompt, scores them, and keeps what later passes need."""
        config = self.config
        rows = [  # (unit of the phase, prompt, record); a text too short for a prompt makes no row
            (position, prompt, record)
            for position, u in enumerate(units)
            for prompt, record in zip(self.prompts[u], self.records[u], strict=True)
            for _ in range(config.num_generations)
            if prompt is not None
        ]
        unit_rows: list[list[int]] = [[] for _ in units]
        for row, (position, _, _) in enumerate(rows):
            unit_rows[position].append(row)
        ids, mask = policy.encode_prompts([prompt for _, prompt, _ in rows], config.max_prompt_length)
        rollouts = sample(policy, ids, mask, config)
        micro = config.micro_batch_size
        with torch.no_grad(), policy.reference():
            ref_logprobs = _in_micro_batches(policy, rollouts, config, micro)[0]
        prompts = policy.tokenizer.batch_decode([prompt for _, prompt, _ in rows], skip_special_tokens=True)
        # The declared columns and no others: a key that only one record has must not change the call.
        columns = {name: [record.get(name) for _, _, record in rows] for name in config.reward.columns}
        scores = self.reward(prompts, policy.decode(rollouts), columns)
        scores = scores.to(policy.device) - config.missing_eos_penalty * (1 - _has_eos(policy, rollouts))
        experience = Experience(rollouts, ref_logprobs, scores, unit_rows)
        if self.passes > 1 or self.minibatches > 1:
            with torch.no_grad():
                logprobs, values = _in_micro_batches(policy, rollouts, config, micro)
            experience.old_logprobs, experience.old_values = logprobs, values
            experience.advantages, experience.returns = self.advantages(
                logprobs, ref_logprobs, values, scores, rollouts.completion_mask
            )
        return experience

    def batch(self, phase: Experience, positions: list[int]) -> Batch:
        rows = [(unit, row) for unit, position in enumerate(positions) for row in phase.unit_rows[position]]
        device = phase.scores.device
        row_unit = torch.tensor([unit for unit, _ in rows], dtype=torch.int64, device=device)
        return Batch(row_unit, torch.tensor([row for _, row in rows], dtype=torch.int64, device=device))

    # 3. Rewards and advantages ---------------------------------------------------------------------------

    def advantages(self, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, scores: Tensor, mask: Tensor):
        """Generalised advantage estimation on per-token rewards; every row by itself.

        Args:
            logprobs, ref_logprobs, values, mask: `(rows, completion)`; scores: `(rows,)`.
        Returns:
            advantages, returns: `(rows, completion)`.
        """
        config = self.config
        rewards = -self.beta * (logprobs - ref_logprobs) * mask  # per-token KL penalty, estimator k1
        last = mask.sum(1).long().clamp(min=1) - 1  # the score falls on the last token (EOS, or the cut)
        rewards = rewards.scatter_add(1, last.unsqueeze(1), (scores - self.baseline).to(rewards.dtype).unsqueeze(1))
        advantage = torch.zeros_like(scores)
        advantages = torch.zeros_like(rewards)
        next_value = torch.zeros_like(scores)  # beyond the last token there is nothing to come
        for t in reversed(range(mask.shape[1])):
            delta = rewards[:, t] + config.gamma * next_value - values[:, t]
            advantage = (delta + config.gamma * config.lam * advantage) * mask[:, t]
            advantages[:, t] = advantage
            next_value = values[:, t] * mask[:, t]
        return advantages, (advantages + values) * mask

    # 4. Loss -------------------------------------------------------------------------------------------

    def row_losses(self, policy: Policy, batch: Batch, phase: Experience) -> tuple[Tensor, Tensor]:
        """Clipped policy loss plus value loss, summed over tokens and divided by the constant length."""
        config, rows = self.config, batch.tensors
        rollouts = phase.rollouts[rows]
        mask, scores, ref_logprobs = rollouts.completion_mask, phase.scores[rows], phase.ref_logprobs[rows]
        logprobs, values = policy.completion_logprobs(rollouts, config.min_completion_length)
        if phase.old_logprobs is None:  # on-policy: the old policy is the current one, detached
            old_logprobs, old_values = logprobs.detach(), values.detach()
            advantages, returns = self.advantages(old_logprobs, ref_logprobs, old_values, scores, mask)
        else:
            assert phase.old_values is not None and phase.advantages is not None and phase.returns is not None
            old_logprobs, old_values = phase.old_logprobs[rows], phase.old_values[rows]
            advantages, returns = phase.advantages[rows], phase.returns[rows]
        ratio = torch.exp(logprobs - old_logprobs)
        clipped_ratio = ratio.clamp(1 - config.cliprange, 1 + config.cliprange)
        policy_loss = torch.max(-advantages * ratio, -advantages * clipped_ratio)
        clipped_values = old_values + (values - old_values).clamp(-config.cliprange_value, config.cliprange_value)
        value_loss = 0.5 * torch.max((values - returns) ** 2, (clipped_values - returns) ** 2)
        token_loss = (policy_loss + config.vf_coef * value_loss) * mask
        kl = ((old_logprobs - ref_logprobs) * mask).sum(1)
        metrics = torch.stack([scores, kl, mask.sum(1)], 1)
        return token_loss.sum(1) / config.max_completion_length, metrics

    # 5. What adapts, from noised metrics only ------------------------------------------------------------

    def after_step(self, released: dict[str, float] | None) -> None:
        config = self.config
        if released is None:
            return
        if config.noised_baseline:
            self.baseline += 0.3 * (released["reward"] - self.baseline)
        if config.adaptive_kl_target is not None:
            error = max(-0.2, min(0.2, released["kl"] / config.adaptive_kl_target - 1))
            self.beta *= 1 + error * config.expected_batch_size / config.adaptive_kl_horizon

    def state(self) -> dict[str, float]:
        return {"beta": self.beta, "baseline": self.baseline}

    def load_state(self, state: dict[str, float]) -> None:
        self.beta, self.baseline = state["beta"], state["baseline"]


def sample(policy: Policy, ids: Tensor, mask: Tensor, config: PPOConfig) -> Rollouts:
    """Completions of `(rows, prompt)` ids with the config's lengths."""
    return policy.sample(
        ids, mask, config.max_completion_length, min_new_tokens=config.min_completion_length,
        rows_at_once=config.micro_batch_size if policy.constant_rows else 256,  # filled-up rows cost time
    )  # fmt: skip


def encode_prompt(policy: Policy, record: Record, config: PPOConfig) -> list[int] | None:
    """Token ids of a record's prompt; None for a text with too few tokens (the unit then adds nothing)."""
    tokenizer = policy.tokenizer
    if "prompt" in record:
        prompt = render(tokenizer, record["prompt"], is_prompt=True)
        return tokens(tokenizer, prompt, prepend_bos=config.prepend_bos)
    text = render(tokenizer, record["text"])
    low, high = config.prompt_min_tokens, config.prompt_max_tokens
    length = cut_length(text, low or high or 8, high or low or 8)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if len(ids) < length:
        return None
    front = [tokenizer.bos_token_id] if config.prepend_bos and tokenizer.bos_token_id is not None else []
    return front + ids[:length]


def check_ppo_columns(policy: Policy, records: list[Record], path: str, config: PPOConfig) -> None:
    """Raises DPAlignError for a missing column or a prompt longer than the limit; never quotes one."""
    require_columns(records, [("prompt",), ("text",)], path)
    for number, record in enumerate(records, 1):
        length = len(encode_prompt(policy, record, config) or [])
        if length > config.max_prompt_length:
            raise DPAlignError(
                f"the prompt of record {number} in {path} has {length} tokens, more than max_prompt_length "
                f"{config.max_prompt_length}: raise the limit or shorten the prompt."
            )


def _has_eos(policy: Policy, rollouts: Rollouts) -> Tensor:
    eos = policy.tokenizer.eos_token_id
    ended = (rollouts.completion_ids == eos) & (rollouts.completion_mask > 0)
    return ended.any(1).float()


def _in_micro_batches(policy: Policy, rollouts: Rollouts, config: PPOConfig, rows: int) -> tuple[Tensor, Tensor]:
    parts = [
        (policy.completion_logprobs(rollouts[chunk], config.min_completion_length), count)
        for chunk, count in policy.chunks(len(rollouts.input_ids), rows)
    ]
    if not parts:
        return rollouts.completion_mask.clone(), rollouts.completion_mask.clone()
    return torch.cat([p[0][:count] for p, count in parts]), torch.cat([p[1][:count] for p, count in parts])
