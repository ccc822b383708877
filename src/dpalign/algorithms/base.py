"""What a stage is: its settings, what enters it, what it reads; and what the training loop asks of an algorithm."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.load import Record, require_columns
from ..domains import COUNT, LENGTH, SEEDS, STEPS, within
from ..errors import DPAlignError
from ..models import AdapterConfig, AdapterStack, ModelConfig
from ..privacy.entropy import SystemEntropy
from ..privacy.mechanism import Clipping, MetricRange
from ..rewards import RewardConfig

Tokenizer: TypeAlias = PreTrainedTokenizerBase
OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
Entering: TypeAlias = Mapping[str, ModelConfig | RewardConfig]  # by the setting that names it


@dataclass(frozen=True)
class Schedule:
    """What a stage draws, but for the noise: `steps` Poisson samples, `passes` releases of each, `minibatches` at once.

    metrics_noise_ratio: noise of the metrics block as a multiple of the gradients'; 0 for no such block.
    """

    sampling_rate: float
    steps: int
    passes: int = 1
    minibatches: int = 1
    metrics_noise_ratio: float = 0.0


@dataclass(kw_only=True)
class StageConfig(ABC):
    """The budget of one stage."""

    target_epsilon: float | None = within(None, "(0, 1000]", or_inf=True)
    target_delta: float | None = within(None, "(0, 1)")
    noise_multiplier: float | None = within(None, "[0, 100000]")

    def validate(self) -> None:
        """Raises DPAlignError for a setting that cannot be."""

    @property
    def has_bounded_sensitivity(self) -> bool:
        """Whether one unit can move what is released by a known amount only."""
        return True

    @abstractmethod
    def schedule(self, stage: str, units: float) -> Schedule:
        """What is drawn from `units` declared units.

        Raises:
            DPAlignError: there are too few of them.
        """


@dataclass(kw_only=True)
class TrainingConfig(StageConfig):
    """Settings of one private stage.

    Args:
        expected_batch_size: units expected in a Poisson sample; sampling rate = this / units of the stage.
        max_steps: number of samples drawn; default: from num_train_epochs.
        num_train_epochs: expected number of times a unit is drawn.
        micro_batch_size: units per forward and backward pass; memory only, no effect on the result.
        learning_rate: peak learning rate of AdamW.
        lr_scheduler_type: `constant`, `linear` or `cosine` (the last two decay to 0).
        warmup_steps: steps of linear warm-up.
        weight_decay: AdamW's.
        adam_beta1: AdamW's.
        adam_beta2: AdamW's.
        adam_epsilon: AdamW's.
        adam_noise_correction: subtract the variance of the privacy noise from Adam's second moment (DP-AdamBC).
        adam_noise_floor: smallest denominator after that, as a multiple of the noise's standard deviation.
        max_grad_norm: C, the bound on one unit's gradient.
        clipping: `automatic` scales every unit's gradient to nearly C, `flat` scales only larger ones down,
            `none` is for runs without privacy.
        clipping_gamma: constant of automatic clipping: g -> C g / (|g| + gamma).
        target_epsilon: epsilon of the stage, or inf for no privacy; default: the recipe's.
        target_delta: delta of the stage; default: the recipe's, else min(1e-5, 1/(10 units)).
        noise_multiplier: sigma instead of target_epsilon; the epsilon that follows is reported.
        metrics_noise_ratio: noise on the training metrics as a multiple of sigma; 0 releases no metrics.
        max_length: most tokens of one record.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        save_steps: steps between checkpoints.
        logging_steps: steps between progress updates of the logs.
        seed: seed of the initial weights; sampling and noise never use it.
        insecure_seed: makes sampling, noise and rollouts reproducible for debugging. NOT PRIVATE.
        adapter: the LoRA adapter that the stage trains.
    """

    has_synthetic_gradient: ClassVar[bool] = False  # whether text that the model writes itself has one

    expected_batch_size: int = within(512, COUNT)
    max_steps: int | None = within(None, STEPS)
    num_train_epochs: float = within(1.0, "(0, 10000]")
    micro_batch_size: int = within(32, "[1, 65536]")
    learning_rate: float = within(3e-4, "[0, 1000]")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = within(0, "[0, 1000000]")
    weight_decay: float = within(0.0, "[0, 1000]")
    adam_beta1: float = within(0.9, "[0, 1)")
    adam_beta2: float = within(0.999, "[0, 1)")
    adam_epsilon: float = within(1e-8, "(0, 1]")
    adam_noise_correction: bool = False
    adam_noise_floor: float = within(0.1, "(0, 1000]")
    max_grad_norm: float = within(1.0, "[1e-9, 1e9]")
    clipping: Clipping = "automatic"
    clipping_gamma: float = within(0.01, "[0, 1e9]")
    metrics_noise_ratio: float = within(10.0, "[0, 1e6]")
    max_length: int = within(128, LENGTH)
    gradient_checkpointing: bool = False
    save_steps: int = within(1, STEPS)
    logging_steps: int = within(1, STEPS)
    seed: int = within(0, SEEDS)
    insecure_seed: int | None = within(None, SEEDS)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)

    @property
    def has_bounded_sensitivity(self) -> bool:
        return self.clipping != "none"

    @property
    def passes(self) -> int:
        """Releases per Poisson sample (T_PPO)."""
        return 1

    @property
    def minibatches(self) -> int:
        """Poisson samples that are drawn together (K)."""
        return 1

    def validate(self) -> None:
        """Raises DPAlignError for a setting that cannot be."""
        if self.adapter.init_a != "random" and not self.has_synthetic_gradient:
            raise DPAlignError(
                "init_a synthetic_gradient is for stages that sample completions: what people wrote has no gradient "
                "before it is read."
            )

    def schedule(self, stage: str, units: float) -> Schedule:
        if self.expected_batch_size > units:
            raise DPAlignError(
                f"expected_batch_size {self.expected_batch_size} is larger than the {units:g} units of stage {stage}: "
                "a Poisson sample cannot expect more units than there are."
            )
        rate = self.expected_batch_size / units
        steps = self.max_steps or max(1, math.ceil(self.num_train_epochs / rate))
        steps = math.ceil(steps / self.minibatches) * self.minibatches
        return Schedule(rate, steps, self.passes, self.minibatches, self.metrics_noise_ratio)


C = TypeVar("C", bound=StageConfig)  # settings
T = TypeVar("T", bound=TrainingConfig)
T_co = TypeVar("T_co")
Model = TypeVar("Model", bound=AdapterStack)  # that the stage trains
Example = TypeVar("Example")  # what a record becomes


@dataclass(frozen=True)
class Tokens:
    """That one unit's turn costs: through the model with a backward pass, and without one (sampled, or read)."""

    trained: float = 0.0
    read: float = 0.0


@dataclass(frozen=True)
class Reading:
    """What a stage reads of one record: a function of private text, for its holder alone.

    tokens: it has. limit: of these are read. learned: of those that are read have a gradient (of a pair the answer with
    fewer; of a prompt, its own tokens). largest: token id among them.
    """

    tokens: int
    limit: int
    learned: int
    largest: int = 0


class StageKind(ABC, Generic[C]):
    """What a section of the recipe stands for. Whoever goes over a recipe's stages asks these and no names.

    A subclass that lacks one of them is a TypeError where it is defined, unless it says `is_base=True`.

    name: of the section, the command, the adapter and the ledger's rows. model_kind: what it trains or measures.
    columns: that a record must have, one of these alternatives.
    """

    name: ClassVar[str]
    Config: ClassVar[type[StageConfig]]
    model_kind: ClassVar[type[AdapterStack]]
    columns: ClassVar[tuple[tuple[str, ...], ...]]

    def __init_subclass__(cls, is_base: bool = False, **options: Any) -> None:
        super().__init_subclass__(**options)
        if is_base:
            return
        missing = [name for name in ("name", "Config", "model_kind", "columns") if not hasattr(cls, name)]
        missing += [n for n in dir(cls) if getattr(getattr(cls, n, None), "__isabstractmethod__", False)]
        if missing:
            raise TypeError(f"stage kind {cls.__name__} lacks {', '.join(missing)}.")

    @classmethod
    def completed(cls, config: C, others: Iterable[StageConfig]) -> C:
        """The settings with what they take from the recipe's other stages, where they leave something open.

        Raises:
            DPAlignError: no other stage has it.
        """
        return config

    @classmethod
    @abstractmethod
    def entering(cls, config: C) -> Entering:
        """Every model and reward that its result rests on, beside the run's model: their past is checked.

        `model` is the one that the stage begins with instead of the run's; a reward is handed to the constructor.
        """

    @classmethod
    @abstractmethod
    def longest(cls, config: C) -> int:
        """Positions that the model must hold."""

    @classmethod
    @abstractmethod
    def tokens(cls, config: C) -> Tokens:
        """What a sampled unit costs, for the planner."""

    @classmethod
    @abstractmethod
    def check(cls, config: C, tokenizer: Tokenizer, record: Record) -> Reading | None:
        """What the stage will read of a record, if it can say that.

        Raises:
            DPAlignError: the record cannot be used; in words that do not quote it.
        """

    @classmethod
    def assumptions(cls, config: C) -> set[str]:
        """What the statement has to say beside the spending."""
        return set()


@dataclass(frozen=True)
class Rows:
    """Rows of some units, ready for the loss.

    unit: `(rows,)` int64, the unit that each row belongs to, counted from 0. tensors: by name, what the loss reads,
    first dimension rows.
    """

    unit: Tensor
    tensors: dict[str, Tensor]

    def of(self, units: list[int]) -> Rows:
        """The rows of `units`, counted anew in that order; a unit that is named twice has its rows twice."""
        device = self.unit.device
        wanted = torch.tensor(units, dtype=torch.int64, device=device)
        counts = torch.bincount(self.unit, minlength=max(units, default=0) + 1)  # rows of each unit
        order, firsts = self.unit.argsort(stable=True), counts.cumsum(0) - counts
        lengths = counts[wanted]
        unit = torch.arange(len(units), device=device).repeat_interleave(lengths)
        place = torch.arange(len(unit), device=device) - (lengths.cumsum(0) - lengths)[unit]  # among its unit's rows
        rows = order[firsts[wanted][unit] + place]
        return Rows(unit, {name: tensor[rows] for name, tensor in self.tensors.items()})

    def filled(self, size: int, example: int, unit: int) -> Rows:
        """At least `size` rows: these, and then the last `example` ones over and over, which belong to `unit`."""
        count, device = len(self.unit), self.unit.device
        if count >= size:
            return self
        more = count - example + torch.arange(size - count, device=device) % example
        rows = torch.cat([torch.arange(count, device=device), more])
        units = torch.cat([self.unit, torch.full_like(more, unit)])
        return Rows(units, {name: tensor[rows] for name, tensor in self.tensors.items()})


def micro_batches(rows: Rows, units: list[int], most_units: int, most_rows: int) -> Iterator[list[int]]:
    """`units` in their order, in parts of at most so many units and rows; a unit with more rows is alone."""
    counts = torch.bincount(rows.unit, minlength=max(units, default=0) + 1).tolist()
    part: list[int] = []
    total = 0
    for unit in units:
        if part and (len(part) == most_units or total + counts[unit] > most_rows):
            yield part
            part, total = [], 0
        part.append(unit)
        total += counts[unit]
    if part:
        yield part


class Algorithm(StageKind[T], Generic[T, Model, Example], is_base=True):
    """A loss per row; the loop averages a unit's rows, clips once per unit and never looks inside.

    No method may compute anything across units: not a mean, a maximum length or a running statistic.
    """

    metrics: tuple[MetricRange, ...]  # the metrics block and its declared ranges
    rows_per_example: int = 1  # at most; a micro-batch has always as many rows as if each had that many

    def __init__(self, config: T) -> None:
        self.config = config

    @abstractmethod
    def setup(self, model: Model) -> None:
        """Adds what the stage trains to the model."""

    def warm_up(self, model: Model) -> int:
        """Learns from text that the model writes itself, before the first draw; how many updates. Reads no record."""
        return 0

    @abstractmethod
    def encode(self, model: Model, record: Record) -> Example | None:
        """One record as an example, or None if nothing can be learned from it; sees no other record.

        Called for every record of the stage before the first draw.
        """

    @abstractmethod
    def rows(self, model: Model, units: list[list[Example]], coins: SystemEntropy | None) -> Rows:
        """The rows of one phase (rollouts, say), made with the current model; every row from its own unit alone.

        Args:
            units: the examples of each sampled unit, perhaps none.
            coins: the phase's secret randomness, whose law ignores who else was sampled; None is torch's generator.
        """

    @abstractmethod
    def row_losses(self, model: Model, rows: Rows) -> tuple[Tensor, Tensor]:
        """Loss `(rows,)` and raw metrics `(rows, len(self.metrics))` of each row."""

    def adapt(self, noised: Mapping[str, float]) -> None:
        """Told the noised metrics of a step, where it has some; may adapt (a KL coefficient), for they are private."""

    def state(self) -> dict[str, float]:
        """What `adapt` changed, for the checkpoint."""
        return {}

    def load_state(self, state: dict[str, float]) -> None:
        """Puts a checkpoint's state back."""


def check_records(
    records: list[Record], path: str, columns: tuple[tuple[str, ...], ...], check: Callable[[Record], T_co]
) -> list[T_co]:
    """What `check` says of each record.

    Raises:
        DPAlignError: a missing column, or the first record that cannot be used; names it, never quotes it.
    """
    require_columns(records, list(columns), path)
    found = []
    for number, record in enumerate(records, 1):
        try:
            found.append(check(record))
        except DPAlignError as error:
            raise DPAlignError(f"record {number} of {path}: {error}.") from None
        except Exception as error:  # of the tokenizer, say
            raise DPAlignError(f"record {number} of {path} cannot be read: {type(error).__name__}.") from None
    return found


def encode_units(
    algorithm: Algorithm[T, Model, Example], model: Model, units: list[list[Record]]
) -> list[list[Example]]:
    """The examples of each unit, perhaps none; every record by itself.

    All records were checked before the first draw. Should one raise something now, it has no example: other stages
    have drawn, and the end of a run must not tell of a record.
    """

    def encode(record: Record) -> Example | None:
        try:
            return algorithm.encode(model, record)
        except OUT_OF_MEMORY:
            raise
        except Exception:
            return None

    encoded = [[encode(record) for record in unit] for unit in units]
    return [[example for example in unit if example is not None] for unit in encoded]


def rows_of_units(
    algorithm: Algorithm[T, Model, Example], model: Model, units: list[list[Example]], coins: SystemEntropy | None
) -> Rows:
    """The rows of drawn units; a unit for which something is raised has none, and so adds zero.

    Running out of memory is raised on: rows have constant shapes, so it tells of nobody's text.
    """
    try:
        return algorithm.rows(model, units, coins)
    except OUT_OF_MEMORY:
        raise
    except Exception:
        parts = [algorithm.rows(model, [[] for _ in units], coins)]
    for number, unit in enumerate(units):
        try:
            own = algorithm.rows(model, [unit], coins)
        except OUT_OF_MEMORY:
            raise
        except Exception:
            continue
        parts.append(Rows(torch.full_like(own.unit, number), own.tensors))
    parts = [part for part in parts if len(part.unit)] or parts[:1]
    tensors = {name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors}
    return Rows(torch.cat([part.unit for part in parts]), tensors)


def unit_means(row_values: Tensor, row_unit: Tensor, units: int) -> Tensor:
    """`(units, ...)` mean over each unit's rows of `(rows, ...)`; 0 for a unit without rows."""
    counts = torch.bincount(row_unit, minlength=units).clamp(min=1).to(row_values)
    sums = row_values.new_zeros(units, *row_values.shape[1:]).index_add_(0, row_unit, row_values)
    return sums / counts.view(-1, *[1] * (row_values.dim() - 1))
