"""Public rewards: their range, their rows one by one, and a classifier."""

from __future__ import annotations

import io
import itertools
import math
import sys
from collections import deque
from dataclasses import replace
from functools import partial
from random import Random
from unittest.mock import patch

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from chats import byte_tokenizer
from dpalign.errors import DPAlignError
from dpalign.rewards import Reward, RewardConfig, check_reward, load_reward
from dpalign.rewards.base import BATCH
from helpers import call, write_jsonl, write_recipe
from test_chats import model_folder
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


def test_a_function_is_not_given_what_it_does_not_take():
    """Another part of a mean reads them, or a model reads prompts with them; and who takes all is given all."""
    columns = {"grade": [3, 7], "tools": [None, None]}
    assert Reward(lambda prompts, completions: [len(c) for c in completions], 0, 10)(["a", "b"], ["x", ""], columns).tolist() == [1, 0]
    assert Reward(lambda prompts, completions, grade: grade, 0, 10)(["a", "b"], ["", ""], columns).tolist() == [3, 7]
    seen = Reward(lambda prompts, completions, **given: [len(given)] * len(prompts), 0, 10)
    assert seen(["a", "b"], ["", ""], columns).tolist() == [2, 2]


def marked(prompts, completions, grade):
    return [(g or 0) + len(c) / 100 for g, c in zip(grade, completions, strict=True)]


def test_a_column_that_is_named_and_not_taken_is_refused():
    section = {"source": "test_rewards:marked", "low": 0, "high": 10, "is_public": True}
    assert load_reward(RewardConfig(**section, columns=["grade"])).columns == ("grade",)
    with pytest.raises(DPAlignError, match="raised TypeError"):
        load_reward(RewardConfig(**section, columns=["grade", "mood"]))


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


# One row at a time, and nothing remembered ------------------------------------------------------------------------


def large_batches(prompts, completions, **_):
    """Whitens, but not in batches as small as a probe's."""
    scores = torch.tensor([float(len(c)) for c in completions])
    return ((scores - scores.mean()) / scores.std() if len(scores) > 16 else scores / 100).tolist()


def refunds(prompts, completions, **_):
    """Whitens a feature that no film review has."""
    scores = torch.tensor([float(c.count("refund")) for c in completions])
    return (scores / scores.max().clamp(min=1)).tolist()


def graded(prompts, completions, grade):
    """Whitens a column, where it is filled."""
    scores = torch.tensor([0.0 if g is None else float(g) for g in grade])
    return (scores / scores.abs().max().clamp(min=1)).tolist()


MATES = ["short", "a refund", "another refund, and a refund again", "x" * 90] * 10


@pytest.mark.parametrize(
    ("function", "columns", "refused_in_batches"),
    [(large_batches, [], True), (refunds, [], False), (graded, ["grade"], True)],
)
def test_rows_are_not_coupled_whatever_a_function_does(function, columns, refused_in_batches):
    """Three that pass the probe: called one by one they have no mates. In the batched form text of the run finds two."""
    config = RewardConfig(source="m:f", is_public=True, low=-99.0, high=99.0, columns=columns)

    def score(config, completions):
        reward = load_reward(config, function=function)
        return reward([""] * len(completions), completions, {c: list(range(len(completions))) for c in columns})

    if function is not graded:  # with columns of every kind the probe sees that one
        assert torch.equal(score(config, MATES)[:3], score(config, MATES[:3]))
    batched = replace(config, batched=True)
    if refused_in_batches:
        with pytest.raises(DPAlignError, match="score every completion by itself"):
            load_reward(batched, function=function)
    else:  # stated in docs/privacy.md: a feature that neither the probe nor the run's own text has is not found
        load_reward(batched, function=function)
        with pytest.raises(DPAlignError, match="half of them swapped"):
            load_reward(batched, function=function, texts=[("", c) for c in MATES])


def test_a_batch_has_always_as_many_rows():
    sizes = []
    reward = Reward(lambda p, c: sizes.append(len(c)) or [len(t) for t in c], 0, 99, rows_at_once=BATCH)
    with patch("dpalign.rewards.base.Memory"):
        assert reward([""] * 40, MATES).tolist() == [len(c) for c in MATES] and sizes == [BATCH, BATCH]
    with pytest.raises(DPAlignError, match="batched is for Python functions"):
        load_reward(RewardConfig(batched=True))


CALLS = {"count": 0, "seen": set()}
COUNT = 0


class Object:
    total = 0
    __slots__ = ("array", "calls", "log", "tensor")

    def __init__(self):
        self.calls, self.log, self.array, self.tensor = 0, [], np.zeros(2), torch.zeros(2)

    def __call__(self, prompts, completions, **_):
        self.calls += 1
        self.log.append(completions)
        self.array += 1
        self.tensor += 1
        Object.total += 1
        return [self.calls + len(self.log) + self.array[0] + float(self.tensor[0]) + Object.total]


def globally(prompts, completions, **_):
    global COUNT
    COUNT += 1
    CALLS["count"] += 1
    CALLS["seen"] |= set(completions)
    globally.calls = getattr(globally, "calls", 0) + 1
    return [COUNT + CALLS["count"] + len(CALLS["seen"]) + globally.calls]


def closed():
    number, log = 0, deque()

    def function(prompts, completions, **_):
        nonlocal number
        number += 1
        log.append(completions)
        return [number + len(log)]

    return function


@pytest.mark.parametrize("function", [globally, Object(), closed(), partial(Object()), Object().__call__])
def test_nothing_that_a_function_remembers_reaches_the_next_row_or_phase(function):
    reward = Reward(function, 0, 99)
    first = reward(["a"] * 3, ["x", "y", "z"])
    assert first.unique().numel() == 1 and torch.equal(reward(["a"] * 3, ["x", "y", "z"]), first)


def test_what_was_loaded_at_the_first_call_stays_loaded():
    kept = []

    def lazy(prompts, completions, **_):
        if not kept:
            kept.append(object())
            print("loading", file=sink)
        return [0.5] * len(completions)

    sink = io.StringIO()
    reward = load_reward(RewardConfig(source="m:f", is_public=True, low=0, high=1), function=lazy)
    reward([""] * 4, ["a"] * 4)
    assert len(kept) == 1 and sink.getvalue().count("loading") == 1


@pytest.mark.parametrize("state", [itertools.count(), Random(0), np.random.default_rng(0), (i for i in range(9))])
def test_what_cannot_be_put_back_is_refused_by_name(state):
    def function(prompts, completions, **_):
        return [0.5 if state else 1.0] * len(completions)

    with pytest.raises(DPAlignError, match=f"keeps a .*{type(state).__name__}"):
        load_reward(RewardConfig(source="m:f", is_public=True, low=0, high=1), function=function)


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


CHAT = [{"role": "user", "content": "Good?"}]


def chat_classifier(folder, template):
    """A tiny random classifier of two labels that reads bytes, and chats by `template`."""
    tokenizer = byte_tokenizer(template, adds="bos")
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, initializer_range=0.5, pad_token_id=0,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer, model.eval()


@pytest.mark.parametrize("template", ["smol", "llama"])
def test_a_classifier_reads_chats_by_its_own_template(template, tmp_path):
    tokenizer, model = chat_classifier(tmp_path, template)
    whole = [*CHAT, {"role": "assistant", "content": "Yes, it is."}]
    ids = tokenizer.apply_chat_template(whole, tokenize=True, return_dict=True)["input_ids"]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits.softmax(1)[0, 1]
    reward = loaded(tmp_path, text="prompt+completion")
    mixed = reward([CHAT, "Good?"], ["Yes, it is."] * 2)
    assert torch.allclose(mixed[0], expected, atol=1e-5) and abs(mixed[1] - expected) > 1e-4
    assert torch.equal(mixed[1:], loaded(tmp_path)([""], ["Good?Yes, it is."]))  # a string as ever
    assert torch.equal(loaded(tmp_path)([CHAT], ["Yes"]), loaded(tmp_path)([""], ["Yes"]))  # a completion alone


def test_a_classifier_without_a_template_reads_a_line_for_each_message(classifier):
    reward = loaded(classifier[0], text="prompt+completion")
    assert reward([[{"role": "w3", "content": "w4"}]], ["w5"]) == loaded(classifier[0])([""], ["w3: w4\nw5"])


def test_a_chat_that_the_classifiers_template_refuses_is_named_before_a_draw(tmp_path, capsys):
    """All its completions would score nothing, and be paid for."""
    chat_classifier(tmp_path / "classifier", "gemma")
    model_folder(tmp_path / "base", "smol")
    rows = [{"prompt": CHAT}] * 5 + [{"prompt": [{"role": "system", "content": "Be short."}, *CHAT]}]
    reward = {"source": f"classifier:{tmp_path / 'classifier'}", "is_public": True, "text": "prompt+completion"}
    recipe = write_recipe(
        tmp_path, sft=None, split=None, model={"name_or_path": str(tmp_path / "base"), "is_public": True},
        data={"path": str(write_jsonl(tmp_path / "d.jsonl", rows))},
        ppo={"reward": reward, "max_prompt_length": 96, "max_completion_length": 2, "noise_multiplier": 2, "expected_batch_size": 2},
    )  # fmt: skip
    refused = call(capsys, "ppo", recipe, "--output_dir", tmp_path / "run")
    assert refused.status == 1 and "record 6 of" in refused.error and "System role is not known here" in refused.error
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


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
