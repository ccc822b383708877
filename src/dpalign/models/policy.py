"""The policy: a causal language model with stacked adapters, a value head, and generation."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from ..data.text import turn_end
from ..errors import DPAlignError
from ..privacy.entropy import SystemEntropy
from ..settings.models import ModelConfig
from . import embedded
from .cache import roomy_cache
from .head import Head, by_position, held_together
from .kernels import chunks
from .loading import load_adapter, refuse_missing
from .lora import check_layers
from .objects import Given
from .precision import settled
from .prompt_format import prompt_format_of
from .quantized import settings_of
from .sampling import Dealt, DrawToken, NoStopBefore, uniforms_of
from .sharded import refuse_nan
from .stack import AdapterStack, load_pretrained

BASE = ""  # the place of an adapter where there is none


@dataclass
class Rollouts:
    """Prompts and sampled completions of some rows, padded to fixed widths.

    input_ids: `(rows, prompt + completion)` int64, prompts left-padded.
    attention_mask: the same shape, 1 where there is a token.
    completion_mask: `(rows, completion)` float, 1 up to and including the first token that stops (EOS, a turn's end).
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor

    @property
    def completion_ids(self) -> Tensor:
        return self.input_ids[:, -self.completion_mask.shape[1] :]

    def __getitem__(self, rows: Tensor | slice | list[int]) -> Rollouts:
        return Rollouts(self.input_ids[rows], self.attention_mask[rows], self.completion_mask[rows])

    @staticmethod
    def cat(parts: list[Rollouts]) -> Rollouts:
        return Rollouts(
            torch.cat([p.input_ids for p in parts]),
            torch.cat([p.attention_mask for p in parts]),
            torch.cat([p.completion_mask for p in parts]),
        )


class Policy(AdapterStack):
    """A causal LM on an `AdapterStack`; `reference` is the model that the newest stage started from."""

    task_type = "CAUSAL_LM"
    auto_class = AutoModelForCausalLM

    def __init__(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(base, tokenizer)
        self.stop_ids = _stop_ids(base, tokenizer)
        # generate fills every unset field from here: a base's own penalties or top-k would change the sampled law.
        base.generation_config = GenerationConfig(eos_token_id=self.stop_ids or None)  # type: ignore[no-untyped-call]
        self.asks_in_chats = False  # whether prompts that it writes itself are chats, as those of the run
        self.words: dict[str, str] = {}  # that a prompt is asked with, by the adapter that has learned it
        self.value_head: nn.Linear | None = None
        accepted = inspect.signature(base.forward).parameters
        self._accepts_positions = "position_ids" in accepted
        self._accepts_keep = "logits_to_keep" in accepted
        self._head: Head | None = Head(base)
        self._try_out(self._head)

    @torch.no_grad()
    def _try_out(self, head: Head) -> None:
        """Raises DPAlignError if later tokens change earlier logits: such a model has no law of the next token.

        One that is not its body and then its head has all of its logits computed together.
        """
        refuse_nan(self.model, self.shards)
        config = self.model.config.get_text_config()
        half = min(16, getattr(config, "max_position_embeddings", None) or 16) // 2
        ids = torch.arange(2 * half, device=self.device)[None] % config.vocab_size
        other = torch.where(ids < half, ids, (ids + 1 + half) % config.vocab_size)
        whole, after = (self(row, torch.ones_like(row), 2 * half)[0] for row in (ids, other))
        rounding = 16 * torch.finfo(self.model.dtype).eps * float(whole.abs().max())
        if float((whole - after)[:, :half].abs().max()) > rounding:
            raise DPAlignError(
                f"{type(self.model).__name__} reads later tokens too (in its config, is_decoder may be false): it "
                "cannot be a policy; use a causal language model."
            )
        try:
            states = head.states(**self._inputs(ids, torch.ones_like(ids)))
            apart = torch.cat([head.logits(states[:, :half]), head.logits(states[:, half:])], 1)
        except Exception:  # of a model that is written in a way of its own
            apart = torch.zeros(())
        if apart.shape != whole.shape or float((apart - whole).abs().max()) > rounding:
            self._head = None

    @classmethod
    def load(cls, config: ModelConfig, device: str | torch.device = "cpu", given: Given | None = None) -> Policy:
        """Loads a base model, or the base and adapter of a release; see `load_pretrained` for objects that are given.

        Raises:
            DPAlignError: the folder or dtype is wrong.
        """
        config = settled(config, device)
        base, tokenizer, adapter, missing = load_pretrained(AutoModelForCausalLM, config, device, given)
        refuse_missing(config.name_or_path, missing)
        policy = cls(base, tokenizer)
        policy.quantization = settings_of(config.quantization, config.dtype)
        if adapter:
            policy.model = load_adapter(base, adapter, is_trainable=False)
            check_layers(policy.model, "earlier")
            policy.adapters.append("earlier")
            policy.eval()
        said = prompt_format_of(embedded.resolve(config.name_or_path))
        if said is not None and said.asked_with:
            policy.words["earlier" if adapter else BASE] = said.asked_with
        return policy

    @property
    def asked_with(self) -> str:
        """Words in front of every prompt, as the policy is switched now; none where its newest adapter learned none."""
        return self.words.get(self.adapters[-1] if self.adapters else BASE, "")

    @property
    def vocabulary(self) -> int:
        """Logits of a position."""
        return int(self.model.config.get_text_config().vocab_size)

    def heads(self) -> list[nn.Linear]:
        return [] if self.value_head is None else [self.value_head]

    def add_value_head(self) -> None:
        """A linear layer from the body's last hidden state to one value, float32, zero at first."""
        with torch.no_grad():  # asked of the model: what its configuration calls hidden size may be another one
            ids = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
            hidden = self(ids, torch.ones_like(ids), 1, with_hidden=True)[1]
        self.value_head = nn.Linear(hidden.shape[-1], 1, device=self.device, dtype=torch.float32)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def finish_stage(self) -> None:
        """Freezes what the stage trained and drops the value head."""
        self.value_head = None
        super().finish_stage()

    # Computation -------------------------------------------------------------------------------------

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, keep: int, *, with_hidden: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Logits of the last `keep` positions, and the last hidden states, in float32 (float64 of a float64 model).

        Args:
            input_ids, attention_mask: `(rows, length)`; either side may be padded.
        Returns:
            `(rows, keep, vocabulary)`, and `(rows, keep, hidden)`, or nothing if nobody asks for it.
        """
        arguments = self._inputs(input_ids, attention_mask)
        if self._accepts_keep:
            length = input_ids.shape[1]  # as indices: gathered states are contiguous, and the head is one large matmul
            arguments["logits_to_keep"] = torch.arange(length - keep, length, device=input_ids.device)
        out = self.model(**arguments, output_hidden_states=with_hidden)
        wide = torch.promote_types(out.logits.dtype, torch.float32)
        # A slice of everything would still write zeros everywhere in the backward pass, before the gradient.
        logits = (out.logits if out.logits.shape[1] == keep else out.logits[:, -keep:]).to(wide)
        hidden = out.hidden_states[-1][:, -keep:].to(wide) if with_hidden else logits.new_empty(0)
        return logits, hidden

    def _inputs(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if self._accepts_positions:
            inputs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
        return inputs

    def logprobs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        tokens: Tensor,
        *,
        min_new_tokens: int = 0,
        temperature: float = 1.0,
        with_hidden: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of tokens, and last hidden states; a few positions at a time where all logits are many.

        Args:
            input_ids, attention_mask: `(rows, length)`; either side may be padded.
            tokens: `(rows, keep)` int64, what follows each of the last `keep` positions.
            min_new_tokens: so many of these could not be one that stops.
        Returns:
            `(rows, keep)`, and `(rows, keep, hidden)` or nothing if nobody asks for it; dtypes as `forward`.
        """

        def chosen(logits: Tensor, here: slice) -> Tensor:
            if temperature != 1:
                logits = logits / temperature
            early = max(0, min_new_tokens - here.start)
            if early and self.stop_ids:
                with torch.no_grad():  # in place, for a copy is large; at probability 0 the gradient is 0 anyway
                    logits[:, :early, self.stop_ids] = -torch.inf
            # cross_entropy keeps one tensor of the logits' size for the backward pass; gather and logsumexp keep three.
            ids = tokens[:, here]
            nll = nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none")
            return -nll.view_as(ids)

        rows, keep = tokens.shape
        at_once = held_together(rows * self.vocabulary)
        head = self._head
        if head is None or keep <= at_once:
            logits, hidden = self(input_ids, attention_mask, keep, with_hidden=with_hidden)
            return chosen(logits, slice(0, keep)), hidden
        states = head.states(**self._inputs(input_ids, attention_mask))[:, -keep:]
        wide = torch.promote_types(states.dtype, torch.float32)
        found = by_position(
            lambda part, here: chosen(head.logits(part).to(wide), here), states, at_once, is_trained=head.is_trained
        )
        return found, states.to(wide) if with_hidden else found.new_empty(0)

    def completion_logprobs(
        self, rollouts: Rollouts, min_new_tokens: int = 0, temperature: float = 1.0, *, with_values: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Log-probability and value of every completion token, under the law that sampled it.

        Returns:
            logprobs, values: `(rows, completion)` float32; both are 0 beyond the completion's end. Values
            are of the state before the token, and 0 without a value head or where they are not asked for.
        """
        head = self.value_head if with_values else None
        chosen, hidden = self.logprobs(
            rollouts.input_ids[:, :-1],  # the state at position t is for the token at t + 1: the last one is never read
            rollouts.attention_mask[:, :-1],
            rollouts.completion_ids,
            min_new_tokens=min_new_tokens,
            temperature=temperature,
            with_hidden=head is not None,
        )
        inside = rollouts.completion_mask > 0
        logprobs = torch.where(inside, chosen, 0.0)
        if head is None:
            return logprobs, torch.zeros_like(logprobs)
        values = head(hidden).squeeze(2)
        return logprobs, torch.where(inside, values, 0.0)

    @torch.no_grad()
    def generate(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        max_new_tokens: int,
        *,
        min_new_tokens: int = 0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        coins: SystemEntropy | None = None,
    ) -> Rollouts:
        """Samples one completion per left-padded prompt, with `coins` or else torch's global generator.

        Rollouts of private prompts are drawn with the sample's secret coins. torch's generator is for public ones.

        By default the law is exactly the policy's own (no top-k, no penalties), which PPO needs.
        """
        tokenizer = self.tokenizer
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False,  # DrawToken draws
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=self.stop_ids or None,
            bos_token_id=tokenizer.bos_token_id,
        )
        processors = LogitsProcessorList()
        if min_new_tokens and self.stop_ids:
            processors.append(NoStopBefore(prompt_ids.shape[1] + min_new_tokens, self.stop_ids))
        if temperature != 1:
            processors.append(TemperatureLogitsWarper(temperature))
        if top_p < 1:
            processors.append(TopPLogitsWarper(top_p))
        processors.append(DrawToken(coins))
        cache = roomy_cache(self.model, prompt_ids.device, prompt_ids.shape[1] + max_new_tokens)
        sequences = self.model.generate(
            input_ids=prompt_ids,
            attention_mask=prompt_mask,
            generation_config=config,
            logits_processor=processors,
            **({} if cache is None else {"past_key_values": cache}),
        )
        completions = sequences[:, prompt_ids.shape[1] :]
        missing = max_new_tokens - completions.shape[1]  # generation stops early once every row has ended
        completions = nn.functional.pad(completions, (0, missing), value=tokenizer.pad_token_id)
        ended = self.stops(completions)
        mask = (ended.long().cumsum(1) - ended.long() == 0).float()  # 1 up to and including the first that stops
        if missing and not ended.any(1).all():
            raise DPAlignError("generation stopped before the completions ended; the model's stop rules are not EOS.")
        return Rollouts(
            torch.cat([prompt_ids, completions], 1), torch.cat([prompt_mask, mask.to(prompt_mask.dtype)], 1), mask
        )

    def stops(self, ids: Tensor) -> Tensor:
        """Which of the token ids end a completion, bool of the same shape."""
        return torch.isin(ids, torch.tensor(self.stop_ids, dtype=ids.dtype, device=ids.device))

    def sample(
        self,
        ids: Tensor,
        mask: Tensor,
        max_new_tokens: int,
        *,
        min_new_tokens: int = 0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        rows_at_once: int = 256,
        coins: Sequence[SystemEntropy] | None = None,
    ) -> Rollouts:
        """Completions for `(rows, prompt)` ids in chunks of a fixed size, with merged weights; as `generate` draws.

        coins: of each row.
        """
        drawn = None if coins is None else uniforms_of(coins, max_new_tokens)
        parts = []
        with self.merged():
            for chunk, count in chunks(len(ids), rows_at_once):
                rows = chunk[:count] if drawn is None else chunk  # public rows need no company
                dealt = None if drawn is None else Dealt([step[rows] for step in drawn])
                part = self.generate(
                    ids[rows],
                    mask[rows],
                    max_new_tokens,
                    min_new_tokens=min_new_tokens,
                    temperature=temperature,
                    top_p=top_p,
                    coins=dealt,
                )
                parts.append(part[:count])
        if not parts:  # an empty sample
            nothing = ids.new_zeros(0, ids.shape[1] + max_new_tokens)
            return Rollouts(nothing, nothing, torch.zeros(0, max_new_tokens, device=ids.device))
        return Rollouts.cat(parts)

    def decode(self, rollouts: Rollouts) -> list[str]:
        """Text of the completions, without special tokens."""
        rows = zip(rollouts.completion_ids.tolist(), rollouts.completion_mask.sum(1).int().tolist(), strict=True)
        ids = [row[:length] for row, length in rows]
        # Of an empty sample `batch_decode` makes one empty text.
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True) if ids else []

    def encode_prompts(self, prompts: list[list[int]], width: int) -> tuple[Tensor, Tensor]:
        """Left-pads token lists to `(rows, width)` ids and mask."""
        ids = torch.full((len(prompts), width), self.tokenizer.pad_token_id, dtype=torch.int64)
        mask = torch.zeros((len(prompts), width), dtype=torch.int64)
        for row, tokens in enumerate(prompts):
            if tokens:
                ids[row, -len(tokens) :] = torch.tensor(tokens)
                mask[row, -len(tokens) :] = 1
        return ids.to(self.device), mask.to(self.device)


def _stop_ids(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a completion: the tokenizer's EOS, the model's own, and the end of a chat's turn."""
    own = getattr(base.generation_config, "eos_token_id", None)
    known = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own]), turn_end(tokenizer)]
    return sorted(
        {token for token in known if token is not None and 0 <= token < base.config.get_text_config().vocab_size}
    )
