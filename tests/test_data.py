"""Private files become records, records become units, units fall into disjoint parts."""

from __future__ import annotations

import csv
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from dpalign.algorithms import SFT, PPOConfig, RewardModelConfig, RLOOConfig, SFTConfig
from dpalign.algorithms.base import encode_units
from dpalign.algorithms.completions import encode_prompt
from dpalign.data import DataConfig, build_units
from dpalign.data.load import read_records
from dpalign.errors import DPAlignError
from dpalign.models import ModelConfig, Policy
from dpalign.plan import split_parts
from dpalign.privacy.ledger import Ledger
from dpalign.recipe import Recipe
from dpalign.training import plan_stage
from helpers import reviews
from tiny import tiny_policy

ROWS = [{"id": "a", "text": 'Some "quoted", text\nof two lines'}, {"id": "b", "text": "Größe, naïveté, 映画 😀"}]


def lines(rows) -> bytes:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()


def write_csv(path):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["id", "text"])
        writer.writeheader()
        writer.writerows(ROWS)


WRITERS = {
    "a.jsonl": lambda path: path.write_bytes(lines(ROWS)),
    "a.ndjson": lambda path: path.write_bytes(b"\n" + lines(ROWS) + b"\n"),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines(ROWS))),
    "a.csv": write_csv,
    "a.csv.gz": lambda path: (write_csv(path.with_name("b")), path.write_bytes(gzip.compress(path.with_name("b").read_bytes()))),
    "a.parquet": lambda path: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path),
    "folder": lambda path: Dataset.from_list(ROWS).save_to_disk(str(path)),
    "splits": lambda path: DatasetDict(
        train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1])
    ).save_to_disk(str(path)),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_records(tmp_path, name):
    WRITERS[name](tmp_path / name)
    assert read_records(str(tmp_path / name)) == ROWS


def test_a_split_of_a_folder(tmp_path):
    WRITERS["splits"](tmp_path / "splits")
    assert read_records(str(tmp_path / "splits"), "test") == ROWS[:1]
    with pytest.raises(DPAlignError, match="no split 'dev'; it has train, test"):
        read_records(str(tmp_path / "splits"), "dev")


# Text to tokens ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy():
    return Policy.load(ModelConfig())


def encoded(policy, record, **settings):
    return SFT(SFTConfig(**settings)).encode(policy, record)


def test_text_is_learned_from_its_second_token_on(policy):
    bos, eos = policy.tokenizer.bos_token_id, policy.tokenizer.eos_token_id
    ids = policy.tokenizer("A fine film.", add_special_tokens=False).input_ids
    whole = encoded(policy, {"text": "A fine film."}, prepend_bos=True)
    assert whole.ids == [bos, *ids, eos] and all(whole.learned)
    cut = encoded(policy, {"text": "A fine film."}, prepend_bos=True, append_eos=False, max_length=3)
    assert cut.ids == [bos, *ids[:2]]
    rows = SFT(SFTConfig(max_length=3)).rows(policy, [[cut]], None)
    assert rows.tensors["learned"].tolist() == [[0, 1, 1]]


def test_a_completion_is_learned_and_its_prompt_is_not(policy):
    record = {"prompt": "This film", "completion": " was fine."}
    text = encoded(policy, record, prepend_bos=True)
    ids, learn_from = text.ids, text.prompt_tokens
    assert policy.tokenizer.decode(ids[1:learn_from]) == "This film"
    assert policy.tokenizer.decode(ids[learn_from:-1]) == " was fine."
    algorithm = SFT(SFTConfig(prepend_bos=True, max_length=16))
    examples = encode_units(algorithm, policy, [[record], [{"text": "This film was fine."}]])
    learned = algorithm.rows(policy, examples, None).tensors["learned"].sum(1).tolist()
    assert learned == [len(ids) - learn_from, len(ids) - 1]


def test_chat_messages_go_through_the_template():
    policy = tiny_policy("gpt2")
    policy.tokenizer.chat_template = (
        "{% for m in messages %}{{ 'w1' if m.role == 'user' else 'w2' }} {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}w2{% endif %}"
    )
    user, answer = {"role": "user", "content": "w7 w8"}, {"role": "assistant", "content": "w9"}

    def words(*numbers):
        return [n + 2 for n in numbers]  # after padding and end of text

    assert encoded(policy, {"text": [user, answer]}, append_eos=False).ids == words(1, 7, 8, 2, 9)
    found = encoded(policy, {"prompt": [user], "completion": [answer]}, append_eos=False)
    assert (found.ids, found.prompt_tokens) == (words(1, 7, 8, 2, 9), 4)
    both = encoded(policy, {"prompt": [user], "completion": [answer]}, completion_only_loss=False)
    assert both.ids == found.ids and all(both.learned)
    with pytest.raises(DPAlignError, match="completion_only_loss needs"):
        encoded(policy, {"text": "w1"}, completion_only_loss=True)
    assert encode_prompt(policy.tokenizer, {"prompt": [user]}, PPOConfig()) == words(1, 7, 8, 2)


def test_a_prompt_is_cut_from_a_text_by_that_text_alone(policy):
    config = PPOConfig(prompt_min_tokens=2, prompt_max_tokens=6, prepend_bos=True)
    texts = [r["text"] for r in reviews(64)]
    cut = [encode_prompt(policy.tokenizer, {"text": t}, config) for t in texts]
    assert {len(c) for c in cut} == {3, 4, 5, 6, 7}
    assert cut == [encode_prompt(policy.tokenizer, {"text": t}, config) for t in texts]
    whole = [policy.tokenizer(t, add_special_tokens=False).input_ids for t in texts]
    assert all(c[1:] == w[: len(c) - 1] for c, w in zip(cut, whole, strict=True))
    assert encode_prompt(policy.tokenizer, {"text": "A"}, config) is None  # too short for a prompt


# Units and parts ---------------------------------------------------------------------------------------------


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "ledger.sqlite")


def persons(people: int, each: int):
    return [{"who": f"p{p}", "text": f"review {k} of person {p}"} for k in range(each) for p in range(people)]


def test_records_are_units_unless_a_column_says_otherwise(ledger):
    rows = persons(10, 3)
    single = build_units(rows, DataConfig(name="d"), ledger)
    assert len(single.units) == single.declared_units == 30 and single.unit == "record"
    grouped = build_units(rows, DataConfig(name="d", unit="who", max_records_per_unit=3), ledger)
    assert len(grouped.units) == grouped.declared_units == 10 and grouped.unit == "who"
    assert all(len(unit) == 3 and len({r["who"] for r in unit}) == 1 for unit in grouped.units)


def test_a_units_records_are_bounded_by_a_rule_that_ignores_order_and_others(ledger):
    config = DataConfig(name="d", unit="who", max_records_per_unit=2)
    rows = persons(6, 5)
    kept = {u[0]["who"]: [r["text"] for r in u] for u in build_units(rows, config, ledger).units}
    assert all(len(texts) == 2 for texts in kept.values())
    fewer = [r for r in rows[::-1] if r["who"] != "p0"]
    assert {u[0]["who"]: [r["text"] for r in u] for u in build_units(fewer, config, ledger).units} == {
        who: texts for who, texts in kept.items() if who != "p0"
    }
    assert len({texts[0].split()[1] for texts in kept.values()}) > 1  # not simply the first ones


def test_parts_are_disjoint_complete_and_stable_across_runs_with_one_ledger(ledger, tmp_path):
    rows, config = reviews(400), DataConfig(name="d")

    def parts(book, data=rows, name="d"):
        return [set(build_units(data, DataConfig(name=name), book, *part).ids) for part in ((0, 0.25), (0.25, 1))]

    first, second = parts(ledger)
    assert not first & second and first | second == set(build_units(rows, config, ledger).ids)
    assert 60 < len(first) < 140
    assert parts(Ledger(tmp_path / "ledger.sqlite")) == [first, second]  # another process, another day
    grown = parts(ledger, [*reviews(500)[400:], *rows[::-1]])
    assert first < grown[0] and second < grown[1]  # nobody moves when others come
    assert not first & set().union(*parts(Ledger(tmp_path / "other.sqlite")))  # another key
    assert not first & set().union(*parts(ledger, name="e"))  # another dataset


def test_equal_records_are_different_units(ledger):
    rows = [{"text": "the same"}] * 3 + [{"text": "another"}]
    data = build_units(rows, DataConfig(name="d"), ledger)
    assert len(set(data.ids)) == 4 and [len(u) for u in data.units] == [1] * 4
    fewer = build_units(rows[1:], DataConfig(name="d"), ledger)
    assert set(fewer.ids) < set(data.ids)


def test_declared_units_are_what_counts_whatever_the_file_holds(ledger):
    data = build_units(reviews(40), DataConfig(name="d", declared_units=1000), ledger, 0.5, 1)
    assert data.declared_units == 500 and 0 < len(data.units) < 40
    config = SFTConfig(expected_batch_size=25, num_train_epochs=3, noise_multiplier=1.0)
    plan = plan_stage("sft", config, data.declared_units)
    assert (plan.sampling_rate, plan.steps) == (0.05, 60) and plan.target_delta == 1e-5
    assert plan_stage("sft", config, 50_000).target_delta == pytest.approx(2e-6)


def test_the_fingerprint_is_of_contents_and_tells_an_outsider_nothing(ledger, tmp_path):
    def fingerprint(rows, book=ledger, **settings):
        return build_units(rows, DataConfig(name="d", **settings), book).fingerprint

    rows = reviews(20)
    assert fingerprint(rows) == fingerprint(rows[::-1])
    changed = [rows[0] | {"text": "Something else."}, *rows[1:]]
    assert len({fingerprint(r, unit="id") for r in (rows, changed, rows[1:])}) == 3
    assert fingerprint(rows, Ledger(tmp_path / "other.sqlite")) != fingerprint(rows)


def parts_of(stages: list[str], split: dict | None, **changes) -> dict[str, tuple[float, float]]:
    sections: dict = {"sft": SFTConfig(), "reward_model": RewardModelConfig(), "ppo": PPOConfig(), "rloo": RLOOConfig()}
    return split_parts(
        Recipe(**{"data": DataConfig(name="d"), "split": split} | {s: sections[s] for s in stages} | changes)
    )


@pytest.mark.parametrize(
    ("names", "split", "parts"),
    [
        (["sft", "ppo"], None, {"sft": (0, 0.5), "ppo": (0.5, 1)}),
        (["sft", "ppo"], {"ppo": 0.75, "sft": 0.25}, {"sft": (0, 0.25), "ppo": (0.25, 1)}),
        (["ppo"], {"sft": 0.25, "ppo": 0.5}, {"ppo": (0.25, 0.75)}),
        (["ppo"], None, {"ppo": (0, 1)}),
        (["sft", "reward_model", "rloo"], {"sft": 0.25, "reward_model": 0.25, "rloo": 0.5}, {"sft": (0, 0.25), "reward_model": (0.25, 0.5), "rloo": (0.5, 1)}),
        (["sft", "ppo"], {"sft": [0.5, 1], "ppo": [0, 0.5]}, {"sft": (0.5, 1), "ppo": (0, 0.5)}),
    ],
)  # fmt: skip
def test_stages_on_one_dataset_get_disjoint_parts(names, split, parts):
    assert parts_of(names, split) == parts


def test_stages_on_their_own_datasets_get_all_of_them():
    own = {"sft_data": DataConfig(name="d"), "ppo_data": DataConfig(name="e")}
    assert parts_of(["sft", "ppo"], None, **own) == {"sft": (0, 1), "ppo": (0, 1)}


def test_stages_in_sequential_composition_share_all_units_or_their_ranges():
    stages, together = ["sft", "reward_model", "ppo"], {"composition": "sequential"}
    assert parts_of(stages, None, **together) == dict.fromkeys(stages, (0, 1))
    ranges = {"sft": [0, 0.5], "reward_model": [0.25, 1], "ppo": [0, 1]}
    assert parts_of(stages, ranges, **together) == {"sft": (0, 0.5), "reward_model": (0.25, 1), "ppo": (0, 1)}


@pytest.mark.parametrize(
    ("split", "composition", "says"),
    [
        ({"sft": 0.5, "ppo": 0.5}, "sequential", "fractions make disjoint parts"),
        ({"sft": [0, 0.5], "ppo": 0.5}, "parallel", "fractions make disjoint parts"),
        ({"sft": [0, 0.5]}, "sequential", "gives stage ppo no range"),
        ({"sft": 0.5}, "parallel", "gives stage ppo no fraction"),
        ({"sft": [0.5, 0.5], "ppo": [0, 1]}, "sequential", "0 <= low < high <= 1"),
        ({"sft": [0, 1.5], "ppo": [0, 1]}, "sequential", "0 <= low < high <= 1"),
        ({"sft": [0, 0.5, 1], "ppo": [0, 1]}, "sequential", "a range is"),
        ({"sft": 0.5, "ppo": 0.6}, "parallel", "add up to at most 1"),
        ({"sft": 0.5, "pppo": 0.5}, "parallel", "must give stages"),
        ({"sft": 0.5, "ppo": "0.5"}, "parallel", "a fraction, or a range"),
    ],
)
def test_splits_that_cannot_be(split, composition, says):
    with pytest.raises(DPAlignError, match=says):
        parts_of(["sft", "ppo"], split, composition=composition)
