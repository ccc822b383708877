"""The law of sampled tokens is the policy's own."""

import pytest
import torch
from scipy.stats import chisquare
from transformers import GenerationConfig

from dpalign.models import Policy
from dpalign.models.sampling import DrawToken, _drawn
from tiny import tiny_base, tiny_policy, tiny_tokenizer

ROWS = 20_000


def drawn(scores: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    return DrawToken()(torch.zeros(len(scores), 1, dtype=torch.int64), scores).argmax(-1)


def p_value(tokens: torch.Tensor, logits: torch.Tensor) -> float:
    expected = logits.double().softmax(-1) * len(tokens)
    return float(chisquare(tokens.bincount(minlength=len(logits)).numpy(), expected.numpy()).pvalue)


def test_tokens_follow_the_softmax():
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, 0.5])
    assert p_value(drawn(logits.expand(ROWS, -1)), logits) > 1e-4
    assert p_value(drawn(logits.expand(ROWS, -1) / 0.8), logits) < 1e-4  # another temperature is seen


def test_impossible_tokens_are_never_drawn_and_bad_rows_do_not_stop_others():
    scores = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0]]).repeat(1000, 1)
    scores[7] = torch.nan
    tokens = drawn(scores)
    assert set(tokens[torch.arange(1000) != 7].tolist()) == {1, 3}


@pytest.mark.parametrize("vocabulary", [1, 127, 128, 129, 1000])
def test_a_point_finds_the_token_that_the_cumulated_probabilities_have_there(vocabulary):
    torch.manual_seed(vocabulary)
    scores = torch.randn(5000, vocabulary) * 3
    scores[torch.rand(scores.shape) < 0.3] = -torch.inf
    scores[:, vocabulary // 2] = 0.0  # one is possible
    points = torch.cat([torch.zeros(100, 1), torch.full((100, 1), 1 - 2.0**-53), torch.rand(4800, 1)]).double()
    tokens = _drawn(scores, points)
    cumulated = scores.double().softmax(-1).cumsum(-1)
    below = torch.nn.functional.pad(cumulated, (1, 0)).gather(1, tokens)
    assert (scores.gather(1, tokens) > -torch.inf).all()
    assert (below <= points + 1e-6).all() and (points <= cumulated.gather(1, tokens) + 1e-6).all()


def test_the_base_models_own_generation_settings_do_not_change_the_law():
    base = tiny_base("gpt2")
    base.generation_config = GenerationConfig(
        repetition_penalty=5.0, top_k=2, no_repeat_ngram_size=1, do_sample=True, temperature=0.1
    )
    for policy in (Policy(base, tiny_tokenizer()), tiny_policy("gpt2")):
        ids, mask = policy.encode_prompts([[3, 4, 5]] * ROWS, 3)
        torch.manual_seed(1)
        rollouts = policy.generate(ids, mask, 1)
        logits = policy(ids[:1], mask[:1], 1)[0][0, 0].detach()
        counted = logits.softmax(-1) * ROWS >= 5  # chi-square needs five expected draws a token
        assert counted.float().mean() > 0.5
        place = counted.long().cumsum(0) - 1
        tokens = rollouts.completion_ids[:, 0]
        tokens = place[tokens[counted[tokens]]]
        assert p_value(tokens, logits[counted]) > 1e-4
