"""Every field outside private/ is on the list in docs/privacy.md, and what is not noised is no function of the data."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import sys
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatch
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpalign.data import units
from dpalign.privacy.entropy import SystemEntropy
from dpalign.release import MEASURED
from helpers import Called, call, files_below, judged, reviews, small_model, write_jsonl, write_recipe

DOCS = Path(__file__).parents[2] / "docs" / "privacy.md"
ORIGINS = {"public", "declared", "noised", "random", "mechanism", "machine"}
ROW = re.compile(r"^\| `([^`]+)` \| (.+) \| (\w+) \|$")
SHORT = {"max_steps": 1, "expected_batch_size": 24}


def listed() -> list[tuple[str, tuple[str, ...], str]]:
    """File pattern, path of a field, origin: the table of docs/privacy.md."""
    rows = [found.groups() for line in DOCS.read_text(encoding="utf-8").splitlines() if (found := ROW.match(line))]
    return [(f, tuple(p.split(".")), origin) for f, paths, origin in rows for p in re.findall(r"`([^`]+)`", paths)]


TABLE = listed()


def matches(pattern: tuple[str, ...], path: tuple[str, ...]) -> bool:
    """`*` is any one name, `**` at the end any rest."""
    if pattern[-1] == "**":
        return (
            len(path) >= len(pattern) - 1 and matches(pattern[:-1], path[: len(pattern) - 1]) if pattern[1:] else True
        )
    return len(pattern) == len(path) and all(p in ("*", name) for p, name in zip(pattern, path, strict=True))


def origin_of(file: str, path: tuple[str, ...]) -> str | None:
    """Of a field; None of one that the list does not know."""
    found = {o for pattern, fields, o in TABLE if fnmatch(file, pattern) and matches(fields, path)}
    assert len(found) < 2, (file, path, found)
    return next(iter(found), None)


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list) and value:
        for item in value:
            yield from leaves(item, (*path, "[]"))
    elif not isinstance(value, dict | list):
        yield path, value


def section(lines: list[bytes], heading: bytes) -> list[bytes]:
    """What stands under a heading of a card."""
    if heading not in lines:
        return []
    return [*takewhile(lambda line: not line.startswith(b"## "), lines[lines.index(heading) + 1 :])]


def outside(run: Path) -> dict[tuple[str, tuple[str, ...]], list[Any]]:
    """All values outside private/, by file and path; a file that is not JSON is one value."""
    found: dict[tuple[str, tuple[str, ...]], list[Any]] = {}
    for file in files_below(run, lambda path: path.parts[0] != "private"):
        name, content = str(file.relative_to(run)), file.read_bytes()
        if file.name == "README.md":
            lines = content.splitlines()
            measured = [line for line in lines if line.startswith(b"Held-out loss on ")]
            worth = section(lines, MEASURED.strip().encode())
            found[name, ("heldout",)] = measured
            found[name, ("worth",)] = worth
            found[name, ("text",)] = [line for line in lines if line not in [*measured, *worth]]
            continue
        if fnmatch(name, "*tokenizer*") or file.suffix not in (".json", ".jsonl"):
            found[name, ("**",)] = [content]
            continue
        documents = content.splitlines() if file.suffix == ".jsonl" else [content]
        for path, value in (leaf for document in documents for leaf in leaves(json.loads(document))):
            found.setdefault((name, path), []).append(value)
    return found


def unknown(run: Path) -> list[str]:
    return [f"{file}: {'.'.join(path)}" for file, path in outside(run) if origin_of(file, path) is None]


# Pipelines -----------------------------------------------------------------------------------------------------


def sections(folder: Path, kind: str) -> dict[str, Any]:
    """A recipe of each kind of stage, measured on public records where it can be."""
    public = write_jsonl(folder / "public.jsonl", reviews(4, "public")).name
    pairs = write_jsonl(folder / "public_pairs.jsonl", judged(4, "public")).name
    write_jsonl(folder / "pairs.jsonl", judged(30, start=100))
    write_jsonl(folder / "held.jsonl", reviews(30, "held"))
    shown = {"eval_path": public, "eval_is_public": True}
    judges = {"name": "judges", "path": "pairs.jsonl", "eval_path": pairs, "eval_is_public": True, "declared_units": 30}
    data = {"path": "data.jsonl", "declared_units": 64}
    common = {"output_dir": "run", "ledger": "ledger.sqlite", "units_disjoint": "declared", "data": data, "sft": SHORT}
    pair = SHORT | {"micro_batch_size": 32, "prepend_bos": True, "adapter": {"r": 2}}
    return common | {
        "sft": {"ppo": None, "split": {"sft": 0.5}},
        "ppo": {
            "data": data | shown, "sft": SHORT | {"eval_steps": 1}, "ppo": SHORT | {"eval_steps": 1, "reward": {"source": "reward_model"}}, "reward_model": pair | {"eval_steps": 1}, "reward_model_data": judges,
            "measurement": {"noise_multiplier": 4.0}, "measurement_data": {"name": "held", "path": "held.jsonl", "declared_units": 30},
            "reference_reward": {"source": "vader"}, "target_epsilon": 20,
        },
        "rloo": {"ppo": None, "data": data | shown, "rloo": pair | {
            "prompt_max_tokens": 4, "max_prompt_length": 5, "max_completion_length": 6, "num_generations": 2, "reward": {"source": "mean", "written_texts": 16, "of": [
                {"source": "vader"}, {"source": "contrast", "wanted": "A fine", "unwanted": "A dull", "max_length": 16}]}}},
        "dpo": {"ppo": None, "dpo": pair, "dpo_data": judges},
        "query": {
            "sft": None, "ppo": None, "reward_query_data": judges, "model": {"name_or_path": small_model(), "is_public": True},
            "reward_query": {"directions": 4, "own_texts": 24, "max_length": 16, "prepend_bos": True, "free": [
                {"source": "vader"}, {"source": "contrast", "wanted": "A fine", "unwanted": "A dull", "max_length": 16, "written_texts": 16}]},
        },
    }[kind]  # fmt: skip


def train(
    folder: Path, kind: str, capsys: Any, monkeypatch: Any, records: list[dict[str, Any]] | None = None
) -> Called:
    folder.mkdir()
    monkeypatch.chdir(folder)
    write_jsonl(folder / "data.jsonl", records or reviews(64))
    called = call(capsys, "run", write_recipe(folder, **sections(folder, kind)), "--json")
    assert called.status == 0, called.err
    return called


@pytest.mark.parametrize("kind", ["ppo", "rloo", "dpo", "query"])
def test_every_field_outside_private_is_listed(kind, tmp_path, capsys, monkeypatch):
    train(tmp_path / "a", kind, capsys, monkeypatch)
    assert unknown(tmp_path / "a" / "run") == []
    files = {file for file, _ in outside(tmp_path / "a" / "run")}
    assert any(file.endswith("constants.safetensors") for file in files) == (kind in ("rloo", "query"))
    assert ("reward_model/reward.safetensors" in files) == (kind == "query")
    assert "metrics.jsonl" in files and ("evaluations.jsonl" in files) == (kind == "ppo")


def test_the_list_is_read_and_a_field_that_it_lacks_is_found(tmp_path):
    assert len(TABLE) > 60 and {origin for *_, origin in TABLE} == ORIGINS
    assert origin_of("release/privacy.json", ("stages", "[]", "split")) == "random"
    assert origin_of("metrics.jsonl", ("noised_metrics", "reward")) == "noised"
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "privacy.json").write_text('{"stages": [{"split": "a", "drawn": 3}], "private": true}')
    (tmp_path / "notes.txt").write_text("x")
    assert unknown(tmp_path) == ["notes.txt: **", "release/privacy.json: stages.[].drawn"]


# Neighbours ----------------------------------------------------------------------------------------------------


def fix_randomness(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes in every run: what differs between runs then is what was let through."""
    calls: Counter[str] = Counter()  # by who calls: how often another one did may depend on who was drawn

    def drawn(count: int) -> bytes:
        caller = sys._getframe(2).f_code
        place = f"{Path(caller.co_filename).name} {caller.co_name} 1"  # wherever this checkout lies; person-0 is drawn
        calls[place] += 1
        return hashlib.shake_256(f"{place} {calls[place]}".encode()).digest(count)

    monkeypatch.setattr(SystemEntropy, "bytes", lambda self, count: drawn(count))
    monkeypatch.setattr(secrets, "token_bytes", lambda count=32: drawn(count))
    monkeypatch.setattr(secrets, "token_hex", lambda count=32: drawn(count).hex())


CHANGED = [{"id": "person-0", "text": "Something that nobody else would have said, twice as long, on evening9999."}]


def differences(tmp_path: Path, kind: str, capsys: Any, monkeypatch: Any, other: list[dict[str, Any]]) -> set[str]:
    """Origins of the fields in which two runs on neighbours differ, with those that are not noised by name."""
    found = []
    for name, records in (("one", reviews(64)), ("other", other)):
        with monkeypatch.context() as fixed:
            fix_randomness(fixed)
            train(tmp_path / name, kind, capsys, fixed, records)
        found.append(outside(tmp_path / name / "run"))
    one, two = found
    assert one.keys() == two.keys()
    origins = {key: origin_of(*key) for key in one if one[key] != two[key]}
    return {o if o in ("noised", "machine") else f"{o}: {f} {'.'.join(p)}" for (f, p), o in origins.items()}


@pytest.mark.parametrize(
    ("kind", "other"),
    [("ppo", CHANGED + reviews(64)[1:]), ("sft", CHANGED + reviews(64)[1:]), ("rloo", reviews(64)[1:])],
    ids=["one changed, all models", "one changed", "one less than declared"],
)
def test_neighbours_differ_only_in_what_is_noised(kind, other, tmp_path, capsys, monkeypatch):
    assert differences(tmp_path, kind, capsys, monkeypatch, other) == {"noised"}


def hash_of_all(config: Any, ledger: Any, identities: np.ndarray, low: float, high: float) -> str:
    return str(ledger.keyed_hash(config.name, b"split", *map(bytes, identities)).hex()[:16])


def test_a_function_of_the_data_is_found(tmp_path, capsys, monkeypatch):
    """Mutant: the split's name is a keyed hash of all records, as it was."""
    monkeypatch.setattr(units, "_split_of", hash_of_all)
    found = differences(tmp_path, "sft", capsys, monkeypatch, CHANGED + reviews(64)[1:])
    assert found == {"noised", "random: release/privacy.json stages.[].split"}
