"""What a stage asks of whatever samples its completions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from ..models import Policy
from ..models.policy import Rollouts
from ..privacy.entropy import SystemEntropy
from ..settings.rollouts import SamplingConfig


class Generator(ABC):
    """Samples by the law of the policy, as it is switched and trained when `push` is called."""

    @abstractmethod
    def push(self, policy: Policy) -> None:
        """Takes the policy's weights over; called before anything is drawn, and reads no record.

        Raises:
            EngineError: it does not compute with them.
        """

    @abstractmethod
    def sample(
        self, policy: Policy, ids: Tensor, mask: Tensor, config: SamplingConfig, coins: Sequence[SystemEntropy] | None
    ) -> Rollouts:
        """A completion for each of `(rows, prompt)` left-padded ids, every row by itself.

        Args:
            coins: each row's own secret randomness; None is torch's generator.

        Raises:
            EngineError: it fails, or its weights are not the policy's.
        """

    @abstractmethod
    def logprobs(self, policy: Policy, rows: list[list[int]]) -> list[Tensor]:
        """Of each row of token ids, the log-probabilities `(length - 1,)` float32 of all tokens but the first, at
        temperature 1, by the weights that it samples with.

        Raises:
            EngineError: it fails.
        """
