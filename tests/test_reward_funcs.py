"""`reward_funcs` as TRL's users give them: what a function is called with, and what several of them add up to."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from dpalign import DPAlignError, DPPPOTrainer, DPRLOOTrainer, PPOConfig, Privacy, RLOOConfig
from dpalign.rewards import Reward
from dpalign.rewards.foreign import signature_of
from dpalign.rewards.weighted import Weighted
from dpalign.settings.rewards import RewardConfig
from dpalign.trainers.rewards import read_reward_funcs, reward_function
from tiny import VOCABULARY, tiny_folder, tiny_tokenizer, words

ROWS = [{"prompt": words(3, seed), "answer": "w1", "style": "short"} for seed in range(32)]
CHAT = [{"role": "user", "content": "w1 w2"}]


def of_completions(completions, **kwargs):
    return [float(len(c)) for c in completions]


def of_answer(completions, answer):
    return [float(a in c) for a, c in zip(answer, completions, strict=True)]


def in_our_order(prompts, completions, **columns):
    return [float(len(p) + 10 * len(c)) for p, c in zip(prompts, completions, strict=True)]


def otherwise_named(p, c):
    return [float(len(x) + 10 * len(y)) for x, y in zip(p, c, strict=True)]


def by_keyword(*, completions, prompts):
    return in_our_order(prompts, completions)


def everything(**kwargs):
    return in_our_order(kwargs["prompts"], kwargs["completions"])


def silent(completions, **kwargs):
    return [None for _ in completions]


class Scaled:
    def __init__(self, factor):
        self.factor, self.seen = factor, 0

    def __call__(self, completions, **kwargs):
        self.seen += 1
        return [self.factor * len(c) + 100 * (self.seen - 1) for c in completions]


def times(completions, factor, **kwargs):
    return [factor * len(c) for c in completions]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (of_completions, 2), (in_our_order, 23), (otherwise_named, 23), (by_keyword, 23), (everything, 23),
        (partial(times, factor=3), 6), (Scaled(2), 4), (Scaled(2).__call__, 4),
        (lambda completions: [float(len(c)) for c in completions], 2),
    ],
)  # fmt: skip
def test_a_function_is_called_as_it_takes_its_arguments(function, expected):
    reward = Reward(function, 0, 100)
    assert reward(["abc"] * 3, ["xy"] * 3).tolist() == [expected] * 3


def test_what_a_function_takes():
    assert signature_of(of_answer).needs == ("answer",) and signature_of(of_answer).takes == {"answer"}
    assert signature_of(partial(times, factor=3)).needs == ()
    assert signature_of(in_our_order).needs == () and signature_of(in_our_order).takes is None
    assert not signature_of(in_our_order).by_name and signature_of(of_answer).by_name


def test_a_chats_function_is_given_messages():
    def function(prompts, completions):
        return [float((prompts, completions) == ([CHAT], [[{"role": "assistant", "content": "w3"}]]))]

    assert Reward(Weighted([function], [2.0]), 0, 9)([CHAT], ["w3"]).tolist() == [2]


# Several -----------------------------------------------------------------------------------------------------------


def test_weights_add_up_and_none_has_nothing_to_say():
    both = Weighted([of_completions, of_answer, silent], [1.0, 10.0, 1000.0])
    reward = Reward(both, -100, 100)
    assert reward([""] * 2, ["w1", "abc"], {"answer": ["w1", "w1"], "style": [1, 2]}).tolist() == [12, 3]
    assert Reward(Weighted([silent], [1.0]), 0, 1)([""], ["w1"]).isnan().all()


def test_a_row_that_one_of_several_cannot_score_is_not_scored():
    def failing(completions):
        return [1 / (len(c) - 2) for c in completions]

    scores = Reward(Weighted([of_completions, failing], [1.0, 1.0]), 0, 100)([""] * 2, ["ab", "abc"])
    assert scores.isnan().tolist() == [True, False] and scores[1] == 4


def test_what_one_of_several_remembers_is_put_back():
    part = Scaled(1)
    reward = Reward(Weighted([part, partial(part)], [1.0, 0.0]), 0, 1000)
    assert reward([""] * 3, ["a"] * 3).unique().numel() == 1 and part.seen == 0
    alone = Scaled(1)
    assert Reward(partial(alone), 0, 1000)([""] * 3, ["a"] * 3).unique().numel() == 1 and alone.seen == 0


# As the trainers read them -----------------------------------------------------------------------------------------


def read(given, weights=None, **settings):
    return read_reward_funcs(given, weights, RewardConfig(**settings), ROWS)


def test_what_a_function_needs_is_a_column_and_no_other_is():
    config, parts = read(of_answer)
    assert config.columns == ["answer"] and parts == [of_answer] and config.source == "test_reward_funcs:of_answer"
    assert read([of_answer, of_completions], [1, 0.5])[0].source == (
        "1 test_reward_funcs:of_answer + 0.5 test_reward_funcs:of_completions"
    )
    assert read(of_completions, columns=["style"])[0].columns == ["style"]
    assert read(partial(times, factor=2))[0].source == "test_reward_funcs:times (partial)"
    assert read(Scaled(1))[0].source == "test_reward_funcs:Scaled"


async def later(completions):
    return [0.0]


@pytest.mark.parametrize(
    ("given", "weights", "said"),
    [
        ([of_answer], [1.0, 2.0], "2 numbers for 1 reward functions"),
        ([], None, "is empty"),
        (later, None, "is a coroutine"),
        (7, None, "'int' object is not iterable|is no function"),
        ([7], None, "int is no function"),
        (lambda completions, completion_ids: [0.0], None, "'completion_ids': a reward reads text"),
        (lambda completions, nothing: [0.0], None, "'nothing': no record of train_dataset"),
    ],
)
def test_what_cannot_be_a_reward_is_refused(given, weights, said):
    with pytest.raises((DPAlignError, TypeError), match=said):
        read(given, weights)


def test_a_model_by_its_name(tmp_path):
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    folder = str(tmp_path / "classifier")
    BertForSequenceClassification(
        BertConfig(vocab_size=VOCABULARY, num_labels=1, initializer_range=0.5, **size)
    ).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    config, parts = read(folder)
    assert (config.source, config.use_logit, config.text, parts) == (
        f"classifier:{folder}", True, "prompt+completion", [],
    )  # fmt: skip
    config, parts = read([folder, of_completions], [2.0, 1.0])
    function = reward_function(parts, [2.0, 1.0], config, "cpu")
    alone = reward_function([folder, silent], None, config, "cpu")
    plain, weighted = alone(["w1"], [" w2"])[0], function(["w1"], [" w2"])[0]
    assert weighted == pytest.approx(2 * plain + 3) and plain != 0
    release = tmp_path / "release"
    release.mkdir()
    (release / "reward.json").write_text("{}")
    assert read(str(release))[0].source == f"reward_model:{release}"
    with pytest.raises(DPAlignError, match="give it alone"):
        read([str(release), of_completions])


def short_and_right(prompts, completions, answer, **kwargs):
    return [1.0 if a in c else 0.0 for a, c in zip(answer, completions, strict=True)]


def test_a_trainer_takes_them(tmp_path):
    base = str(tiny_folder("llama", tmp_path / "base"))
    small = {"max_prompt_length": 8, "max_completion_length": 2, "max_steps": 1, "per_device_train_batch_size": 4}
    declared = Privacy(
        noise_multiplier=2.0, dataset_name="toy", model_is_public=True, reward_is_public=True, reward_range=(-1, 2)
    )
    trainer = DPRLOOTrainer(
        model=base, args=RLOOConfig(output_dir=str(tmp_path / "run"), reward_weights=[1.0, 0.1], **small),
        train_dataset=ROWS, reward_funcs=[short_and_right, partial(times, factor=0.1)], privacy=declared, quiet=True,
    )  # fmt: skip
    assert trainer.train()["private"]
    reward = trainer._recipe.rollouts.reward
    assert (reward.low, reward.high, reward.columns) == (-1, 2, ["answer"])
    assert any("0.1 test_reward_funcs:times (partial)" in a for a in trainer.privacy["assumptions"])
    with pytest.raises(DPAlignError, match="reward_weights is for reward_funcs"):
        DPPPOTrainer(base, PPOConfig(output_dir="x", reward_weights=[1.0]), ROWS, privacy=declared)
