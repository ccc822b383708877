"""What the data does to a run is told to its holder before anything is drawn, and to nobody else."""

from __future__ import annotations

import json
from functools import partial

import pytest

from chats import byte_tokenizer
from dpalign.algorithms.base import Reading, check_records
from dpalign.algorithms.completions import encode_prompt
from dpalign.algorithms.dpo import DPO, DPOConfig
from dpalign.algorithms.ppo import PPO, PPOConfig
from dpalign.algorithms.reward import RewardModelConfig, RewardModelling
from dpalign.algorithms.sft import SFT, SFTConfig
from dpalign.errors import DPAlignError
from dpalign.survey import Survey, survey
from helpers import call, files_below, write_jsonl, write_recipe
from test_chats import asked, chat_recipe, said

RECORDS = [{"id": f"p{i % 20}", "prompt": "a" * (4 + i % 9), "completion": "b" * 3} for i in range(40)]


def test_a_survey_counts_records_and_units():
    readings = [Reading(3, 8, 2), Reading(12, 8, 0), Reading(9, 8, 0), Reading(8, 8, 1), Reading(5, 8, 0)]
    records = [{"who": name} for name in ("a", "a", "b", "c", "b")]
    found = survey(readings, records, "who")
    assert found == Survey(5, limit=8, cut=2, longest=12, nine_in_ten=12, empty=3, units=3, idle_units=1)
    assert found is not None and found.sentences() == [
        "2 of 5 records are cut at 8 tokens; 12 would hold nine in ten, 12 all",
        "of 3 records no token is learned; 1 of 3 units have no other: they are paid for and teach nothing",
    ]
    alone = survey(readings, records, None)
    assert alone is not None and (alone.units, alone.idle_units) == (5, 3)
    inside = [{"meta": {"user": name}} for name in ("a", " a", "b", "b", 7)]  # as the units are named
    nested = survey(readings, inside, "meta.user")
    assert nested is not None and (nested.units, nested.idle_units) == (3, 1)
    assert survey([Reading(3, 8, 2)], [{}], None).sentences() == []
    assert survey([None], [{}], None) is None


@pytest.mark.parametrize(
    ("longest", "limit", "enough"), [(33, 64, None), (32, 64, 32), (17, 64, 32), (6, 64, 8), (6, 48, 6), (0, 64, None)]
)
def test_a_limit_that_only_costs_time_is_told(longest, limit, enough):
    """A half, a quarter, ... of the limit, so that it is not the length of a record."""
    readings = [Reading(length, limit, 1) for length in (0, longest)]
    found = survey(readings, [{}, {}], None, padded=True)
    assert found is not None
    assert found.sentences() == (
        []
        if enough is None
        else [
            f"prompts are padded to max_prompt_length {limit}, and none has more than {enough} tokens: that limit would "
            "do, in less time"
        ]
    )
    assert survey(readings, [{}, {}], None).sentences() == []  # of texts, which are not


def test_records_that_are_too_long_are_counted():
    config, tokenizer = PPOConfig(max_prompt_length=4), byte_tokenizer()
    check = partial(PPO.check, config, tokenizer)
    records = [{"prompt": "a" * length} for length in (3, 6, 4, 9)]
    with pytest.raises(DPAlignError) as said:
        check_records(records, "x.jsonl", PPO.columns, check)
    assert str(said.value) == (
        "record 2 of x.jsonl: the prompt has 6 tokens, more than max_prompt_length 4: raise the limit or set "
        "truncate_prompts; 2 of 4 records are too long, and 9 tokens would hold all."
    )
    with pytest.raises(DPAlignError, match=r"^record 5 of x\.jsonl") as said:
        check_records([*records, {"prompt": 3}], "x.jsonl", PPO.columns, check)
    assert "too long" not in str(said.value)


def test_what_each_stage_reads():
    tokenizer = byte_tokenizer()
    record = {"prompt": "aaaa", "completion": "bb"}
    a, b, c, y = (tokenizer(letter, add_special_tokens=False).input_ids[0] for letter in "abcy")
    assert SFT.check(SFTConfig(max_length=8), tokenizer, record) == Reading(7, 8, 3, b)  # EOS too
    assert SFT.check(SFTConfig(max_length=4), tokenizer, record) == Reading(7, 4, 0, b)
    assert SFT.check(SFTConfig(max_length=4), tokenizer, {"text": "aaaa"}) == Reading(5, 4, 3, a)
    pair = {"prompt": "aa", "chosen": "bbb", "rejected": "c"}
    assert DPO.check(DPOConfig(max_length=8), tokenizer, pair) == Reading(6, 8, 2, c)
    assert RewardModelling.check(RewardModelConfig(max_length=8), tokenizer, pair) == Reading(5, 8, 3, c)
    same_end = {"chosen": "abcccc", "rejected": "xycccc"}
    assert RewardModelling.check(RewardModelConfig(max_length=4), tokenizer, same_end) == Reading(6, 4, 0, y)
    config = PPOConfig(prompt_max_tokens=3, max_prompt_length=4)
    assert PPO.check(config, tokenizer, {"prompt": "aaa"}) == Reading(3, 4, 3, a)
    assert PPO.check(config, tokenizer, {"text": "aa"}) == Reading(0, 4, 0)


def test_a_long_prompt_keeps_its_end_where_that_is_asked():
    tokenizer = byte_tokenizer()
    config = PPOConfig(max_prompt_length=4, prepend_bos=True)
    with pytest.raises(DPAlignError, match="set truncate_prompts"):
        PPO.check(config, tokenizer, {"prompt": "abcdef"})
    config.truncate_prompts = True
    f = tokenizer("f", add_special_tokens=False).input_ids[0]
    assert PPO.check(config, tokenizer, {"prompt": "abcdef"}) == Reading(7, 4, 4, f)
    assert tokenizer.decode(encode_prompt(tokenizer, {"prompt": "abcdef"}, config)) == "<bos>def"
    config.prepend_bos = False
    assert tokenizer.decode(encode_prompt(tokenizer, {"prompt": "abcdef"}, config)) == "cdef"
    assert tokenizer.decode(encode_prompt(tokenizer, {"prompt": "abc"}, config)) == "abc"


def test_plan_says_it_and_checks_what_a_run_checks(tmp_path, capsys):
    recipe = chat_recipe(tmp_path)
    assert "The data: nothing is cut" in call(capsys, "plan", recipe).out
    short = call(capsys, "plan", recipe, "--sft.max_length", 60, "--rloo.max_prompt_length", 224).out.replace("\n", " ")
    assert "sft, for the data holder alone: 64 of 64 records are cut at 60 tokens" in short
    assert (
        "rloo, for the data holder alone: prompts are padded to max_prompt_length 224, and none has more than 112"
        in short
    )
    as_json = call(capsys, "plan", recipe, "--sft.max_length", 60, "--json").out
    assert "cut" not in as_json and "idle" not in as_json
    with open(tmp_path / "pairs.jsonl", "a") as file:
        file.write(
            json.dumps({"id": 9999, "prompt": [asked(1)], "chosen": [said("a")], "rejected": [{"role": 1}]}) + "\n"
        )
    assert "record 65" in call(capsys, "plan", recipe).error
    assert "were not checked" in call(capsys, "plan", recipe, "--no_data").out
    assert not (tmp_path / "run").exists() and not (tmp_path / "ledger.sqlite").exists()


def test_a_run_leaves_it_in_its_private_folder_alone(tmp_path, capsys):
    write_jsonl(tmp_path / "data.jsonl", [{"id": f"p{i}", "text": f"a film of number {i} " * 3} for i in range(40)])
    recipe = write_recipe(tmp_path, ppo=None, sft={"max_steps": 1, "max_length": 7})
    called = call(capsys, "run", recipe)
    assert "cut" not in called.out + called.err
    run = tmp_path / "run"
    assert json.loads((run / "private" / "data.json").read_text())["sft"]["cut"] == 40
    for file in files_below(run, lambda path: path.parts[0] != "private" and path.suffix in (".json", ".jsonl", ".md")):
        assert "nine_in_ten" not in file.read_text()
