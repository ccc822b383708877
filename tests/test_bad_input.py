"""What is wrong is said in one sentence that quotes no record, before anything is drawn or released."""

from __future__ import annotations

import gzip
import json
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from dpalign.privacy.ledger import Ledger
from helpers import (
    Called,
    call,
    files_below,
    in_fresh_process,
    judged,
    ledger_rows,
    reviews,
    write_jsonl,
    write_recipe,
)
from tiny import tiny_base, tiny_tokenizer

MARKER = "zebrafinch"
RECORDS = reviews(64, MARKER)
REWARDS = """
calls = 0
def constant(prompts, completions, **columns):
    return [0.5 for _ in completions]
def nan(prompts, completions, **columns):
    return [float("nan") for _ in completions]
def short(prompts, completions, **columns):
    return [0.5 for _ in completions[1:]]
def words(prompts, completions, **columns):
    return ["good" for _ in completions]
def whitened(prompts, completions, **columns):
    lengths = [len(c) / 100 for c in completions]
    return [v - sum(lengths) / len(lengths) for v in lengths]
def stateful(prompts, completions, **columns):
    global calls
    calls += 1
    return [len(c) / (100 + calls) for c in completions]
def failing(prompts, completions, **columns):
    raise KeyError("score")
not_a_function = 3
"""


def reward(name: str, **changes: Any) -> dict[str, Any]:
    source = {"source": f"bad_rewards:{name}", "is_public": True, "low": -1.0, "high": 1.0}
    return {"sft": None, "ppo": {"reward": source | changes}}


def other_data(name: str, records: list[dict], unit: str | None) -> Callable[[Path], dict[str, Any]]:
    """A second dataset for PPO alone."""

    def changes(folder: Path) -> dict[str, Any]:
        path = write_jsonl(folder / "other.jsonl", records)
        return {"ppo_data": {"name": name, "path": str(path), "unit": unit}, "data": {"unit": unit}}

    return changes


def text(content: str | bytes, ending: str = ".jsonl") -> Callable[[Path], dict[str, Any]]:
    """A data file with this content."""

    def changes(folder: Path) -> dict[str, Any]:
        path = folder / f"bad{ending}"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return {"data": {"path": str(path)}}

    return changes


def records(rows: list[dict]) -> Callable[[Path], dict[str, Any]]:
    return text("".join(json.dumps(r) + "\n" for r in rows))


def below_a_file(folder: Path) -> dict[str, Any]:
    return {"output_dir": str(folder / "data.jsonl" / "run")}


def ledger_is_a_folder(folder: Path) -> dict[str, Any]:
    (folder / "taken").mkdir()
    return {"ledger": str(folder / "taken")}


def undeclared_model(folder: Path) -> dict[str, Any]:
    tiny_base("gpt2").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    return {"model": {"name_or_path": str(folder / "model"), "is_public": False}}


CHAT = [{"role": "user", "content": f"{MARKER} says hello"}]
LINES = [json.dumps(r) for r in RECORDS]
DATA = {
    "missing file": ({"data": {"path": "nowhere.jsonl"}}, "nowhere.jsonl does not exist"),
    "no file named": ({"data": {"path": ""}}, "names no data"),
    "no name": ({"data": {"name": ""}}, "declared name"),
    "empty file": (text(""), "is empty"),
    "unknown ending": (text(f"{MARKER}", ".txt"), "unknown ending"),
    "not UTF-8": (text("\n".join(LINES).encode() + b'\n{"text": "\xff\xfe zebrafinch"}\n'), "not UTF-8"),
    "broken JSON": (text("\n".join([*LINES[:4], LINES[4][:-9], *LINES[5:]])), "line 5 of"),
    "JSON of another kind": (text("\n".join([*LINES[:2], f'["{MARKER}"]'])), "line 3 of"),
    "cut gzip": (text(gzip.compress("\n".join(LINES).encode())[:-40], ".jsonl.gz"), "cannot be read"),
    "ragged CSV": (text(f"id,text\n1,{MARKER}\n2,{MARKER},more\n", ".csv"), "fields than the header"),
    "not Parquet": (text(f"PAR1{MARKER}", ".parquet"), "not a Parquet file"),
    "missing column": (records([{"body": r["text"]} for r in RECORDS]), "'text' or 'prompt' + 'completion'"),
    "one record without text": (records([*RECORDS, {"id": "x", "text": ""}]), "record 65 of"),
    "numbers for text": (records([*RECORDS, {"id": "x", "text": 3}]), "record 65 of"),
    "chat without a template": (records([{"text": CHAT} for _ in RECORDS]), "no chat template"),
    "chat prompts without a template": (
        lambda folder: {"sft": None} | records([{"prompt": CHAT} for _ in RECORDS])(folder),
        "no chat template",
    ),
    "long prompt": (
        lambda folder: {"sft": None} | records([{"prompt": f"{MARKER} " * 9} for _ in RECORDS])(folder),
        "more than max_prompt_length 5",
    ),
    "missing unit column": ({"data": {"unit": "author"}}, "record 1 names no unit in column 'author'"),
    "unit missing in one record": (
        lambda folder: merge_unit(records([*RECORDS, {"text": MARKER}])(folder)),
        "record 65 names no unit",
    ),
    "overlapping units": (other_data("others", reviews(80)[50:], "id"), "14 units are in both"),
    "undeclared disjointness": (other_data("others", reviews(8), None), "units_disjoint: declared"),
}
PAIRS = judged(63, MARKER)


def pairs(*rows: dict[str, Any], **section: Any) -> Callable[[Path], dict[str, Any]]:
    """A reward stage alone, on 63 good pairs and `rows`."""
    stage = {"expected_batch_size": 8, "max_steps": 2, "max_length": 24, "adapter": {"r": 2}} | section
    return lambda folder: {"sft": None, "ppo": None, "reward_model": stage} | records([*PAIRS, *rows])(folder)


def wrong(**changes: Any) -> Callable[[Path], dict[str, Any]]:
    return pairs({"chosen": MARKER, "rejected": "good"} | changes)


REWARD_MODEL = {
    "pairs without rejected": (
        lambda folder: pairs()(folder) | records([{"chosen": r["chosen"]} for r in PAIRS])(folder),
        "expected 'chosen' + 'rejected'",
    ),
    "texts for pairs": (lambda folder: pairs()(folder) | records(RECORDS)(folder), "expected 'chosen' + 'rejected'"),
    "no pairs": (lambda folder: pairs()(folder) | text("")(folder), "is empty"),
    "an empty answer": (wrong(rejected=""), "record 64 of"),
    "preference above 1": (wrong(preference=1.5), "no valid preference: expected a number in [0, 1]"),
    "preference below 0": (wrong(preference=-0.1), "no valid preference"),
    "NaN margin": (wrong(margin=float("nan")), "no valid margin: expected a number of at least 0"),
    "margin of words": (wrong(margin=MARKER), "no valid margin"),
    "negative margin": (wrong(margin=-1), "no valid margin"),
    "chats among strings": (wrong(chosen=CHAT, rejected=CHAT), "chat messages in another"),
    "half of the smoothing": (pairs(label_smoothing=0.5), "label_smoothing 0.5"),
    "no such treatment of ties": (pairs(ties="coin"), "ties"),
    "longer than the model": (pairs(max_length=5000), "lower the stage's lengths"),
    "reward model without a stage": (reward("", source="reward_model"), "needs a section reward_model or reward_query in the recipe"),
    "no such reward model": (reward("", source="reward_model:nowhere", is_public=False), "must be declared public"),
    "not a reward model": (lambda folder: reward("", source=f"reward_model:{folder}"), "not the release of a reward model"),
    "both ppo and rloo": ({"rloo": {"max_steps": 1}}, "keep one of them"),
    "evaluation of nothing": ({"ppo": None, "measurement": {}}, "measurement has nothing to measure by"),
    "rloo longer than the model": (
        {"ppo": None, "rloo": {"expected_batch_size": 8, "max_steps": 1, "max_completion_length": 5000}}, "stage rloo needs",
    ),
    "one rollout for rloo": ({"ppo": None, "rloo": {"num_generations": 1}}, "must be at least 2"),
    "judges overlap": (
        lambda folder: pairs()(folder) | {
            "sft": {"max_steps": 1, "expected_batch_size": 8}, "data": {"unit": "id"},
            "reward_model_data": {"name": "pairs", "path": str(write_jsonl(folder / "o.jsonl", judged(40, start=59))), "unit": "id"},
        },
        "5 units are in both 'reviews' (sft) and 'pairs' (reward_model)",
    ),
    "overlap in sequential composition under two names": (
        lambda folder: {"composition": "sequential"} | other_data("others", reviews(80)[50:], "id")(folder),
        "14 units are in both",
    ),
    "fractions in sequential composition": (
        {"composition": "sequential", "split": {"sft": 0.5, "ppo": 0.5}}, "fractions make disjoint parts",
    ),
    "no such composition": ({"composition": "optimistic"}, "composition"),
    "a weight of nothing": ({"composition": "sequential", "allocation": {"sft": 0.0}}, "allocation 0.0 must be above 0"),
    "no budget left": (
        {"composition": "sequential", "sft": {"noise_multiplier": 0.3}}, "leaves them nothing of epsilon 2",
    ),
}  # fmt: skip
REWARD = {
    "NaN reward": (reward("nan"), "NaN or infinity"),
    "wrong length": (reward("short"), "returned 7 scores for 8 completions"),
    "no numbers": (reward("words"), "must return numbers"),
    "coupled rows": (reward("whitened"), "score every completion by itself"),
    "running state": (reward("stateful"), "score every completion by itself"),
    "failing reward": (reward("failing"), "raised KeyError on the public probe texts"),
    "no such reward": (reward("missing"), "cannot be imported"),
    "no function": (reward("not_a_function"), "is not a function"),
    "no module": (reward("", source="sentiment"), "use vader, classifier:PATH, judge:MODEL"),
    "no range": (reward("constant", low=None), "declared range"),
    "empty range": (reward("constant", low=1.0), "must be finite and not empty"),
    "private reward": (reward("constant", is_public=False), "declared public"),
    "no classifier's folder": (
        reward("", source="classifier:runs/nowhere/it"),
        "cannot load a text classifier from 'runs/nowhere/it': there is no such folder",
    ),
    "no classifier": (lambda folder: reward("", source=f"classifier:{folder}"), "cannot load a text classifier"),
}
SETTINGS = {
    "epsilon 0": ({"target_epsilon": 0}, "epsilon 0"),
    "negative epsilon": ({"target_epsilon": -2}, "epsilon -2"),
    "negative noise": ({"sft": {"noise_multiplier": -1.0}}, "sft.noise_multiplier -1.0 must be at least 0"),
    "stage above the run": ({"sft": {"target_epsilon": 9}}, "more than the target 2"),
    "delta 1": ({"target_delta": 1}, "delta 1"),
    "batch above N": ({"sft": {"expected_batch_size": 33}}, "expected_batch_size 33 is larger than the 32 units"),
    "declared units below the batch": ({"data": {"declared_units": 10}}, "larger than the 5 units"),
    "no steps": ({"sft": {"max_steps": 0}}, "max_steps 0"),
    "clipping none": ({"sft": {"clipping": "none"}}, "unbounded sensitivity"),
    "no such clipping": ({"sft": {"clipping": "soft"}}, "clipping"),
    "unknown field": ({"colour": "red"}, "unknown field colour"),
    "unknown nested field": ({"sft": {"learning_rat": 1}}, "unknown field sft.learning_rat"),
    "a stage under its old name": (
        {"reward": {"max_steps": 1}},
        "that stage is called reward_model now, and its data reward_model_data",
    ),
    "its data under the old name": ({"evaluation_data": {"name": "x"}}, "and its data measurement_data"),
    "data of a stage that is not there": ({"dpo_data": {"name": "x"}}, "the recipe has no stage dpo"),
    "unknown field two levels down": ({"ppo": {"reward": {"sauce": 1}}}, "unknown field ppo.reward.sauce"),
    "wrong type": ({"sft": {"max_steps": "many"}}, "field sft.max_steps: expected int"),
    "number for a section": ({"sft": 3}, "field sft: expected a section of settings"),
    "wrong type at the top": ({"target_epsilon": "small"}, "field target_epsilon: expected float"),
    "no stage": ({"sft": None, "ppo": None}, "no stage"),
    "split above 1": ({"split": {"sft": 0.8, "ppo": 0.8}}, "add up to at most 1"),
    "split without a stage": ({"split": {"sft": 0.5}}, "gives stage ppo no fraction"),
    "no such layers": ({"sft": {"adapter": {"target_modules": ["nothing"]}}}, "the model has no layer nothing"),
    "undeclared model": (undeclared_model, "must be declared public"),
    "no such release": (
        {"model": {"name_or_path": "runs/nowhere/release"}},
        "'runs/nowhere/release' is neither a folder here",
    ),
    "empty model folder": (lambda folder: {"model": {"name_or_path": str(folder), "is_public": True}}, "cannot load"),
    "no such dtype": ({"model": {"dtype": "int8"}}, "field model.dtype: expected"),
    "output below a file": (below_a_file, "choose a writable output folder"),
    "ledger is a folder": (ledger_is_a_folder, "give another path with --ledger"),
}


def merge_unit(changes: dict[str, Any]) -> dict[str, Any]:
    return {"data": changes["data"] | {"unit": "id"}}


def check(folder: Path, called: Called, says: str) -> None:
    assert says in called.error
    assert MARKER not in called.out + called.err and "evening" not in called.err
    outside = files_below(folder / "run", lambda path: path.parts[0] != "private") if (folder / "run").is_dir() else []
    assert not outside, "nothing half-written"
    if (folder / "ledger.sqlite").exists():
        assert ledger_rows(folder) == 0, "nothing drawn"


@pytest.mark.parametrize("case", [*DATA, *REWARD, *REWARD_MODEL, *SETTINGS])
def test_bad_input(case, tmp_path, capsys, monkeypatch):
    (tmp_path / "bad_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bad_rewards", raising=False)
    write_jsonl(tmp_path / "data.jsonl", RECORDS)
    changes, says = (DATA | REWARD | REWARD_MODEL | SETTINGS)[case]
    recipe = write_recipe(tmp_path, **(changes(tmp_path) if callable(changes) else changes))
    check(tmp_path, call(capsys, "run", recipe, "--json"), says)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("fly",), "unknown command 'fly'"),
        (("run", "nowhere.yaml"), "nowhere.yaml"),
        (("run", "broken.yaml"), "the recipe is not YAML of sections and fields"),
        (("run", "recipe.yaml", "--sft.max_step", "3"), "unknown field sft.max_step"),
        (("run", "recipe.yaml", "--sft.max_steps", "few"), "field sft.max_steps"),
        (("generate", "tiny-review-lm"), "give at least one --prompt"),
        (("export", "nowhere", "--to", "x"), "holds no release"),
        (("evaluate", "tiny-review-lm", "--data", "data.jsonl"), "--eval_is_public"),
        (("ledger", "--ledger", "empty.sqlite", "--dataset", "nothing"), "knows no dataset 'nothing'"),
        (("ledger", "--ledger", "mistyped.sqlite"), "there is no ledger mistyped.sqlite"),
        (("ledger", "--ledger", "other.sqlite"), "other.sqlite is the database of another program"),
        (("ledger", "--ledger", "foreign.sqlite"), "holds a row that no dpalign wrote"),
    ],
)
def test_bad_calls(arguments, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path)
    (tmp_path / "broken.yaml").write_text("output_dir: [1\n  sft: {")
    Ledger("empty.sqlite").close()
    for name, table in (
        ("other", "CREATE TABLE mail (id)"),
        ("foreign", "INSERT INTO intents (written, dataset, units) VALUES ('', 'x', -1)"),
    ):
        Ledger("foreign.sqlite").close()
        with closing(sqlite3.connect(f"{name}.sqlite")) as database, database:
            database.execute(table)
    check(tmp_path, call(capsys, *arguments), says)
    assert not (tmp_path / "mistyped.sqlite").exists() and not (tmp_path / "ledger.sqlite").exists()
    with closing(sqlite3.connect("other.sqlite")) as database:
        assert database.execute("SELECT name FROM sqlite_master").fetchall() == [("mail",)]


def test_a_fresh_process_says_it_too(tmp_path):
    write_jsonl(tmp_path / "data.jsonl", [{"body": r["text"]} for r in RECORDS])
    status, out, err = in_fresh_process(tmp_path, "run", write_recipe(tmp_path), "--json")
    check(tmp_path, Called(status, out, err), "'text' or 'prompt'")


def test_a_librarys_error_quotes_nothing(tmp_path, capsys, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError(f"cannot train on {RECORDS[0]['text']}")

    monkeypatch.setattr("dpalign.training.loop.PerUnitGradients", fail)
    write_jsonl(tmp_path / "data.jsonl", RECORDS)
    called = call(capsys, "run", write_recipe(tmp_path, target_epsilon=100, ppo=None, sft={"noise_multiplier": 2}))
    assert called.status == 1 and "internal error RuntimeError" in called.err
    assert MARKER not in called.err and "Traceback" not in called.err
