"""Does an engine compute with the weights that it was pushed, and sample by their law?

Both are asked on text that the policy wrote itself before anything was drawn, so whatever is found is public or a
post-processing of releases.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import EngineError
from ..models import Policy
from ..models.generation import write_prompts
from ..models.policy import Rollouts
from ..settings.rollouts import SamplingConfig

ROWS, TOKENS = 32, 24  # of the probe, at most

# Root mean square of what rounding explains of the difference of two log-probabilities, in nats. float32: 1e-6 is
# measured between kernels on a CPU, and reduced precision of a GPU's products makes 1e-3 of it. Half precision: 1e-2 to
# 3e-2 is measured (docs/engines.md).
TOLERANCE = {torch.float32: 5e-3, torch.float64: 5e-3}
IN_HALF = 1e-1
# A move decides if the standard deviation of the engine's share of it is at most that much; it may be off by OFF.
DECISIVE, OFF = 0.08, 0.4
CERTAIN = 3.5  # of Kolmogorov's statistic: an engine that samples rightly exceeds it once in 2e10 tries


class Agreement:
    """What an engine and the trainer say of the probe after each push.

    An engine that goes on with older weights answers what it answered before. So the change of its answer since the
    last push that decided, e - e0, is projected on the trainer's, t - t0: a share of 1 if the push was applied, 0 if
    not. The rounding of single tokens averages out of this, so that steps smaller than rounding still decide.

    rounding: of e - e0 - (t - t0), root mean square over tokens, half of its square here and half there.
    """

    def __init__(self, dtype: torch.dtype, url: str) -> None:
        self.tolerance = TOLERANCE.get(dtype, IN_HALF)
        self.url = url
        self.rounding = torch.finfo(dtype).eps  # at least; measured at start-up
        self.trainer: Tensor | None = None  # their answers to the last push that decided: `(tokens,)` float64
        self.engine: Tensor | None = None

    def begin(self, trainer: Tensor, engine: Tensor) -> None:
        """With the answers of weights that were not pushed: those of the base.

        Raises:
            EngineError: they are not those of one model.
        """
        off = rms(engine - trainer)
        if not off <= self.tolerance:
            raise EngineError(
                f"the rollout engine at {self.url} computes with another model than this run, or in another dtype: on "
                f"the public probe its log-probabilities are {off:.2g} nats away, and rounding explains "
                f"{self.tolerance:g}."
            )
        self.trainer, self.engine = trainer, engine

    def check(self, trainer: Tensor, engine: Tensor) -> float | None:
        """The share of the trainer's change that the engine shows; None if it is too small to decide.

        Raises:
            EngineError: the engine does not compute with what was pushed.
        """
        assert self.trainer is not None and self.engine is not None
        moved, shown = trainer - self.trainer, engine - self.engine
        share, off = self._share(moved, shown), rms(engine - trainer)
        if not off <= self.tolerance or (share is not None and not abs(share - 1) <= OFF):
            said = "" if share is None else f" its answer moved by {share:.2f} of what it should,"
            raise EngineError(
                f"the rollout engine at {self.url} does not compute with the weights that were pushed: on the public "
                f"probe{said} and is {off:.2g} nats away (rounding explains {self.tolerance:g}); nothing was sampled "
                "with them."
            )
        if share is not None:
            self.trainer, self.engine = trainer, engine
        return share

    def _share(self, moved: Tensor, shown: Tensor) -> float | None:
        """<shown, moved> / |u|^2 if its standard deviation is small; |u|^2 is |moved|^2 without its rounding."""
        count, variance = len(moved), self.rounding**2
        signal = float(moved @ moved) - count * variance / 2
        noise = math.sqrt(max(0.0, signal) * variance + count * variance**2 / 4)
        return float(shown @ moved) / signal if signal > 0 and noise <= DECISIVE * signal else None

    def learn_rounding(self, trainer: Tensor, engine: Tensor) -> None:
        """From answers that must move: how much of an engine's change is rounding."""
        assert self.trainer is not None and self.engine is not None
        found = rms((engine - self.engine) - (trainer - self.trainer))
        self.rounding = max(self.rounding, min(found, self.tolerance))


def rms(values: Tensor) -> float:
    """Root mean square; infinite if one is not finite."""
    found = float(values.double().square().mean().sqrt())
    return found if math.isfinite(found) else math.inf


@contextmanager
def public_randomness(policy: Policy) -> Iterator[None]:
    """Within the block torch's generators start at 0, and behind it they go on as if nothing had been."""
    with torch.random.fork_rng([policy.device] if policy.device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def write_probe(policy: Policy, positions: int) -> list[list[int]]:
    """Token ids that the policy writes itself, the same ones at every start; of at most `positions` tokens.

    Raises:
        DPAlignError: the tokenizer has neither BOS nor EOS.
    """
    with public_randomness(policy):
        prompts = write_prompts(policy, ROWS, max(1, min(TOKENS, positions - 1)), ROWS)
    return [prompt.ids[:positions] for prompt in prompts]


@torch.no_grad()
def places(policy: Policy, rollouts: Rollouts, config: SamplingConfig) -> Tensor:
    """`(tokens,)` float64: the probability of all tokens that are likelier than the one that was sampled, and a random
    share of its own. Uniform on [0, 1] if it was sampled by the policy's law; cut off at p by top-p, say."""
    found = []
    for row in range(len(rollouts.input_ids)):
        one = rollouts[row : row + 1]
        width = one.completion_mask.shape[1]
        logits = policy(one.input_ids[:, :-1], one.attention_mask[:, :-1], width)[0][0] / config.temperature
        if config.min_completion_length and policy.stop_ids:
            logits[: config.min_completion_length, policy.stop_ids] = -torch.inf
        law = logits.double().softmax(-1)[one.completion_mask[0] > 0].cpu()
        own = law.gather(1, one.completion_ids[0].cpu()[: len(law), None])
        likelier = (law * (law > own)).sum(1)
        found.append(likelier + torch.rand(len(law), dtype=torch.float64) * (law * (law == own)).sum(1))
    return torch.cat(found)


def kolmogorov(values: Tensor) -> float:
    """sqrt(n) times the largest distance of the distribution of `(n,)` values from the uniform one."""
    ordered, count = values.sort().values, len(values)
    grid = torch.arange(count + 1, dtype=torch.float64) / count
    distance = torch.maximum(grid[1:] - ordered, ordered - grid[:-1])
    return float(distance.max()) * math.sqrt(count)
