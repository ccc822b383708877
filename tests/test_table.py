"""Records on disk: what was read is what is there, with the columns that are read, under the hashes of all of them."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from dpalign.data import DataConfig, build_units, load, readers
from dpalign.data import table as tables
from dpalign.data.columns import only_columns, require_columns
from dpalign.data.hashes import RecordHashes
from dpalign.data.load import Record, read_chunks, read_records
from dpalign.data.table import Table, write_table
from dpalign.data.table import table_of as table_of_dataset
from dpalign.data.units import count_units
from dpalign.errors import DPAlignError
from dpalign.privacy.ledger import Ledger
from dpalign.recipe import Recipe
from dpalign.records import count_undeclared, read_stage_records, stage_units
from dpalign.settings.dpo import DPOConfig
from dpalign.settings.ppo import PPOConfig
from dpalign.settings.rewards import RewardConfig
from dpalign.settings.sft import SFTConfig
from helpers import call, ledger_rows, reviews, write_jsonl, write_recipe

SECRET = bytes(range(32))
CHAT = [{"role": "user", "content": "Größe?"}, {"role": "assistant", "content": "映画 😀"}]
ROWS: list[Record] = [
    {"text": "A film.", "id": "007", "n": 7},
    {"text": 'Of "two"\nlines', "n": None, "more": {"a": [1, {"b": 2.5}]}},
    {"id": 3, "text": "\ud800 half", "n": math.inf, "more": [None, True, {}]},
    {"text": CHAT, "system": "Be kind.", "messages": CHAT, "n": 10**30},
    {"text": "", "more": ""},
]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """With a secret that everybody knows."""
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger._db.execute("INSERT INTO datasets VALUES ('d', ?)", (SECRET,))
    return ledger


@pytest.fixture(params=[1, 3, 4096])
def at_once(request, monkeypatch) -> int:
    """Records that are read at a time."""
    for module in (load, readers):
        monkeypatch.setattr(module, "BATCH", request.param)
    return request.param


def columns_in(records: list[Record]) -> list[str]:
    return sorted({name for record in records for name in record})


def stored(
    path: Path, folder: Path | None, keep: list[str] | None = None, *configs: DataConfig, ledger: Any = None
) -> Table:
    keep = columns_in(read_records(str(path))) if keep is None else keep
    hashes = {(c.name, c.unit): RecordHashes(c, ledger) for c in configs}
    return write_table(read_chunks(str(path)), keep, folder, hashes)


# What is there -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_table_holds_what_was_read(tmp_path, in_memory, at_once):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    read = read_records(str(path))
    assert read[3]["messages"][0] == {"role": "system", "content": "Be kind."}
    table = stored(path, None if in_memory else tmp_path)
    assert list(table) == [table[row] for row in range(len(table))] == table[:] == read and table[-1] == read[-1]
    assert [list(record) for record in table] == [list(record) for record in read]  # what is missing is not null
    with pytest.raises(IndexError):
        table[len(read)]


def test_a_number_is_no_text_and_a_text_no_number(tmp_path):
    """What pyarrow's own readers would change."""
    (tmp_path / "a.csv").write_text("id,text\n007,x\n7.0,\n", encoding="utf-8")
    assert list(stored(tmp_path / "a.csv", tmp_path)) == [{"id": "007", "text": "x"}, {"id": "7.0", "text": ""}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"id": 7}, {"id": "7"}, {"id": 7.0}, {"id": True}])
    assert [type(record["id"]) for record in stored(path, tmp_path)] == [int, str, float, bool]


TABLES = {
    "a.parquet": lambda path, rows: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path),
    "pieces.parquet": lambda path, rows: pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), path, row_group_size=2
    ),
    "folder": lambda path, rows: Dataset.from_list(rows).save_to_disk(str(path)),
    "chosen": lambda path, rows: Dataset.from_list([rows[0], *rows]).select(range(1, len(rows) + 1)).save_to_disk(str(path)),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_a_tables_columns_stay_as_they_are(tmp_path, name, at_once):
    """Also what JSON has no word for; and `system` is put into a chat wherever it is read."""
    import datetime

    rows = [
        {"messages": [{"role": "user", "content": f"q{i}", "name": None}], "system": f"s{i}", "day": datetime.date(2020, 1, i + 1), "raw": b"\xff"}
        for i in range(5)
    ]  # fmt: skip
    TABLES[name](tmp_path / name, rows)
    read = read_records(str(tmp_path / name))
    assert read[4] == {
        "messages": [{"role": "system", "content": "s4"}, {"role": "user", "content": "q4"}],
        "system": "s4", "day": rows[4]["day"], "raw": b"\xff",
    }  # fmt: skip
    table = stored(tmp_path / name, tmp_path)
    assert list(table) == [table[row] for row in range(5)] == read
    fewer = table.without({"raw", "day"})
    assert fewer[4] == {"messages": read[4]["messages"], "system": "s4"} and len(fewer) == 5


def test_a_categorical_column_of_a_table(tmp_path):
    """Whose dictionary may be another one in each piece."""
    column = pyarrow.chunked_array(
        [pyarrow.array(["a", "b"]).dictionary_encode(), pyarrow.array(["c", "a"]).dictionary_encode()]
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet", row_group_size=2)
    assert [r["text"] for r in stored(tmp_path / "a.parquet", tmp_path)] == ["a", "b", "c", "a"]


# What is not ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_column_that_nobody_reads_is_not_stored(tmp_path, name):
    rows = [{"text": f"t{i}", "secret": f"zebra{i}"} for i in range(4)]
    write_jsonl(tmp_path / name, rows) if name == "a.jsonl" else TABLES[name](tmp_path / name, rows)
    table = stored(tmp_path / name, None, ["prompt", "text"])
    buffers = b"".join(b.to_pybytes() for batch in table._batches for c in batch.columns for b in c.buffers() if b)
    assert b"t3" in buffers and b"zebra" not in buffers
    assert list(table) == [{"text": f"t{i}"} for i in range(4)] and table.columns == ("text", "secret")


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_columns_that_are_not_stored_are_named(tmp_path, name):
    rows = [{"body": "x", "label": True}] * 3
    write_jsonl(tmp_path / name, rows) if name == "a.jsonl" else TABLES[name](tmp_path / name, rows)
    table = stored(tmp_path / name, tmp_path, ["text"])
    assert len(table) == 3 and table[2] == {}
    with pytest.raises(DPAlignError, match="has the columns 'body', 'label'; expected 'text'"):
        require_columns(table, [("text",)], "a")
    many = stored(write_jsonl(tmp_path / "many.jsonl", [{"x" * 100_000: 1}]), None, ["text"])
    with pytest.raises(DPAlignError, match=r"has the columns 'x{498}…; expected") as error:
        require_columns(many, [("text",)], "a")
    assert len(str(error.value)) < 600
    unpaired = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "a", "completion": "b", "label": True}])
    with pytest.raises(DPAlignError, match="join a true and a false answer"):
        require_columns(stored(unpaired, None, ["chosen", "rejected"]), [("chosen", "rejected")], "b")


def test_a_later_record_with_another_text_is_not_read_otherwise(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b", "prompt": "p", "who": 1}])
    table = stored(path, tmp_path, ["prompt", "text", "who"])
    alternatives = (("text",), ("prompt",))
    assert list(only_columns(table, alternatives)) == [{"text": "a"}, {"text": "b", "who": 1}]
    assert list(only_columns(table, alternatives, {"prompt"})) == list(table)


def test_the_file_has_no_name_and_is_its_owners_alone(tmp_path, monkeypatch):
    path, folder = write_jsonl(tmp_path / "a.jsonl", reviews(20)), tmp_path / "private"
    folder.mkdir()
    made = []
    monkeypatch.setattr(
        tables.tempfile, "TemporaryFile",
        lambda dir, make=tables.tempfile.TemporaryFile: made.append(make(dir=dir)) or made[-1],
    )  # fmt: skip
    modes = []
    monkeypatch.setattr(
        tables, "_mapped", lambda f, mapped=tables._mapped: modes.append(os.fstat(f.fileno())) or mapped(f)
    )
    table = stored(path, folder)
    assert not list(folder.iterdir()) and table[19] == reviews(20)[19]
    assert [mode.st_mode & 0o777 for mode in modes] == [0o600] and made[0].closed


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", reviews(20))

    def full(*of: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pyarrow.ipc, "new_stream", full)
    with pytest.raises(DPAlignError, match=r"no room for the records \(No space left on device\)"):
        stored(path, tmp_path)


# Hashes --------------------------------------------------------------------------------------------------------------


def keyed(*parts: bytes) -> bytes:
    """As PRIVACY asks for: HMAC-SHA256 under the dataset's secret, every part behind its length."""
    told = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    return hmac.new(SECRET, told, hashlib.sha256).digest()


def content(record: Record) -> bytes:
    return json.dumps(record, sort_keys=True, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")


def by_hand(
    records: list[Record], unit: str | None, most: int, low: float, high: float
) -> tuple[list[bytes], list[list[Record]], str]:
    """One record after the other: identities, the units' records, and the fingerprint."""
    grouped: dict[bytes, list[tuple[bytes, Record]]] = {}
    for record in records:
        who = keyed(b"unit", str(record[unit]).encode()) if unit else keyed(b"record", content(record))
        copies = 0
        while unit is None and who in grouped:
            copies += 1
            who = keyed(b"record", content(record), copies.to_bytes(4, "little"))
        grouped.setdefault(who, []).append((keyed(b"order", content(record)), record))
    kept = {w: sorted(grouped[w], key=lambda row: row[0])[:most] for w in sorted(grouped)
            if low <= int.from_bytes(w[:6], "big") / 2**48 < high}  # fmt: skip
    orders = [order for rows in kept.values() for order, _ in rows]
    return list(kept), [[r for _, r in rows] for rows in kept.values()], keyed(b"fingerprint", *kept, *orders).hex()


MANY = [
    *reviews(30),
    *reviews(3),
    {"id": "person-1", "text": "Ünïcode \ud800", "extra": [1]},
    *reviews(2),
    *reviews(30, "noon"),
]


@pytest.mark.parametrize("part", [(0.0, 1.0), (0.25, 0.5)])
@pytest.mark.parametrize(("unit", "most"), [(None, 1), ("id", 1), ("id", 3)])
def test_hashes_are_those_of_whole_records_one_by_one(tmp_path, ledger, unit, most, part, at_once):
    config = DataConfig(name="d", unit=unit, max_records_per_unit=most)
    table = stored(write_jsonl(tmp_path / "a.jsonl", MANY), tmp_path, ["text"], config, ledger=ledger)
    for records in (table, MANY):
        data = build_units(records, config, ledger, *part)
        ids, units, fingerprint = by_hand(MANY, unit, most, *part)
        assert list(data.ids) == ids and data.fingerprint == fingerprint and len(data.units) == len(ids)
        assert [[r["text"] for r in rows] for rows in data.units] == [[r["text"] for r in rows] for rows in units]
        assert count_units(records, config) == len(by_hand(MANY, unit, most, 0, 1)[0])


def test_the_fingerprint_is_that_of_older_versions(ledger):
    """Worked out by version 0.2.0.dev of before there were tables: an unfinished run goes on."""
    data = build_units(reviews(40), DataConfig(name="d"), ledger, 0.5, 1.0)
    assert data.fingerprint == "43656ad51b91d0974b19e1d7f076737283975e179cf7a632ca74d889a080dd20"
    of_people = build_units(MANY, DataConfig(name="d", unit="id", max_records_per_unit=2), ledger)
    assert of_people.fingerprint == "5839f7415dcfc4d80d98cd4154b20cad6b7808e23a4d1996110dbda686e9c54b"
    (kept,) = ledger._db.execute("SELECT contents FROM splits WHERE kind = 'records '").fetchone()
    assert kept.hex() == "4f9e17a5a315885bf5a650d1a02ae9e4ea69de0dcd65e4d78dee1b13fa7e7c8b"


def test_a_thousand_copies_are_hashed_once_each(ledger, monkeypatch):
    """Not once for every copy before: a form letter that a million people sent would take for ever."""
    from dpalign.privacy.ledger import KeyedHash

    asked = []
    monkeypatch.setattr(
        KeyedHash, "__call__", lambda self, *p, real=KeyedHash.__call__: asked.append(p) or real(self, *p)
    )
    data = build_units([{"text": "the same"}] * 1000, DataConfig(name="d"), ledger)
    assert len(set(data.ids)) == 1000 and len(asked) < 4000
    last = keyed(b"record", content({"text": "the same"}), (999).to_bytes(4, "little"))
    assert last in set(data.ids)


def test_a_unit_without_a_name_is_told_while_the_file_is_read(tmp_path, ledger):
    path = write_jsonl(tmp_path / "a.jsonl", [*reviews(5), {"text": "x"}])
    with pytest.raises(DPAlignError, match="record 6 names no unit in column 'id'"):
        stored(path, tmp_path, ["text"], DataConfig(name="d", unit="id"), ledger=ledger)


# A recipe's stages ---------------------------------------------------------------------------------------------------


def recipe(path: Path, **stages: Any) -> Recipe:
    return Recipe(data=DataConfig(name="d", path=str(path), unit="meta.user"), **stages)


def test_what_any_stage_may_read_is_kept(tmp_path, ledger):
    record = {
        "prompt": "p", "completion": "c", "chosen": "a", "rejected": "b", "margin": 1, "preference": 0.5, "text": "t",
        "tools": None, "chat_template_kwargs": {}, "label": True, "meta": {"user": "u"}, "asked": 1, "address": "nobody's",
    }  # fmt: skip
    path = write_jsonl(tmp_path / "a.jsonl", [record])
    always = {"prompt", "tools", "chat_template_kwargs", "label", "meta"}
    reward = RewardConfig(source="x.py:f", columns=["asked"])
    for stages, more in [
        ({"sft": SFTConfig()}, {"completion", "text"}),
        ({"dpo": DPOConfig()}, {"chosen", "rejected", "margin", "preference"}),
        ({"ppo": PPOConfig(reward=reward)}, {"text", "asked"}),
        ({"sft": SFTConfig(), "ppo": PPOConfig(reward=reward)}, {"completion", "text", "asked"}),
    ]:
        records = read_stage_records(recipe(path, **stages), ledger)
        assert {name: set(rows[0]) for name, rows in records.items()} == dict.fromkeys(stages, always | more)


def test_stages_of_one_file_share_a_table_and_its_hashes(tmp_path, ledger):
    rows = [
        {"text": f"t{i}", "prompt": f"p{i}", "completion": "c", "meta": {"user": f"u{i // 2}"}, "x": i}
        for i in range(80)
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    shared = recipe(path, sft=SFTConfig(), ppo=PPOConfig())
    assert count_undeclared(shared) == {"sft": 40, "ppo": 40}
    records = read_stage_records(shared, ledger, tmp_path)
    assert records["sft"] is records["ppo"]
    data, _ = stage_units(shared, records, ledger)
    assert len(data["sft"].units) + len(data["ppo"].units) == 40
    assert {tuple(r) for rows in data["sft"].units for r in rows} == {("text", "meta")}
    plain = build_units(rows, shared.data, ledger, 0.5, 1.0)
    assert plain.fingerprint == data["ppo"].fingerprint and list(plain.ids) == list(data["ppo"].ids)


def test_a_run_leaves_no_record_behind(tmp_path, capsys):
    rows = [r | {"address": "zebrafinch street"} for r in reviews(64)]
    write_jsonl(tmp_path / "data.jsonl", rows)
    assert call(capsys, "run", write_recipe(tmp_path, ppo=None, sft={"max_steps": 1})).status == 0
    assert ledger_rows(tmp_path) == 1
    for file in (tmp_path / "run").rglob("*"):
        assert not file.is_file() or b"zebrafinch" not in file.read_bytes()
        assert not file.is_file() or b"evening0007" not in file.read_bytes()


def test_the_rows_of_a_dataset_stay_where_they_are(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"q{i}", "name": None}], "system": "s", "n": i} for i in range(9)]
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "a"))
    dataset = Dataset.load_from_disk(str(tmp_path / "a"))
    before = pyarrow.total_allocated_bytes()
    table = table_of_dataset(dataset, "train_dataset")
    assert pyarrow.total_allocated_bytes() - before < 200  # of 9 rows
    assert list(table) == read_records(str(tmp_path / "a")) and table[8]["messages"][0]["content"] == "s"
    twice = Dataset.from_list([rows[0], {**rows[1], "system": "t", "messages": [{"role": "system", "content": "u"}]}])
    with pytest.raises(DPAlignError, match=r"^record 2 of train_dataset has a column 'system' and another system"):
        table_of_dataset(twice, "train_dataset")
