"""Private files become records, records become units, units fall into disjoint parts."""

from __future__ import annotations

import csv
import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from chats import ADDS, byte_tokenizer
from dpalign.algorithms import SFT, PPOConfig, RewardModelConfig, RLOOConfig, SFTConfig
from dpalign.algorithms.base import encode_units
from dpalign.algorithms.completions import encode_prompt
from dpalign.data import DataConfig, build_units
from dpalign.data.columns import require_columns
from dpalign.data.load import read_records
from dpalign.errors import DPAlignError
from dpalign.models import ModelConfig, Policy
from dpalign.plan import split_parts
from dpalign.privacy.ledger import Ledger
from dpalign.recipe import Recipe
from dpalign.training import plan_stage
from helpers import reviews, write_jsonl
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


def test_a_table_gives_nobody_arguments_that_they_do_not_have(tmp_path):
    calls = [
        {"name": "look", "arguments": {"at": "it"}},
        {"name": "hear", "arguments": {"far": [{"x": 1}, {"y": None}]}},
    ]
    rows = [{"id": "a", "note": None, "messages": [{"role": "assistant", "tool_calls": [call]}]} for call in calls]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "a"))
    calls[1]["arguments"]["far"][1] = {}
    assert read_records(str(tmp_path / "a.parquet")) == read_records(str(tmp_path / "a")) == rows


# Hub names ---


def hub(monkeypatch, error: Exception | None = None) -> list[tuple[str, str | None, str]]:
    """A hub that gives two records, or fails; what it was asked for."""
    asked = []

    def load_dataset(name, configuration, *, split, cache_dir):
        asked.append((name, configuration, split))
        if error is not None:
            raise error
        return Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_hub_name_is_honoured(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = hub(monkeypatch)
    assert read_records("someone/reviews", "test") == read_records("imdb", "test") == ROWS
    assert asked == [("someone/reviews", None, "test"), ("imdb", None, "test")]
    for path in (
        "./chats/all",
        "./chats:all",
        "chats:",
        ":all",
        "a:b:c",
        "data/chats:all/x",
        "data/chats/all",
        "/nowhere/chats",
        "~/chats",
    ):
        with pytest.raises(DPAlignError, match=f"{path} does not exist"):
            read_records(path)
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ConnectionError("Couldn't reach 'x'"), "there is no connection to it"),
        (
            ValueError("Unknown split \"dev\". Should be one of ['train', 'test']."),
            r"no split 'dev' .*, but 'train', 'test'",
        ),
        (
            ValueError("Config name is missing.\nPlease pick one among the available configs: ['a', 'b']\nExample of"),
            "several configurations .'a', 'b'.: say which one, as someone/reviews:CONFIGURATION",
        ),
        (ValueError("cannot split 'a secret'"), "of that name: ValueError."),
    ],
)
def test_why_a_hub_gave_nothing(monkeypatch, tmp_path, error, says):
    monkeypatch.chdir(tmp_path)
    hub(monkeypatch, error)
    with pytest.raises(DPAlignError, match=says) as caught:
        read_records("someone/reviews", "dev")
    assert "secret" not in str(caught.value)


def test_one_of_several_configurations_is_named_behind_a_colon(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = hub(monkeypatch)
    assert read_records("someone/feedback:comparisons", "dev") == read_records("wikitext:wikitext-2-raw-v1") == ROWS
    assert asked == [("someone/feedback", "comparisons", "dev"), ("wikitext", "wikitext-2-raw-v1", "train")]
    write_jsonl(tmp_path / "chats:all.jsonl", [{"text": "a file whose name has a colon"}])
    assert read_records("chats:all.jsonl") == [{"text": "a file whose name has a colon"}] and len(asked) == 2


def test_what_the_library_says_of_configurations_is_understood(monkeypatch, tmp_path):
    """Its own words, of a dataset like the Hub's: a card that lists two configurations."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "here"
    folder.mkdir()
    for name in ("axis", "comparisons"):
        write_jsonl(folder / f"{name}.jsonl", [{"text": name}])
    listed = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("axis", "comparisons"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")
    real = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *more, **options: real(str(folder), *more, **options))
    assert read_records("me/chats:axis", cache_dir=tmp_path / "cache") == [{"text": "axis"}]
    with pytest.raises(
        DPAlignError, match=r"several configurations \('axis', 'comparisons'\): say which one, as me/chats:"
    ):
        read_records("me/chats", cache_dir=tmp_path / "cache")
    with pytest.raises(DPAlignError, match="it has no configuration other, but 'axis', 'comparisons'"):
        read_records("me/chats:other", cache_dir=tmp_path / "cache")


def test_a_folder_of_files_names_one(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "part-0.parquet").write_bytes(b"")
    with pytest.raises(DPAlignError, match=r"save_to_disk: give one of its files, such as part-0\.parquet"):
        read_records(str(tmp_path))


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


@pytest.mark.parametrize("prepend_bos", [True, False])
def test_a_prompt_from_a_text_has_no_special_tokens_of_the_tokenizers(prepend_bos):
    """Whatever it puts around a text: the prompt goes on, and has BOS where that is asked for, once."""
    config = PPOConfig(prompt_min_tokens=4, prompt_max_tokens=4, prepend_bos=prepend_bos)
    found = {tuple(encode_prompt(byte_tokenizer(adds=adds), {"text": "Dull film"}, config) or ()) for adds in ADDS}
    own = byte_tokenizer()("Dull").input_ids
    assert found == {(*([byte_tokenizer().bos_token_id] if prepend_bos else []), *own)} and len(own) == 4


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


def test_a_unit_may_be_inside_another_column(ledger, tmp_path):
    config = DataConfig(name="toy", unit="meta.user", max_records_per_unit=5)
    rows = [{"text": f"t{i}", "meta": {"user": f"u{i % 3}", "at": i}} for i in range(9)]
    assert sorted(len(unit) for unit in build_units(rows, config, ledger).units) == [3, 3, 3]
    flat = [{"text": row["text"], "meta.user": row["meta"]["user"], "meta": {"user": "all"}} for row in rows]
    ids = [list(build_units(given, config, ledger).ids) for given in (flat, rows)]
    assert ids[0] == ids[1]  # a column's own name first
    for odd in ({"text": "x", "meta": None}, {"text": "x", "meta": {"user": {"id": 1}}}, {"text": "x", "meta": "u1"}):
        with pytest.raises(DPAlignError, match=r"record 10 names no unit in column 'meta\.user'"):
            build_units([*rows, odd], config, ledger)
    with pytest.raises(DPAlignError, match="record 1 has half of a character"):
        build_units([{"text": "x", "meta": {"user": "u\ud800"}}], config, ledger)


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


def test_a_first_line_that_is_a_record_is_not_quoted(tmp_path):
    """A file without a header: what would be its columns' names is what somebody wrote."""
    path = tmp_path / "d.csv"
    path.write_text("zebrafinch,a secret\nanother,text\n", encoding="utf-8")
    with pytest.raises(DPAlignError, match="has 2 columns, named by its first line; expected 'text'") as raised:
        require_columns(read_records(str(path)), (("text",),), str(path))
    assert "zebrafinch" not in str(raised.value) and "secret" not in str(raised.value)
    path.write_text("yes,zebrafinch,no,zebrafinch\n1,2,3,4\n", encoding="utf-8")
    with pytest.raises(DPAlignError, match="one name for its columns 2 and 4") as raised:
        read_records(str(path))
    assert "zebrafinch" not in str(raised.value)


def test_whatever_arrow_says_of_a_file_is_one_sentence(tmp_path, monkeypatch):
    def refuses(*arguments):
        raise pyarrow.ArrowNotImplementedError("of zebrafinch")

    WRITERS["a.parquet"](tmp_path / "a.parquet")
    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", refuses)
    with pytest.raises(DPAlignError, match="is not a Parquet file"):
        read_records(str(tmp_path / "a.parquet"))
