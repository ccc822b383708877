"""Malformed inputs of every kind, made from tables: each writes itself into a folder and says which command meets it.

Those of a recipe are made from the configs' own fields, so that a new field has its cases without being named here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import json
import math
import shutil
import sqlite3
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints
from unittest.mock import patch

import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from dpalign.cli import main
from dpalign.domains import Domain
from dpalign.recipe import Recipe
from helpers import judged, merged, reviews, settings, write_jsonl
from reader import small_model

FORMATS = Path(__file__).parent / "formats"
SLOWEST = 20  # seconds
MARKER = "zebrafinch"


@dataclass(frozen=True)
class Case:
    """One malformed input. make: writes it into a folder and returns the command's words. says: part of the answer."""

    group: str
    name: str
    make: Callable[[Path], list[str]]
    says: str = ""


@dataclass(frozen=True)
class Verdict:
    """What became of a case. draws: intents that were written. fault: why it is not as it should be; empty if it is."""

    status: int
    error: str
    seconds: float
    draws: int
    fault: str


def judge(case: Case, folder: Path) -> Verdict:
    """Runs a case in this process, in an empty folder."""
    words = case.make(folder)
    before = drawn(folder)
    out, err, started = io.StringIO(), io.StringIO(), time.monotonic()
    raised = ""
    offline = patch("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else it asks, and asks again
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(folder), offline:
        try:
            status = main(words)
        except BaseException as error:
            status, raised = 1, f"{type(error).__name__} came out"
    seconds, error = time.monotonic() - started, err.getvalue().strip()
    draws = drawn(folder) - before
    sentences = [line for line in error.splitlines() if line.startswith("dpalign: error: ")]
    fault = raised
    if not fault and ("internal error" in error or "Traceback" in error):
        fault = "internal error"
    elif not fault and status == 0:
        fault = "accepted"
    elif not fault and (len(sentences) != 1 or error.splitlines()[-1] != sentences[0]):
        fault = "not one sentence"
    elif not fault and draws:
        fault = "refused after a draw"
    elif not fault and seconds > SLOWEST:
        fault = "slow"
    elif not fault and case.says not in error:
        fault = f"does not say {case.says!r}"
    elif not fault and (MARKER in error or MARKER in out.getvalue()):
        fault = "quotes a record"
    return Verdict(status, error, round(seconds, 2), draws, fault)


def drawn(folder: Path) -> int:
    """Intents in the ledger of a folder, if it has one."""
    path = folder / "ledger.sqlite"
    if not path.is_file():
        return 0
    with contextlib.closing(sqlite3.connect(path)) as database:
        try:
            return int(database.execute("SELECT count(*) FROM intents").fetchone()[0])
        except sqlite3.Error:
            return 0


def recipe(folder: Path, **changes: Any) -> list[str]:
    """`dpalign run` of the tests' small recipe, without a stage that nobody asks for."""
    if not (folder / "data.jsonl").exists():
        write_jsonl(folder / "data.jsonl", reviews(64, MARKER))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings(folder, **changes)), encoding="utf-8")
    return ["run", str(folder / "recipe.yaml"), "--json"]


# Fields of a recipe --------------------------------------------------------------------------------------------------


def configs(kind: type, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], type]:
    """A config and those inside it, by the names of their sections."""
    found = {path: kind}
    for name, hint in get_type_hints(kind).items():
        for one in (hint, *_alternatives(hint)):
            if dataclasses.is_dataclass(one):
                found |= configs(one, (*path, name))
    return found


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else ()


def bad_values(hint: Any, domain: Domain | None) -> Iterator[Any]:
    """Values that a field of this type cannot have, the most telling first."""
    kinds = _alternatives(hint) or (hint,)
    origins = {get_origin(kind) for kind in kinds}
    if domain is not None and (int in kinds or float in kinds):
        yield math.nan
        yield domain.low if not domain.with_low else domain.low - 1
        yield -math.inf
        yield 10**30 if int in kinds else 1e308
        if not domain.or_inf:
            yield math.inf
        yield [1]
    if int in kinds:
        yield 1.5
    if str in kinds:
        yield "a\x1b[2Jb"
        yield "x" * 5000
        yield " "
    if bool in kinds:
        yield "maybe"
        yield 3
    if Literal in origins:
        yield "no such thing"
        yield 3
    if list in origins and str not in kinds:
        yield [-1]
    if tuple in origins:
        yield from ([1.0, 1.0], [2.0, -2.0], [math.nan, 1.0], [0.0, math.inf], [1.0], [0.0, 1.0, 2.0], "wide")
    if dict in origins:
        yield {"sft": math.nan}
        yield {"sft": -1}
        yield {"sft": "much"}
    yield {"no such field": 1}


def field_cases(per_field: int | None = None) -> Iterator[Case]:
    """Every field of every config with values that it cannot have; at most `per_field` of them."""
    for path, kind in configs(Recipe).items():
        hints = get_type_hints(kind)
        for f in dataclasses.fields(kind):
            if any(dataclasses.is_dataclass(one) for one in (hints[f.name], *_alternatives(hints[f.name]))):
                values: list[Any] = ["a word", 3, [1], {"no such field": 1}]
            else:
                values = list(bad_values(hints[f.name], f.metadata.get("domain")))
            for value in values[:per_field]:
                yield _field_case((*path, f.name), value)


def _field_case(path: tuple[str, ...], value: Any) -> Case:
    def make(folder: Path) -> list[str]:
        changes: Any = value
        for name in reversed(path):
            changes = {name: changes}
        words = recipe(folder)
        whole = merged(settings(folder), changes) if isinstance(value, dict) else _set(settings(folder), path, value)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(whole), encoding="utf-8")
        return words

    shown = ascii(value) if not isinstance(value, str) or len(value) < 40 else f"{len(value)} characters"
    return Case("fields", f"{'.'.join(path)} = {shown}", make, says=path[-1] if not isinstance(value, dict) else "")


def _set(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    place = tree
    for name in path[:-1]:
        place = place.setdefault(name, {})
    place[path[-1]] = value
    return tree


# What fields say together, and the file itself -----------------------------------------------------------------------

STAGE: dict[str, Any] = {"expected_batch_size": 8, "max_steps": 2}
TOGETHER: dict[str, tuple[dict[str, Any], str]] = {
    "no output folder": ({"output_dir": ""}, "output_dir is empty"),
    "a batch above the units": ({"sft": {"expected_batch_size": 33}}, "expected_batch_size 33"),
    "epochs without end": ({"sft": {"max_steps": None, "num_train_epochs": 1e5}}, "num_train_epochs"),
    "more draws than are accounted for": ({"sft": {"max_steps": 200000}}, "ask for fewer steps"),
    "units without end": ({"data": {"declared_units": 10**12}, "sft": {"max_steps": None}}, "ask for fewer steps"),
    "prompts longer than their limit": ({"ppo": {"prompt_max_tokens": 9}}, "max_prompt_length"),
    "a shortest prompt above the longest": ({"ppo": {"prompt_min_tokens": 5}}, "prompt_min_tokens 5"),
    "a shortest completion above the longest": ({"ppo": {"min_completion_length": 7}}, "min_completion_length 7"),
    "more positions than the model has": ({"sft": {"max_length": 100000}}, "positions"),
    "a reward's range turned round": ({"ppo": {"reward": {"low": 1.0, "high": 0.0}}}, "range"),
    "a reward's range without width": ({"ppo": {"reward": {"low": 1.0, "high": 1.0}}}, "range"),
    "a reward of scale 0": ({"ppo": {"reward": {"scale": 0}}}, "scale 0"),
    "no rank for a policy": ({"ppo": {"adapter": {"r": 0}}}, "adapter.r 0"),
    "a text of one token": ({"sft": {"max_length": 1}}, "max_length 1"),
    "KL that nobody measures": ({"ppo": {"adaptive_kl_target": 1.0, "metrics_noise_ratio": 0}}, "adaptive_kl_target"),
    "a baseline that nobody measures": ({"ppo": {"noised_baseline": True, "metrics_noise_ratio": 0}}, "noised_baseline"),
    "activations without room": ({"sft": {"max_length": 2, "adapter": {"init_a": "activations"}}}, "init_a activations"),
    "synthetic gradient of texts": ({"sft": {"adapter": {"init_a": "synthetic_gradient"}}}, "init_a"),
    "layers that are not there": ({"ppo": {"adapter": {"target_modules": ["nothing"]}}}, "no layer nothing"),
    "one layer that is not there": ({"ppo": {"adapter": {"target_modules": ["q_proj", "nothing"]}}}, "nothing"),
    "no layers": ({"ppo": {"adapter": {"target_modules": []}}}, "target_modules"),
    "a layer number beyond the last": ({"ppo": {"adapter": {"layers": [0, 99]}}}, "99"),
    "no layer numbers": ({"ppo": {"adapter": {"layers": []}}}, "layers"),
    "a pattern that is none": ({"ppo": {"adapter": {"target_modules": "(("}}}, "target_modules"),
    "noise and epsilon": ({"sft": {"noise_multiplier": 1.0, "target_epsilon": 1.0}}, "exactly one"),
    "a stage above the run": ({"sft": {"target_epsilon": 9}}, "more than the target"),
    "another delta": ({"sft": {"target_delta": 1e-7}}, "target_delta"),
    "no clipping with noise": ({"sft": {"clipping": "none"}}, "unbounded sensitivity"),
    "two stages that sample": ({"rloo": STAGE}, "keep one of them"),
    "no stage": ({"sft": None, "ppo": None}, "no stage"),
    "fractions above 1": ({"split": {"sft": 0.8, "ppo": 0.8}}, "at most 1"),
    "a fraction for one of two": ({"split": {"sft": 0.5}}, "no fraction"),
    "a range turned round": ({"split": {"sft": [0.5, 0.2], "ppo": [0.5, 1.0]}}, "low < high"),
    "a range of three": ({"split": {"sft": [0.0, 0.2, 0.3], "ppo": [0.5, 1.0]}}, "[low, high]"),
    "a split of a stage that is none": ({"split": {"sft": 0.5, "poetry": 0.5}}, "must give stages"),
    "fractions of a shared budget": ({"composition": "sequential", "split": {"sft": 0.5, "ppo": 0.5}}, "disjoint"),
    "an allocation to nobody": ({"composition": "sequential", "allocation": {"poetry": 1.0}}, "poetry"),
    "an allocation in parallel": ({"allocation": "minimal"}, "composition: sequential"),
    "a GPU that is not here": ({"device": "cuda:99"}, "cuda:99"),
    "a device that is none": ({"device": "toaster"}, "toaster"),
    "a device for shapes alone": ({"device": "meta"}, "meta"),
    "a ledger in memory": ({"ledger": ":memory:"}, "memory"),
    "a measurement by nothing": ({"ppo": None, "measurement": {}}, "nothing to measure by"),
    "data of a stage that is not there": ({"dpo_data": {"name": "x"}}, "no stage dpo"),
    "a reward model that nobody trains": ({"ppo": {"reward": {"source": "reward_model"}}}, "reward_model"),
}  # fmt: skip

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
FILES: dict[str, tuple[str | bytes, str]] = {
    "a key twice": ("target_epsilon: 2\ntarget_epsilon: 6\nsft: {}\n", "stands twice"),
    "a key twice in a section": ("sft: {max_steps: 1, max_steps: 100}\n", "stands twice"),
    "a key twice by quotes": ('target_epsilon: 2\n"target_epsilon": 6\nsft: {}\n', "stands twice"),
    "a bomb of aliases": (BOMB + "sft: {}\n", "more than 10000 values"),
    "a bomb as a value": (BOMB + "split: *i\n", "more than 10000 values"),
    "an alias inside itself": ("split: &a {sft: *a}\n", "inside itself"),
    "brackets without end": ("split: " + "[" * 100000, "nested"),
    "fifty levels": ("split: " + "[" * 60 + "]" * 60, "nested"),
    "a number of 5000 digits": (f"sft: {{max_steps: {'9' * 5000}}}", "digits"),
    "not YAML": ("output_dir: [1\n  sft: {", "recipe"),
    "a tab": ("sft:\n\tmax_steps: 1", "recipe"),
    "a tag that runs code": ("sft: !!python/object/apply:os.system ['true']", "tag"),
    "a tag that is wrong": ("sft: {max_steps: !!int many}", "tag"),
    "a list": ("- sft\n- ppo\n", ""),
    "a word": ("sft\n", ""),
    "nothing": ("", "the recipe is not YAML"),
    "two documents": ("sft: {}\n---\nppo: {}\n", "document"),
    "not UTF-8": (b"output_dir: \xff\xfe\n", "cannot be read"),
    "bytes": (bytes(range(256)) * 20, "cannot be read"),
    "two million bytes": ("# " + "x" * 2_000_000, "more than 1000000 bytes"),
    "a key that is a number": ("3: 4\nsft: {}\n", ""),
    "a key that is a list": ("? [1, 2]\n: 3\n", ""),
    "a number beyond all numbers": ("target_epsilon: 1e400\nsft: {}\n", "larger than a number can be"),
    "a section that is nothing": ("model:\nsft: {}\n", "expected a section of settings"),
    "an hour for a number": ("sft: {max_steps: 1:30}\n", "another number"),
    "an octal number": ("sft: {max_steps: 010}\n", "another number"),
    "a date for a name": ("data: {name: [2001-01-01]}\nsft: {}\n", "name"),
    "a control character": ('output_dir: "a\\u0000b"\nsft: {}\n', "output_dir"),
}


def recipe_cases() -> Iterator[Case]:
    for name, (changes, says) in TOGETHER.items():
        yield Case("together", name, lambda folder, c=changes: recipe(folder, **c), says)
    for name, (content, says) in FILES.items():

        def make(folder: Path, content: str | bytes = content) -> list[str]:
            path = folder / "recipe.yaml"
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
            return ["run", str(path), "--json"]

        yield Case("file", name, make, says)
    yield Case("file", "a folder", lambda folder: ["run", str(folder)], "no recipe")
    yield Case("file", "a device", lambda folder: ["run", "/dev/zero"], "no recipe")
    yield Case("file", "none", lambda folder: ["run", "nowhere.yaml"], "nowhere.yaml")


# Data ----------------------------------------------------------------------------------------------------------------

LINES = [json.dumps(r) for r in reviews(64, MARKER)]
DATA: dict[str, tuple[str, str | bytes]] = {
    "empty": ("d.jsonl", ""), "blank lines": ("d.jsonl", "\n\n \n"), "a cut line": ("d.jsonl", "\n".join(LINES)[:-9]),
    "a list": ("d.jsonl", "\n".join([*LINES, f'["{MARKER}"]'])), "a number": ("d.jsonl", "\n".join([*LINES, "3"])),
    "not UTF-8": ("d.jsonl", "\n".join(LINES).encode() + b'\n{"text": "\xff\xfe"}'),
    "half a character": ("d.jsonl", "\n".join([*LINES, '{"text": "\\ud800 zebrafinch"}'])),
    "half a character in a key": ("d.jsonl", "\n".join([*LINES, '{"text": "zebrafinch", "\\udc00": 1}'])),
    "brackets without end": ("d.jsonl", "\n".join([*LINES, '{"text": ' + "[" * 100000])),
    "a digit string": ("d.jsonl", "\n".join([*LINES, '{"text": ' + "9" * 5000 + "}"])),
    "no text": ("d.jsonl", "\n".join([*LINES, '{"text": null}'])), "an empty text": ("d.jsonl", "\n".join([*LINES, '{"text": ""}'])),
    "a number for text": ("d.jsonl", "\n".join([*LINES, '{"text": 3.5}'])), "another column": ("d.jsonl", '{"body": "zebrafinch"}'),
    "a text in messages": ("d.jsonl", "\n".join([*LINES, '{"text": ["zebrafinch"]}'])),
    "messages without a template": ("d.jsonl", "\n".join([*LINES, '{"text": [{"role": "user", "content": "zebrafinch"}]}'])),
    "messages without a role": ("d.jsonl", "\n".join([*LINES, '{"text": [{"content": "zebrafinch"}]}'])),
    "cut gzip": ("d.jsonl.gz", gzip.compress("\n".join(LINES).encode())[:-40]),
    "damaged gzip": ("d.jsonl.gz", gzip.compress("\n".join(LINES).encode())[:60] + b"\xff" * 60),
    "no gzip": ("d.jsonl.gz", "\n".join(LINES)), "ragged CSV": ("d.csv", f"id,text\n1,{MARKER}\n2,{MARKER},more\n"),
    "short CSV": ("d.csv", f"id,text\n1,{MARKER}\n2\n"), "CSV of a header": ("d.csv", "id,text\n"),
    "CSV with a column twice": ("d.csv", f"text,text\n{MARKER},b\n"), "CSV with NUL": ("d.csv", b"id,text\n1,a\0b\n2,c\n"),
    "CSV with an open quote": ("d.csv", f'id,text\n1,"{MARKER}\n'), "bytes as CSV": ("d.csv", bytes(range(256))),
    "no Parquet": ("d.parquet", f"PAR1{MARKER}"), "empty Parquet": ("d.parquet", b""), "cut Parquet": ("d.parquet", b"PAR1" + b"\0" * 90 + b"PAR1"),
    "unknown ending": ("d.txt", MARKER), "no ending": ("data", MARKER), "a ZIP": ("d.zip", b"PK\x03\x04"),
}  # fmt: skip
RECORDS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {  # by name: good records but one, sections
    f"{stage}: {name}": (good, bad, {"sft": None, "ppo": None, stage: section})
    for stage, section, good, bads in (
        ("sft", STAGE, {"prompt": "A film", "completion": " was good."}, {"completion": [None, "", 3, {}, [3]], "prompt": [None, 3, [], [{}]]}),
        ("dpo", STAGE | {"max_length": 24}, judged(1)[0] | {"prompt": "So:", "margin": 0.5, "preference": 1.0},
         {"chosen": [None, "", 3, [{"role": 3, "content": "x"}]], "prompt": [3, "many words " * 40], "margin": [-1, math.nan, "much", [1], 1e400],
          "preference": [2, -0.1, "maybe", {}]}),
        ("reward_model", STAGE | {"max_length": 24}, judged(1)[0] | {"margin": 0.5},
         {"rejected": [None, "", 3, []], "margin": [-1, math.nan, "much"], "preference": [2, math.nan]}),
        ("ppo", STAGE | {"max_prompt_length": 5}, {"prompt": "A film"}, {"prompt": [None, "", 3, "many words " * 40, [{"role": "user"}], [[]]]}),
        ("rloo", STAGE | {"max_prompt_length": 5}, {"prompt": "A film"}, {"prompt": [None, "many words " * 40]}),
    )
    for column, values in bads.items()
    for name, bad in ((f"{column} = {ascii(v)[:40]}", {column: v}) for v in values)
}  # fmt: skip


def data_cases() -> Iterator[Case]:
    for name, (file, content) in DATA.items():

        def make(folder: Path, file: str = file, content: str | bytes = content) -> list[str]:
            (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
            return recipe(folder, data={"path": str(folder / file)})

        yield Case("data", name, make)
    for name, (good, bad, sections) in RECORDS.items():

        def make_record(folder: Path, good: Any = good, bad: Any = bad, sections: Any = sections) -> list[str]:
            rows = [good | {"id": i} for i in range(40)]
            small = small_model(folder / "model")
            write_jsonl(folder / "data.jsonl", [*rows, {k: v for k, v in (good | bad).items() if v is not None}])
            return recipe(folder, **sections, model={"name_or_path": str(small), "is_public": True})

        yield Case("records", name, make_record)
    for name, changes in {
        "a column of units that is not there": {"unit": "author"}, "units that are fractions": {"unit": "text"},
        "no file": {"path": "nowhere.jsonl"}, "no name": {"name": ""}, "no path": {"path": ""}, "a folder of nothing": {"path": "."},
        "a demo that is none": {"path": "demo:nothing/x"}, "a demo without a file": {"path": "demo:"}, "a device": {"path": "/dev/zero"},
        "public records that are not there": {"eval_path": "nowhere.jsonl", "eval_is_public": True},
    }.items():  # fmt: skip
        if name != "units that are fractions":
            yield Case("data", name, lambda folder, c=changes: recipe(folder, data=c))


# Models and what is loaded beside them -------------------------------------------------------------------------------


def damaged(change: Callable[[Path], None]) -> Callable[[Path], list[str]]:
    """A run of PPO from a small model that was damaged."""

    def make(folder: Path) -> list[str]:
        change(small_model(folder / "model"))
        return recipe(folder, sft=None, model={"name_or_path": str(folder / "model"), "is_public": True})

    return make


def weights(
    change: Callable[[dict[str, torch.Tensor]], Any], file: str = "model.safetensors"
) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        tensors = load_file(model / file)
        change(tensors)
        save_file(tensors, model / file, metadata={"format": "pt"})

    return apply


def edited(file: str, **changes: Any) -> Callable[[Path], None]:
    """A JSON file with other values; None takes one out."""

    def apply(model: Path) -> None:
        value = json.loads((model / file).read_text(encoding="utf-8"))
        value = {k: v for k, v in (value | changes).items() if v is not None}
        (model / file).write_text(json.dumps(value), encoding="utf-8")

    return apply


def replaced(file: str, content: bytes | None) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        (model / file).unlink() if content is None else (model / file).write_bytes(content)

    return apply


def cut(file: str) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        content = (model / file).read_bytes()
        (model / file).write_bytes(content[: len(content) // 2])

    return apply


def first(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in sorted(tensors) if "layers.0" in name)


def _no_specials(model: Path) -> None:
    for name in ("pad_token", "eos_token", "bos_token"):
        edited("tokenizer_config.json", **{name: None})(model)
    (model / "special_tokens_map.json").unlink(missing_ok=True)


def _token_beyond(model: Path) -> None:
    """A word of the data becomes a token that the model has no embedding for."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.add_tokens(["This dull"]) == 1
    tokenizer.save_pretrained(model)


MODELS: dict[str, Callable[[Path], None]] = {
    "a weight is NaN": weights(lambda t: t[first(t)].view(-1)[:1].fill_(math.nan)),
    "a weight is infinite": weights(lambda t: t[first(t)].view(-1)[:1].fill_(math.inf)),
    "a tensor is missing": weights(lambda t: t.pop(first(t))),
    "a tensor has another shape": weights(lambda t: t.update({first(t): torch.zeros(3)})),
    "all tensors are missing": weights(lambda t: [t.pop(n) for n in list(t)[1:]]),
    "half a file of weights": cut("model.safetensors"),
    "a file of weights without bytes": replaced("model.safetensors", b""),
    "a file of weights of zeros": replaced("model.safetensors", b"\0" * 4096),
    "no file of weights": replaced("model.safetensors", None),
    "no configuration": replaced("config.json", None),
    "half a configuration": cut("config.json"),
    "an empty configuration": replaced("config.json", b"{}"),
    "a configuration that is a list": replaced("config.json", b"[]"),
    "a configuration that is no text": replaced("config.json", b"\xff\xfe\0"),
    "no such architecture": edited("config.json", model_type="poem"),
    "layers without end": edited("config.json", num_hidden_layers=10**9),
    "minus one layers": edited("config.json", num_hidden_layers=-1),
    "heads that do not divide": edited("config.json", num_attention_heads=3, num_key_value_heads=3, head_dim=None),
    "no heads": edited("config.json", num_attention_heads=0),
    "words for a width": edited("config.json", hidden_size="wide"),
    "a width without end": edited("config.json", hidden_size=10**12),
    "a vocabulary without end": edited("config.json", vocab_size=10**12),
    "more layers than weights": edited("config.json", num_hidden_layers=3),
    "an activation that is none": edited("config.json", hidden_act="sigh"),
    "no tokenizer": lambda model: [f.unlink() for f in model.glob("*token*")] and None,
    "half a tokenizer": cut("tokenizer.json"),
    "a tokenizer that is a list": replaced("tokenizer.json", b"[]"),
    "a tokenizer of another kind": edited("tokenizer.json", model={"type": "Poem"}),
    "settings of a tokenizer that are a list": replaced("tokenizer_config.json", b"[]"),
    "neither padding nor EOS": _no_specials,
    "a token beyond the embedding": _token_beyond,
    "an adapter's configuration that is none": replaced("adapter_config.json", b"{}"),
    "an adapter's configuration that is no JSON": replaced("adapter_config.json", b"{"),
    "an adapter without a base": replaced("adapter_config.json", b'{"peft_type": "LORA", "r": 2}'),
    "an adapter of a base that is not there": replaced(
        "adapter_config.json", b'{"peft_type": "LORA", "r": 2, "base_model_name_or_path": "nowhere/at-all"}'
    ),
}


def model_cases() -> Iterator[Case]:
    for name, change in MODELS.items():
        yield Case("models", name, damaged(change))
    for name, changes in {
        "a folder of nothing": {"name_or_path": ".", "is_public": True},
        "not declared public": {"name_or_path": "nowhere/at-all"},
        "not there": {"name_or_path": "nowhere/at-all", "is_public": True},
        "not a name": {"name_or_path": "a b//c::d", "is_public": True},
        "a file": {"name_or_path": "data.jsonl", "is_public": True},
    }.items():
        yield Case("models", name, lambda folder, c=changes: recipe(folder, sft=None, model=c))


# Rewards -------------------------------------------------------------------------------------------------------------

REWARDS: dict[str, tuple[str, str]] = {
    "a syntax error": ("def score(:", "SyntaxError"), "an exit at import": ("import sys; sys.exit(0)", "SystemExit"),
    "an interrupt at import": ("raise KeyboardInterrupt", "KeyboardInterrupt"), "a fault at import": ("1 / 0", "ZeroDivisionError"),
    "a module that is not there": ("import nothing_of_the_kind", "nothing_of_the_kind"), "no function of that name": ("other = 1", "score"),
    "no function": ("score = 3", "not a function"), "a class": ("class score: pass", "raised"), "NUL": ("\0", "cannot be imported"),
    "an exit": ("import sys\ndef score(p, c, **k): sys.exit(0)", "SystemExit"), "an interrupt": ("def score(p, c, **k): raise KeyboardInterrupt", "KeyboardInterrupt"),
    "a generator's end": ("def score(p, c, **k): raise GeneratorExit", "GeneratorExit"), "no columns": ("def score(): return []", "TypeError"),
    "too few": ("def score(p, c, **k): return []", "0 scores"), "words": ("def score(p, c, **k): return ['good' for _ in c]", "numbers"),
    "a number": ("def score(p, c, **k): return 1.0", "TypeError"), "nothing": ("def score(p, c, **k): pass", "TypeError"),
    "NaN": ("def score(p, c, **k): return [float('nan') for _ in c]", "NaN"), "infinity": ("def score(p, c, **k): return [float('inf') for _ in c]", "infinity"),
    "chance": ("import random\ndef score(p, c, **k): return [random.random() for _ in c]", "score"),
    "a running number": ("n = [0]\ndef score(p, c, **k):\n    n[0] += 1\n    return [n[0] / 99 for _ in c]", "score"),
    "no end": ("def score(p, c, **k): return score(p, c, **k)", "RecursionError"), "a dictionary": ("def score(p, c, **k): return {}", "0 scores"),
    "complex numbers": ("def score(p, c, **k): return [1j for _ in c]", "numbers"), "a file of bytes": ("\udcff", "cannot be imported"),
}  # fmt: skip
SOURCES = {
    "no such source": ("sentiment", "not known"), "no module": (":score", "not known"), "no name": ("rewards:", "not known"),
    "a relative module": ("..rewards:score", "cannot be imported"), "a classifier that is not there": ("classifier:nowhere/at-all", "cannot load"),
    "a classifier without a name": ("classifier:", "cannot load"), "a reward model that is not there": ("reward_model:nowhere", "not the release"),
    "a reward model without a name": ("reward_model:", ""), "a causal LM as classifier": ("classifier:model", "no weights"),
}  # fmt: skip


def reward_cases() -> Iterator[Case]:
    def scored(source: str, content: str = "") -> Callable[[Path], list[str]]:
        def make(folder: Path) -> list[str]:
            sys.modules.pop("faulty", None)
            (folder / "faulty.py").write_bytes(content.encode("utf-8", "surrogateescape"))
            small = small_model(folder / "model")
            section = {"source": source, "is_public": True, "low": -1.0, "high": 1.0}
            sys.path[:] = [str(folder), *[p for p in sys.path if "malformed-" not in p]]
            return recipe(
                folder, sft=None, ppo={"reward": section}, model={"name_or_path": str(small), "is_public": True}
            )

        return make

    for name, (content, says) in REWARDS.items():
        if name != "a running number":  # what it remembers is put back: it scores as a constant
            yield Case("rewards", name, scored("faulty:score", content), says)
    for name, (source, says) in SOURCES.items():
        yield Case("rewards", name, scored(source), says)
    yield Case(
        "rewards",
        "no range",
        lambda folder: recipe(folder, sft=None, ppo={"reward": {"source": "math:sin", "is_public": True}}),
        "range",
    )
    yield Case(
        "rewards",
        "not public",
        lambda folder: recipe(folder, sft=None, ppo={"reward": {"source": "math:sin"}}),
        "public",
    )


# Ledgers and statements ----------------------------------------------------------------------------------------------

ROW = {
    "dataset": [None, 3, b"x"], "run": [None, 3], "stage": [None, 3], "step": [None, -1, 1.5, "x"], "attempt": [-1, "x"],
    "low": [None, -1, 2, "x"], "high": [0.0, 7, "x"], "sampling_rate": [None, 0, -1, 2, "x"], "noise_multiplier": [None, -1, "x"],
    "metrics_noise_multiplier": [-1, "x"], "passes": [0, -1, 1.5, "x"], "units": [None, 0, -1, "x"],
}  # fmt: skip


def ledger_cases() -> Iterator[Case]:
    def with_file(content: bytes | None, name: str = "l.sqlite") -> Callable[[Path], list[str]]:
        def make(folder: Path) -> list[str]:
            if content is not None:
                (folder / name).write_bytes(content)
            return ["ledger", "--ledger", str(folder / name)]

        return make

    for name, content in {
        "not there": None, "text": b"this is no ledger, it is a letter to somebody" * 20, "a cut header": b"SQLite format 3\0" + b"\1" * 900,
        "half a ledger": (FORMATS / "ledger_v0.sqlite").read_bytes()[:3000],
    }.items():  # fmt: skip
        yield Case("ledgers", name, with_file(content))
    for column, values in ROW.items():
        for value in values:

            def make(folder: Path, column: str = column, value: Any = value) -> list[str]:
                shutil.copy(FORMATS / "ledger_v0.sqlite", folder / "l.sqlite")
                with contextlib.closing(sqlite3.connect(folder / "l.sqlite")) as database, database:
                    database.execute(f"UPDATE intents SET {column} = ? WHERE id = 1", (value,))
                return ["ledger", "--ledger", str(folder / "l.sqlite")]

            yield Case("ledgers", f"{column} = {value!r}", make)
    for name, words in {
        "delta 2": ["--delta", "2"],
        "delta NaN": ["--delta", "nan"],
        "delta 0": ["--delta", "0"],
        "no dataset": ["--dataset", "x"],
    }.items():

        def asked(folder: Path, words: list[str] = words) -> list[str]:
            shutil.copy(FORMATS / "ledger_v0.sqlite", folder / "l.sqlite")
            return ["ledger", "--ledger", str(folder / "l.sqlite"), *words]

        yield Case("ledgers", name, asked)
    for name in ("newer", "of another program", "a folder"):

        def other(folder: Path, name: str = name) -> list[str]:
            path = folder / "l.sqlite"
            if name == "a folder":
                path.mkdir()
            else:
                with contextlib.closing(sqlite3.connect(path)) as database, database:
                    database.execute("PRAGMA user_version = 99" if name == "newer" else "CREATE TABLE mail (id)")
            return recipe(folder, ledger=str(path))

        yield Case("ledgers", name, other)


OF_STATEMENT = {
    "format": [99, "new"], "private": [None, 1, "yes"], "epsilon": [None, "much", -1, [], math.nan], "stages": [None, [], {}, 3, [3]],
    "assumptions": [None, "all", [3]],
}  # fmt: skip
OF_STAGE = {
    "stage": [None, 3], "dataset": [None, 3], "part": [None, [0.0], [0.5, 0.2], [-1, 1], [0, 7], ["a", "b"], 3], "split": [None, 3], "unit": [None, 3],
    "declared_units": [None, 0, -1, "many", math.nan], "max_grad_norm": [None, 0, -1, "x"], "mechanisms": [None, [], {}, [3]], "private": [None, "yes", False],
}  # fmt: skip
OF_MECHANISM = {
    "sampling_rate": [None, 0, 2, -1, "x", math.nan], "noise_multiplier": [None, 0, -1, "x", math.nan], "steps": [None, 0, -1, 1.5, 10**12, "x"],
    "passes": [0, -1, 1.5, "x"], "metrics_noise_multiplier": [-1, "x", math.nan],
}  # fmt: skip


def statement_cases() -> Iterator[Case]:
    def stated(place: Callable[[dict[str, Any]], dict[str, Any]], key: str, value: Any) -> Callable[[Path], list[str]]:
        def make(folder: Path) -> list[str]:
            model = small_model(folder / "model")
            whole = json.loads((FORMATS / "privacy_parallel.json").read_text(encoding="utf-8"))
            if value is None:
                place(whole).pop(key)
            else:
                place(whole)[key] = value
            (model / "privacy.json").write_text(json.dumps(whole), encoding="utf-8")
            return recipe(folder, sft=None, model={"name_or_path": str(model), "is_public": True}, target_epsilon=100)

        return make

    tables = (
        ("", OF_STATEMENT, lambda whole: whole), ("stage ", OF_STAGE, lambda whole: whole["stages"][0]),
        ("mechanism ", OF_MECHANISM, lambda whole: whole["stages"][0]["mechanisms"][0]),
    )  # fmt: skip
    for where, table, place in tables:
        for key, values in table.items():
            for value in values:
                yield Case("statements", f"{where}{key} = {value!r}", stated(place, key, value), "privacy")
    for name, content in {
        "a list": b"[]",
        "half": b'{"format": 1',
        "bytes": b"\xff\xfe",
        "empty": b"",
        "deep": b"[" * 100000,
    }.items():

        def other(folder: Path, content: bytes = content) -> list[str]:
            (small_model(folder / "model") / "privacy.json").write_bytes(content)
            return recipe(folder, sft=None, model={"name_or_path": str(folder / "model"), "is_public": True})

        yield Case("statements", name, other, "not a privacy statement")


# The command line ----------------------------------------------------------------------------------------------------

NUMBERS = ["nan", "-1", "0", "1e400", "x", ""]
PLAN = ["plan", "--units", "1000", "--batch-size", "10", "--steps", "100", "--delta", "1e-5", "--epsilon", "2"]
CALLS: dict[str, list[str]] = {
    **{f"plan {name} {v!r}": [*PLAN, name, v] for name in ("--units", "--batch-size", "--delta", "--epsilon") for v in NUMBERS},
    **{f"plan --steps {v!r}": [*PLAN, "--steps", v] for v in (*NUMBERS, "1.5", "10" * 20)},
    **{f"plan --passes {v!r}": [*PLAN, "--passes", v] for v in ("0", "-1", "x", "9" * 30)},
    **{f"plan --noise-multiplier {v!r}": [*PLAN[:-2], "--noise-multiplier", v] for v in ("nan", "-1", "x", "inf")},
    "plan of a batch above the units": [*PLAN, "--batch-size", "1e9"], "plan of units without end": [*PLAN, "--units", "inf"],
    "plan of nothing": ["plan"], "plan of everything": [*PLAN, "--noise-multiplier", "1"],
    **{
        f"generate {name} {v!r}": ["generate", "tiny-review-lm", "--prompt", "x", name, v]
        for name, values in {
            "--max_completion_length": ["0", "-1", "x", "1000000000", "1.5"], "--num_generations": ["0", "-1", "x", "1000000000"],
            "--temperature": ["0", "-1", "nan", "inf", "x"], "--top_p": ["0", "-1", "2", "nan", "x"], "--seed": ["-1", "x", "9" * 30],
            "--best_of": ["0", "1", "2", "x", "1000000000"], "--reward": ["vader", ""],
        }.items()
        for v in values
    },
    "generate from nothing": ["generate", "nowhere", "--prompt", "x"], "generate an empty prompt": ["generate", "tiny-review-lm", "--prompt", ""],
    "generate from no file": ["generate", "tiny-review-lm", "--prompts", "nowhere.jsonl"],
    "generate more than the model holds": ["generate", "tiny-review-lm", "--prompt", "x " * 5000],
    "export of nothing": ["export", "nowhere", "--to", "x"], "evaluate nothing": ["evaluate", "nowhere", "--data", "data.jsonl", "--eval_is_public"],
    "evaluate without data": ["evaluate", "tiny-review-lm", "--data", "nowhere.jsonl", "--eval_is_public"],
    **{
        f"evaluate {name} {v!r}": ["evaluate", "tiny-review-lm", "--data", "data.jsonl", "--eval_is_public", name, v]
        for name, values in {
            "--num_prompts": ["0", "-1", "x"], "--prompt_tokens": ["0", "-1"], "--max_prompt_length": ["0", "-1"], "--max_completion_length": ["0", "-1", "1000000000"],
            "--seed": ["-1", "x", "9" * 30], "--device": ["cuda:99", "toaster", ""], "--reward": ["poetry", ""], "--judge": ["x", ":", "nothing:x"],
            "--reward_low": ["nan", "x"], "--reference_column": ["colour"], "--baseline": ["nowhere"], "--output": ["nowhere/x.json"], "--plot": ["x.gif"],
        }.items()
        for v in values
    },
    **{
        f"evaluate --private {name} {v!r}": [
            "evaluate", "tiny-review-lm", "--private", "--dataset_name", "held-out", "--data", "data.jsonl", "--output_dir", "out",
            *(["--epsilon", "1"] if name != "--epsilon" else []), name, v,
        ]
        for name, values in {
            "--epsilon": ["0", "-1", "nan", "inf", "x"], "--delta": ["0", "1", "2", "nan"], "--noise_multiplier": ["1"], "--declared_units": ["0", "-1", "x"],
            "--max_records_per_unit": ["0", "-1"], "--reward_low": ["nan", "2"], "--output_dir": [""], "--dataset_name": ["", "a\nb"], "--data": ["", "nowhere.jsonl"],
        }.items()
        for v in values
    },
    **{
        f"sweep {name} {v!r}": ["sweep", "recipe.yaml", name, v]
        for name, values in {"--epsilons": ["nan", "-1", "1e400", "x", "4:0", "4:x"], "--seeds": ["0", "-1", "x"], "--vary": ["x"], "--at": ["4"], "--public_proxy": ["nowhere.jsonl"]}.items()
        for v in values
    },
    "no command": ["fly"], "run without a recipe's value": ["run", "recipe.yaml", "--sft.max_steps"],
    "a field that is none": ["run", "recipe.yaml", "--sft.max_step", "3"], "a word for a number": ["run", "recipe.yaml", "--sft.max_steps", "few"],
    "NaN by the command line": ["run", "recipe.yaml", "--sft.learning_rate", ".nan"], "brackets by the command line": ["run", "recipe.yaml", "--split", "[" * 500],
    "a bomb by the command line": ["run", "recipe.yaml", "--split", "{a: &a [1, 1], b: &b [*a, *a], c: [*b, *b]}"],
}  # fmt: skip


def call_cases() -> Iterator[Case]:
    for name, words in CALLS.items():

        def make(folder: Path, words: list[str] = words) -> list[str]:
            recipe(folder)
            return list(words)

        yield Case("calls", name, make)


# Runs that have begun ------------------------------------------------------------------------------------------------


def begun(change: Callable[[Path], Any]) -> Callable[[Path], list[str]]:
    """A run whose first stage is done, with something damaged in its private folder."""

    def make(folder: Path) -> list[str]:
        small = small_model(folder / "model")
        section = {"name_or_path": str(small), "is_public": True}
        assert main([*recipe(folder, ppo=None, model=section)[:2], "--json"]) == 0
        change(folder / "run" / "private")
        return recipe(folder, ppo=None, model=section)

    return make


def newest(private: Path) -> Path:
    return sorted((private / "sft" / "final").glob("step-*"))[-1]


def state(**changes: Any) -> Callable[[Path], None]:
    return lambda private: edited("state.json", **changes)(newest(private))


CHECKPOINTS: dict[str, Callable[[Path], Any]] = {
    "half the tensors": lambda private: cut("tensors.safetensors")(newest(private)),
    "no tensors": lambda private: (newest(private) / "tensors.safetensors").unlink(),
    "other tensors": lambda private: weights(lambda t: t.pop(next(iter(t))), "tensors.safetensors")(newest(private)),
    "half a state": lambda private: cut("state.json")(newest(private)),
    "a state that is a list": lambda private: (newest(private) / "state.json").write_text("[]"),
    "a state of bytes": lambda private: (newest(private) / "state.json").write_bytes(b"\xff"),
    "no step": state(step=None), "a step that is a word": state(step="three"), "a step beyond the last": state(step=10**9),
    "no sum": state(sha256=None), "no data": state(fingerprint=None), "other data": state(fingerprint="x"), "no settings": state(config_hash=None),
    "other settings": state(config_hash="x"), "no algorithm": state(algorithm=None), "an algorithm that is a word": state(algorithm="sft"),
    "a run without a name": lambda private: (private / "run.json").write_text("{}"),
    "half a run": lambda private: cut("run.json")(private), "a run that is a list": lambda private: (private / "run.json").write_text("[]"),
    "origins that are a word": lambda private: edited("run.json", origins="here")(private),
    "origins without a model": lambda private: edited("run.json", origins={"model": 3})(private),
    "a run of another ledger": lambda private: edited("run.json", ledger="x")(private),
}  # fmt: skip


def checkpoint_cases() -> Iterator[Case]:
    for name, change in CHECKPOINTS.items():
        yield Case("checkpoints", name, begun(change))


def all_cases(per_field: int | None = None) -> list[Case]:
    """Every case; of every field at most `per_field` values."""
    tables = (
        recipe_cases, data_cases, model_cases, reward_cases, ledger_cases, statement_cases, call_cases, checkpoint_cases,
    )  # fmt: skip
    return [*field_cases(per_field), *(case for table in tables for case in table())]
