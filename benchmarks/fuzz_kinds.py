"""What is fuzzed: of each kind of input the files that are damaged, and the functions that a command reads them with.

`meet` returns where an input is accepted, having used it; it lets dpalign's own error through where it is refused; and it
raises AssertionError where something was lost, or what was accepted cannot be used. Nothing is drawn.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import math
import os
import pickle
import runpy
import sqlite3
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow
import pyarrow.parquet
import torch
import yaml
from hypothesis import strategies as st
from models import word_tokenizer
from mutations import IN_PLACE, MARKER, as_json, changed, damaged, values
from safetensors.torch import load, save
from transformers import LlamaConfig, LlamaForCausalLM

from dpalign import boundary, provenance, workspace
from dpalign.algorithms import PPO
from dpalign.algorithms.base import check_records
from dpalign.cli import manual
from dpalign.cli.train import only_stage
from dpalign.data import UnitDataset, read_records
from dpalign.data.overlap import remember_contents
from dpalign.domains import check_settings
from dpalign.errors import DPAlignError
from dpalign.files import dumps
from dpalign.inputs import read_record
from dpalign.models import AdapterConfig, ModelConfig, Normalization, Policy, RewardModel, TextFormat
from dpalign.models.reward_model import normalization_of
from dpalign.parsing import fields_below, recipe_from
from dpalign.plan import RecipeStage
from dpalign.privacy import parts, statement
from dpalign.privacy.ledger import COLUMNS, Intent, Ledger
from dpalign.privacy.parts import Part
from dpalign.privacy.statement import read_statement
from dpalign.recipe import Recipe
from dpalign.records import check_shared_texts, read_by, read_stage_records, stage_units, units_of
from dpalign.reporting.html import write_report
from dpalign.reporting.nist import write_nist
from dpalign.rewards import Reward
from dpalign.settings.data import DataConfig
from dpalign.settings.ppo import PPOConfig
from dpalign.settings.rewards import RewardConfig
from dpalign.stages import STAGES
from dpalign.survey import survey
from dpalign.training import Stage
from finished import finished_run

ROOT = Path(__file__).parent.parent
FORMATS = ROOT / "tests" / "formats"
VOCABULARY = 64
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"


@dataclass(frozen=True)
class Case:
    """One input: files by their names, and what else the command is told."""

    files: dict[str, bytes]
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kind:
    """share: of all cases. inputs: made when it is first asked for. meet: reads the files in a folder. writes: whether it
    may change them, and sees to it itself that nothing is lost. of_records: whether a message may not quote them."""

    share: float
    inputs: Callable[[], st.SearchStrategy[Case]]
    meet: Callable[[Case, Path], None]
    writes: bool = False
    of_records: bool = False


@cache
def place() -> Path:
    """A folder of this process for what cases share."""
    return Path(tempfile.mkdtemp(prefix="dpalign-fuzz-"))


@cache
def base() -> Path:
    """A model of one narrow layer, and its tokenizer."""
    folder = place() / "base"
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "max_position_embeddings": 32}
    LlamaForCausalLM(LlamaConfig(**sizes, **ends)).save_pretrained(folder)
    word_tokenizer(VOCABULARY).save_pretrained(folder)
    return folder


@cache
def tokenizer() -> Any:
    found = word_tokenizer(VOCABULARY)
    found.chat_template = TEMPLATE
    return found


def policy() -> Policy:
    return Policy.load(ModelConfig(str(base()), is_public=True, dtype="float32"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def one_damaged(files: dict[str, bytes], ways: dict[str, st.SearchStrategy[bytes]]) -> st.SearchStrategy[Case]:
    """The files with one of them replaced, or none of it left, or two of them exchanged."""
    names = sorted(ways)
    replaced = [ways[name].map(lambda content, name=name: Case(files | {name: content})) for name in names]
    gone = st.sampled_from(names).map(lambda name: Case({n: c for n, c in files.items() if n != name}))
    pairs = st.permutations(sorted(files)).map(lambda order: Case(files | {order[0]: files[order[1]], order[1]: files[order[0]]}))
    return st.one_of(*replaced, *replaced, *replaced, gone, pairs)


def json_or_bytes(content: bytes) -> st.SearchStrategy[bytes]:
    tree = st.builds(as_json, changed([json.loads(content)]), st.booleans())
    return st.one_of(tree, tree, damaged([content]))


# Recipes --------------------------------------------------------------------------------------------------------------

COMMANDS = ["run", "run", *(name for name, listed in STAGES.items() if listed.is_command)]


def recipes() -> st.SearchStrategy[Case]:
    contents = [file.read_bytes() for file in sorted((ROOT / "recipes").glob("*.yaml"))]
    trees = [yaml.safe_load(content) for content in contents]
    names = [name for section in ["", *STAGES, "model", "data"] for name in fields_below(section)]
    texts = st.one_of(st.sampled_from(["", "null", "{}", "[]", "inf", "1e-3", "1:30", "010", "true", "{r: 1}", "[0, 1]", "x", "*a", "&a [*a]", "'"]),
                      values.map(lambda value: str(value)[:200]), damaged([b"{sft: 0.5, ppo: [0, 1]}"]).map(lambda b: b.decode("utf-8", "surrogateescape")[:200]))  # fmt: skip
    option = st.tuples(st.sampled_from([*names, "no.such", "sft", "data", "help", "config", "sft.help"]), texts, st.booleans())
    options = st.lists(option, max_size=2).map(lambda found: [w for name, text, apart in found for w in ([f"--{name}", text] if apart else [f"--{name}={text}"])])
    files = st.one_of(changed(trees).map(as_yaml), changed(trees).map(as_json), damaged(contents))
    return st.builds(lambda file, command, words: Case({"recipe.yaml": file}, (command, *words)), files, st.sampled_from(COMMANDS), options)


def as_yaml(tree: Any) -> bytes:
    try:
        return yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, ValueError, RecursionError):
        return as_json(tree)


def meet_recipe(case: Case, folder: Path) -> None:
    command, *words = case.words
    recipe = parsed(command, [str(folder / "recipe.yaml"), *words])
    if recipe is None:
        return
    again = folder / "again.yaml"
    again.write_text(yaml.safe_dump(asdict(recipe), allow_unicode=True), encoding="utf-8")
    assert parsed(command, [str(again)]) == recipe, "what was parsed is not what it is written as"


def parsed(command: str, words: list[str]) -> Recipe | None:
    """As `dpalign run` and the stages' commands do it."""
    if manual.asked(command, words, "") is not None:
        return None
    recipe = recipe_from(command, words)
    if command not in STAGES:
        recipe.check()
        return recipe
    check_settings(recipe)
    return only_stage(recipe, command)


# Data -----------------------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Any] = {
    "sft": {"max_length": 8}, "dpo": {"max_length": 8}, "reward_model": {"max_length": 8}, "ppo": {"max_prompt_length": 8, "max_completion_length": 4},
    "rloo": {"max_prompt_length": 8, "max_completion_length": 4}, "offline": {"max_prompt_length": 8, "max_completion_length": 4},
}  # fmt: skip
ENDINGS = ["jsonl", "ndjson", "json", "csv", "tsv", "parquet", "jsonl.gz", "json.gz", "csv.gz", "JSONL", "txt", "parquet.gz"]
RECORDS = [
    [{"text": f"w1 w{n} {MARKER}", "id": f"p{n // 2}", "meta": {"user": n // 2}} for n in range(4)],
    [{"prompt": f"w{n}", "completion": f"w2 {MARKER}", "id": n} for n in range(4)],
    [{"prompt": f"w{n}", "chosen": f"w2 w3 {MARKER}", "rejected": "w4", "id": n, "margin": 0.5} for n in range(3)],
    [{"messages": [{"role": "user", "content": f"w{n}"}, {"role": "assistant", "content": MARKER}], "system": "w9", "id": n} for n in range(3)],
    [{"conversations": [{"from": "human", "value": f"w{n}"}, {"from": "gpt", "value": MARKER}], "tools": "[]", "id": n} for n in range(3)],
    [{"prompt": [{"role": "user", "content": f"w{n}"}], "chosen": [{"role": "assistant", "content": MARKER}],
      "rejected": [{"role": "assistant", "content": "w5"}], "preference": 1.0, "id": n} for n in range(3)],
]  # fmt: skip
FITTING = [["sft", "ppo", "rloo"], ["sft", "ppo", "offline"], ["dpo", "reward_model", "ppo"], ["sft", "ppo"], ["sft", "rloo"], ["dpo", "reward_model"]]


def data() -> st.SearchStrategy[Case]:
    whole = {ending: [written(records, ending) for records in RECORDS] for ending in ENDINGS}
    every = [content for contents in whole.values() for content in contents]

    def case(stages: list[str], ending: str, contents: st.SearchStrategy[bytes]) -> st.SearchStrategy[Case]:
        told = st.tuples(st.sampled_from(stages), st.sampled_from(["", "", "id", "meta.user", "text"]), st.sampled_from(["1", "2"]))
        return st.builds(lambda content, words: Case({f"data.{ending}": content}, words), contents, told)

    found = [case([*SECTIONS], ending, damaged(every)) for ending in ENDINGS]
    for records, stages in zip(RECORDS, FITTING, strict=True):
        for ending in ENDINGS:
            tree = st.builds(written, changed([records], most=2), st.just(ending), st.booleans())
            found += [case(stages, ending, tree)] * 2 + [case(stages, ending, damaged([written(records, ending)], most=2))]
            if ending.endswith(".gz"):
                found.append(case(stages, ending, damaged([written(records, ending.removesuffix(".gz"))]).map(packed)))
    return st.one_of(found)


def packed(content: bytes) -> bytes:
    return gzip.compress(content, 1, mtime=0)


def written(records: Any, ending: str, plain: bool = True) -> bytes:
    """A tree as a file of that ending; what the format cannot hold is written as lines of JSON."""
    kind, _, gz = ending.lower().partition(".")
    content = _written(records, kind, plain)
    return packed(content) if gz else content


def _written(records: Any, kind: str, plain: bool) -> bytes:
    if not isinstance(records, list) or kind == "json":
        return as_json(records, plain)
    rows = [row for row in records if isinstance(row, dict)]
    if kind == "parquet" and rows:
        try:
            sink = io.BytesIO()
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink, row_group_size=2)
            return sink.getvalue()
        except (pyarrow.ArrowException, ValueError, TypeError, OverflowError):
            pass
    if kind in ("csv", "tsv") and rows:
        mark = "," if kind == "csv" else "\t"
        names = list(rows[0])
        lines = [names, *([row.get(name, "") for name in names] for row in rows)]
        text = "\n".join(mark.join('"' + str(cell).replace('"', '""') + '"' for cell in line) for line in lines)
        return text.encode("utf-8", "surrogatepass")
    return b"\n".join(as_json(record, plain) for record in records)


@cache
def recipe_of(stage: str) -> Recipe:
    section = SECTIONS[stage] | {"expected_batch_size": 1, "max_steps": 1}
    return recipe_from("run", [f"--{stage}={json.dumps(section)}"])


def meet_data(case: Case, folder: Path) -> None:
    """As `run_recipe` reads the records of a stage, up to its first draw."""
    (name,), (stage, unit, most) = case.files, case.words
    source = DataConfig(name="people", path=str(folder / name), unit=unit or None, max_records_per_unit=int(most))
    recipe = replace(recipe_of(stage), data=source)
    with closing(Ledger(":memory:")) as ledger:
        given = read_stage_records(recipe, ledger, folder if case.words[2] == "1" else None)
        units, _ = stage_units(recipe, given, ledger)
        found, public = units[stage], units_of(recipe, given, units)[stage]
        records = {stage: read_by(recipe, stage, given[stage])}
        planned = RecipeStage(stage, recipe.stages[stage])
        readings = check_records(
            records[stage], source.path, planned.kind.columns, partial(read_record, planned, tokenizer(), VOCABULARY)
        )
        survey(readings, records[stage], source.unit)
        texts = check_shared_texts(recipe, records, [], ledger)
        remember_contents(texts, ledger)
        kept = [record for records_of in found.units for record in records_of]
        assert len(records[stage]) == len(read_records(source.path)), "records were lost"
        assert 1 <= len(found.units) <= len(kept) <= len(records[stage]), "units have other records"
        assert unit or int(public.count) == len(records[stage]), "a record is no unit"
        assert not ledger.intents(), "something was drawn"


# Ledgers --------------------------------------------------------------------------------------------------------------

INTENT = Intent("reviews", "new-run", "sft", 0, 0, "split", 0.0, 1.0, 0.1, 2.0, math.inf, 1, 1.0, "record", 64.0, "f", "c", True)
TABLES = {"datasets": ["name", "secret"], "identity": ["name"], "intents": ["id", "written", *COLUMNS], "splits": ["dataset", "kind", "name", "contents"],
          "texts": ["dataset", "is_public", "shelf", "hashes"], "keys": ["name", "secret"]}  # fmt: skip
SCHEMAS = [
    "PRAGMA user_version = {n}", "DROP TABLE {table}", "ALTER TABLE {table} RENAME TO other", "ALTER TABLE {table} RENAME COLUMN {column} TO other",
    "ALTER TABLE {table} DROP COLUMN {column}", "ALTER TABLE {table} ADD COLUMN later DEFAULT 3", "DELETE FROM {table}", "DELETE FROM {table} WHERE rowid % 3 = 1",
    "CREATE TABLE mail (id)", "CREATE VIEW also AS SELECT * FROM {table}", "CREATE TRIGGER gone AFTER INSERT ON {table} BEGIN DELETE FROM intents; END",
    "CREATE TRIGGER never BEFORE INSERT ON intents BEGIN SELECT RAISE(IGNORE); END", "CREATE UNIQUE INDEX once ON {table} ({column})", "CREATE INDEX more ON {table} ({column})",
    "INSERT INTO {table} SELECT * FROM {table}", "INSERT OR REPLACE INTO datasets VALUES ('b', x'00')", "INSERT INTO identity VALUES (NULL)",
    "CREATE TABLE kept AS SELECT * FROM intents; DROP TABLE intents; ALTER TABLE kept RENAME TO intents",
    "DROP TABLE intents; CREATE VIEW intents AS SELECT 1 AS id, 'now' AS written, name AS dataset FROM datasets", "PRAGMA application_id = 7", "VACUUM",
    "PRAGMA writable_schema = 1; UPDATE sqlite_master SET sql = replace(sql, 'NULL', 'NULL ') WHERE name = '{table}'",
    "PRAGMA writable_schema = 1; UPDATE sqlite_master SET sql = substr(sql, 1, length(sql) - {n}) WHERE name = '{table}'",
    "PRAGMA writable_schema = 1; UPDATE sqlite_master SET rootpage = {n} WHERE name = '{table}'", "PRAGMA writable_schema = 1; DELETE FROM sqlite_master WHERE name LIKE 'sqlite_auto%'",
]  # fmt: skip


@cache
def ledgers_there_are() -> list[bytes]:
    """One that version 0.1.0 wrote, and one of this version."""
    path = place() / "now.sqlite"
    with closing(Ledger(path)) as ledger:
        for dataset in ("reviews", "people"):
            ledger.secret(dataset)
            split = ledger.split(dataset, "records", b"contents")
            assert split is not None
            ledger.write([replace(INTENT, dataset=dataset, run=f"run-{n % 2}", step=n, split=split, low=n % 2 / 2) for n in range(6)])
            ledger.remember_texts(dataset, False, os.urandom(64))
        ledger.key("texts")
    return [(FORMATS / "ledger_v0.sqlite").read_bytes(), path.read_bytes()]


def ledgers() -> st.SearchStrategy[Case]:
    seeds = ledgers_there_are()
    columns = [(table, column) for table, names in TABLES.items() for column in names]
    columns += [("intents", column) for column in COLUMNS] * 3
    setting = st.tuples(st.just("UPDATE OR IGNORE {table} SET {column} = ? WHERE rowid % ? = 0"), st.sampled_from(columns), values, st.integers(1, 5))
    schema = st.tuples(st.sampled_from(SCHEMAS), st.sampled_from(columns), st.none(), st.integers(0, 7))
    edits = st.lists(st.one_of(setting, setting, setting, schema), min_size=1, max_size=3)
    edited = st.builds(edited_ledger, st.sampled_from(seeds), edits)
    contents = st.one_of(edited, edited, damaged(seeds, most=4, changes=IN_PLACE), damaged(seeds))
    return contents.map(lambda content: Case({"l.sqlite": content}))


def edited_ledger(content: bytes, edits: list[Any]) -> bytes:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as database:
        database.deserialize(content)
        for statement_of, (table, column), value, number in edits:
            statements = statement_of.format(table=table, column=column, n=number).split("; " if "TRIGGER" not in statement_of else "\0")
            for text in statements:
                with contextlib.suppress(sqlite3.Error, OverflowError, UnicodeError):
                    bound = (value if isinstance(value, str | bytes | int | float) or value is None else str(value), number)
                    database.execute(text, bound if "?" in text else ())
        return database.serialize()


def rows_of(path: Path) -> list[tuple[Any, ...]] | None:
    """All intents that SQLite finds, without dpalign; None if it finds no such table."""
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?immutable=1", uri=True)) as database:
            database.text_factory = lambda text: text.decode(errors="surrogateescape")
            names = [row[1] for row in database.execute("PRAGMA table_info(intents)")]
            if not set(COLUMNS) <= set(names):
                return None
            return sorted(database.execute(f"SELECT {', '.join(COLUMNS)} FROM intents NOT INDEXED").fetchall(), key=repr)
    except (sqlite3.Error, UnicodeDecodeError, OverflowError):
        return None


def meet_ledger(case: Case, folder: Path) -> None:
    """As a run opens one, counts what was spent, and writes the row of a draw."""
    path = folder / "l.sqlite"
    before, content = rows_of(path), path.read_bytes()
    try:
        ledger = Ledger(path)
    except DPAlignError:
        assert path.read_bytes() == content and [*folder.iterdir()] == [path], "a ledger that is refused was changed"
        raise
    error = None
    with closing(ledger):
        try:
            counted(ledger, before)
            ledger.secret("reviews"), ledger.key("texts"), ledger.split("reviews", "records", b"contents")
            for dataset, is_public in ledger.known_texts():
                [*ledger.texts(dataset, is_public)]
            ledger.write([INTENT])
        except DPAlignError as refused:
            error = refused
    after = rows_of(path)
    assert before is None or (after is not None and not set(map(repr, before)) - set(map(repr, after))), "rows were lost"
    if error is not None:
        raise error
    assert after is not None and len(after) == len(before or ()) + 1, "the new row is not there"


def counted(ledger: Ledger, rows: list[tuple[Any, ...]] | None) -> None:
    """What `dpalign ledger` says, from the accountant's coarse grid; no draw that the file holds may be missed."""
    whole = ledger.intents()
    assert len(whole) == len(rows or ()), "draws are missed"
    assert sum(len(ledger.intents(dataset=name)) for name in ledger.datasets()) == len(whole), "draws of a dataset are missed"
    for name in ledger.datasets():
        spendings = ledger.spendings(dataset=name)
        assert sum(s.mechanism.steps for s in spendings) == len(ledger.intents(dataset=name)), "draws are not counted"
        assert is_epsilon(parts.epsilon_of(spendings, 1e-5, quick=True)), "no epsilon"


def is_epsilon(found: float) -> bool:
    return found >= 0


# Checkpoints ----------------------------------------------------------------------------------------------------------


def lengths(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [len(text) % 7 / 7 for text in completions]


def stage(folder: Path, ledger: Ledger) -> Stage:
    """DP-PPO of two steps, whose coefficients adapt."""
    config = PPOConfig(
        expected_batch_size=2, max_steps=3, max_prompt_length=4, max_completion_length=3, micro_batch_size=4, save_steps=1, noise_multiplier=1.0,
        adaptive_kl_target=1.0, noised_baseline=True, adapter=AdapterConfig(r=1), reward=RewardConfig(source="x:y", is_public=True, low=0.0, high=1.0),
    )  # fmt: skip
    units = [[{"prompt": f"w{number} w1"}] for number in range(4)]
    data = UnitDataset(Part("people", "split"), units, [bytes([n] * 32) for n in range(4)], 4.0, "record", "fingerprint")
    return Stage(policy(), PPO(config, Reward(lengths, 0.0, 1.0)), data, folder=folder, run="run", ledger=ledger)


@cache
def resumable() -> tuple[Stage, dict[str, bytes]]:
    """A stage after two of its steps, and its newest checkpoint; with what the run says of itself."""
    folder = place() / "ppo"
    trained = stage(folder, Ledger(":memory:"))
    with contextlib.suppress(KeyboardInterrupt), patch.object(Stage, "_evaluate", stops_after(2)):
        trained.train()
    said = {"run": "run", "ledger": "l", "attempts": {"sft": {"0": "a"}}, "dtypes": {"model": "float32"}, "origins": {"model": asdict(
        provenance.Origin("m", tuple(statements_there_are()[0][1][:1]), ("declared",)))}}  # fmt: skip
    newest = sorted(folder.glob("step-*"))[-1]
    return trained, {f"ppo/{newest.name}/{file.name}": file.read_bytes() for file in newest.iterdir()} | {"run.json": as_json(said)}


def stops_after(steps: int) -> Callable[..., None]:
    def evaluate(self: Stage, step: int, attempt: int) -> None:
        if step == steps:
            raise KeyboardInterrupt

    return evaluate


def checkpoints() -> st.SearchStrategy[Case]:
    _, files = resumable()
    state, tensors = sorted(name for name in files if name.startswith("ppo/"))
    weights = damaged_tensors(files[tensors])
    said = json.loads(files[state])
    believed = st.builds(  # with the sum of the tensors that lie there
        lambda tree, content: Case(files | {tensors: content, state: as_json(tree | {"sha256": hashlib.sha256(content).hexdigest()} if isinstance(tree, dict) else tree)}),
        st.one_of(st.just(said), changed([said])), st.one_of(st.just(files[tensors]), weights, weights),
    )  # fmt: skip
    ways = {state: json_or_bytes(files[state]), tensors: weights, "run.json": json_or_bytes(files["run.json"])}
    return st.one_of(believed, believed, one_damaged(files, ways))


def damaged_tensors(content: bytes) -> st.SearchStrategy[bytes]:
    """A safetensors file whose header says something else, or whose bytes are damaged."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    tree = changed([header]).map(as_json)
    sizes = st.one_of(st.none(), st.none(), st.sampled_from([0, 1, 2**31, 2**63 - 1, 2**64 - 1]), st.integers(0, 2 * size))
    headed = st.builds(lambda head, said: (len(head) if said is None else said).to_bytes(8, "little") + head + content[8 + size :], tree, sizes)
    return st.one_of(headed, other_tensors(content), damaged([content]), damaged([content], changes=IN_PLACE))


def other_tensors(content: bytes) -> st.SearchStrategy[bytes]:
    """A whole file with a tensor of another shape, dtype or value, or one more or less."""
    tensors = load(content)
    names = sorted(tensors)
    changes: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda t: t * math.nan, lambda t: t + math.inf, lambda t: t.double(), lambda t: t.to(torch.int64), lambda t: t.half(), lambda t: t.bool(), lambda t: t.flatten(),
        lambda t: t[None], lambda t: t.T if t.ndim == 2 else t, lambda t: t[:0] if t.ndim else t, lambda t: t.new_zeros(()), lambda t: torch.cat([t.flatten()] * 2), lambda t: t * 1e38,
    ]  # fmt: skip

    def other(name: str, change: Callable[[torch.Tensor], torch.Tensor], how: int) -> bytes:
        new = change(tensors[name]).contiguous().clone()
        rest = {n: t for n, t in tensors.items() if n != name}
        return save(rest if how == 0 else rest | {f"{name}.more": new} if how == 1 else tensors | {name: new})

    return st.builds(other, st.sampled_from(names), st.sampled_from(changes), st.integers(0, 5))


def meet_checkpoint(case: Case, folder: Path) -> None:
    """As a run goes on: what it says of itself, the newest checkpoint, and the update after it."""
    trained, _ = resumable()
    drawn = trained.ledger.intents()
    workspace.AttemptNames(folder).name_of(drawn[0])
    workspace.same_origins(folder, {}, drawn)
    trained.folder = folder / "ppo"
    if trained._resume() is None:
        raise DPAlignError("there is no checkpoint: the stage begins anew.")
    assert all(math.isfinite(number) for number in trained.algorithm.state().values()), "a state that is no number"
    for parameter in trained.gradients.parameters:
        parameter.grad = torch.zeros_like(parameter)
    trained.optimizer.step()
    assert trained.ledger.intents() == drawn, "something was drawn"


# Adapters and heads ---------------------------------------------------------------------------------------------------


class Runs:
    """A pickle of it makes a folder where somebody reads it."""

    def __reduce__(self) -> Any:
        return os.mkdir, (str(place() / "ran"),)


@cache
def releases() -> dict[str, dict[str, bytes]]:
    """Files of a policy's release, of a classifier's, and of a reward that reads several layers."""
    made = {}
    for name in ("policy", "classifier", "layers"):
        folder, model = place() / name, policy()
        model.add_adapter("sft", AdapterConfig(r=2))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.1 * torch.randn_like(parameter))
        model.finish_stage()
        folder.mkdir()
        if name == "policy":
            model.save_adapter(folder, str(base()))
            (folder / "prompts.json").write_bytes(as_json({"prepend_bos": True, "chats": False, "asked_with": ""}))
        else:
            reward = RewardModel.from_policy(model, TextFormat(max_length=8, pooling="layers" if name == "layers" else "last"))
            reward.save(folder, str(base()), Normalization())
        made[name] = files_of(folder)
    return made


def adapters() -> st.SearchStrategy[Case]:
    found, pickled = [], pickle.dumps(Runs())
    for name, files in releases().items():
        ways = {file: damaged_tensors(content) if file.endswith(".safetensors") else json_or_bytes(content) for file, content in files.items()
                if file.partition(".")[0] in ("adapter_config", "adapter_model", "reward", "prompts")}  # fmt: skip
        planted = st.sampled_from(["adapter_model.bin", "adapter_model.pt", "adapter_model.safetensors", "training_args.bin"]).map(
            lambda file, files=files: Case({n: c for n, c in files.items() if n != "adapter_model.safetensors"} | {file: pickled})
        )
        one = st.one_of(one_damaged(files, ways), one_damaged(files, ways), one_damaged(files, ways), planted)
        found.append(one.map(lambda case, name=name: Case(case.files, (name,))))
    return st.one_of(found)


def meet_adapter(case: Case, folder: Path) -> None:
    """As a model of a recipe, or a reward, is loaded; then it reads a text."""
    config = ModelConfig(str(folder), dtype="float32")
    if case.words == ("policy",):
        model: Any = Policy.load(config)
        ids = torch.tensor([[1, 2, 3]])
        with torch.no_grad():
            assert model(ids, torch.ones_like(ids), 1)[0].shape == (1, 1, VOCABULARY)
        assert type(model.asked_with) is str
    else:
        normalization = normalization_of(folder)
        model = RewardModel.load(config)
        assert model.score(["w1 w2"]).shape == (1,) and math.isfinite(normalization.scale)
    assert not (place() / "ran").exists(), "a pickle was read"


# Privacy statements ---------------------------------------------------------------------------------------------------


@cache
def statements_there_are() -> list[tuple[Any, list[statement.StageStatement]]]:
    """Those that version 0.1.0 wrote, and one of now."""
    trees = [json.loads(file.read_bytes()) for file in sorted(FORMATS.glob("privacy_*.json"))]
    folder = finished_run(place() / "stated")
    now = json.loads((folder / "summary.json").read_bytes())
    stages = [statement.StageStatement.from_json(one) for tree in trees for one in tree["stages"]]
    attempts = replace(stages[0], attempts={"a": [m.steps for m in stages[0].mechanisms]}, id="a")
    made = statement.PrivacyStatement(True, 1.0, 1e-5, [attempts], assumptions=["declared"], ledger=now["ledger"], dtypes={"model": "float32"})
    trees.append(json.loads(dumps(made.as_dict())))
    return [(tree, [statement.StageStatement.from_json(one) for one in tree["stages"]]) for tree in trees]


def statements() -> st.SearchStrategy[Case]:
    trees = [tree for tree, _ in statements_there_are()]
    tree = st.builds(as_json, changed(trees), st.booleans())
    contents = st.one_of(tree, tree, tree, damaged([as_json(tree) for tree in trees]))
    return contents.map(lambda content: Case({"privacy.json": content}))


def meet_statement(case: Case, folder: Path) -> None:
    """As a release is trained further: its past, what it costs together with another one, and whether it may leave."""
    found = read_statement(folder)
    if found is None:
        raise DPAlignError("there is no statement.")
    value, stages = found
    origin = provenance.Origin("m", tuple(stages), tuple(value["assumptions"]))
    again = provenance.Origin.from_json(json.loads(dumps(asdict(origin))))
    assert again == origin, "a past that is not what it is written as"
    together = statement.merge_stages([*statements_there_are()[1][1], *stages])
    cost = statement.epsilon_of(together, 1e-5)
    assert is_epsilon(cost) and (math.isfinite(cost) or not all(s.private for s in together)), "no epsilon"
    assert is_epsilon(statement.epsilon_of(statement.merge_stages(stages), 1e-5)), "no epsilon"
    assert all(0 <= at["true_positives"] <= 1 for at in statement.attack_success_of(together)), "no rate"
    boundary.found_in(folder)
    recomputed(folder / "privacy.json")


def recomputed(path: Path) -> None:
    """tools/recompute.py says whether the number is right, or in one sentence why it cannot."""
    said = io.StringIO()
    with patch.object(sys, "argv", ["recompute.py", str(path)]), contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        runpy.run_path(str(ROOT / "tools" / "recompute.py"), run_name="__main__")


# Reports --------------------------------------------------------------------------------------------------------------


def reports() -> st.SearchStrategy[Case]:
    files = files_of(finished_run(place() / "finished"))
    logs = {name: damaged([content]) for name, content in files.items() if name.endswith(".jsonl")}
    ways = {name: json_or_bytes(content) for name, content in files.items() if name.endswith(".json")}
    summary = {"summary.json": ways["summary.json"]}
    return st.one_of(one_damaged(files, summary), one_damaged(files, summary), one_damaged(files, ways | logs))


def meet_report(case: Case, folder: Path) -> None:
    """As `dpalign report`, with --nist too, makes pages of what a run has left."""
    write_report(folder)
    write_nist(folder)


KINDS = {
    "recipes": Kind(0.01, recipes, meet_recipe),
    "data": Kind(0.37, data, meet_data, of_records=True),
    "ledgers": Kind(0.20, ledgers, meet_ledger, writes=True),
    "checkpoints": Kind(0.30, checkpoints, meet_checkpoint),
    "adapters": Kind(0.06, adapters, meet_adapter),
    "statements": Kind(0.04, statements, meet_statement),
    "reports": Kind(0.02, reports, meet_report),
}
