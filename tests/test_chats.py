"""Chats from end to end: supervised fine-tuning on messages, a reward model on chat pairs, and a policy that it scores."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from chats import TEMPLATES, byte_tokenizer, model_folder
from dpalign.algorithms import basis
from dpalign.algorithms.completions import read_prompt
from dpalign.algorithms.ppo import PPOConfig
from dpalign.algorithms.reward import encode_pair
from dpalign.algorithms.sft import SFT, SFTConfig
from dpalign.data.columns import only_columns
from dpalign.data.text import encode_completion, opening_of_a_turn, turn_end
from dpalign.errors import DPAlignError
from dpalign.models import AdapterConfig, Policy, RewardModel, TextFormat
from dpalign.models.generation import answers, padded, write_prompts
from dpalign.models.policy import Rollouts
from dpalign.models.prompt_format import PromptFormat, prompt_format_of
from dpalign.release import as_trained
from dpalign.rewards import Reward
from dpalign.rewards.base import PROBES
from dpalign.rewards.learned import Learned
from dpalign.run import Run
from helpers import call, merged, write_jsonl, write_recipe

NOUNS = ["film", "play", "novel", "series", "concert", "game"]


def policy(template: str) -> Policy:
    tokenizer = byte_tokenizer(template)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return Policy(LlamaForCausalLM(config), tokenizer)


def reward_model(template: str) -> RewardModel:
    tokenizer = byte_tokenizer(template, adds="bos")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256, pad_token_id=0, num_labels=1,
    )  # fmt: skip
    return RewardModel(AutoModelForSequenceClassification.from_config(config), tokenizer, TextFormat(200))


def asked(i: int) -> dict:
    return {"role": "user", "content": f"Is {NOUNS[i % 6]} {i} good?"}


def said(words: str) -> dict:
    return {"role": "assistant", "content": words}


CHATS = [{"id": i, "messages": [asked(i), said(f"Yes, {NOUNS[i % 6]} {i} is.")]} for i in range(64)]
PAIRS = [
    {"id": 1000 + i, "prompt": [asked(1000 + i)], "chosen": [said("Yes.")], "rejected": [said(f"No {i}.")]}
    for i in range(64)
]


# What a reward model reads ----------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["same", "llama", "gemma"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_completion_is_scored_on_the_ids_that_a_pair_with_it_was_learned_on(template, other):
    """The policy's answer, sampled token by token, and the same answer in a pair: equal ids for the reward model."""
    writer, judge = policy(template), reward_model(template if other == "same" else other)
    read: list[list[int]] = []
    judge.pad = lambda rows: read.extend(rows) or RewardModel.pad(judge, rows)
    for i, words in ((0, "the best"), (1, "he's right, then.")):
        record = {"prompt": [asked(i)], "messages": None}
        prompt = read_prompt(writer.tokenizer, record, PPOConfig())
        learned = encode_completion(writer.tokenizer, [asked(i)], [said(words)])
        end = learned.ids.index(turn_end(writer.tokenizer), learned.prompt_tokens)
        row = torch.tensor([learned.ids[: end + 1]])  # the policy stops where the turn ends
        mask = torch.tensor([learned.learned[learned.prompt_tokens : end + 1]]).float()
        assert prompt is not None and row[0, : learned.prompt_tokens].tolist() == prompt.ids
        texts = answers(writer, [prompt], Rollouts(row, torch.ones_like(row), mask))
        assert texts == [words]
        read.clear()
        Learned(judge)([prompt.text], texts)
        pair = encode_pair(judge, {"prompt": [asked(i)], "chosen": [said(words)], "rejected": [said("no")]})
        assert read == [pair.chosen] * 64, "and the rows that fill a chunk up are the same"


@pytest.mark.parametrize("template", TEMPLATES)
def test_generation_stops_at_a_turns_end_at_eos_and_at_what_the_model_says(template):
    given = policy(template).model
    given.generation_config.eos_token_id = [2, 30]
    writer = Policy(given, byte_tokenizer(template))
    assert writer.stop_ids == sorted({2, 30, turn_end(writer.tokenizer)})
    ids = torch.full((256, 1), 40)
    torch.manual_seed(0)
    rollouts = writer.sample(ids, torch.ones_like(ids), 24, min_new_tokens=2)
    mask, stops = rollouts.completion_mask > 0, writer.stops(rollouts.completion_ids)
    assert (stops & mask).any(1).sum() > 8, "some rows stop"
    last = mask.sum(1) - 1
    before = mask & (torch.arange(24) < last[:, None])
    assert not (stops & before).any(), "no row goes on behind a stop"
    assert not stops[:, :2].any() and len(set(rollouts.completion_ids[stops & mask].tolist())) == len(writer.stop_ids)
    logprobs, _ = writer.completion_logprobs(rollouts, 2)
    scores = writer(rollouts.input_ids[:, :-1], rollouts.attention_mask[:, :-1], 24)[0]
    scores[:, :2, writer.stop_ids] = -torch.inf
    law = scores.log_softmax(2).gather(2, rollouts.completion_ids[..., None])[..., 0]
    assert torch.allclose(logprobs[mask], law[mask], atol=1e-5)


def test_a_reward_function_is_given_messages():
    """As TRL gives them."""
    wanted = [([asked(0)], [said("Yes.")]), ("Is it?", " No.")]

    def reward(prompts, completions, **columns):
        return [float(pair in wanted) for pair in zip(prompts, completions, strict=True)]

    assert Reward(reward, -1, 1)([[asked(0)], "Is it?"], ["Yes.", " No."]).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_models_own_prompts_are_chats(template):
    writer = policy(template)
    writer.asks_in_chats = True
    torch.manual_seed(3)
    prompts = write_prompts(writer, 5, 6, 4)
    assert len({tuple(prompt.ids) for prompt in prompts}) > 1
    for prompt in prompts:
        (message,) = prompt.text
        assert message["role"] == "user" and message["content"]
        chat = writer.tokenizer.apply_chat_template([message], add_generation_prompt=True)["input_ids"]
        assert prompt.ids == chat
    ids, mask = padded(writer, prompts)
    assert [row[m > 0].tolist() for row, m in zip(ids, mask, strict=True)] == [prompt.ids for prompt in prompts]


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_directions_of_a_chat_models_layers_are_of_its_own_chats(template, monkeypatch):
    writer, read = policy(template), []
    writer.asks_in_chats = True
    logprobs = writer.logprobs
    monkeypatch.setattr(writer, "logprobs", lambda ids, mask, after: read.append((ids, mask)) or logprobs(ids, mask, after))
    adapter = AdapterConfig(r=2, freeze_a=True, init_a="activations", init_rows=6)
    torch.manual_seed(3)
    SFT(SFTConfig(adapter=adapter, max_length=200, micro_batch_size=4)).setup(writer)
    texts = [row[m > 0].tolist() for ids, mask in read for row, m in zip(ids, mask, strict=True)]
    opening = opening_of_a_turn(writer.tokenizer)
    assert len(texts) == 6 and all(text[: len(opening)] == opening for text in texts)
    for a in (p for name, p in writer.named_parameters() if "lora_A" in name):
        assert torch.allclose(a @ a.T, torch.eye(2), atol=1e-4) and not a.requires_grad


# Through the command ----------------------------------------------------------------------------------------


def chat_recipe(folder: Path, **changes) -> Path:
    write_jsonl(folder / "chats.jsonl", CHATS)
    write_jsonl(folder / "pairs.jsonl", PAIRS)
    write_jsonl(folder / "public.jsonl", [{"prompt": [asked(i)]} for i in range(100, 104)])
    model_folder(folder / "model", "smol")
    public = {"eval_path": str(folder / "public.jsonl"), "eval_is_public": True}
    sections = {
        "model": {"name_or_path": str(folder / "model"), "is_public": True},
        "data": None,
        "sft_data": {"name": "chats", "path": str(folder / "chats.jsonl"), "unit": "id"},
        "reward_model_data": {"name": "pairs", "path": str(folder / "pairs.jsonl"), "unit": "id"},
        "rloo_data": {"name": "chats", "path": str(folder / "chats.jsonl"), "unit": "id"} | public,
        "sft": {"max_length": 128, "prepend_bos": False, "max_steps": 2},
        "reward_model": {"expected_batch_size": 8, "max_steps": 2, "max_length": 200, "adapter": {"r": 2}},
        "ppo": None,
        "rloo": {
            "expected_batch_size": 8, "max_steps": 2, "num_generations": 2, "max_prompt_length": 112,
            "max_completion_length": 8, "adapter": {"r": 2}, "reward": {"source": "reward_model"},
        },
    }  # fmt: skip
    return write_recipe(folder, **merged(sections, changes))


def test_sft_reward_and_rloo_on_chats(tmp_path, capsys, monkeypatch):
    read: list[list[int]] = []
    real = RewardModel.pad
    monkeypatch.setattr(RewardModel, "pad", lambda model, rows: read.extend(rows) or real(model, rows))
    monkeypatch.setattr(Run, "self_check", lambda *_: None)  # it writes random chats, some of them longer
    assert call(capsys, "run", chat_recipe(tmp_path), "--json").json["epsilon"] <= 2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    system = tokenizer.apply_chat_template([asked(0)])["input_ids"]
    probes = {tokenizer.decode(tokenizer(p + c).input_ids) for p, c in PROBES}
    chats = [ids for ids in read if tokenizer.decode(ids) not in probes and " awful awful" not in tokenizer.decode(ids)]
    assert len(chats) > 500 and all(ids[:20] == system[:20] for ids in chats), "every text is the template's"
    assert all(ids[-2:] == tokenizer("<|im_end|>\n").input_ids for ids in chats), "and its turn is ended"
    (first, *_) = json.loads((tmp_path / "run" / "completions.json").read_text())
    assert first["prompt"] == "user: Is series 100 good?\n".replace("series", NOUNS[100 % 6])


@pytest.mark.parametrize(
    ("file", "record", "says"),
    [
        ("chats.jsonl", {"messages": "Yes."}, "a string in one record and chat messages in another"),
        ("chats.jsonl", {"messages": [{"content": "Yes."}]}, "record 65 of .*: a chat message has no role"),
        (
            "pairs.jsonl",
            {"prompt": "What?", "chosen": [said("a")], "rejected": [said("b")]},
            "record 65.*two of a kind",
        ),
        ("pairs.jsonl", {"prompt": [asked(1)], "chosen": [said("a")], "rejected": [{"role": 3}]}, "record 65.*no role"),
    ],
)
def test_one_record_that_is_no_chat_is_named_before_a_draw(file, record, says, tmp_path, capsys):
    recipe = chat_recipe(tmp_path)
    with open(tmp_path / file, "a") as f:
        f.write(json.dumps({"id": 9999} | record) + "\n")
    called = call(capsys, "run", recipe, "--json")
    assert re.search(says, called.error) and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_release_says_how_its_prompts_were_made(tmp_path, capsys):
    call(
        capsys, "run", chat_recipe(tmp_path, reward_model=None, reward_model_data=None, rloo={"reward": None}), "--json"
    )
    release = tmp_path / "run" / "release"
    assert prompt_format_of(release) == PromptFormat(prepend_bos=False, chats=True)
    found = call(capsys, "generate", release, "--prompt", "Is it?", "--max_completion_length", 2, "--json").json
    tokenizer = AutoTokenizer.from_pretrained(release)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Is it?"}], add_generation_prompt=True)
    assert found["completions"][0]["prompt"] == tokenizer.decode(chat["input_ids"])
    plain = call(capsys, "generate", release, "--prompt", "Is it?", "--no-chat", "--max_completion_length", 2, "--json")
    assert plain.json["completions"][0]["prompt"] == "Is it?"
    (release / "prompts.json").write_text('{"prepend_bos": 1}')
    assert "does not say how prompts are made" in call(capsys, "generate", release, "--prompt", "Is it?").error


def test_releases_that_differ_are_asked_about(tmp_path):
    for name, prepend in (("one", True), ("two", False)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "prompts.json").write_text(json.dumps({"prepend_bos": prepend, "chats": False}))
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert as_trained([one, "tiny-review-lm"], None) and not as_trained([two], None)
    assert as_trained([two], True) and not as_trained([one], False)
    with pytest.raises(DPAlignError, match="one was trained with BOS in front"):
        as_trained([one, two], None)


def test_a_later_record_with_another_text_is_not_read_otherwise(tmp_path):
    records = [{"prompt": f"Is {i} good?", "completion": " Yes."} for i in range(3)]
    assert only_columns(records, SFT.columns) is records
    last = only_columns([*records, records[0] | {"text": "other", "id": 7}], SFT.columns)[-1]
    assert last == records[0] | {"id": 7}
    kept = only_columns([*records, records[0] | {"text": "other"}], SFT.columns, {"text"})[-1]
    assert kept["text"] == "other", "a column that a reward asks for stays"


def test_a_stages_own_text_is_of_the_kind_that_it_reads(tmp_path, capsys, monkeypatch):
    """SFT on plain texts before a stage on chats. A mutant: of the kind of the last stage, for which texts have no room."""
    write_jsonl(tmp_path / "texts.jsonl", [{"text": f"A text about {i}.", "id": f"text {i}"} for i in range(30)])
    texts = {"name": "texts", "path": str(tmp_path / "texts.jsonl"), "unit": "id"}
    adapter = {"r": 2, "freeze_a": True, "init_a": "activations", "init_rows": 8}
    kinds, aligned = [], basis.align_to_activations

    def seen(policy, **options):
        kinds.append(policy.asks_in_chats)
        aligned(policy, **options)

    monkeypatch.setattr(basis, "align_to_activations", seen)
    recipe = chat_recipe(tmp_path, sft={"max_length": 8, "max_steps": 1, "adapter": adapter}, sft_data=texts, reward_model=None, reward_model_data=None, rloo={"reward": None})
    done = call(capsys, "run", recipe, "--json")
    assert done.status == 0, done.err
    assert kinds == [False]
    assert prompt_format_of(tmp_path / "run" / "release").chats
