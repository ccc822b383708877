"""Models measured while a stage trains: exact, on records that are declared public.

What is measured are weights that the mechanism has released, on public records: post-processing, which costs nothing.
It must not change what is trained either: torch's coins, the model's modes and what it trains are put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from ..algorithms.base import Algorithm, Reading, StageKind
from ..algorithms.pairs import PairAlgorithm, preference_of
from ..algorithms.rollouts import CompletionAlgorithm
from ..algorithms.texts import TextAlgorithm
from ..data.load import Record
from ..errors import DPAlignError
from ..files import append_line, read_lines
from ..models import AdapterStack
from .metrics import evaluate_policy, public_prompts
from .preferences import agreement_on
from .texts import text_loss

MEASURED = (PairAlgorithm, CompletionAlgorithm, TextAlgorithm)  # kinds of stages with something to measure on records
Numbers: TypeAlias = Mapping[str, float]


@dataclass(frozen=True)
class EvaluationReport:
    """What was measured on public records after a step; step 0 is before the first one."""

    stage: str
    step: int
    steps: int
    numbers: Numbers


def check_public(
    kind: type[StageKind[Any]], readings: Sequence[Reading | None], records: list[Record], path: str
) -> None:
    """Raises DPAlignError if nothing can be measured on public records of a stage; asked before the first draw."""
    if issubclass(kind, PairAlgorithm):
        if all(preference_of(record) == 0.5 for record in records):
            raise DPAlignError(f"all pairs of {path} are ties: stage {kind.name} has nothing to be measured on.")
    elif readings and not any(reading is None or reading.learned for reading in readings):
        raise DPAlignError(
            f"no record of {path} has anything that stage {kind.name} can be measured on: texts are too short for a "
            "prompt, or have no token that is learned."
        )


def measure_of(
    algorithm: Algorithm[Any, Any, Any], model: Any, records: list[Record], *, at_most: int | None, seed: int
) -> Callable[[], dict[str, float]]:
    """Measures what a stage trains, on public records, as the model is when it is called.

    Args:
        model: that the stage trains. at_most: prompts that are completed; default all. seed: of their sampling.
    """
    if isinstance(algorithm, CompletionAlgorithm):
        config, reward = algorithm.config, algorithm.reward
        prompts = public_prompts(model, records, config, at_most)
        return lambda: evaluate_policy(model, prompts, reward, config, seed=seed)[0].as_dict()
    if isinstance(algorithm, PairAlgorithm):
        return lambda: agreement_on(algorithm.differences(model, records), records).as_dict()
    if isinstance(algorithm, TextAlgorithm):
        return lambda: _short(text_loss(*algorithm.nats(model, records)).as_dict())
    raise TypeError(f"stage {algorithm.name} has nothing to be measured on records")


def _short(numbers: Numbers) -> dict[str, float]:
    """Where all is measured on texts, nothing has to say so."""
    return {name.removeprefix("text_"): value for name, value in numbers.items()}


class Evaluations:
    """Measures one stage's model when it is asked to, writes that down and tells it.

    A step that the log has, of the same attempt, is not measured again.

    Args:
        log: evaluations.jsonl.
    """

    def __init__(
        self,
        log: Path,
        stage: str,
        steps: int,
        model: AdapterStack,
        measure: Callable[[], Numbers],
        tell: Callable[[EvaluationReport], None] = lambda report: None,
        begins: Callable[[], None] = lambda: None,
    ) -> None:
        self.log, self.stage, self.steps, self.model, self.measure = log, stage, steps, model, measure
        self.tell, self.begins = tell, begins
        self._known = {(line.get("stage"), line.get("step"), line.get("attempt")) for line in read_lines(log)}

    def __call__(self, step: int, attempt: int, private: bool) -> None:
        """private: whether all that the model has learned, or will in this stage, has a guarantee."""
        if (self.stage, step, attempt) in self._known:
            return
        self.begins()
        with undisturbed(self.model):
            numbers = self.measure()
        line = {"private": private, "stage": self.stage, "step": step, "attempt": attempt, "measured": numbers}
        append_line(self.log, line)
        self.tell(EvaluationReport(self.stage, step, self.steps, numbers))


@contextmanager
def undisturbed(model: AdapterStack) -> Iterator[None]:
    """Within the block the model is in evaluation mode (else generation has no cache where activations are recomputed)
    and nothing learns; afterwards torch's coins, the model's modes and its trainables are as before."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [(p, p.requires_grad) for p in model.parameters()]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            for p, requires_grad in trained:
                p.requires_grad_(requires_grad)
