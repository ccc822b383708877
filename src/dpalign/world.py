"""The processes that carry one run out together: one, or as many as a launcher has started.

The first of them is the run: it alone reads the records, opens the ledger, draws the samples and the noise, moves the
weights and writes files. The others are given the units that fall to them, and give back the sum of those units'
clipped gradients, as integers. What goes between them (records, members of a sample, sums without noise) is as private
as the memory of the first one.

A tensor may be kept in parts, one in each process. Any of them may ask for all of it, at any time and as often as it
likes: the others hand out their parts where they wait for anything.
"""

from __future__ import annotations

import atexit
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from .errors import DPAlignError
from .launched import Place, check_launcher, place

MEETING = timedelta(minutes=10)  # for all processes to be there
WAITING = timedelta(days=30)  # for one that lives: the first one trains, measures and writes much by itself
NOTHING = -1  # of the tensors that are kept in parts


class LostProcessError(DPAlignError):
    """Another process of the run is no more, and so the run cannot go on."""


class LostProcess(BaseException):
    """The same on its way up: a layer's weights may be asked for anywhere, and nobody who contains what a record or a
    foreign function raises is to go on without them. error: what is said in the end."""

    def __init__(self, error: LostProcessError) -> None:
        super().__init__(str(error))
        self.error = error


@contextmanager
def lost_is_said() -> Iterator[None]:
    """What leaves the block is a `LostProcessError`."""
    try:
        yield
    except LostProcess as lost:
        raise lost.error from None


class World:
    """One process alone, which is the first; what it shares is its own."""

    rank, size = 0, 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, value: Any = None) -> Any:
        """The first process's value, in every process."""
        return value

    def deal(self, values: Sequence[Any] = ()) -> Any:
        """Of the first process's values, one for each process, this process's."""
        return values[0]

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Adds the tensors of all processes up in place, in the first process; the others keep theirs.

        Integers add up exactly, in any order.
        """

    def spread(self, tensors: Sequence[Tensor]) -> None:
        """Overwrites the tensors, of the same shapes everywhere, by those of the first process."""

    def forget(self) -> None:
        """Nothing that was kept is asked for any more; called by all processes at once."""


ALONE = World()


class Processes(World):
    """Several processes, through torch.distributed: gloo for what lies on the CPU, nccl for what lies on a GPU.

    Every method but `whole` is called by all of them, in the same order.

    has_begun: whether anything was shared. lost: what was raised when another process was found to have ended.

    Raises:
        DPAlignError: fewer GPUs than processes on this machine.
        LostProcess: the others do not come. By the methods: one of the others has ended.
    """

    def __init__(self, where: Place) -> None:
        self.rank, self.size, self.has_begun = where.rank, where.size, False
        self._kept: list[Tensor] = []
        self._waits: list[Callable[[], None]] = []
        self._is_broken = False
        self.lost: LostProcess | None = None
        backend = "gloo"
        if torch.cuda.is_available():
            if where.local >= torch.cuda.device_count():
                raise DPAlignError(
                    f"process {where.local + 1} of this machine has no GPU of its own (torch finds "
                    f"{torch.cuda.device_count()}): start one process for each GPU, or hide the GPUs "
                    "(CUDA_VISIBLE_DEVICES=) and run on the CPU."
                )
            torch.cuda.set_device(where.local)
            backend = "cpu:gloo,cuda:nccl"
        if "MASTER_ADDR" not in os.environ and not dist.is_initialized():
            raise DPAlignError("the environment names a rank and no MASTER_ADDR: start the processes with torchrun.")
        with self._together():
            if not dist.is_initialized():  # else a script has done so
                dist.init_process_group(backend, timeout=MEETING)
                atexit.register(dist.destroy_process_group)
            self._group = dist.new_group(backend=backend, timeout=WAITING)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """What all processes do at once; a process that is gone is one sentence."""
        try:
            yield
        except RuntimeError:
            raise self._lost("another process of this run has ended or does not answer, and so this one ends") from None

    def _lost(self, why: str) -> LostProcess:
        lost = LostProcessError(f"{why}: the same command goes on from where the run was last saved.")
        lost.said_elsewhere = self.rank > 1 or (self.rank == 1 and not self.has_begun)  # one says it for all
        self.lost = LostProcess(lost)
        return self.lost

    def share(self, value: Any = None) -> Any:
        box = [value]
        self._meet()
        with self._together():
            dist.broadcast_object_list(box, src=0, group=self._group)
        self.has_begun = True
        return box[0]

    def deal(self, values: Sequence[Any] = ()) -> Any:
        box: list[Any] = [None]
        self._meet()
        with self._together():
            dist.scatter_object_list(box, list(values) if self.is_first else None, src=0, group=self._group)
        return box[0]

    def sum(self, tensors: Sequence[Tensor]) -> None:
        self._meet()
        if any(tensor.is_cuda for tensor in tensors):  # nccl waits for the dead; gloo notices
            with self._together():
                dist.all_reduce(torch.zeros(1), group=self._group)
        for alike, flat in _flat(tensors):
            with self._together():
                dist.reduce(flat, dst=0, op=dist.ReduceOp.SUM, group=self._group)
            if self.is_first:
                _put_back(alike, flat)

    def spread(self, tensors: Sequence[Tensor]) -> None:
        self._meet()
        for alike, flat in _flat(tensors):
            with self._together():
                dist.broadcast(flat, src=0, group=self._group)
            if not self.is_first:
                _put_back(alike, flat)

    def keep(self, parts: Sequence[Tensor], wait: Callable[[], None]) -> int:
        """Has this process's parts of some tensors handed out; each is as long as the others' of the same tensor.

        wait: called when this process begins to wait for the others.

        Returns:
            The number of the first tensor; every process keeps the same ones in the same order.
        """
        self._meet()
        first = len(self._kept)
        self._kept += parts
        self._waits.append(wait)
        return first

    def forget(self) -> None:
        self._meet()
        self._kept, self._waits = [], []

    def whole(self, number: int) -> Tensor:
        """All parts of a tensor that is kept, one after the other."""
        while True:
            gathered, tensor = self._round(number)
            if gathered == number:
                return tensor
            del tensor

    def _meet(self) -> None:
        """Hands out what is kept here until no process is anywhere but here."""
        for wait in self._waits:
            wait()
        while self._kept and self._round(NOTHING)[0] != NOTHING:
            pass

    def _round(self, wish: int) -> tuple[int, Tensor]:
        """All processes gather one tensor, which most of them wish for: its number, and the tensor.

        So no process has to do what the others do: one may draw a longer completion, have more units, or measure alone.
        In every round one gets what it wishes for.
        """
        was_broken, self._is_broken = self._is_broken, True  # until the round is over
        try:
            if was_broken:
                raise self.lost or RuntimeError
            wishes = torch.empty(self.size, dtype=torch.int64)
            with self._together():
                dist.all_gather_into_tensor(wishes, torch.tensor([wish]), group=self._group)
            counts = Counter(number for number in wishes.tolist() if number != NOTHING)
            chosen, whole = NOTHING, wishes
            if counts:
                chosen = min(counts, key=lambda number: (-counts[number], number))
                part = self._kept[chosen]
                whole = part.new_empty(self.size * part.numel())
                with self._together():
                    dist.all_gather_into_tensor(whole, part, group=self._group)
        except Exception as error:  # the others have gone on with the round
            raise self._lost(f"weights could not be put together here ({type(error).__name__})") from None
        self._is_broken = False
        return chosen, whole


def check_alike(world: World, own: Mapping[str, int]) -> None:
    """Called by all processes.

    own: checksums of weights, by name.

    Raises:
        DPAlignError: they are not the same everywhere.
    """
    first = world.share(own)
    strangers = torch.tensor([int(own != first)])
    world.sum([strangers])
    if int(strangers) > 0:
        where = [name for name in first if own.get(name) != first[name]]
        raise DPAlignError(
            f"{int(strangers)} of {world.size} processes have other weights than the first one"
            f"{f' ({where[0]})' if where else ''}: every machine needs the same model, and the same versions of "
            "the libraries; nothing more was drawn."
        )


def _flat(tensors: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], Tensor]]:
    """The tensors of one dtype and device, and their numbers in a row: one message for all of them."""
    kinds = {(t.dtype, t.device): [u for u in tensors if (u.dtype, u.device) == (t.dtype, t.device)] for t in tensors}
    for alike in kinds.values():
        flat = torch.cat([t.detach().flatten() for t in alike])
        if flat.numel():
            yield alike, flat


@torch.no_grad()
def _put_back(tensors: list[Tensor], flat: Tensor) -> None:
    for tensor, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


_joined: Processes | None = None


def refuse_lost() -> None:
    """Raises LostProcess once more if another process is known to have ended: whoever contains what is raised asks."""
    if _joined is not None and _joined.lost is not None:
        raise _joined.lost


def joined() -> World:
    """The world of this process: it waits for the others that the launcher has started, once."""
    global _joined
    where = place()
    if where.size == 1:
        return ALONE
    if _joined is None:
        check_launcher()
        with lost_is_said():
            _joined = Processes(where)
    return _joined
