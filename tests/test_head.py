"""Log-probabilities a few positions at a time: the same numbers and gradients as from all logits, and never all of these."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import CohereConfig, CohereForCausalLM, GPT2LMHeadModel, PreTrainedModel

from dpalign.algorithms.anchor import Anchor
from dpalign.algorithms.base import unit_means
from dpalign.gradients import PerUnitGradients
from dpalign.models import AdapterConfig, Policy, head
from dpalign.models.head import by_position, held_together
from dpalign.models.policy import Rollouts
from dpalign.models.sampling import DrawToken
from test_anchor import gradients as gradients_of
from test_anchor import policy_at, settings
from tiny import SIZES, VOCABULARY, tiny_base, tiny_tokenizer

ROWS, COMPLETION = 6, 7
UNIT = torch.tensor([2, 0, 2, 1, 0, 2])
LAWS = [{}, {"min_new_tokens": 3}, {"min_new_tokens": 5, "temperature": 0.7}]


def capped() -> PreTrainedModel:
    """Gemma 2, whose logits are capped behind the head."""
    base = tiny_base("gemma2")
    base.config.final_logit_softcapping = 1.5  # logits here are not as large as those that are capped at 30
    return base


def scaled() -> PreTrainedModel:
    """Cohere, whose logits are scaled behind the head."""
    torch.manual_seed(0)
    return CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.3, pad_token_id=0))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": lambda: tiny_base("gpt2"),
    "llama": lambda: tiny_base("llama"),
    "capped": capped,
    "scaled": scaled,
    "mixture": lambda: tiny_base("mixtral"),
}
ADAPTED = {"gpt2": ["c_attn"], "mixture": ["q_proj", "v_proj"]}


def adapted(kind: str, dtype: torch.dtype = torch.float32, layers: list[str] | None = None) -> Policy:
    policy = Policy(MODELS[kind]().to(dtype), tiny_tokenizer())
    policy.add_adapter("stage", AdapterConfig(r=2, target_modules=layers or ADAPTED.get(kind, ["q_proj", "down_proj"])))
    policy.add_value_head()
    torch.manual_seed(1)
    for p in policy.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.2)
    return policy.to(dtype) if dtype == torch.float64 else policy


def rollouts() -> Rollouts:
    """Left-padded prompts of 1 to 5 tokens, completions of 1 to 7."""
    torch.manual_seed(2)
    ids = torch.randint(2, VOCABULARY, (ROWS, 5 + COMPLETION))
    attention, inside = torch.ones_like(ids), torch.ones(ROWS, COMPLETION)
    for row in range(ROWS):
        attention[row, : row % 5] = 0
        inside[row, 1 + (3 * row) % COMPLETION :] = 0
    attention[:, 5:] = inside.long()
    return Rollouts(ids, attention, inside)


def read(policy: Policy, law: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, values, and `(units, trainables)` gradients of a loss that weighs every token differently."""
    gradients, some = PerUnitGradients(policy), rollouts()
    with gradients.collect(UNIT, 3):
        logprobs, values = policy.completion_logprobs(some, **law)
        weights = torch.linspace(-1, 2, COMPLETION)
        losses = (some.completion_mask * (-weights * logprobs + 0.5 * (values - weights) ** 2)).sum(1)
        unit_means(losses, UNIT, 3).sum().backward()
    return logprobs.detach(), values.detach(), torch.cat([g.flatten(1) for g in gradients.grads()], 1)


def in_parts(monkeypatch: pytest.MonkeyPatch, positions: int) -> None:
    monkeypatch.setattr(head, "AT_ONCE", positions * 4 * ROWS * VOCABULARY)


def shapes_of_logits(policy: Policy) -> list[tuple[int, ...]]:
    """Filled with the shape of what the output layer gives, as it is called."""
    seen: list[tuple[int, ...]] = []
    layer = policy.model.get_base_model().get_output_embeddings()
    layer.register_forward_hook(lambda module, inputs, logits: seen.append(tuple(logits.shape)))
    return seen


def test_how_many_are_held_together_worked_by_hand():
    assert held_together(8 * 128_000) == 16  # 16 * 8 * 128,000 float32 logits are 65.5 MB, of 67.1
    assert held_together(2**24) == held_together(0) // 2**24 == 1 and held_together(2**24 + 1) == 1


@pytest.mark.parametrize("positions", [1, 3, 6])
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("kind", MODELS)
def test_the_same_numbers_and_gradients_as_from_all_logits(kind, law, positions, monkeypatch):
    """Of models that cap or scale their logits, too, and with tokens that must not be drawn."""
    dtype, close = torch.float64, {"rtol": 1e-9, "atol": 1e-11}
    if kind == "capped":  # which transformers cannot compute in float64 with padding
        dtype, close = torch.float32, {"rtol": 1e-4, "atol": 1e-5}
    expected = read(adapted(kind, dtype), law)
    in_parts(monkeypatch, positions)
    policy = adapted(kind, dtype)
    seen = shapes_of_logits(policy)
    found = read(policy, law)
    assert {shape[1] for shape in seen[1:]} == {positions, COMPLETION % positions or positions}
    assert expected[2].norm(dim=1).min() > 0.1
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, **close)


def test_the_cases_differ():
    """What stands behind the head, and what the laws ask for, is seen in the numbers that are compared above."""
    for kind, module in (("capped", "final_logit_softcapping"), ("scaled", "logit_scale")):
        policy = adapted(kind)
        before = read(policy, {})[0]
        inner = policy.model.get_base_model()
        if kind == "capped":
            setattr(inner.config, module, None)
        else:
            setattr(inner, module, 1.0)
        assert (read(policy, {})[0] - before).abs().max() > 0.1
    first, *others = (read(adapted("llama"), law)[0] for law in LAWS)
    assert all((first - other).abs().max() > 1e-3 for other in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_training_dtypes(dtype, monkeypatch):
    """Log-probabilities are float32's also of a bfloat16 model: products are rounded, and nothing behind them."""
    expected = read(adapted("llama", dtype), {})
    in_parts(monkeypatch, 2)
    found = read(adapted("llama", dtype), {})
    assert found[0].dtype == found[1].dtype == torch.float32
    assert torch.allclose(found[0], expected[0], atol=1e-5 if dtype == torch.float32 else 1e-2)
    distance = (found[2].float() - expected[2].float()).norm(dim=1) / expected[2].float().norm(dim=1)
    assert distance.max() < (1e-5 if dtype == torch.float32 else 2e-2)
    if dtype == torch.bfloat16:
        assert (found[0] - found[0].bfloat16().float()).abs().max() > 0


def test_an_adapter_on_the_head_is_trained_too(monkeypatch):
    """Its logits are computed again in the backward pass."""
    layers = ["q_proj", "lm_head"]
    expected = read(adapted("llama", torch.float64, layers), LAWS[2])
    in_parts(monkeypatch, 2)
    policy = adapted("llama", torch.float64, layers)
    seen = shapes_of_logits(policy)
    found = read(policy, LAWS[2])
    assert [shape[1] for shape in seen] == [1, 2, 2, 2, 1, 1, 2, 2, 2]  # of the whole model one; then in parts, twice
    assert all(torch.allclose(one, other, rtol=1e-9, atol=1e-11) for one, other in zip(found, expected, strict=True))


def test_a_frozen_head_is_asked_once_and_all_logits_are_never_kept(monkeypatch):
    policy, kept = adapted("llama"), []
    seen = shapes_of_logits(policy)

    def sizes_kept() -> list[int]:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: [kept.append(t.numel()), t][1], lambda t: t):
            read(policy, {})
        return kept

    assert ROWS * COMPLETION * VOCABULARY in sizes_kept()  # in one part they are
    in_parts(monkeypatch, 2)
    seen.clear()
    assert ROWS * COMPLETION * VOCABULARY not in sizes_kept() and 2 * ROWS * VOCABULARY in kept
    assert [shape[1] for shape in seen] == [1, 2, 2, 2, 1]  # of the whole model one; then 7 positions, 2 at a time


def test_without_gradients_none_is_computed(monkeypatch):
    in_parts(monkeypatch, 2)
    policy = adapted("llama")
    with torch.no_grad():
        monkeypatch.setattr(torch.autograd, "grad", None)
        logprobs, values = policy.completion_logprobs(rollouts())
    assert not logprobs.requires_grad and logprobs.sum() < 0 and values.abs().sum() > 0


class TokenBias(GPT2LMHeadModel):
    """Whose logits depend on the tokens in another way than through the body: no body and head."""

    def forward(self, input_ids=None, logits_to_keep=0, **options):
        out = super().forward(input_ids=input_ids, logits_to_keep=logits_to_keep, **options)
        keep = slice(None) if isinstance(logits_to_keep, int) else logits_to_keep
        out.logits = out.logits * (1 + input_ids[:, keep].unsqueeze(2) % 3)
        return out


def test_a_model_that_is_no_body_with_a_head_is_asked_for_all_logits(monkeypatch):
    base = TokenBias(tiny_base("gpt2").config)
    policy = Policy(base, tiny_tokenizer())
    policy.add_adapter("stage", AdapterConfig(r=2))
    expected = policy.completion_logprobs(rollouts())[0]
    in_parts(monkeypatch, 2)
    seen = shapes_of_logits(policy)
    assert torch.equal(policy.completion_logprobs(rollouts())[0], expected)
    assert seen == [(ROWS, COMPLETION, VOCABULARY)]


def test_the_body_answers_for_itself_again_afterwards(monkeypatch):
    """Also if an error ends what was asked of the head, and where somebody else has put a forward pass in its place."""
    policy = adapted("llama")
    body = policy.model.get_base_model().base_model
    own = body.forward

    def logged(*arguments, **options):
        return own(*arguments, **options)

    in_parts(monkeypatch, 2)
    for forward in (None, logged):
        if forward:
            body.forward = forward
        policy.completion_logprobs(rollouts())
        assert vars(body).get("forward") is forward
        with pytest.raises(RuntimeError):
            policy._head.logits(torch.zeros(1, 1, 5))
        assert vars(body).get("forward") is forward


def test_numbers_that_nothing_arrives_at_have_no_gradient():
    """The gradient is that of each position's own number times what arrives at it."""
    states = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    found = by_position(lambda part, here: (part**3).sum(2) * (1 + here.start), states, 2, is_trained=False)
    arriving = torch.tensor([[1.0, 0, 2, -1, 3], [0, 0, 0, 0, 0]], dtype=torch.float64)
    (found * arriving).sum().backward()
    start = torch.tensor([1, 1, 3, 3, 5.0])
    assert torch.allclose(states.grad, 3 * states.detach() ** 2 * (arriving * start).unsqueeze(2))


def test_tokens_are_drawn_as_many_rows_at_a_time_as_may_be(monkeypatch):
    """And are the same, whatever that is."""
    scores, ids, widest = torch.randn(50, 40), torch.zeros(50, 1, dtype=torch.int64), []
    original = Tensor.cumsum
    monkeypatch.setattr(Tensor, "cumsum", lambda t, *how, **more: [widest.append(len(t)), original(t, *how, **more)][1])
    drawn = []
    for rows in (50, 8):
        monkeypatch.setattr(head, "AT_ONCE", rows * 40 * 4)
        torch.manual_seed(0)
        drawn.append(DrawToken()(ids, scores))
    assert torch.equal(*drawn) and widest == 2 * [50] + 12 * [8] + 2 * [2]  # of sums, and within one


def test_a_policy_is_held_by_as_few_texts_at_a_time(monkeypatch):
    """The divergence of whole laws needs all logits of a text, and so takes fewer texts."""
    found = []
    for at_once in (2**26, 3 * 4 * 8 * VOCABULARY):  # of 3 + 5 tokens
        policy, anchor = policy_at(0.3), Anchor(settings())
        for p in (p for p in policy.parameters() if p.requires_grad):
            p.grad = torch.zeros_like(p)
        anchor._written(policy)
        monkeypatch.setattr(head, "AT_ONCE", at_once)
        seen = shapes_of_logits(policy)
        anchor.add_gradient(policy, 1)
        found.append(gradients_of(policy))
        assert max(rows for rows, *_ in seen) == (48 if at_once == 2**26 else 3)
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0])
