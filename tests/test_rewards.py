"""Public rewards: their range, their rows one by one, and a classifier."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from dpalign.errors import DPAlignError
from dpalign.rewards import Reward, RewardConfig, check_reward, load_reward
from tiny import VOCABULARY, tiny_tokenizer, words


def test_vader_is_public_and_within_its_range():
    reward = load_reward(RewardConfig())
    scores = reward(["The film"] * 3, [" was wonderful, I loved it!", " was awful and boring.", ""])
    assert (reward.low, reward.high) == (-1, 1)
    assert scores[0] > 0.7 and scores[1] < -0.5 and scores[2] == 0
    both = load_reward(RewardConfig(text="prompt+completion"))
    assert both(["A wonderful"], [" film"])[0] > 0.5 > reward(["A wonderful"], [" film"])[0] == 0


def test_scale_shift_and_range():
    reward = Reward(lambda p, completions, **_: [float(c) for c in completions], low=-1, high=2, scale=0.5, shift=1)
    assert reward([""] * 4, ["0", "1", "100", "-100"]).tolist() == [1, 1.5, 2, -1]


def test_columns_reach_the_reward():
    reward = Reward(lambda prompts, completions, grade, **_: grade, 0, 10)
    assert reward(["a", "b"], ["", ""], {"grade": [3, 7], "id": [1, 2]}).tolist() == [3, 7]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, "text", None])
def test_a_row_that_cannot_be_scored_disturbs_nobody(bad):
    reward = Reward(lambda p, completions, **_: [bad if c == "bad" else 0.5 for c in completions], 0, 1)
    scores = reward([""] * 3, ["good", "bad", "good"])
    assert scores.isnan().tolist() == [False, True, False] and scores[0] == scores[2] == 0.5


def test_a_row_that_raises_or_a_wrong_length_disturbs_nobody():
    def raising(prompts, completions, **columns):
        return [1 / len(c) for c in completions]

    assert Reward(raising, 0, 1)(["a"] * 3, ["xx", "", "x"]).isnan().tolist() == [False, True, False]

    def dropping(prompts, completions, **columns):
        return [0.5 for c in completions if c]

    scores = Reward(dropping, 0, 1)(["a"] * 3, ["xx", "", "x"])
    assert scores.isnan().tolist() == [False, True, False] and scores[0] == 0.5


def whitened(prompts, completions, **_):
    lengths = torch.tensor([float(len(c)) for c in completions])
    return ((lengths - lengths.mean()) / (lengths.std(correction=0) + 1)).tolist()


def ranked(prompts, completions, **_):
    return [sorted(completions, key=len).index(c) / 10 for c in completions]


class Running:
    """Divides by a running mean of absolute scores."""

    def __init__(self) -> None:
        self.mean, self.calls = 1.0, 0

    def __call__(self, prompts, completions, **_):
        scores = [len(c) for c in completions]
        self.calls += 1
        self.mean += (sum(scores) / len(scores) - self.mean) / self.calls
        return [s / self.mean for s in scores]


def random(prompts, completions, **_):
    return torch.rand(len(completions)).tolist()


@pytest.mark.parametrize("coupled", [whitened, ranked, Running(), random])
def test_a_reward_that_couples_rows_is_refused(coupled):
    with pytest.raises(DPAlignError, match="score every completion by itself"):
        check_reward(coupled)


def test_a_reward_that_scores_every_row_by_itself_is_not_refused():
    check_reward(
        lambda prompts, completions, **_: [len(p + c) / 100 for p, c in zip(prompts, completions, strict=True)]
    )


# Classifier --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Folder of a tiny random classifier of three labels."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=16, initializer_range=0.5, pad_token_id=0,
            id2label={0: "bad", 1: "fair", 2: "good"}, label2id={"bad": 0, "fair": 1, "good": 2},
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder, model.eval()


def loaded(folder, **settings) -> Reward:
    return load_reward(RewardConfig(source=f"classifier:{folder}", is_public=True, **settings))


def test_classifier_scores_are_the_models(classifier):
    folder, model = classifier
    texts = [words(1 + i % 7, i) for i in range(40)]  # more than one batch of it, of different lengths
    prompts = [words(2, 100 + i) for i in range(40)]
    logits = []
    for text in texts:
        ids = tiny_tokenizer()(text, return_tensors="pt")
        with torch.no_grad():
            logits.append(model(ids.input_ids, attention_mask=ids.attention_mask).logits[0])
    expected = torch.stack(logits).softmax(1)
    assert expected[:, 2].std() > 0.01
    reward = loaded(folder)
    assert (reward.low, reward.high) == (0, 1)
    assert torch.allclose(reward(prompts, texts), expected[:, 2], atol=1e-5)  # the last label is the default
    assert torch.allclose(loaded(folder, label="bad")(prompts, texts), expected[:, 0], atol=1e-5)
    logit = loaded(folder, label="fair", use_logit=True, low=-9.0, high=9.0)
    assert torch.allclose(logit(prompts, texts), torch.stack(logits)[:, 1], atol=1e-5)
    assert torch.allclose(reward(prompts[:1], texts[:1]), reward(prompts, texts)[:1], atol=1e-6)


def test_classifier_may_read_the_prompt_and_cuts_long_texts(classifier):
    reward = loaded(classifier[0], text="prompt+completion")
    joined = loaded(classifier[0])
    assert reward(["w3 w4"], [" w5"]) == joined([""], ["w3 w4 w5"]) != joined([""], ["w5"])
    assert torch.isfinite(joined([""], [words(50, 0)])).all()


def test_what_a_classifier_is_refused_for(classifier):
    folder = classifier[0]
    with pytest.raises(DPAlignError, match="has no label 'great'; it has bad, fair, good"):
        loaded(folder, label="great")
    with pytest.raises(DPAlignError, match="declared range"):
        loaded(folder, use_logit=True)
    with pytest.raises(DPAlignError, match="declared public"):
        load_reward(RewardConfig(source=f"classifier:{folder}"))


def test_a_function_in_a_file_beside_the_recipe_is_found(tmp_path, monkeypatch):
    (tmp_path / "reward_beside.py").write_text(
        "def f(prompts, completions, **columns):\n    return [0.5] * len(prompts)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])  # as for an installed command
    reward = load_reward(RewardConfig(source="reward_beside:f", is_public=True, low=0.0, high=1.0))
    assert reward(["a"], ["b"]).tolist() == [0.5]
