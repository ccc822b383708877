"""Offline alignment's arithmetic by hand, and what its completions are sampled from."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from chats import byte_tokenizer
from dpalign import DPOfflineTrainer, Privacy
from dpalign import OfflineConfig as OfflineArguments
from dpalign.algorithms import Offline, OfflineConfig
from dpalign.algorithms.base import Rows, encode_units
from dpalign.algorithms.completions import sample
from dpalign.algorithms.offline import best, halves, summary
from dpalign.data.text import encode_prompt_text
from dpalign.domains import check_settings
from dpalign.errors import DPAlignError
from dpalign.evaluation import measure_policy, public_prompts
from dpalign.evaluation.private import _measure
from dpalign.models import Policy
from dpalign.models.generation import Prompt, with_words
from dpalign.models.policy import Rollouts
from dpalign.models.prompt_format import PromptFormat, prompt_format_of
from dpalign.privacy.entropy import SystemEntropy
from dpalign.rewards import Reward
from helpers import call, ledger_rows, reviews, small_model, write_jsonl, write_recipe
from tiny import tiny_policy, words

NAN = math.nan


def offline(score=lambda prompts, completions, **_: [len(c) / 20 for c in completions], **settings) -> Offline:
    settings = {"noise_multiplier": 1.0, "expected_batch_size": 8, "max_prompt_length": 6} | settings
    return Offline(OfflineConfig(**settings), Reward(score, -5, 5))


# Weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "keep", "weights"),
    [
        ([1.0, 4.0, 3.0, 2.0], 1, [0, 1, 0, 0]),
        ([1.0, 4.0, 3.0, 2.0], 2, [0, 1, 1, 0]),
        ([4.0, 4.0, 3.0, 2.0], 1, [0.5, 0.5, 0, 0]),
        ([4.0, 3.0, 3.0, 3.0], 2, [1, 1 / 3, 1 / 3, 1 / 3]),
        ([2.0, 2.0, 2.0, 2.0], 3, [0.75, 0.75, 0.75, 0.75]),
        ([-1.0, NAN, -2.0, NAN], 1, [1, 0, 0, 0]),
        ([-1.0, NAN, NAN, NAN], 2, [1, 0, 0, 0]),
        ([NAN, NAN, NAN, NAN], 1, [0, 0, 0, 0]),
        ([1.0, 1.0 + 1e-6, 0.0, 0.0], 1, [0.5, 0.5, 0, 0]),
        ([1e-4, 2e-4, 0.0, -1e-4], 1, [0, 1, 0, 0]),
        ([0.0, 0.0, 0.0, NAN], 1, [1 / 3, 1 / 3, 1 / 3, 0]),
    ],
)
def test_the_best_by_hand(scores, keep, weights):
    assert best(torch.tensor([scores]), keep)[0].tolist() == pytest.approx(weights)
    backwards = best(torch.tensor([scores[::-1], [0.0, 1.0, 2.0, 3.0]]), keep)[0]
    assert backwards.tolist() == pytest.approx(weights[::-1]), "neither the place nor another prompt says anything"


def test_the_softmax_by_hand():
    scores = torch.tensor([[0.0, math.log(3.0), NAN], [NAN, NAN, NAN], [2.0, 2.0, 2.0], [-900.0, NAN, -901.0]])
    found = offline(method="weighted", reward_temperature=1.0, num_generations=3).weights(scores)
    assert found[0].tolist() == pytest.approx([0.25, 0.75, 0])
    assert found[1].tolist() == [0, 0, 0] and found[2].tolist() == pytest.approx([1 / 3] * 3)
    assert found[3].tolist() == pytest.approx([1 / (1 + math.exp(-1)), 0, 1 / (1 + math.e)])
    sharper = offline(method="weighted", reward_temperature=0.5, num_generations=3).weights(scores)
    assert sharper[0].tolist() == pytest.approx([0.1, 0.9, 0])


@pytest.mark.parametrize(
    ("scores", "sides"),
    [
        ([1.0, 4.0, 3.0, 2.0], [-1, 1, 1, -1]),
        ([1.0, 3.0, 2.0, NAN], [-1, 1, 0, 0]),
        ([4.0, 4.0, 4.0, 1.0], [1, 1, 1, -1]),
        ([2.0, 2.0, 2.0, 2.0 + 1e-6], [0, 0, 0, 0]),
        ([5.0, NAN, NAN, NAN], [0, 0, 0, 0]),
    ],
)
def test_the_halves_by_hand(scores, sides):
    assert halves(torch.tensor([scores]))[0].tolist() == sides
    assert halves(torch.tensor([scores[::-1], [0.0, 1.0, 2.0, 3.0]]))[0].tolist() == sides[::-1]


def test_the_summary_by_hand():
    scores = torch.tensor([[1.0, 5.0, 3.0, NAN], [7.0, 7.0, 7.0, 7.0], [NAN] * 4])
    weights = torch.tensor([[0.0, 0.75, 0.25, 0.0], [0.5] * 4, [0.0] * 4])
    means = summary(scores, weights).mean(1)
    # Reward 9 / 3; by weight 0.75 * 5 + 0.25 * 3; share 1 / (4 * (0.5625 + 0.0625)).
    assert torch.allclose(means, torch.tensor([[3.0, 4.5, 0.4], [7.0, 7.0, 1.0], [NAN] * 3]), equal_nan=True)


# Loss --------------------------------------------------------------------------------------------------------


@dataclass
class FixedPolicy:
    """Answers with given log-probabilities."""

    logprobs: Tensor

    def completion_logprobs(self, rollouts: Rollouts, *law: float) -> tuple[Tensor, Tensor]:
        return self.logprobs, torch.zeros_like(self.logprobs)


def test_loss_worked_by_hand():
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    ids = torch.zeros(2, 5, dtype=torch.int64)
    rows = Rows(torch.zeros(2, dtype=torch.int64), {
        "input_ids": ids, "attention_mask": ids, "completion_mask": mask, "weights": torch.tensor([0.25, -0.75]),
        "ref_logprobs": torch.tensor([[-1.5, -1.0, 9.0], [-0.5, -0.5, -1.0]]),
        "told": torch.tensor([[0.5, 0.6, 0.7], [1.5, 1.6, 1.7]]),
    })  # fmt: skip
    logprobs = torch.tensor([[-1.0, -0.5, 7.0], [-1.0, -1.0, -1.0]], requires_grad=True)
    losses, metrics = offline(max_completion_length=3).row_losses(FixedPolicy(logprobs), rows)
    assert losses.tolist() == pytest.approx([0.25 * 1.5 / 3, 0.75 * 3 / 3])
    # Reward, KL of the start against the policy (-2.5 + 1.5, and -2 + 3), length, reward by weight, share.
    assert torch.allclose(metrics, torch.tensor([[0.5, -1.0, 2.0, 0.6, 0.7], [1.5, 1.0, 3.0, 1.6, 1.7]]))
    losses.sum().backward()
    assert torch.allclose(logprobs.grad, -torch.tensor([[0.25, 0.25, 0.0], [0.75, 0.75, 0.75]]) / 3)


# Rows --------------------------------------------------------------------------------------------------------

UNITS = [[{"prompt": words(2, 1)}, {"prompt": words(3, 2)}], [{"prompt": words(1, 3)}]]


def rows_of(algorithm: Offline, moved_by: float) -> Rows:
    """Rows of the units, with the stage's adapter moved."""
    policy = tiny_policy("llama")
    algorithm.setup(policy)
    for p in policy.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=moved_by, generator=torch.Generator().manual_seed(1))
    examples = encode_units(algorithm, policy, UNITS)
    torch.manual_seed(3)
    return algorithm.rows(policy, examples, None)


def test_completions_are_of_what_the_stage_started_from():
    """However far the policy has moved, it learns from the same completions."""
    settings = {"num_generations": 4, "max_completion_length": 6}
    near, far = (rows_of(offline(**settings), moved) for moved in (1e-3, 3.0))
    assert all(torch.equal(near.tensors[name], far.tensors[name]) for name in ("input_ids", "scores", "weights"))
    assert torch.allclose(near.tensors["ref_logprobs"], far.tensors["ref_logprobs"])


def test_weights_are_by_prompt_within_their_units():
    rows = rows_of(offline(num_generations=4, max_completion_length=6), 0.1)
    assert rows.unit.tolist() == [0] * 8 + [1] * 4
    weights, scores = rows.tensors["weights"].view(3, 4), rows.tensors["scores"].view(3, 4)
    assert weights.sum(1).tolist() == pytest.approx([1.0] * 3) and len({*scores.flatten().tolist()}) > 3
    assert (weights * scores).sum(1).tolist() == pytest.approx(scores.max(1).values.tolist())


def test_a_completion_without_a_reward_is_not_learned():
    """Of the first prompt every second completion has one, of the last none has."""
    given = iter([1.0, NAN, 2.0, NAN, *[0.5] * 4, *[NAN] * 4])
    rows = rows_of(
        offline(lambda prompts, completions, **_: [next(given) for _ in completions], num_generations=4), 0.1
    )
    assert rows.tensors["weights"].tolist() == [0, 0, 1, 0, *[0.25] * 4, 0, 0, 0, 0]
    assert rows.tensors["scores"].isfinite().all()
    told = rows.tensors["told"].view(3, 4, 3).mean(1)
    assert told[:2].tolist() == [[1.5, 2.0, 0.25], [0.5, 0.5, 1.0]] and told[2].isnan().all()


# Words in front ----------------------------------------------------------------------------------------------

WORDS = {"method": "conditional", "good": "w80 w81 ", "bad": "w90 "}


def test_halves_stand_behind_their_words():
    """Sampled without words, by what the stage started from; then the better half is behind `good`, the other behind `bad`."""
    plain = rows_of(offline(num_generations=4, max_completion_length=6, max_prompt_length=8), 0.1)
    rows = rows_of(offline(num_generations=4, max_completion_length=6, max_prompt_length=8, **WORDS), 0.1)
    assert torch.equal(rows.tensors["input_ids"][:, 8:], plain.tensors["input_ids"][:, 8:])
    for name in ("scores", "ref_logprobs", "completion_mask"):
        assert torch.equal(rows.tensors[name], plain.tensors[name])
    weights = rows.tensors["weights"].view(3, 4)
    assert torch.equal(weights, halves(rows.tensors["scores"].view(3, 4))) and {*weights.flatten().tolist()} >= {1, -1}
    learned = weights.clamp(min=0) / weights.clamp(min=0).sum(1, keepdim=True)  # what the metrics call learned is good
    mean = (learned * rows.tensors["scores"].view(3, 4)).sum(1)
    assert torch.allclose(rows.tensors["told"].view(3, 4, 3)[:, :, 1].mean(1), mean)
    number = tiny_policy("llama").tokenizer.get_vocab()
    for row, weight in enumerate(weights.flatten().tolist()):
        words = [number[word] for word in (["w90"] if weight < 0 else ["w80", "w81"])]
        prompt, asked = (
            r.tensors["input_ids"][row, :8][r.tensors["attention_mask"][row, :8] > 0] for r in (plain, rows)
        )
        assert asked.tolist() == words + prompt.tolist()


def test_the_policy_is_asked_with_the_good_words_and_its_reference_without():
    policy, algorithm = tiny_policy("llama"), offline(max_completion_length=3, **WORDS)
    assert policy.asked_with == ""
    algorithm.setup(policy)
    for p in policy.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)
    assert policy.asked_with == "w80 w81 "
    with policy.reference():
        assert policy.asked_with == ""
    prompts = public_prompts(policy, [{"prompt": f"w{i} w2"} for i in range(5)], algorithm.config)
    measured = measure_policy(policy, prompts, algorithm.reward, algorithm.config, seed=4)
    torch.manual_seed(4)
    ids = policy.tokenizer([f"w80 w81 w{i} w2" for i in range(5)], return_tensors="pt").input_ids
    rollouts = policy.sample(ids, torch.ones_like(ids), 3)
    assert policy.decode(rollouts) == measured.completions
    bare = Rollouts(rollouts.input_ids[:, 2:], rollouts.attention_mask[:, 2:], rollouts.completion_mask)
    with torch.no_grad():
        ours = policy.completion_logprobs(rollouts)[0].sum(1)
        with policy.reference():
            theirs = policy.completion_logprobs(bare)[0].sum(1)
    assert measured.evaluation.kl == pytest.approx(float((ours - theirs).mean()), abs=1e-5)
    nats = -float(theirs.sum()) / float(rollouts.completion_mask.sum())
    assert measured.evaluation.perplexity == pytest.approx(math.exp(nats), rel=1e-5)


def test_a_private_measurement_asks_so_too(monkeypatch):
    """Rows of a constant width: the reference has room for words that it is not asked with."""
    policy, algorithm = tiny_policy("llama"), offline(max_completion_length=3, **WORDS)
    algorithm.setup(policy)
    seen = []

    def spied(policy, ids, mask, config, coins):
        seen.append((ids.shape[1], ids[0][mask[0] > 0].tolist()))
        return sample(policy, ids, mask, config, coins)

    monkeypatch.setattr("dpalign.evaluation.private.sample", spied)
    found = _measure(policy, [[{"prompt": "w3 w2"}]], algorithm.reward, algorithm.config, SystemEntropy())
    asked, plain = (policy.tokenizer(text).input_ids for text in ("w80 w81 w3 w2", "w3 w2"))
    assert (
        [ids for _, ids in seen] == [asked, plain] and len({width for width, _ in seen}) == 1 and found.isfinite().all()
    )


@pytest.mark.parametrize("template", ["llama", "qwen", "smol", "gemma", "mistral"])
def test_words_in_front_of_a_chat(template):
    """A system message where the template writes one; else, and behind one that is there, in the first message."""
    tokenizer = byte_tokenizer(template)
    chat = [{"role": "user", "content": "Is it?"}]
    prompt = Prompt(encode_prompt_text(tokenizer, chat), chat)
    system = [{"role": "system", "content": "Be kind."}, *chat]
    expected = {"gemma": [{"role": "user", "content": "Be kind.\n\nIs it?"}]}
    expected["mistral"] = expected["gemma"]
    found = with_words(tokenizer, prompt, "Be kind. ")
    assert found == encode_prompt_text(tokenizer, expected.get(template, system))
    assert with_words(tokenizer, prompt, "") == prompt.ids
    if template not in expected:
        both = [{"role": "system", "content": "Be brief.\n\nBe kind."}, *chat]
        assert with_words(tokenizer, Prompt([], system), "Be brief.") == encode_prompt_text(tokenizer, both)


def test_words_stand_behind_bos():
    tokenizer = byte_tokenizer()
    ids = encode_prompt_text(tokenizer, "Is it?", prepend_bos=True)
    assert with_words(tokenizer, Prompt(ids, "Is it?"), "Well: ") == encode_prompt_text(
        tokenizer, "Well: Is it?", prepend_bos=True
    )


CONDITIONAL = {
    "prompts": "self_written", "method": "conditional", "good": "Good: ", "bad": "Bad: ", "max_steps": 1,
    "expected_batch_size": 6, "num_generations": 2, "prepend_bos": True, "prompt_max_tokens": 4, "max_prompt_length": 12,
    "max_completion_length": 6, "adapter": {"r": 2},
}  # fmt: skip


def test_whoever_uses_the_release_need_not_know(tmp_path, capsys, monkeypatch):
    """The words are in prompts.json and the card; generate and evaluate ask with them and do not show them."""
    public = write_jsonl(tmp_path / "public.jsonl", reviews(3, "public"))
    recipe = write_recipe(
        tmp_path, sft=None, ppo=None, offline=CONDITIONAL, data={"eval_path": str(public), "eval_is_public": True}
    )
    assert call(capsys, "run", recipe, "--json").json["evaluation"]["offline"]["prompts"] == 3
    release = tmp_path / "run" / "release"
    assert json.loads((release / "prompts.json").read_text())["asked_with"] == "Good: "
    assert "`Good: `" in (release / "README.md").read_text()
    seen, sample = [], Policy.sample

    def spied(policy, ids, mask, *arguments, **options):
        seen.append(policy.tokenizer.decode(ids[0][mask[0] > 0], skip_special_tokens=True))
        return sample(policy, ids, mask, *arguments, **options)

    monkeypatch.setattr(Policy, "sample", spied)
    found = call(capsys, "generate", release, "--prompt", "It is", "--max_completion_length", 2, "--json").json
    assert seen == ["Good: It is"] and found["completions"][0]["prompt"] == "It is"
    assert call(capsys, "export", release, "--merge", "--to", tmp_path / "merged").status == 0
    call(capsys, "generate", tmp_path / "merged", "--prompt", "It is", "--max_completion_length", 2)
    assert seen[1:] == ["Good: It is"]
    seen.clear()
    options = ("--data", public, "--eval_is_public", "--prompt_tokens", 4, "--max_completion_length", 2, "--json")
    call(capsys, "evaluate", release, small_model(), *options).json  # noqa: B018
    assert [text.startswith("Good: ") for text in seen] == [True, False]
    more = call(capsys, "run", recipe, "--model.name_or_path", release, "--output_dir", tmp_path / "more")
    assert "has learned to be asked with words in front" in more.error


def test_a_release_of_before_has_no_words(tmp_path):
    (tmp_path / "prompts.json").write_text('{"prepend_bos": true, "chats": false}')
    assert prompt_format_of(tmp_path) == PromptFormat(prepend_bos=True)
    (tmp_path / "prompts.json").write_text('{"prepend_bos": true, "chats": false, "asked_with": 3}')
    with pytest.raises(DPAlignError, match="does not say how prompts are made"):
        prompt_format_of(tmp_path)


def test_there_has_to_be_room_for_the_words(tmp_path, capsys):
    own = write_recipe(tmp_path, sft=None, ppo=None, offline=CONDITIONAL | {"max_prompt_length": 5})
    assert "with the words in front of it, more than max_prompt_length 5" in call(capsys, "run", own).error
    records = write_recipe(
        tmp_path, sft=None, ppo=None, offline=CONDITIONAL | {"max_prompt_length": 5, "prompts": "private"}
    )
    said = call(capsys, "run", records).error
    assert "record 1 of" in said and "tokens with the words in front of it" in said and ledger_rows(tmp_path) == 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_generations": 1}, "num_generations 1 must be at least 2"),
        ({"keep": 4}, "keep 4 of num_generations 4 completions leaves nothing out"),
        ({"method": "weighted", "keep": 2}, "keep is for method filtered, not weighted"),
        ({"reward_temperature": 2.0}, "reward_temperature is for method weighted, not filtered"),
        ({"good": "w1"}, "good is for method conditional, not filtered"),
        ({"method": "conditional", "good": "A", "bad": "A "}, "good and bad are the same words"),
        ({"method": "conditional", "truncate_prompts": True}, "truncate_prompts would cut off"),
        ({"reward_temperature": 0.0, "method": "weighted"}, "reward_temperature 0.0 must be at least"),
    ],
)
def test_what_cannot_be_learned_is_refused(changes, says):
    with pytest.raises(DPAlignError, match=says):
        check_settings(OfflineConfig(**changes))


def test_a_trainer_on_private_prompts(tmp_path):
    """Every update draws, and is in the statement; its metrics have the declared names."""
    args = OfflineArguments(
        output_dir=str(tmp_path / "run"), method="weighted", reward_temperature=0.1, num_generations=3, max_steps=2,
        expected_batch_size=8, prepend_bos=True, prompt_max_tokens=4, max_prompt_length=5, max_completion_length=6,
    )  # fmt: skip
    privacy = Privacy(
        target_epsilon=8.0, dataset_name="reviews", declared_units=40, model_is_public=True, reward_is_public=True,
        reward_range=(0.0, 1.0), ledger=str(tmp_path / "ledger.sqlite"),
    )  # fmt: skip

    def short(completions):
        return [1 / (1 + len(c)) for c in completions]

    trainer = DPOfflineTrainer(small_model(), args, reviews(40), reward_funcs=short, privacy=privacy, quiet=True)
    done = trainer.train()
    assert done["private"] and 0 < done["epsilon"] <= 8 and ledger_rows(tmp_path) == 2
    assert [(s["stage"], s["units"]) for s in done["stages"]] == [("offline", 40)]
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    names = ["reward", "forward_kl", "completion_length", "learned_reward", "learned_share"]
    assert [*line["noised_metrics"]] == names
