"""A frozen base that the processes of a run hold together: of each large weight every one keeps an equal part.

A layer's weights are put together when it computes, with those of its block, and forgotten again when other blocks do.
Autograd is not given them to keep either: the backward pass puts them together again. As in FSDP; but FSDP has all
processes make the same passes in the same order. Here samples are of unequal size, completions end early, and the first
process measures alone (`World.whole`). Adapters, heads, biases and norms are whole everywhere.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from ..errors import DPAlignError
from ..world import World, check_alike, joined

AT_ONCE = 2  # blocks that are held whole: the one that computes, and the one before it
BLOCK = re.compile(r"(.*?\.\d+)\.")
Sharding: TypeAlias = Literal["training", "full"]


@dataclass(frozen=True)
class Place:
    """Where a weight is: its block's number, and from which to which byte of it."""

    block: int
    start: int
    end: int
    shape: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True)
class Saved:
    """What autograd keeps instead of a weight, or of a view of one."""

    block: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Shards:
    """The large weights of one base, in parts; of one process alone they are whole.

    Args:
        base: on any device; its large weights become placeholders on `device`, and the rest goes there.
        kind: `training`: whole while completions are sampled; `full`: never.

    Raises:
        DPAlignError: another process has other weights.
    """

    def __init__(self, base: PreTrainedModel, kind: Sharding, device: str | torch.device, world: World) -> None:
        self.kind, self._world, self._holding, self._wide = kind, world, 0, 0
        self._gathered: OrderedDict[int, Tensor] = OrderedDict()  # block to bytes, the last used one last
        self._places: dict[int, Place] = {}  # by the address of a placeholder
        self._placeholders: list[Tensor] = []  # whose addresses are nobody else's while they are here
        self.kept = self.total = 0  # bytes of these weights in this process, and in all
        if world.size == 1:
            base.to(device)  # type: ignore[arg-type]
            return
        own = checksums(base)
        parts = [self._divide(number, block, device) for number, block in enumerate(_blocks(base))]
        for tensor in [*base.parameters(), *base.buffers()]:
            if not is_placeholder(tensor):
                tensor.data = tensor.data.to(device)
        self._first = world.keep(parts)
        check_alike(world, own)
        self.attach(base)

    @torch.no_grad()
    def _divide(self, number: int, block: list[nn.Parameter], device: str | torch.device) -> Tensor:
        """This process's part of a block, as bytes; the block's weights become placeholders."""
        whole = torch.cat([p.data.reshape(-1).view(torch.uint8) for p in block])
        length = -(-len(whole) // (16 * self._world.size)) * 16
        part = whole[self._world.rank * length :][:length]
        part = nn.functional.pad(part, (0, length - len(part))).to(device, copy=True)
        self.kept, self.total, start = self.kept + length, self.total + len(whole), 0
        for p in block:
            place = Place(number, start, start + p.numel() * p.element_size(), p.shape, p.dtype)
            # Of a weight that is computed with here and not put together, all is NaN.
            placeholder = torch.full((1,), torch.nan, dtype=p.dtype, device=device)
            self._placeholders.append(placeholder)
            self._places[placeholder.data_ptr()] = place
            p.data, start = placeholder.expand(p.shape), place.end
        return part

    def attach(self, model: nn.Module) -> None:
        """Has the layers of a model, whose weights are placeholders of this base, compute with the weights."""
        for module in model.modules():
            own = [(p, self._places.get(p.data_ptr())) for p in module.parameters(recurse=False)]
            found = [(p, p.data, place) for p, place in own if place is not None and is_placeholder(p)]
            if found:
                layer = _Layer(self, found)
                module.register_forward_pre_hook(layer.begin)
                module.register_forward_hook(layer.end, always_call=True)

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Within the block what is put together stays so, but for a base that is never whole."""
        self._holding += self.kind == "training"
        try:
            yield
        finally:
            self._holding -= self.kind == "training"
            self._forget()

    @contextmanager
    def widened(self) -> Iterator[None]:
        """Within the block, where no gradient is taken, half-precision weights are computed with in float32."""
        self._wide += 1
        try:
            yield
        finally:
            self._wide -= 1

    def weight(self, place: Place) -> Tensor:
        """All of it."""
        found = self._block(place.block)[place.start : place.end].view(place.dtype).view(place.shape)
        return found.float() if self._wide and found.element_size() < 4 else found

    def _block(self, number: int) -> Tensor:
        if number not in self._gathered:
            self._gathered[number] = self._world.whole(self._first + number)
        self._gathered.move_to_end(number)
        self._forget()
        return self._gathered[number]

    def _forget(self) -> None:
        while len(self._gathered) > AT_ONCE and not self._holding:
            self._gathered.popitem(last=False)

    # Autograd's own copies -------------------------------------------------------------------------------------------

    def pack(self, tensor: Tensor) -> Tensor | Saved:
        """What autograd keeps of a tensor for the backward pass."""
        address = tensor.untyped_storage().data_ptr()
        for number, block in self._gathered.items():
            if block.untyped_storage().data_ptr() == address:
                return Saved(number, tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()))
        return tensor

    def unpack(self, saved: Tensor | Saved) -> Tensor:
        """The tensor that was kept."""
        if isinstance(saved, Tensor):
            return saved
        storage = self._block(saved.block).untyped_storage()
        empty = torch.empty(0, dtype=saved.dtype, device=storage.device)
        return empty.set_(storage, saved.offset, saved.size, saved.stride)


class _Layer:
    """One layer's hooks: its weights are there while it computes."""

    def __init__(self, shards: Shards, weights: list[tuple[nn.Parameter, Tensor, Place]]) -> None:
        self.shards, self.weights = shards, weights
        self.saving: list[saved_tensors_hooks] = []  # one for each call that is under way

    def begin(self, layer: nn.Module, arguments: Any) -> None:
        for p, _, place in self.weights:
            p.data = self.shards.weight(place)
        self.saving.append(saved_tensors_hooks(self.shards.pack, self.shards.unpack))
        self.saving[-1].__enter__()

    def end(self, layer: nn.Module, arguments: Any, output: Any) -> None:
        self.saving.pop().__exit__()
        if not self.saving:
            for p, placeholder, _ in self.weights:
                p.data = placeholder


def shard(base: PreTrainedModel, kind: Sharding, device: str | torch.device) -> None:
    """Spreads a base over the processes of the run, which all call this at once.

    Raises:
        DPAlignError: another process has other weights.
    """
    base.dpalign_shards = Shards(base, kind, device, joined())  # type: ignore[assignment]


def shards_of(base: nn.Module) -> Shards | None:
    """Of a base that is spread over processes."""
    return getattr(base, "dpalign_shards", None)


def share_shards(base: nn.Module, other: nn.Module) -> None:
    """Has `base`, which was given the weights of `other`, compute with them."""
    shards = shards_of(other)
    if shards is not None:
        base.dpalign_shards = shards  # type: ignore[assignment]
        shards.attach(base)


def is_placeholder(tensor: Tensor) -> bool:
    """Whether it stands for a weight that is elsewhere: one number, repeated."""
    return tensor.numel() > 1 and not any(tensor.stride())


def checksums(model: nn.Module) -> dict[str, int]:
    """Sums of the bytes of every tensor that a model computes with: the same, in any order, of the same weights.

    Those that are spread over processes were compared when they were spread.
    """
    tensors = [(n, t.detach()) for n, t in [*model.named_parameters(), *model.named_buffers()] if not is_placeholder(t)]
    return {name: int(t.flatten().view(torch.uint8).sum(dtype=torch.int64)) for name, t in tensors}


def _blocks(base: PreTrainedModel) -> list[list[nn.Parameter]]:
    """Weights of two and more dimensions of a base's body and its output embeddings: by block, and of one dtype each.

    A new head is none of them.
    """
    head = base.get_output_embeddings()  # type: ignore[no-untyped-call]
    spread = {id(p) for module in (base.base_model, head) if module is not None for p in module.parameters()}
    found: dict[tuple[str, torch.dtype], list[nn.Parameter]] = {}
    for name, p in base.named_parameters():
        if id(p) in spread and p.ndim > 1:
            block = BLOCK.match(name)
            found.setdefault((block[1] if block else name, p.dtype), []).append(p)
    return list(found.values())


def refuse_whole(shards: Shards | None, what: str) -> None:
    """Raises DPAlignError for what needs all weights at once, where processes hold them together."""
    if shards is not None:
        raise DPAlignError(
            f"{what} needs the whole base in every process: leave it out, or set model.sharding to none."
        )
