"""Input directions for a frozen LoRA A, from text that the policy writes itself.

Privacy noise grows with the number of trained weights, so it pays to train few good ones. A policy can tell which.

- Where a public reward says what is wanted (`synthetic_gradient`): it writes prompts itself, completes them, and the
  reward's gradient with respect to each adapted weight, decomposed by SVD, gives the input directions along which
  reward can move (in the spirit of LoRA-GA, Wang et al. 2024, and of public gradient subspaces, Zhou et al. 2021).
- Where only people's texts say it (`activations`): the leading directions of what each adapted layer reads of the
  policy's own text. The first is close to their mean, so that its weights act as a bias does, and biases alone do well
  in private training (Bu et al. 2022, arXiv 2210.00036).

No record is read: the policy is public or a DP release, so this is post-processing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from ..errors import DPAlignError
from ..models import AdapterStack, Policy
from ..models.generation import Prompt, longest_written, padded, write_prompts
from ..models.policy import Rollouts
from ..settings.base import TrainingConfig

PROMPT_TOKENS = 8  # of a text that the policy begins and goes on with
UNUSED = "an adapted layer took no part in the loss, so init_a {} for it: leave it out of adapter.target_modules."
SPARE = 128  # directions of a sketch beyond those that are asked for


def add_adapter(policy: Policy, name: str, config: TrainingConfig, length: int) -> None:
    """A stage's adapter, whose A is what the stage's settings say; length: of the longest text that the stage reads."""
    policy.add_adapter(name, config.adapter)
    if config.adapter.init_a != "random":
        check_rank(policy, config.adapter.init_a)
    if config.adapter.init_a == "activations":
        size = config.micro_batch_size
        align_to_activations(policy, rows=config.adapter.init_rows, length=length, micro_batch_size=size)


def check_rank(policy: AdapterStack, init_a: str) -> None:
    """Raises DPAlignError for a newest adapter with more directions than one of its layers has inputs."""
    ranks = [layer.lora_A[policy.adapters[-1]].weight.shape for layer in adapted(policy)]
    rank, inputs = min(ranks, key=lambda shape: shape[1] - shape[0])
    if rank > inputs:
        raise DPAlignError(
            f"adapter.r {rank}: a layer has {inputs} inputs, and with init_a {init_a} no more directions."
        )


def check_own_text(name: str, policy: Policy, length: int) -> None:
    """Refuses, before the first draw, a model that cannot write the texts that `activations` are of.

    Raises:
        DPAlignError: the tokenizer has neither BOS nor EOS, or a text has no room in `length` tokens.
    """
    needed = longest_written(policy, 2)
    if needed > length:
        raise DPAlignError(
            f"{name}.adapter.init_a activations: a text that the model writes itself has at least {needed} tokens with "
            f"what stands around it, and stage {name} reads {length}: allow longer ones, or leave init_a out."
        )


def align_inputs(
    policy: Policy,
    score: Callable[[list[Prompt], Rollouts, Policy], Tensor],
    *,
    rows: int,
    prompt_tokens: int,
    max_new_tokens: int,
    min_new_tokens: int,
    micro_batch_size: int,
) -> None:
    """Sets every A of the newest adapter to the leading right singular vectors of the synthetic gradient.

    Args:
        policy: with the newest adapter added; its B is still zero.
        score: the public reward of rollouts, `(rows,)`, NaN where there is none.
        rows: synthetic rollouts to estimate the gradient from; the prompts have `prompt_tokens` tokens after BOS.

    Raises:
        DPAlignError: the reward says the same of all of them, or nothing of any, so that it has no gradient.
    """
    prompts = write_prompts(policy, rows, prompt_tokens, micro_batch_size)
    rollouts = policy.sample(
        *padded(policy, prompts), max_new_tokens, min_new_tokens=min_new_tokens, rows_at_once=micro_batch_size
    )
    scores = score(prompts, rollouts, policy).to(policy.device)
    known = scores[scores.isfinite()]
    if len(known) == 0 or bool((known == known[0]).all()):
        raise DPAlignError(
            f"init_a synthetic_gradient: the reward {'says the same of' if len(known) else 'cannot score any of'} "
            f"{rows} completions that the model writes itself, and so has no gradient: leave init_a out, or raise "
            "init_rows."
        )
    scores = torch.where(scores.isfinite(), scores, known.mean())
    advantages = scores - scores.mean()  # synthetic rows may share statistics: no unit is among them

    layers = adapted(policy)
    weights = [layer.get_base_layer().weight for layer in layers]
    trained = [p for p in policy.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for i in range(0, rows, micro_batch_size):
            rows_here = slice(i, i + micro_batch_size)
            logprobs, _ = policy.completion_logprobs(rollouts[rows_here], min_new_tokens)
            (-(advantages[rows_here] * logprobs.sum(1)).sum() / rows).backward()  # type: ignore[no-untyped-call]
        for layer, weight in zip(layers, weights, strict=True):
            if weight.grad is None:
                raise DPAlignError(UNUSED.format("synthetic_gradient has no gradient"))
            gradient = weight.grad.float().T if layer.fan_in_fan_out else weight.grad.float()  # (out, in)
            a = layer.lora_A[policy.adapters[-1]].weight
            a.data.copy_(leading_inputs(gradient, a.shape[0]))
    finally:
        for weight in weights:
            weight.grad = None
            weight.requires_grad_(False)
        for p in trained:
            p.requires_grad_(True)


@torch.no_grad()
def align_to_activations(policy: Policy, *, rows: int, length: int, micro_batch_size: int) -> None:
    """Sets every A of the newest adapter to the leading directions of what its layer reads of the policy's own text.

    Args:
        policy: with the newest adapter added; its B is still zero.
        rows: texts that the policy writes, of at most `length` tokens: beginning at BOS, or a chat's first turns.
    """
    begun = min(PROMPT_TOKENS, length - longest_written(policy, 1))
    prompts = write_prompts(policy, rows, begun, micro_batch_size)
    ids, mask = padded(policy, prompts)
    written = policy.sample(ids, mask, max(1, length - ids.shape[1]), rows_at_once=micro_batch_size)
    ranks = {layer: layer.lora_A[policy.adapters[-1]].weight for layer in adapted(policy)}
    sketches = {layer: Sketch(a.shape[1], a.shape[0]) for layer, a in ranks.items()}
    for i in range(0, rows, micro_batch_size):
        part = written[i : i + micro_batch_size]
        ids, mask = part.input_ids, part.attention_mask
        hooks = [layer.register_forward_pre_hook(partial(_read, s, mask[:, :-1])) for layer, s in sketches.items()]
        try:
            policy.logprobs(ids[:, :-1], mask[:, :-1], ids[:, 1:])
        finally:
            for hook in hooks:
                hook.remove()
    for layer, a in ranks.items():
        a.copy_(sketches[layer].leading(a.shape[0]))


def _read(sketch: Sketch, mask: Tensor, layer: Any, arguments: tuple[Tensor, ...]) -> None:
    """What a layer reads of the tokens that are there; all of it, where a layer has no such shape."""
    inputs = arguments[0]
    whole = inputs[mask.bool()] if inputs.shape[:-1] == mask.shape else inputs.reshape(-1, inputs.shape[-1])
    sketch.add(whole)


class Sketch:
    """The leading eigenvectors of the second moment of `(tokens, in)` inputs, from one pass over them.

    Nystroem's method (Halko et al. 2011, algorithm 5.5): the moment is seen through some random directions, which
    costs in x k numbers instead of in x in. Exact where the inputs have no more than k dimensions.
    """

    def __init__(self, inputs: int, rank: int) -> None:
        self.through = torch.randn(inputs, min(inputs, rank + SPARE), dtype=torch.float64)
        self.seen: Tensor | None = None

    def add(self, inputs: Tensor) -> None:
        """`(tokens, in)` float."""
        read = inputs.double()
        seen = (read.T @ (read @ self.through.to(read.device))).cpu()
        self.seen = seen if self.seen is None else self.seen + seen

    def leading(self, rank: int) -> Tensor:
        """`(rank, in)` orthonormal float64 rows.

        Raises:
            DPAlignError: nothing was added.
        """
        if self.seen is None:
            raise DPAlignError(UNUSED.format("activations has nothing to go by"))
        inner = self.through.T @ self.seen
        values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
        kept = values > 1e-12 * values[-1]
        root = self.seen @ (vectors[:, kept] / values[kept].sqrt())
        return leading_inputs(root.T, rank)


def adapted(policy: AdapterStack) -> list[Any]:
    """The layers of the newest adapter."""
    return [m for m in policy.modules() if isinstance(m, LoraLayer) and policy.adapters[-1] in m.lora_A]


def leading_inputs(gradient: Tensor, rank: int) -> Tensor:
    """`(rank, in)` orthonormal rows: the leading right singular vectors of an `(out, in)` gradient; where it has fewer,
    random directions that are orthogonal to them. rank: at most `in`."""
    directions: Tensor = torch.linalg.svd(gradient, full_matrices=False).Vh[:rank]
    if len(directions) < rank:
        others = torch.randn(rank - len(directions), gradient.shape[1], dtype=gradient.dtype).to(gradient.device)
        directions = torch.linalg.qr(torch.cat([directions, others]).T).Q.T
    return directions
