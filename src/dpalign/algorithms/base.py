"""What a stage is: its settings, what enters it, what it reads; and what the training loop asks of an algorithm."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.columns import with_columns
from ..data.load import Record
from ..data.text import TEMPLATE_COLUMNS, Text
from ..errors import DPAlignError, EngineError, TooLongError
from ..models import AdapterStack, ModelConfig
from ..privacy.entropy import SystemEntropy
from ..privacy.mechanism import MetricRange
from ..settings.base import StageConfig, TrainingConfig
from ..settings.rewards import RewardConfig

Tokenizer: TypeAlias = PreTrainedTokenizerBase
OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
Coins: TypeAlias = Sequence[SystemEntropy]  # one a unit, or one a row
Entering: TypeAlias = Mapping[str, ModelConfig | RewardConfig]  # by the setting that names it


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


class Reading(NamedTuple):
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
    columns: that a record must have, one of these alternatives. optional: that are read, too, where a record has them:
    no other is kept, but for those of its unit and its rewards.
    """

    name: ClassVar[str]
    Config: ClassVar[type[StageConfig]]
    model_kind: ClassVar[type[AdapterStack]]
    columns: ClassVar[tuple[tuple[str, ...], ...]]
    optional: ClassVar[tuple[str, ...]] = TEMPLATE_COLUMNS

    def __init_subclass__(cls, is_base: bool = False, **options: Any) -> None:
        super().__init_subclass__(**options)
        if is_base:
            return
        missing = [name for name in ("name", "Config", "model_kind", "columns") if not hasattr(cls, name)]
        missing += [n for n in dir(cls) if getattr(getattr(cls, n, None), "__isabstractmethod__", False)]
        if missing:
            raise TypeError(f"stage kind {cls.__name__} lacks {', '.join(missing)}.")

    @classmethod
    def of(cls, config: C) -> type[StageKind[Any]]:
        """Itself, or another kind that a section with these settings stands for."""
        return cls

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
        """The rows of `units`, counted anew in that order; a unit that is named twice has its rows twice.

        Integers are as wide as models take them.
        """
        device = self.unit.device
        wanted = torch.tensor(units, dtype=torch.int64, device=device)
        counts = torch.bincount(self.unit, minlength=max(units, default=0) + 1)  # rows of each unit
        order, firsts = self.unit.argsort(stable=True), counts.cumsum(0) - counts
        lengths = counts[wanted]
        unit = torch.arange(len(units), device=device).repeat_interleave(lengths)
        place = torch.arange(len(unit), device=device) - (lengths.cumsum(0) - lengths)[unit]  # among its unit's rows
        rows = order[firsts[wanted][unit] + place]
        return Rows(unit, {name: _wide(tensor[rows]) for name, tensor in self.tensors.items()})

    def kept(self) -> Rows:
        """The same for as long as a phase lasts: integers, which are token ids, masks and counts, in 32 bits."""
        narrow = {n: t.to(torch.int32) if t.dtype == torch.int64 else t for n, t in self.tensors.items()}
        return Rows(self.unit, narrow)

    def split(self, size: int) -> list[Rows]:
        """These rows in their order, at most `size` of them in each part."""
        parts = [slice(start, start + size) for start in range(0, len(self.unit), size)]
        return [Rows(self.unit[part], {name: t[part] for name, t in self.tensors.items()}) for part in parts]

    def filled(self, size: int, example: int, unit: int) -> Rows:
        """At least `size` rows: these, and then the last `example` ones over and over, which belong to `unit`."""
        count, device = len(self.unit), self.unit.device
        if count >= size:
            return self
        more = count - example + torch.arange(size - count, device=device) % example
        rows = torch.cat([torch.arange(count, device=device), more])
        units = torch.cat([self.unit, torch.full_like(more, unit)])
        return Rows(units, {name: tensor[rows] for name, tensor in self.tensors.items()})


def _wide(tensor: Tensor) -> Tensor:
    return tensor.long() if tensor.dtype == torch.int32 else tensor


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
    own_texts: Callable[[int], list[Text]] | None = None  # so many texts that the run's policy writes, if it has one
    rows_per_example: int = 1  # of each; they are next to each other, and `row_losses` always has all of them
    noise_multiplier: float = 0.0  # of a private stage: as planned, and while it trains as it is added
    declared_units: float = 0.0  # that a private stage may sample

    def __init__(self, config: T) -> None:
        self.config = config

    @property
    def examples_at_once(self) -> int:
        """Examples of a micro-batch: those of `micro_batch_size` rows, and at least one.

        Where that is a multiple of 8, their rows are one, too: rounding then does not depend on a unit's place.
        """
        size, each = self.config.micro_batch_size, self.rows_per_example
        step = 8 // math.gcd(8, each) if size % 8 == 0 else 1
        return max(step, size // each // step * step)

    @property
    def rows_at_once(self) -> int:
        """Rows of a micro-batch: always as many, whatever they hold."""
        return self.examples_at_once * self.rows_per_example

    @abstractmethod
    def setup(self, model: Model) -> None:
        """Adds what the stage trains to the model."""

    def optimizer(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer | None:
        """What takes the noised gradients; None is AdamW as the settings say."""
        return None

    def warm_up(self, model: Model) -> int:
        """Learns from text that the model writes itself, before the first draw; how many updates. Reads no record."""
        return 0

    @abstractmethod
    def encode(self, model: Model, record: Record) -> Example | None:
        """One record as an example, or None if nothing can be learned from it; sees no other record.

        Called for a record when its unit is drawn, and the same whenever that is.
        """

    @classmethod
    def check_writing(cls, config: T, model: Model) -> None:
        """Raises DPAlignError if `write` cannot, with this model; asked before the first draw."""
        raise DPAlignError(f"stage {cls.name} learns from records alone: its prompts cannot be self-written.")

    def write(self, model: Model, count: int) -> list[Example]:
        """At most so many examples that the model writes itself; reads no record, and draws on torch's generator."""
        raise NotImplementedError(f"{type(self).__name__} learns from records alone")

    def before_draw(self, model: Model) -> None:
        """Whatever has to be done with the current weights before a phase's units are drawn; reads no record.

        Raises:
            EngineError: what samples completions does not have them.
        """

    @abstractmethod
    def rows(self, model: Model, units: list[list[Example]], coins: Coins | None) -> Rows:
        """The rows of one phase (rollouts, say), made with the current model; every row from its own unit alone.

        Args:
            units: the examples of each sampled unit, perhaps none.
            coins: each unit's own secret randomness for the phase; None is torch's generator.
        """

    @abstractmethod
    def row_losses(self, model: Model, rows: Rows) -> tuple[Tensor, Tensor]:
        """Loss `(rows,)` and raw metrics `(rows, len(self.metrics))` of each row."""

    def add_gradient(self, model: Model, step: int) -> None:
        """Adds to the gradients that the trainables have, noised wherever the stage draws; reads no record."""

    def adapt(self, noised: Mapping[str, float]) -> None:
        """Told the metrics of a step, noised unless it read no record; may adapt (a KL coefficient) to them."""

    def state(self) -> dict[str, float]:
        """What `adapt` changed, for the checkpoint."""
        return {}

    def load_state(self, state: dict[str, float]) -> None:
        """Puts a checkpoint's state back."""


def check_records(
    records: Sequence[Record], path: str, columns: tuple[tuple[str, ...], ...], check: Callable[[Record], T_co]
) -> list[T_co]:
    """All that `checked` says."""
    return list(checked(records, path, columns, check))


def checked(
    records: Sequence[Record], path: str, columns: tuple[tuple[str, ...], ...], check: Callable[[Record], T_co]
) -> Iterator[T_co]:
    """What `check` says of each record.

    Raises:
        DPAlignError: a missing column, or the first record that cannot be used; names it, never quotes it. If it is
            only too long, also how many are.
    """
    too_long = []
    for number, record in with_columns(records, columns, path):
        try:
            found = check(record)
        except TooLongError as error:
            too_long.append((number, error))
        except DPAlignError as error:
            raise DPAlignError(f"record {number} of {path}: {error}.") from None
        except Exception as error:  # of the tokenizer, say
            raise DPAlignError(f"record {number} of {path} cannot be read: {type(error).__name__}.") from None
        else:
            yield found
    if too_long:
        number, first = too_long[0]
        raise DPAlignError(
            f"record {number} of {path}: {first}; {len(too_long):,} of {len(records):,} records are too long, and "
            f"{max(error.tokens for _, error in too_long)} tokens would hold all."
        )


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
    algorithm: Algorithm[T, Model, Example], model: Model, units: list[list[Example]], coins: Coins | None
) -> Rows:
    """The rows of drawn units; a unit for which something is raised has none, and so adds zero.

    Running out of memory is raised on: rows have constant shapes, so it tells of nobody's text. So is the failure of an
    engine, which fails on public text as well: were it a unit's own, all units would add zero from then on.
    """
    try:
        return algorithm.rows(model, units, coins)
    except (EngineError, *OUT_OF_MEMORY):
        raise
    except Exception:
        parts = [algorithm.rows(model, [[] for _ in units], coins)]
    for number, unit in enumerate(units):
        try:
            own = algorithm.rows(model, [unit], None if coins is None else coins[number : number + 1])
        except (EngineError, *OUT_OF_MEMORY):
            raise
        except Exception:
            continue
        parts.append(Rows(torch.full_like(own.unit, number), own.tensors))
    parts = [part for part in parts if len(part.unit)] or parts[:1]
    tensors = {name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors}
    return Rows(torch.cat([part.unit for part in parts]), tensors)


def unit_means(row_values: Tensor, row_unit: Tensor, units: int, counts: Tensor | None = None) -> Tensor:
    """`(units, ...)` mean over each unit's rows of `(rows, ...)`; 0 for a unit without rows.

    counts: `(units,)` rows of each unit where these are a part of them: the means of all parts then add up to the mean.
    """
    counts = torch.bincount(row_unit, minlength=units) if counts is None else counts
    sums = row_values.new_zeros(units, *row_values.shape[1:]).index_add_(0, row_unit, row_values)
    return sums / counts.clamp(min=1).to(row_values).view(-1, *[1] * (row_values.dim() - 1))
