"""A server samples: it is pushed the adapter before every draw, and asked whether it computes with it."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from ..errors import DPAlignError, EngineError
from ..models import AdapterConfig, Policy
from ..models.policy import Rollouts
from ..printable import printable
from ..privacy.entropy import SystemEntropy
from ..settings.engine import EngineConfig
from ..settings.rollouts import CompletionConfig, SamplingConfig
from .api import Completions
from .base import Generator
from .local import Local
from .verified import CERTAIN, ROWS, Agreement, kolmogorov, places, public_randomness, rms, write_probe
from .wire import Wire

LAW_TOKENS = 1536  # sampled tokens, at most, by which the engine's law is compared with the policy's
TRIAL = "trial"  # the adapter by which pushes are tried


def reach(config: CompletionConfig, policy: Policy) -> Engine:
    """The engine that a stage names, tried with the policy that it will be pushed.

    Raises:
        EngineError: it does not answer, serves another model, takes too short sequences, does not apply what it is
            pushed, or samples by another law.
    """
    engine = Engine(config.engine)
    engine.begin(policy, config)
    try:
        engine.try_pushes(policy, config.adapter)
        engine.try_law(policy, config)
    except BaseException:
        engine.close()
        raise
    return engine


class Engine(Generator):
    """vLLM's completions API. Every push has a name of its own, so that nothing which the server keeps of an older one
    (cached keys and values, say) is taken for it."""

    def __init__(self, config: EngineConfig) -> None:
        assert config.url is not None
        self.config, self.url = config, config.url
        self.api = Completions(Wire(config.url, only_here=not config.is_trusted))
        self.probe: list[list[int]] = []
        self._temporary: TemporaryDirectory[str] | None = None
        self._run, self._pushes = secrets.token_hex(4), 0
        self._base = self._serving = ""  # names there: of the base, and of what was pushed last
        self._pushed = self._verified = ""  # fingerprints of the weights that these were

    # Before the first draw -----------------------------------------------------------------------------------

    def begin(self, policy: Policy, config: SamplingConfig) -> None:
        """Looks whether it serves the policy's base model, for sequences that are long enough.

        Raises:
            EngineError: it does not.
        """
        served = self.api.models()
        name = self.config.model or next(iter(served), None)
        if name is None or name not in served:
            known = printable(", ".join(served)) or "none"
            raise EngineError(f"the rollout engine at {self.url} serves no model {name!r} (it serves: {known}).")
        limit = served[name]
        if limit is not None and limit < config.positions:
            raise EngineError(
                f"the rollout engine at {self.url} takes sequences of {limit} tokens, and the stage needs "
                f"{config.positions}: start it with --max-model-len {config.positions}."
            )
        self._base = self._serving = name
        self.probe = write_probe(policy, config.positions)
        self.agreement = Agreement(policy.model.dtype, self.url)
        with policy.base():
            self.agreement.begin(*self._answers(policy))

    def try_pushes(self, policy: Policy, adapter: AdapterConfig) -> None:
        """Pushes an adapter with random weights, and one with none, and looks for the effect of both.

        Raises:
            EngineError: the engine does not show it.
        """
        with public_randomness(policy):
            policy.add_adapter(TRIAL, replace(adapter, init_a="random"))
            try:
                self._move(policy)
                self._load(policy)
                self.agreement.learn_rounding(*self._answers(policy))
                self._must_move(policy)
                with torch.no_grad():
                    for p in trained_of(policy):
                        p.zero_()
                self._load(policy)
                self._must_move(policy)
            finally:
                policy.finish_stage()
                policy.drop_newest()

    def _move(self, policy: Policy) -> None:
        """Random weights for what is trainable, large enough to be seen in the trainer's own answers."""
        before = self._ours(policy)
        scale = 0.01
        while rms(self._ours(policy) - before) < 10 * self.agreement.tolerance:
            scale *= 2
            if scale > 1e4:
                raise DPAlignError("the stage's adapter changes nothing that the model says: adapt other layers.")
            with torch.no_grad():
                for p in trained_of(policy):
                    p.copy_(scale * torch.randn_like(p))

    def _must_move(self, policy: Policy) -> None:
        if self.agreement.check(*self._answers(policy)) is None:
            raise EngineError(
                f"the rollout engine at {self.url} rounds so much that a pushed adapter cannot be told from none: "
                f"serve the model in {str(policy.model.dtype).removeprefix('torch.')}."
            )

    def try_law(self, policy: Policy, config: SamplingConfig) -> None:
        """Has it complete public prompts, and compares what it samples with the policy's law.

        Raises:
            EngineError: another temperature, or a part of the law is cut off; or the same coins for every row.
        """
        self.push(policy)
        longest = [list(islice(cycle(self.probe[0]), config.max_prompt_length))]
        starts = [row[: max(1, min(len(row) // 2, config.max_prompt_length))] for row in self.probe]
        rows = max(ROWS, LAW_TOKENS // config.max_completion_length)
        prompts = [starts[number % len(starts)] for number in range(rows)]
        seeds = seeds_of([SystemEntropy()] * (1 + rows), 1 + rows)
        found = self.api.complete(self._serving, longest + prompts, seeds, config, policy.stop_ids)
        if any(ids is None for ids in found):
            raise EngineError(
                f"the rollout engine at {self.url} refused public prompts of the stage's lengths, or what it answered "
                "breaks the stage's rules (token ids, max_completion_length, stop tokens)."
            )
        ids, mask = policy.encode_prompts(prompts, config.max_prompt_length)
        rollouts = rollouts_of(policy, ids, mask, found[1:], config.max_completion_length)
        with public_randomness(policy):
            distance = kolmogorov(places(policy, rollouts, config))
        if distance > CERTAIN:
            raise EngineError(
                f"the rollout engine at {self.url} samples by another law than the policy's at temperature "
                f"{config.temperature:g} (on public prompts Kolmogorov's statistic is {distance:.1f}): it must not cut "
                "the law off or share coins between requests."
            )

    # While a stage trains --------------------------------------------------------------------------------------

    def push(self, policy: Policy) -> None:
        self._load(policy)
        self._verify(policy)

    def sample(
        self, policy: Policy, ids: Tensor, mask: Tensor, config: SamplingConfig, coins: Sequence[SystemEntropy] | None
    ) -> Rollouts:
        if fingerprint(policy) != self._verified:
            raise EngineError(
                f"the rollout engine at {self.url} was not pushed the weights that are to be sampled from."
            )
        prompts = [row[kept].tolist() for row, kept in zip(ids, mask > 0, strict=True)]
        found = self.api.complete(self._serving, prompts, seeds_of(coins, len(prompts)), config, policy.stop_ids)
        if any(row is None for row in found):
            self._verify(policy)  # it fails for everything? Then the run stops; else it is this unit's own matter
            raise DPAlignError("the rollout engine refused a prompt.")
        return rollouts_of(policy, ids, mask, found, config.max_completion_length)

    def logprobs(self, policy: Policy, rows: list[list[int]]) -> list[Tensor]:
        return self.api.logprobs(self._serving, rows)

    def close(self) -> None:
        """Has the server forget what it was pushed; if that fails, it does no harm."""
        with suppress(EngineError):
            self._forget(self._serving)
        self._serving, self._pushed, self._verified = self._base, "", ""
        self.api.wire.close()
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    def _load(self, policy: Policy) -> None:
        """Has the server load the adapters that are on, unless it has them; the one before is unloaded."""
        known = fingerprint(policy)
        if known == self._pushed:
            return
        older, self._verified = self._serving, ""
        if policy.concatenated():
            self._pushes += 1
            self._serving = f"dpalign-{self._run}-{self._pushes}"
            folder = self._folder() / self._serving
            folder.mkdir(parents=True)
            policy.write_adapter(folder, self._base)
            self.api.load(self._serving, folder)
        else:
            self._serving = self._base
        self._pushed = known
        self._forget(older)

    def _forget(self, name: str) -> None:
        """Has the server unload an adapter; until then it may read its files again."""
        if name != self._base:
            rmtree(self._folder() / name, ignore_errors=True)
            self.api.unload(name)

    def _verify(self, policy: Policy) -> None:
        self._verified = ""
        self.agreement.check(*self._answers(policy))
        self._verified = self._pushed

    def _answers(self, policy: Policy) -> tuple[Tensor, Tensor]:
        """Log-probabilities `(tokens,)` float64 of the probe, here and there."""
        return self._ours(policy), torch.cat(self.logprobs(policy, self.probe)).double()

    def _ours(self, policy: Policy) -> Tensor:
        return torch.cat(Local().logprobs(policy, self.probe)).double()

    def _folder(self) -> Path:
        if self.config.folder is not None:
            return Path(self.config.folder).resolve()
        self._temporary = self._temporary or TemporaryDirectory(prefix="dpalign-engine-")
        return Path(self._temporary.name)


def fingerprint(policy: Policy) -> str:
    """SHA-256 of the adapters that are on, as they are pushed."""
    digest = hashlib.sha256()
    for name, matrices in sorted(policy.concatenated().items()):
        digest.update(name.encode())
        for matrix in matrices:
            digest.update(matrix.cpu().float().numpy().tobytes())
    return digest.hexdigest()


def trained_of(policy: Policy) -> list[nn.Parameter]:
    """What its newest adapter trains."""
    return [p for p in policy.parameters() if p.requires_grad]


def seeds_of(coins: Sequence[SystemEntropy] | None, rows: int) -> list[int]:
    """A seed of 63 bits for each row, from its own coins: whoever else is there does not move it."""
    if coins is None:
        drawn: list[int] = torch.randint(0, 2**63 - 1, (rows,)).tolist()
        return drawn
    return [int.from_bytes(own.bytes(8), "big") >> 1 for own in coins]


def rollouts_of(policy: Policy, ids: Tensor, mask: Tensor, found: Sequence[list[int] | None], width: int) -> Rollouts:
    """Prompts and completions, padded to `width` new tokens."""
    lengths = torch.tensor([len(row or ()) for row in found], dtype=torch.int64, device=ids.device)
    ended = (torch.arange(width, device=ids.device) < lengths[:, None]).float()
    rows = [torch.tensor(row or (), dtype=torch.int64) for row in found]
    padding = int(policy.tokenizer.pad_token_id)
    padded = [nn.functional.pad(row, (0, width - len(row)), value=padding) for row in rows]
    completions = torch.stack(padded).to(ids.device) if padded else ids.new_zeros(0, width)
    return Rollouts(torch.cat([ids, completions], 1), torch.cat([mask, ended.to(mask.dtype)], 1), ended)
