"""`dpalign generate --best_of N`: the choice by hand, the same texts as without it, and what is said of the reward."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch

from chats import model_folder
from dpalign.cli.generate import best_of
from dpalign.models import ModelConfig, Normalization, RewardModel, embedded
from dpalign.models.reward_model import TextFormat
from dpalign.models.stack import AdapterConfig
from dpalign.rewards import RewardConfig, load_reward
from helpers import call, write_jsonl
from test_evaluate import OUTSIDE, state

FILM = ("generate", "tiny-review-lm", "--prepend_bos", "--max_completion_length", 8)
TWO = ("--prompt", "The film", "--prompt", "I thought that", "--seed", 3)


def test_the_best_of_each_group_by_hand():
    rows = [{"completion": letter} for letter in "abcdefghi"]
    scores = torch.tensor([0.5, 0.25, 0.5, math.nan, -1.0, -3.0, *[math.nan] * 3])
    found = best_of(3, rows, scores)
    # Of equal ones the first; one without a score not even behind a negative one; the first of a group without any.
    assert [row["completion"] for row in found] == ["a", "e", "g"]
    assert [row["score"] for row in found][:2] == [0.5, -1.0] and math.isnan(found[2]["score"])
    assert [row["mean_score"] for row in found][:2] == pytest.approx([1.25 / 3, -2.0])
    assert math.isnan(found[2]["mean_score"])


def test_it_chooses_among_what_is_written_without_it(capsys):
    """Two prompts, two completions each, of which each is the best of three."""
    written = call(capsys, *FILM, *TWO, "--num_generations", 6, "--json").json["completions"]
    found = call(
        capsys, *FILM, *TWO, "--num_generations", 2, "--best_of", 3, "--reward", "vader", "--json"
    ).json  # fmt: skip
    reward = load_reward(RewardConfig())
    scores = reward([row["prompt"] for row in written], [row["completion"] for row in written])
    assert len({*scores.tolist()}) > 4, "otherwise the choice shows nothing"
    groups = scores.view(4, 3)
    assert [row["score"] for row in found["completions"]] == pytest.approx(groups.max(1).values.tolist())
    assert [row["mean_score"] for row in found["completions"]] == pytest.approx(groups.mean(1).tolist())
    chosen = [written[3 * number + int(place)] for number, place in enumerate(groups.argmax(1))]
    assert [{name: row[name] for name in ("prompt", "completion")} for row in found["completions"]] == chosen
    assert found["best_of"] == 3 and found["reward"] == "vader" and found["outside_the_guarantee"] is False
    assert found["kl_at_most"] == pytest.approx(0.43195, abs=1e-5)  # log 3 - 2/3


def test_the_terminal_shows_the_score(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    called = call(capsys, *FILM, *TWO, "--best_of", 3, "--reward", "vader")
    rows = call(capsys, *FILM, *TWO, "--best_of", 3, "--reward", "vader", "--json").json["completions"]
    for row in rows:
        assert f"score {row['score']:.3f}, mean of 3: {row['mean_score']:.3f}" in called.out
    assert OUTSIDE not in called.out


def test_top_p_is_honoured(capsys):
    found = call(capsys, *FILM, "--prompt", "The", "--num_generations", 6, "--top_p", 1e-6, "--json").json
    assert len({row["completion"] for row in found["completions"]}) == 1


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "judges", raising=False)
    (tmp_path / "judges.py").write_text(
        "def seen(prompts, completions, tone):\n"
        "    return [score(*row) for row in zip(prompts, completions, tone)]\n"
        "def score(prompt, completion, tone):\n"
        "    is_chat = prompt == [{'role': 'user', 'content': 'Is it?'}] and completion[0]['role'] == 'assistant'\n"
        "    return {'kind': 2.0, 'curt': 1.0}.get(tone, 0.0) + is_chat / 2\n"
    )
    return tmp_path


def test_a_function_is_given_what_was_asked(rewards, capsys):
    """A chat's messages, the answer as a message, and the columns of the prompt's own record."""
    chat = [{"role": "user", "content": "Is it?"}]
    write_jsonl(rewards / "asked.jsonl", [{"prompt": chat, "tone": "kind"}, {"prompt": chat, "tone": "curt"}])
    declared = ("--reward_is_public", "--reward_low", 0, "--reward_high", 5, "--reward_columns", "tone")
    called = call(
        capsys, "generate", model_folder(rewards / "base", "qwen"), "--prompts", "asked.jsonl", "--best_of", 2, "--reward",
        "judges:seen", *declared, "--max_completion_length", 3, "--json",
    )  # fmt: skip
    assert len(called.json["completions"]) == 2 and called.json["completions"][0]["prompt"].endswith("assistant\n")
    assert [row["score"] for row in called.json["completions"]] == [2.5, 1.5]


@pytest.mark.parametrize(("private", "epsilon"), [(True, 4.0), (False, "inf")])
def test_what_a_reward_without_a_guarantee_chose_is_labelled(private, epsilon, tmp_path, capsys):
    model = RewardModel.load(ModelConfig(), text=TextFormat(max_length=16))
    model.add_adapter("reward", AdapterConfig(r=2))
    folder = state(tmp_path / "reward_model", private, epsilon)
    model.save(folder, embedded.resolve("tiny-review-lm"), Normalization())
    options = (*FILM, *TWO, "--best_of", 2, "--reward", f"reward_model:{folder}")
    assert call(capsys, *options, "--json").json["outside_the_guarantee"] is not private
    assert ("outside the guarantee: the reward" in call(capsys, *options).out) is not private


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--best_of", 3), "--best_of needs the reward that chooses"),
        (("--reward", "vader"), "--reward chooses among several completions: say how many with --best_of"),
        (("--reward_low", 0), "--reward_low chooses among several completions"),
        (("--best_of", 1, "--reward", "vader"), "1 must be at least 2"),
        (("--best_of", 2, "--reward", "judges:seen"), "must be declared public"),
        (("--best_of", 2, "--reward", "reward_model:nowhere"), "not the release of a reward model"),
        (("--best_of", 2, "--reward", "contrast.yaml"), "name one in reward.base"),
    ],
)
def test_what_cannot_choose_is_refused(options, says, rewards, capsys):
    section = {"source": "contrast", "wanted": "a good", "unwanted": "a bad"}
    (rewards / "contrast.yaml").write_text(json.dumps(section))
    assert says in call(capsys, *FILM, *TWO, *options).error
