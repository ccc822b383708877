"""`reward_funcs` as TRL's users give them: what a function is called with, and what several of them add up to."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from dpalign import DPAlignError, DPPPOTrainer, DPRLOOTrainer, PPOConfig, Privacy, RLOOConfig
from dpalign.algorithms.rloo import RLOOConfig as RLOOSettings
from dpalign.models import ModelConfig, Normalization, RewardModel
from dpalign.provenance import check_provenance
from dpalign.recipe import Recipe
from dpalign.rewards import Reward, load_reward
from dpalign.rewards.foreign import signature_of
from dpalign.rewards.weighted import Weighted, sum_of, terms_of
from dpalign.settings.data import DataConfig
from dpalign.settings.rewards import RewardConfig
from dpalign.trainers.rewards import read_reward_funcs, reward_function
from reader import ROOT
from test_reward_model import reward_model
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


# A released reward model among them --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    """A reward model on the scale 2 * score + 0.5, that was trained with privacy on 'texts' and 'pairs'."""
    folder = tmp_path_factory.mktemp("released")
    base = reward_model()
    base.save(folder / "release", str(tiny_folder("gpt2", folder / "base")), Normalization(2.0, 0.5))
    shutil.copy(ROOT / "tests" / "formats" / "privacy_reward_model.json", folder / "release" / "privacy.json")
    return folder / "release"


@pytest.mark.parametrize("weights", [None, [2.0, 3.0]])
def test_a_release_in_a_list_scores_as_it_does_alone(release, weights):
    config, parts = read([str(release), of_completions], weights)
    assert config.source == sum_of(weights or [1, 1], [f"reward_model:{release}", "test_reward_funcs:of_completions"])
    first, second = weights or [1.0, 1.0]
    alone = load_reward(RewardConfig(source=f"reward_model:{release}", low=-99, high=99))
    function = reward_function(parts, weights, config, "cpu")
    reward = load_reward(replace(config, is_public=True, low=-99, high=99), function=function)
    prompts, completions = ["w1 w2", "w3"], [" w4", " w5 w6"]
    expected = first * alone(prompts, completions) + second * torch.tensor([3.0, 6.0])
    assert torch.allclose(reward(prompts, completions), expected, atol=1e-4) and reward.rows_at_once == 1
    raw = RewardModel.load(ModelConfig(str(release))).score(["w1 w2 w4"])
    assert alone(prompts[:1], completions[:1]).tolist() == pytest.approx([2 * float(raw) + 0.5], abs=1e-4)


def test_a_list_of_releases_needs_no_word_of_anybody_and_is_called_with_all_rows(release):
    config, parts = read([str(release)], [2.0])
    function = reward_function(parts, [2.0], config, "cpu")
    assert load_reward(replace(config, low=-9, high=9), function=function).rows_at_once is None
    with pytest.raises(DPAlignError, match="must be declared public"):  # what is not ours is not believed
        load_reward(replace(config, low=-9, high=9), function=of_completions)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("declared", [False, True])
def test_the_past_of_a_release_in_a_list_is_checked_as_if_it_were_alone(parts, declared, release):
    def origin(source):
        reward = RewardConfig(source=source, is_public=True, low=-1, high=1)
        rloo = RLOOSettings(reward=reward, noise_multiplier=2.0, max_steps=1)
        data = DataConfig(name="toy", declared_units=9)
        disjoint = "declared" if declared else None
        recipe = Recipe(output_dir="out", model=ModelConfig(), data=data, rloo=rloo, units_disjoint=disjoint)
        return check_provenance(recipe)["rloo.reward"]

    alone, listed = f"reward_model:{release}", sum_of([2.0, 1.0][:parts], [f"reward_model:{release}", "m:f"][:parts])
    if not declared:  # other datasets, of which nobody says that they are other people's
        for source in (alone, listed):
            with pytest.raises(DPAlignError, match="declare units_disjoint: declared"):
                origin(source)
        return
    assert origin(listed).stages == origin(alone).stages and len(origin(alone).stages) == 2
    more = {text for text in origin(listed).assumptions if "1 m:f'" in text}
    assert set(origin(listed).assumptions) - more == set(origin(alone).assumptions) and len(more) == parts - 1


def test_a_path_that_reads_like_a_sum_is_refused_among_several():
    with pytest.raises(DPAlignError, match=r"must not hold ' \+ '"):
        read(["a + 2 b", of_completions])
    assert terms_of("classifier:a + 2 b") == [] and terms_of("0.5 m:f + -1e-05 m:g (partial)") == [
        "m:f",
        "m:g (partial)",
    ]


def test_a_trainer_asks_for_the_range_of_a_sum_of_releases_and_for_no_declaration(release):
    args = RLOOConfig(output_dir="x", reward_weights=[2.0])
    with pytest.raises(DPAlignError) as told:
        DPRLOOTrainer("tiny-review-lm", args, ROWS, reward_funcs=[str(release)], privacy=Privacy(target_epsilon=8))
    assert "reward_range" in str(told.value) and "reward_is_public" not in str(told.value)


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
