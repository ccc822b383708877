"""Before the first draw: does any unit touch another one, in this model, with this algorithm, reward and collation?

A guarantee per unit needs that what a unit contributes is a function of that unit alone. Types do not say so of a
person's model or algorithm, so it is tried, on units that the run writes itself (no record is read): the same units in
different company must have the same rollout log-probabilities, the same numbers in their rows (rewards, reference
log-probabilities) and the same clipped gradient; company moves the sum by at most C; and nothing is remembered.

What is found is a coupling that self-written text shows and that is larger than rounding; what the losses promise (see
`Algorithm`) remains what the guarantee rests on.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..algorithms.base import OUT_OF_MEMORY, Algorithm, Rows, encode_units, micro_batches
from ..algorithms.basis import check_rank
from ..algorithms.rollouts import ScoredAlgorithm, rollouts_of
from ..data.text import Text
from ..errors import DPAlignError
from ..gradients import PerUnitGradients
from ..models import AdapterStack, Policy
from ..models.quantized import rounds_activations
from ..privacy.accountant import SampledGaussian
from ..privacy.entropy import SystemEntropy
from ..privacy.gate import PrivateStep, Sample
from ..privacy.mechanism import UnitGradients
from ..privacy.products import Factors, Products
from ..rewards import Reward
from ..settings.base import TrainingConfig
from ..settings.rollouts import ScoredConfig
from .loop import unit_gradients
from .self_written import own_randomness, self_written

Units = list[list[Any]]  # the examples of each unit
NAMES = {"scores": "reward", "ref_logprobs": "reference log-probabilities", "reference": "reference log-probabilities"}


# What rounding may do, as a share of C or of the largest number of a kind. Micro-batches have constant numbers of rows,
# so a row is computed by the same operations in any company, and nearly always to the same bits; not so where a matrix
# kernel treats a row by its place (docs/privacy.md), or a GPU adds in no fixed order: far less than this.
ROUNDING = 1e-4
OTHER_WIDTH = 2e-2  # of a half-precision model, where rows have fewer positions


class Coupled(DPAlignError):
    """One unit changes what another one contributes."""


class PublicCoins(SystemEntropy):
    """Coins that do not ask who else is there: rollout g of G is drawn from its law at g / (G + 1)."""

    def __init__(self, group: int = 1) -> None:
        self.group = group

    def uniforms(self, count: int) -> np.ndarray:
        places: np.ndarray = (np.arange(count) % self.group + 1) / (self.group + 1)
        return places


@dataclass(frozen=True)
class Phase:
    """What some units led to: their rows, their clipped gradients `(units, trainables)`, and the sum of these."""

    units: Units
    rows: Rows
    clipped: Tensor
    sum: Tensor


def check_stage(
    model: AdapterStack,
    kind: type[Algorithm[Any, Any, Any]],
    config: Any,
    rewards: Mapping[str, Reward],
    *,
    people: bool = False,
    chats: bool = False,
) -> float:
    """Tries a stage on its model, which is then as it was; how many seconds a self-written unit took.

    Args:
        rewards: that enter it. people: whether a unit may have several records. chats: whether records are chats.

    Raises:
        DPAlignError: which quantity one unit changed for another, and in which layer it first differs.
    """
    with own_randomness(model.device), _on_trial(model, kind, config, rewards) as (algorithm, gradients):
        check = SelfCheck(model, algorithm, gradients)
        try:
            check.run(self_written(algorithm, model, 2 * check.size + 1, 2 if people else 1, chats))
        except Coupled as error:
            raise DPAlignError(
                f"stage {kind.name} cannot be private with {type(check.base).__name__}: {error}"
            ) from None
    return statistics.median(check.seconds)


class SelfCheck:
    """One stage, with its adapter on the model: the properties below, each of which raises `Coupled`."""

    def __init__(self, model: AdapterStack, algorithm: Algorithm[Any, Any, Any], gradients: PerUnitGradients) -> None:
        self.model, self.algorithm, self.gradients = model, algorithm, gradients
        self.config: TrainingConfig = algorithm.config
        self.base: nn.Module = model.model.get_base_model() if model.adapters else model.model
        self.seconds: list[float] = []  # that a unit took, by phase
        self.size = max(2, algorithm.examples_at_once)  # units that are tried at once: a micro-batch of the run

    def run(self, records: list[list[Any]]) -> None:
        """All of it, on twice as many units as a micro-batch has and one more."""
        size = self.size
        units = encode_units(self.algorithm, self.model, records)
        buffers = {name: buffer.clone() for name, buffer in self.base.named_buffers()}
        here, half = list(range(size)), size // 2
        companies = [  # every second unit is another one; the others are; one is gone; one has come
            [unit + size * (unit % 2) for unit in here],
            [unit + size * (1 - unit % 2) for unit in here],
            [unit for unit in here if unit != half],
            [*here[:half], 2 * size, *here[half:]],
        ]
        try:
            self.sampling_ignores_company(units, here, companies[0])
            base = self.phase(units, here)
            if not bool(base.clipped.any()):
                raise Coupled("no unit that the run wrote itself has a gradient, so nothing can be tried.")
            self.buffers_stay(buffers)
            for there in companies:
                self.company_changes_nothing(base, here, units, there)
            self.padding_changes_nothing(base)
            self.nothing_is_remembered(base, here, units)
            self.buffers_stay(buffers)
        finally:
            for name, buffer in self.base.named_buffers():
                buffer.copy_(buffers[name])

    # What a unit contributes ---------------------------------------------------------------------------------------

    def phase(self, units: Units, chosen: list[int]) -> Phase:
        """As the loop does it: rows of all units, then gradients of a micro-batch at a time, clipped and summed."""
        config, model, began = self.config, self.model, time.monotonic()
        taken = [units[unit] for unit in chosen]
        rows = self._located(lambda: self.algorithm.rows(model, taken, [PublicCoins(group_of(config))] * len(taken)))
        step = PrivateStep(
            SampledGaussian(1.0, 0.0, 1),
            max_grad_norm=config.max_grad_norm,
            divisor=1.0,
            clipping=config.clipping,
            clipping_gamma=config.clipping_gamma,
        )
        shapes, products = [p.shape for p in self.gradients.parameters], bool(self.gradients.whole)
        mechanism = Sample(step, [], SystemEntropy()).mechanism(shapes, model.device, torch.float64, products)
        clipped = []
        for part in self._parts(rows, len(taken)):
            grads = self._located(partial(self._gradients, rows, part))
            mechanism.add(grads)
            flat = torch.cat([_compact(g) for g in grads], 1)
            factors = mechanism.clip_factors(flat.norm(dim=1)).unsqueeze(1)
            clipped.append(torch.where(factors > 0, flat * factors, 0.0))
        total = torch.cat([g.flatten() for g in mechanism.release()[0]])
        self.seconds.append((time.monotonic() - began) / len(chosen))
        return Phase(taken, rows, torch.cat(clipped), total)

    def _parts(self, rows: Rows, units: int) -> list[list[int]]:
        algorithm = self.algorithm
        return list(micro_batches(rows, list(range(units)), algorithm.examples_at_once, algorithm.rows_at_once))

    def _gradients(self, rows: Rows, part: list[int]) -> list[UnitGradients]:
        batch, gradients = rows.of(part), self.gradients
        if len(batch.unit) == 0:
            nothing: list[list[Factors]] = [[] for _ in part]
            return [
                Products(p.shape, nothing) if id(p) in gradients.whole else p.new_zeros(len(part), *p.shape)
                for p in gradients.parameters
            ]
        grads, _ = unit_gradients(self.model, self.algorithm, self.gradients, batch, self.algorithm.examples_at_once)
        return [g[: len(part)] for g in grads]

    # The properties ------------------------------------------------------------------------------------------------

    def company_changes_nothing(self, base: Phase, here: list[int], units: Units, there: list[int]) -> None:
        """Units that are in both have the same rows and the same clipped gradient; one more or less moves at most C."""
        other = self.phase(units, there)
        kept = [unit for unit in here if unit in there]
        ours, theirs = [here.index(unit) for unit in kept], [there.index(unit) for unit in kept]
        one, two = base.rows.of(ours), other.rows.of(theirs)
        alike = self._same_tokens(one, two, len(kept))
        pairs = [(o, t) for o, t, same in zip(ours, theirs, alike, strict=True) if same]
        self._compare_rows(base, other, pairs)
        moved = (base.clipped[[o for o, _ in pairs]] - other.clipped[[t for _, t in pairs]]).norm(dim=1)
        most, worst = float(moved.max()) / self.config.max_grad_norm, int(moved.argmax())
        if most > ROUNDING:
            raise Coupled(
                f"the clipped gradient of a unit changes by {most:.2g} C with the other units that are there; "
                + self._where(base, other, *pairs[worst])
            )
        if abs(len(here) - len(there)) == 1 and all(alike):
            distance = float((base.sum - other.sum).norm()) / self.config.max_grad_norm
            if distance > 1 + len(here) * ROUNDING:
                raise Coupled(f"one unit moves the sum of clipped gradients by {distance:.3g} C.")

    def buffers_stay(self, buffers: dict[str, Tensor]) -> None:
        """No forward pass changes a buffer."""
        for name, buffer in self.base.named_buffers():
            if not torch.equal(buffer.nan_to_num(), buffers[name].nan_to_num()):
                raise Coupled(f"its buffer {name} changes in a forward pass: others read what one record leaves there.")

    def nothing_is_remembered(self, base: Phase, here: list[int], units: Units) -> None:
        """After all of that the same units lead to the same again."""
        try:
            self.company_changes_nothing(base, here, units, here)
        except Coupled as error:
            raise Coupled(f"it remembers something of earlier units: {error}") from None

    def sampling_ignores_company(self, units: Units, here: list[int], there: list[int]) -> None:
        """The law of a row's next token, as long as its tokens are the same, when every second row is another one."""
        policy, config = self.model, self.algorithm.config
        if not isinstance(policy, Policy) or not isinstance(config, ScoredConfig):
            return
        laws = [self._laws(policy, config, [units[unit] for unit in chosen]) for chosen in (here, there)]
        kept = [place for place, (a, b) in enumerate(zip(here, there, strict=True)) if a == b and units[a]]
        for (law, tokens), (other, others) in zip(*laws, strict=False):
            moved = (law[kept] - other[kept]).abs().amax(1)
            if bool((moved > ROUNDING * (1 + law[kept].abs().amax(1))).any()):
                raise Coupled(
                    f"the rollout log-probabilities of a unit change by {float(moved.max()):.2g} when another one is "
                    "changed; " + self._where_sampled(units, here, there)
                )
            kept = [place for place in kept if tokens[place] == others[place]]  # rounding may tip a draw

    def padding_changes_nothing(self, base: Phase) -> None:
        """Rollouts whose prompts are padded less have the same log-probabilities: positions are counted by the mask."""
        policy, algorithm = self.model, self.algorithm
        if not isinstance(policy, Policy) or not isinstance(algorithm, ScoredAlgorithm):
            return
        rollouts, config = rollouts_of(base.rows), algorithm.config
        padding = (rollouts.attention_mask.cumsum(1) == 0).sum(1)
        rows = torch.nonzero(padding >= 1).flatten()[:8]
        if len(rows) == 0:
            return  # no prompt leaves room
        cut = int(padding[rows].min())
        whole = rollouts[rows]
        less = type(whole)(whole.input_ids[:, cut:], whole.attention_mask[:, cut:], whole.completion_mask)
        with torch.no_grad():
            one, two = (policy.completion_logprobs(r, config.min_completion_length)[0] for r in (whole, less))
        is_full = next(self.base.parameters()).dtype in (torch.float32, torch.float64)
        is_full, moved = is_full and not rounds_activations(self.base), (one - two).abs()
        if bool((moved > (ROUNDING if is_full else OTHER_WIDTH) * (1 + one.abs())).any()):
            raise Coupled(
                f"the rollout log-probabilities change by {float(moved.max()):.2g} when a prompt has {cut} padding "
                "tokens fewer: the model counts no positions by the attention mask or the position_ids it is given."
            )

    # How it is told ------------------------------------------------------------------------------------------------

    def _same_tokens(self, one: Rows, two: Rows, units: int) -> list[bool]:
        """Whether each unit's tokens are the same; rounding may tip the draw of a completion, and of nothing else."""
        if len(one.unit) != len(two.unit):
            raise Coupled("the number of a unit's rows depends on the other units.")
        same = torch.ones(units, dtype=torch.bool, device=one.unit.device)
        for name, tensor in one.tensors.items():
            if tensor.dim() > 1 and not tensor.is_floating_point():
                differs = (tensor != two.tensors[name]).flatten(1).any(1)
                same[one.unit[differs]] = False
        if bool(same.all()):
            return [True] * units
        if not isinstance(self.algorithm, ScoredAlgorithm) or int(same.sum()) * 2 < units:
            raise Coupled("the tokens of a unit's rows depend on the other units.")
        return [bool(s) for s in same]

    def _compare_rows(self, base: Phase, other: Phase, pairs: list[tuple[int, int]]) -> None:
        """Every float among the tensors of the rows of units that are in both."""
        one, two = base.rows.of([here for here, _ in pairs]), other.rows.of([there for _, there in pairs])
        for name, tensor in one.tensors.items():
            if not tensor.is_floating_point() or tensor.numel() == 0:
                continue
            ours = tensor.nan_to_num()
            moved = (ours - two.tensors[name].nan_to_num()).abs().reshape(len(ours), -1).amax(1)
            if float(moved.max()) > ROUNDING * (1 + float(ours.abs().max())):
                worst, what = pairs[int(one.unit[int(moved.argmax())])], NAMES.get(name, name)
                raise Coupled(
                    f"the {what} of a unit changes by {float(moved.max()):.2g} with the other units that are there; "
                    + self._where(base, other, *worst)
                )

    def _where(self, base: Phase, other: Phase, here: int, there: int) -> str:
        """The first layer whose output differs for a unit, in the micro-batch that it is in."""
        calls, places = [], []
        for phase, place in ((base, here), (other, there)):
            part = next(part for part in self._parts(phase.rows, len(phase.units)) if place in part)
            rows, within = phase.rows.of(part), part.index(place)
            calls.append(partial(self._gradients, phase.rows, part))
            places.append(torch.nonzero(rows.unit == within).flatten().tolist())
        return self._first_difference(calls, places)

    def _where_sampled(self, units: Units, here: list[int], there: list[int]) -> str:
        policy, config = self.model, self.algorithm.config
        kept = [place for place, (a, b) in enumerate(zip(here, there, strict=True)) if a == b]
        calls = [partial(self._laws, policy, config, [units[unit] for unit in chosen]) for chosen in (here, there)]
        return self._first_difference(calls, [kept, kept])

    def _first_difference(self, calls: Sequence[Callable[[], object]], places: list[list[int]]) -> str:
        ours, theirs = (outputs_of(self.base, call) for call in calls)
        for (name, one), (_, two) in zip(ours, theirs, strict=False):
            if max(places[0]) < len(one) and max(places[1]) < len(two) and one.shape[1:] == two.shape[1:]:
                a, b = one[places[0]].double(), two[places[1]].double()
                if float((a - b).abs().max()) > 1e-5 * float(1 + a.abs().max()):
                    return f"the first layer whose output differs is {name or 'the whole model'}."
        return f"no layer's output differs, so it is {type(self.algorithm).__name__}, or its reward."

    def _located(self, call: Callable[[], Any]) -> Any:
        """What `call` returns; an error of the model's is told with the layer in which it was raised."""
        try:
            return call()
        except OUT_OF_MEMORY:
            raise
        except Exception as error:
            layer = layer_that_raises(self.base, call)
            where = f"layer {layer}" if layer else f"{type(self.algorithm).__name__}"
            what = "" if isinstance(error, DPAlignError) else f"{type(error).__name__}: "
            raise Coupled(f"{where} refused units that the run wrote itself ({what}{error})") from None

    def _laws(self, policy: Any, config: Any, units: Units) -> list[tuple[Tensor, list[int]]]:
        """Of every step of generation: log-probabilities `(rows, some tokens)`, and the tokens that were drawn."""
        prompts = [unit[0].ids if unit else [] for unit in units]
        ids, mask = policy.encode_prompts(prompts, config.max_prompt_length)
        found: list[Tensor] = []

        def keep(module: nn.Module, arguments: Any, output: Any) -> None:
            logits = output.logits[:, -1].float()
            found.append(logits.log_softmax(-1)[:, :: max(1, logits.shape[-1] // 256)])

        handle = self.base.register_forward_hook(keep)
        try:
            with policy.merged():
                rollouts = policy.generate(
                    ids,
                    mask,
                    config.max_completion_length,
                    min_new_tokens=config.min_completion_length,
                    coins=PublicCoins(),
                )
        finally:
            handle.remove()
        return list(zip(found, rollouts.completion_ids.T.tolist(), strict=False))


@contextmanager
def _on_trial(
    model: AdapterStack, kind: type[Algorithm[Any, Any, Any]], config: Any, rewards: Mapping[str, Reward]
) -> Iterator[tuple[Algorithm[Any, Any, Any], PerUnitGradients]]:
    """The stage's algorithm, and its adapter and heads on the model with random weights: zero ones would hide much.

    A reward is mixed with a number that the text fixes: self-written text may score alike, which would hide much too.
    """
    plain = replace(config, adapter=replace(config.adapter, init_a="random"))
    algorithm = kind(plain, **{name: spread(reward) for name, reward in rewards.items()})
    kept = {id(p): p.detach().clone() for head in model.heads() for p in head.parameters()}
    adapters = list(model.adapters)
    try:
        algorithm.setup(model)
        if config.adapter.init_a != "random":
            check_rank(model, config.adapter.init_a)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.05 * torch.randn_like(p))
        if plain.gradient_checkpointing:
            model.checkpoint_activations(True)
        yield algorithm, PerUnitGradients(model)
    finally:
        if plain.gradient_checkpointing:
            model.checkpoint_activations(False)
        model.finish_stage()
        if model.adapters != adapters:
            model.drop_newest()
        with torch.no_grad():
            for head in model.heads():
                for p in head.parameters():
                    if id(p) in kept:  # else it was added on trial, and the stage will begin with another one
                        p.copy_(kept[id(p)])


def _compact(grads: UnitGradients) -> Tensor:
    """`(units, numbers)` float64 that change where a unit's gradient does, with the norm that it has.

    Of `Products` what they are along one direction of random signs: the norm is that of the whole in the mean, and a
    change that is not seen lies across the direction.
    """
    if isinstance(grads, Tensor):
        return grads.flatten(1).double()
    signs = torch.randint(2, (grads.shape[1],), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    device = next((use.inputs.device for uses in grads.units for use in uses), torch.device("cpu"))
    return grads.along((2 * signs - 1).to(device))


def group_of(config: Any) -> int:
    """Rows that a record leads to."""
    return config.num_generations if isinstance(config, ScoredConfig) else 1


def spread(reward: Reward) -> Reward:
    """Half the reward, half a number in its range that prompt and completion fix."""
    return Reward(Spread(reward), reward.low, reward.high, rows_at_once=None)


class Spread:
    """What `spread` calls; it has the scores of a mean, too."""

    def __init__(self, reward: Reward) -> None:
        self.reward, self.low, self.width = reward, reward.low, reward.high - reward.low
        self.count: int = getattr(reward.function, "count", 0)

    def __call__(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
        scores = self.reward(prompts, completions, columns).nan_to_num(self.low).tolist()
        places = [self._place(f"{p}|{c}") for p, c in zip(prompts, completions, strict=True)]
        return [(score + place) / 2 for score, place in zip(scores, places, strict=True)]

    def scores(self, texts: Sequence[Text]) -> Tensor:
        """`(texts, count)`, as `Mean.scores`."""
        function: Any = self.reward.function
        found: Tensor = function.scores(texts).nan_to_num(0.0)
        return (found + torch.tensor([[self._place(str(text))] for text in texts])) / 2

    def _place(self, text: str) -> float:
        return self.low + sum(map(ord, text)) % 97 / 96 * self.width


def outputs_of(model: nn.Module, call: Callable[[], object]) -> list[tuple[str, Tensor]]:
    """Every module's output in `call`, if it is or begins with a tensor; the innermost first of nested ones."""
    found: list[tuple[str, Tensor]] = []

    def keep(name: str, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor) and first.is_floating_point() and first.dim() > 0:
            found.append((name, first.detach().clone()))

    handles = [
        module.register_forward_hook(lambda module, arguments, output, name=name: keep(name, output))
        for name, module in model.named_modules()
    ]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return found


def layer_that_raises(model: nn.Module, call: Callable[[], object]) -> str:
    """The innermost module that was running when `call` raised; empty if none was."""
    running: list[str] = []
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda module, arguments, name=name: running.append(name)))
        handles.append(module.register_forward_hook(lambda module, arguments, output: void(running.pop())))
    try:
        call()
    except Exception:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return running[-1] if running else ""


def void(value: object) -> None:
    """What a hook must return to change nothing."""
