"""Small files as people have them: each works, or gets one clear sentence before any draw."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from chats import TEMPLATES
from dpalign.data.load import read_records
from helpers import call
from test_chats import model_folder

ASK, YES, NO = ({"role": r, "content": c} for r, c in (("user", "Good?"), ("assistant", "Yes."), ("assistant", "No.")))
SYSTEM = {"role": "system", "content": "Be short."}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
LOOK = CALL | {"tool_calls": [{"function": {"name": "look", "arguments": {"look": "there"}}}]}
TOOL = {"role": "tool", "content": "It is good."}
TOOLS = [{"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {}}}]
TOOLS_OF_TWO = [
    {
        "type": "function",
        "function": {"name": n, "description": "Looks.", "parameters": {"properties": {n: {"type": "string"}}}},
    }
    for n in ("look", "hear")
]  # in a table each has the other's argument, too, and null
PARTS = [{"type": "text", "text": "Good"}, {"type": "text", "text": "?"}]
SHARE = [{"from": "human", "value": "Good?"}, {"from": "gpt", "value": "Yes."}]


def jsonl(*records: Any, start: bytes = b"") -> bytes:
    """Each record three times, for a sample needs a few."""
    return start + b"".join(json.dumps(r).encode() + b"\n" for r in records for _ in range(3))


def parquet(*records: Any) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*records] * 3), sink)
    return sink.getvalue().to_pybytes()


BOM = b"\xef\xbb\xbf"
PAIR = {"prompt": [ASK], "chosen": [YES], "rejected": [NO]}
PLAIN_PAIR = {"prompt": "Good?", "chosen": " Yes.", "rejected": " No."}
# name of the file, its bytes, the stage, the chat template, and the sentence, or None where it works
WORK: dict[str, tuple[str, bytes, str, str]] = {
    "messages": ("d.jsonl", jsonl({"messages": [ASK, YES]}), "sft", "smol"),
    "messages of four turns": ("d.jsonl", jsonl({"messages": [SYSTEM, ASK, YES, ASK, NO]}), "sft", "smol"),
    "messages beside text": ("d.jsonl", jsonl({"text": "x", "messages": [ASK, YES]}), "sft", "smol"),
    "text": ("d.jsonl", jsonl({"text": "A film."}), "sft", "smol"),
    "text of messages": ("d.jsonl", jsonl({"text": [ASK, YES]}), "sft", "qwen"),
    "sharegpt": ("d.jsonl", jsonl({"conversations": SHARE}), "sft", "smol"),
    "sharegpt as messages": ("d.jsonl", jsonl({"messages": SHARE}), "sft", "llama"),
    "sharegpt's system": ("d.jsonl", jsonl({"system": "Be short.", "conversations": SHARE}), "sft", "smol"),
    "content parts": ("d.jsonl", jsonl({"messages": [ASK | {"content": PARTS}, YES]}), "sft", "llama"),
    "tools": ("d.jsonl", jsonl({"messages": [ASK, CALL, TOOL, YES], "tools": TOOLS}), "sft", "qwen"),
    "tools as json": ("d.jsonl", jsonl({"messages": [ASK, CALL, TOOL, YES], "tools": json.dumps(TOOLS)}), "sft", "qwen"),
    "no tools here": ("d.jsonl", jsonl({"messages": [ASK, YES], "tools": None}), "sft", "smol"),
    "completion of strings": ("d.jsonl", jsonl({"prompt": "Good?", "completion": " Yes."}), "sft", "smol"),
    "completion of a chat": ("d.jsonl", jsonl({"prompt": [ASK], "completion": [YES]}), "sft", "mistral"),
    "string behind a chat": ("d.jsonl", jsonl({"prompt": [ASK], "completion": "Yes."}), "sft", "gemma"),
    "prefilled answer": ("d.jsonl", jsonl({"prompt": [ASK, YES], "completion": [NO]}), "sft", "phi"),
    "conversation as completion": ("d.jsonl", jsonl({"prompt": [ASK], "completion": [ASK, YES]}), "sft", "smol"),
    "bom in jsonl": ("d.jsonl", jsonl({"text": "A film."}, start=BOM), "sft", "smol"),
    "bom in csv": ("d.csv", BOM + b"text\r\nA film.\r\nA play.\r\nA song.\r\n", "sft", "smol"),
    "bom in pairs": ("d.csv", BOM + b"prompt,chosen,rejected\n" + b"Good?, Yes., No.\n" * 3, "dpo", "smol"),
    "json array": ("d.json", json.dumps([{"text": "A film."}] * 3, indent=1).encode(), "sft", "smol"),
    "json array with bom": ("d.json", BOM + b"\n" + json.dumps([{"text": "A film."}] * 3).encode(), "sft", "smol"),
    "json lines as json": ("d.json", jsonl({"text": "A film."}), "sft", "smol"),
    "blank lines": ("d.jsonl", jsonl({"text": "A film."}).replace(b"\n", b"\n\n"), "sft", "smol"),
    "crlf": ("d.jsonl", jsonl({"text": "A film."}).replace(b"\n", b"\r\n"), "sft", "smol"),
    "gzip": ("d.jsonl.gz", gzip.compress(jsonl({"text": "A film."})), "sft", "smol"),
    "gzipped csv with bom": ("d.csv.gz", gzip.compress(BOM + b"text\nA film.\nA play.\nA.\n"), "sft", "smol"),
    "semicolons": ("d.csv", b"prompt;chosen;rejected\n" + b"Good, really?; Yes.; No.\n" * 3, "reward_model", "smol"),
    "excel's separator": ("d.csv", BOM + b"sep=;\r\nid;text\r\n" + b"1;A film, really.\r\n" * 3, "sft", "smol"),
    "tabs": ("d.tsv", b"id\ttext\n" + b"1\tA film, really.\n" * 3, "sft", "smol"),
    "quoted newlines": ("d.csv", b'text,n\n' + b'"A\nfilm, ""good"".",1\n' * 3, "sft", "smol"),
    "upper case ending": ("d.JSONL", jsonl({"text": "A film."}), "sft", "smol"),
    "parquet of messages": ("d.parquet", parquet({"messages": [ASK, YES]}), "sft", "smol"),
    "parquet with nulls": ("d.parquet", parquet({"messages": [ASK, CALL | {"tool_calls": None}, YES]}), "sft", "qwen"),
    "parquet of pairs": ("d.parquet", parquet(PAIR), "dpo", "smol"),
    "explicit pairs": ("d.jsonl", jsonl(PAIR), "reward_model", "mistral"),
    "implicit pairs": ("d.jsonl", jsonl({"chosen": [ASK, YES], "rejected": [ASK, NO]}), "dpo", "gemma"),
    "ultrafeedback": (
        "d.jsonl", jsonl({"prompt": "Good?", "chosen": [ASK, YES], "rejected": [ASK, NO]}), "dpo", "smol",
    ),
    "pairs of strings": ("d.jsonl", jsonl(PLAIN_PAIR), "dpo", "smol"),
    "pairs without a prompt": ("d.jsonl", jsonl({"chosen": "Good.", "rejected": "Bad."}), "reward_model", "smol"),
    "prompt of null": ("d.jsonl", jsonl(PLAIN_PAIR | {"prompt": None}), "dpo", "smol"),
    "good answers alone": ("d.jsonl", jsonl({"prompt": "Good?", "completion": " Yes.", "label": True}), "sft", "smol"),
    "a label of another kind": ("d.jsonl", jsonl({"prompt": "a", "completion": " b", "label": 0}), "sft", "smol"),
    "parquet of tools": ("d.parquet", parquet({"messages": [ASK, LOOK, TOOL, YES], "tools": TOOLS_OF_TWO}), "sft", "qwen"),
    "chat prompts": ("d.jsonl", jsonl({"prompt": [SYSTEM, ASK]}), "rloo", "smol"),
    "messages as prompts": ("d.jsonl", jsonl({"messages": [ASK, YES]}), "rloo", "llama"),
    "string prompts": ("d.jsonl", jsonl({"prompt": "Good?"}), "rloo", "smol"),
    "texts as prompts": ("d.jsonl", jsonl({"text": "A film that is good."}), "rloo", "smol"),
}  # fmt: skip
REFUSED: dict[str, tuple[str, bytes, str, str, str]] = {
    "two systems": (
        "d.jsonl", jsonl({"system": "Be long.", "conversations": [{"from": "system", "value": "Be short."}, *SHARE]}),
        "sft", "smol", "record 1 of .*another system message in its chat",
    ),
    "a system that is no text": (
        "d.jsonl", jsonl({"system": ["Be short."], "conversations": SHARE}), "sft", "smol", "'system' that is no text",
    ),
    "tools that are dropped": (
        "d.jsonl", jsonl({"messages": [ASK, CALL, TOOL, YES], "tools": TOOLS}), "sft", "smol",
        "record 1 of .*: the chat template does not write tool calls",
    ),
    "an image": (
        "d.jsonl", jsonl({"messages": [{"role": "user", "content": [{"type": "image"}]}, YES]}), "sft", "smol",
        "record 1 of .*: a chat message has a part that is no text",
    ),
    "no role": ("d.jsonl", jsonl({"messages": [{"content": "x"}]}), "sft", "smol", "record 1 of .*: .*has no role"),
    "no alternation": ("d.jsonl", jsonl({"messages": [ASK, ASK]}), "sft", "mistral", "record 1.*must alternate"),
    "no system role": ("d.jsonl", jsonl({"messages": [SYSTEM, ASK]}), "sft", "gemma", "record 1.*System role"),
    "a list of strings": ("d.jsonl", jsonl({"text": ["a", "b"]}), "sft", "smol", "a string or a list of chat messages"),
    "a string among chats": (
        "d.jsonl", jsonl({"messages": [ASK, YES]}, {"messages": "x"}), "sft", "smol", "one kind in all records",
    ),
    "content that is a number": (
        "d.jsonl", jsonl({"messages": [{"role": "user", "content": 7}]}), "sft", "smol", "neither text nor a list",
    ),
    "an empty chat": ("d.jsonl", jsonl({"messages": []}), "sft", "smol", "record 1 .*no text in column 'messages'"),
    "null text": ("d.jsonl", jsonl({"text": None}), "sft", "smol", "record 1 of .* has no text in column 'text'"),
    "a lone surrogate": ("d.jsonl", b'{"text": "\\ud800 film"}\n' * 3, "sft", "smol", "record 1 .*half of a character"),
    "a surrogate in a chat": (
        "d.jsonl", b'{"messages": [{"role": "user", "content": "\\udc00"}]}\n' * 3, "sft", "smol", "half of a character",
    ),
    "tools that are no json": (
        "d.jsonl", jsonl({"messages": [ASK, YES], "tools": "look"}), "sft", "qwen", "'tools' is a string that is not JSON",
    ),
    "string prompt before a chat": (
        "d.jsonl", jsonl({"prompt": "Bad?", "chosen": [YES], "rejected": [NO]}), "dpo", "smol", "give two of a kind",
    ),
    "two kinds of answers": ("d.jsonl", jsonl({"chosen": [YES], "rejected": "No."}), "dpo", "smol", "two of a kind"),
    "a wrong second answer": (
        "d.jsonl", jsonl(PAIR | {"rejected": [NO, NO]}), "reward_model", "mistral", "record 1.*must alternate",
    ),
    "unpaired preferences": (
        "d.jsonl", jsonl({"prompt": "a", "completion": "b", "label": True}), "dpo", "smol", "join a true and a false answer",
    ),
    "bad answers as good ones": (
        "d.jsonl", jsonl({"prompt": "a", "completion": "b", "label": True}, {"prompt": "a", "completion": "c", "label": False}),
        "sft", "smol", "unpaired preferences .*keep the records whose label is true",
    ),
    "one object": (
        "d.json", json.dumps({"version": 1, "data": [{"text": "x"}]}, indent=1).encode(), "sft", "smol",
        "save the array in its 'data' by itself",
    ),
    "only an answer": ("d.jsonl", jsonl({"messages": [YES]}), "rloo", "smol", "there is no prompt"),
    "latin-1": ("d.csv", "text\nDer Film läuft.\n".encode("latin-1"), "sft", "smol", "not UTF-8 text .byte"),
    "utf-16": ("d.csv", "text\nA film.\n".encode("utf-16"), "sft", "smol", "not UTF-8 text .byte"),
    "half a line": ("d.jsonl", jsonl({"text": "x"}) + b'{"text": "y', "sft", "smol", "line 4 of .* is not JSON"),
    "half an array": ("d.json", b'[{"text": "x"},\n {"text": ', "sft", "smol", r"is none \(line 2\)"),
    "an array of strings": ("d.json", b'["x"]', "sft", "smol", "entry 1 of the array in .* is not a JSON object"),
    "a number": ("d.jsonl", b"7\n", "sft", "smol", "line 1 of .* is not a JSON object"),
    "deep nesting": ("d.jsonl", b"[" * 100_000, "sft", "smol", "begins as a JSON array"),
    "a column twice": ("d.csv", b"text,text\na,b\n", "sft", "smol", "one name for its columns 1 and 2"),
    "a column without a name": ("d.csv", b"text,\na,b\n", "sft", "smol", "a column without a name"),
    "more fields": ("d.csv", b"text,n\na film, good,1\n", "sft", "smol", "record 1 of .* more or fewer fields"),
    "an open quote": ("d.csv", b'text\n"a film\n', "sft", "smol", "not valid CSV"),
    "a header alone": ("d.csv", b"text\n", "sft", "smol", "is empty"),
    "nothing": ("d.jsonl", b"", "sft", "smol", "is empty"),
    "no gzip": ("d.jsonl.gz", b"text", "sft", "smol", "cannot be read"),
    "no parquet": ("d.parquet", b"text", "sft", "smol", "not a Parquet file"),
    "excel": ("d.xlsx", b"PK", "sft", "smol", "save a spreadsheet as CSV"),
    "alpaca": ("d.jsonl", jsonl({"instruction": "a", "output": "b"}), "sft", "smol", "columns 'instruction', 'output'; exp"),
}  # fmt: skip
STAGES = {
    "sft": {"max_length": 160},
    "reward_model": {"max_length": 160},
    "dpo": {"max_length": 160},
    "rloo": {"max_prompt_length": 160, "max_completion_length": 4, "num_generations": 2, "prompt_max_tokens": 3},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: model_folder(folder / name, name) for name in TEMPLATES}


def plan(case: tuple, models: dict[str, Path], folder: Path, capsys: pytest.CaptureFixture[str]):
    name, content, stage, template = case[:4]
    (folder / name).write_bytes(content)
    recipe = {
        "output_dir": str(folder / "run"), "ledger": str(folder / "ledger.sqlite"), "target_epsilon": 4,
        "model": {"name_or_path": str(models[template]), "is_public": True},
        "data": {"name": "people", "path": str(folder / name), "declared_units": 3},
        stage: STAGES[stage] | {"expected_batch_size": 2, "max_steps": 2, "adapter": {"r": 2}},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return call(capsys, "plan", folder / "recipe.yaml", "--json")


@pytest.mark.parametrize("case", WORK)
def test_works(case, models, tmp_path, capsys):
    called = plan(WORK[case], models, tmp_path, capsys)
    assert called.status == 0, called.err
    records = read_records(str(tmp_path / WORK[case][0]))
    assert len(records) == 3 and not any(key.startswith("\ufeff") for record in records for key in record)


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused(case, models, tmp_path, capsys):
    said = plan(REFUSED[case], models, tmp_path, capsys).error
    assert re.search(REFUSED[case][4], said), said
    assert "internal" not in said and not (tmp_path / "run").exists()


def test_a_system_beside_a_chat_is_its_first_message(tmp_path):
    said = {"from": "system", "value": "Be short."}
    records = [
        {"system": "Be short.", "conversations": SHARE}, {"system": "Be short.", "messages": [ASK, YES]},
        {"system": "Be short.", "conversations": [said, *SHARE]}, {"system": "", "conversations": SHARE},
    ]  # fmt: skip
    (tmp_path / "d.jsonl").write_bytes(b"".join(json.dumps(r).encode() + b"\n" for r in records))
    found = [
        next(r[c] for c in ("conversations", "messages") if c in r) for r in read_records(str(tmp_path / "d.jsonl"))
    ]
    assert found == [[SYSTEM, *SHARE], [SYSTEM, ASK, YES], [said, *SHARE], SHARE]


def test_there_are_sixty():
    assert len(WORK) + len(REFUSED) >= 60
