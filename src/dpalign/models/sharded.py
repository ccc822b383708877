"""A frozen base that the processes of a run hold together: of each large weight every one keeps an equal part.

A layer's weights are put together when it computes, with those of its block, and forgotten again when other blocks do.
Autograd is not given them to keep either: the backward pass puts them together again. As in FSDP; but FSDP has all
processes make the same passes in the same order. Here samples are of unequal size, completions end early, and the first
process measures alone (`World.whole`). Adapters, heads, biases and norms are whole everywhere.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import GenerationConfig, PreTrainedModel

from ..errors import DPAlignError
from ..world import Processes, World, check_alike, joined

AT_ONCE = 2  # blocks that are held whole: the one that computes, and the one before it
ALIGNED = 64  # bytes, as torch's own tensors begin at a multiple of them
BLOCK = re.compile(r"(.*?\.\d+)\.")
Pack: TypeAlias = Callable[[Tensor], Any]
Unpack: TypeAlias = Callable[[Any], Tensor]
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


@dataclass(frozen=True)
class Outer:
    """What other hooks, that were there before, have made of a tensor."""

    packed: Any
    unpack: Unpack


class Shards:
    """The large weights of one base, in parts; of one process alone they are whole.

    Args:
        base: on any device; its large weights become placeholders on `device`, and the rest goes there.
        kind: `training`: whole while completions are sampled; `full`: never.

    Raises:
        DPAlignError: another process has other weights.
    """

    def __init__(self, base: PreTrainedModel, kind: Sharding, device: str | torch.device, world: World) -> None:
        self.kind, self._holding, self._wide = kind, 0, 0
        self._gathered: OrderedDict[int, Tensor] = OrderedDict()  # block to bytes, the last used one last
        self._places: dict[int, Place] = {}  # by the address of a placeholder
        self._placeholders: list[Tensor] = []  # whose addresses are nobody else's while they are here
        self.kept = self.total = 0  # bytes of these weights in this process, and in all
        if not isinstance(world, Processes):
            base.to(device)  # type: ignore[arg-type]
            return
        self._world = world
        blocks = _blocks(base)
        spread = {id(p) for block in blocks for p in block}
        own = checksums(base, spread)  # the rest is compared when a stage begins, with what is new
        parts = [self._divide(number, block, device) for number, block in enumerate(blocks)]
        for tensor in [*base.parameters(), *base.buffers()]:
            if not is_placeholder(tensor):
                tensor.data = tensor.data.to(device)
        self._first = world.keep(parts, self._wait)
        check_alike(world, own)
        self.attach(base)

    @torch.no_grad()
    def _divide(self, number: int, block: list[nn.Parameter], device: str | torch.device) -> Tensor:
        """This process's part of a block, as bytes; the block's weights become placeholders."""
        weights = [p.data.reshape(-1).view(torch.uint8) for p in block]
        whole = torch.cat([nn.functional.pad(w, (0, -len(w) % ALIGNED)) for w in weights])
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
            p.data, start = placeholder.expand(p.shape), place.end + -place.end % ALIGNED
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
            self._forget(AT_ONCE)

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
            self._forget(AT_ONCE - 1)  # before there is room for another one
            self._gathered[number] = self._world.whole(self._first + number)
        self._gathered.move_to_end(number)
        return self._gathered[number]

    def _forget(self, most: int) -> None:
        while len(self._gathered) > most and not self._holding:
            self._gathered.popitem(last=False)

    def _wait(self) -> None:
        self._forget(0)

    # Autograd's own copies -------------------------------------------------------------------------------------------

    def pack(self, tensor: Tensor) -> Tensor | Saved:
        """What autograd keeps of a tensor for the backward pass: a weight it finds again."""
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
        outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
        self.saving.append(saved_tensors_hooks(partial(self.pack, outer), self.unpack))
        self.saving[-1].__enter__()
        for p, _, place in self.weights:
            p.data = self.shards.weight(place)

    def pack(self, outer: tuple[Pack, Unpack] | None, tensor: Tensor) -> Any:
        """A weight is found again; of the rest, those decide who decided before: checkpointing, say."""
        kept = self.shards.pack(tensor)
        return kept if isinstance(kept, Saved) or outer is None else Outer(outer[0](tensor), outer[1])

    def unpack(self, kept: Any) -> Tensor:
        return kept.unpack(kept.packed) if isinstance(kept, Outer) else self.shards.unpack(kept)

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


def checksums(model: nn.Module, only: Collection[int] | None = None) -> dict[str, int]:
    """Sums of the bytes of every tensor that a model computes with: the same, in any order, of the same weights.

    Those that are spread over processes were compared when they were spread.

    only: identities of those that are wanted.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    tensors = [(n, t.detach()) for n, t in named if not is_placeholder(t) and (only is None or id(t) in only)]
    return {name: int(t.flatten().view(torch.uint8).sum(dtype=torch.int64)) for name, t in tensors}


def _blocks(base: PreTrainedModel) -> list[list[nn.Parameter]]:
    """Weights of two and more dimensions of a base's body and its output embeddings: by block, and of one dtype each.

    A new head is none of them; nor are convolutions, which are small, and which some models compute by themselves.
    """
    head = base.get_output_embeddings()  # type: ignore[no-untyped-call]
    modules = [m for whole in (base.base_model, head) if whole is not None for m in whole.modules()]
    spread = {id(p) for m in modules if not isinstance(m, nn.modules.conv._ConvNd) for p in m.parameters(recurse=False)}
    found: dict[tuple[str, torch.dtype], list[nn.Parameter]] = {}
    for name, p in base.named_parameters():
        if id(p) in spread and p.ndim > 1 and p.numel() > 1:
            block = BLOCK.match(name)
            found.setdefault((block[1] if block else name, p.dtype), []).append(p)
    return list(found.values())


@torch.no_grad()
def refuse_nan(model: Any, shards: Shards | None) -> None:
    """Tries a model, and a policy's next tokens too, on public ids: all processes do so at once.

    Raises:
        DPAlignError: a layer computes with weights that are elsewhere, because the layer that has them isn't called.
    """
    if shards is None or shards.total == 0:
        return
    ids = torch.arange(4, device=model.device)[None] % model.config.get_text_config().vocab_size
    mask, found = torch.ones_like(ids), [model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits]
    if model.can_generate():
        plain = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False, min_new_tokens=3, max_new_tokens=3, output_logits=True, return_dict_in_generate=True
        )
        found += model.generate(input_ids=ids, attention_mask=mask, generation_config=plain).logits
    if any(bool(logits.isnan().any()) for logits in found):
        raise DPAlignError(
            f"a layer of {type(model).__name__} computes with the weights of another one and does not call it, so the "
            "base cannot be held in parts: set model.sharding to none."
        )


def refuse_whole(shards: Shards | None, what: str) -> None:
    """Raises DPAlignError for what needs all weights at once, where processes hold them together."""
    if shards is not None:
        raise DPAlignError(
            f"{what} needs the whole base in every process: leave it out, or set model.sharding to none."
        )
