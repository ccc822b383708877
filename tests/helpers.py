"""Review-like texts, a small recipe, and the `dpalign` command in this process or in one of its own."""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpalign.cli import main
from dpalign.models import embedded
from fresh import Started

ADJECTIVES = ["dull", "bright", "strange", "quiet", "brave", "silly", "lovely", "clumsy", "honest", "greedy"]
NOUNS = ["film", "play", "novel", "series", "concert", "game", "album", "circus", "lecture", "parade"]
VERDICTS = ["made me laugh", "lost the plot", "stole my heart", "fell apart", "won me over", "went on too long"]
PICKLES = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"}


def reviews(count: int, marker: str = "evening") -> list[dict[str, Any]]:
    """`count` different records with columns `id` and `text`; every text holds `marker` and the record's number."""
    return [
        {
            "id": f"person-{i}",
            "text": f"This {ADJECTIVES[i % 10]} {NOUNS[i // 10 % 10]} {VERDICTS[i % 6]} on {marker}{i:04}.",
        }
        for i in range(count)
    ]


def judged(count: int, marker: str = "evening", start: int = 0) -> list[dict[str, Any]]:
    """`count` different pairs with columns `id`, `chosen` and `rejected`, numbered from `start`."""
    better, worse = ["lovely", "brave", "honest"], ["dull", "clumsy", "silly"]
    return [
        {
            "id": f"person-{i}",
            "chosen": f"A {better[i % 3]} {NOUNS[i % 10]} that won me over on {marker}{i:04}.",
            "rejected": f"A {worse[i % 3]} {NOUNS[i // 10 % 10]} that lost the plot on {marker}{i:04}.",
        }
        for i in range(start, start + count)
    ]


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


@functools.cache
def small_model() -> str:
    """Folder of a random Llama of one narrow layer with the embedded model's tokenizer, made once for all tests.

    A run of the command spends its time in python and in five layers of 256; one layer of 32 shows the same mechanics.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = Path(embedded.resolve(embedded.TINY_REVIEW_LM))
    around = tempfile.mkdtemp(prefix="dpalign-small-model-")
    atexit.register(shutil.rmtree, around, ignore_errors=True)
    folder = Path(around) / "small-model"  # a statement names it: no letter of that is drawn
    sizes = {
        "vocab_size": 4096, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 512, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder)
    return str(folder)


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """A recipe of two short stages whose files all lie in `folder`; `changes` are merged into its sections."""
    stage = {"expected_batch_size": 8, "micro_batch_size": 32, "prepend_bos": True, "adapter": {"r": 2}}
    recipe: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "ledger": str(folder / "ledger.sqlite"),
        "model": {"name_or_path": small_model(), "is_public": True},
        "data": {"name": "reviews", "path": str(folder / "data.jsonl")},
        "target_epsilon": 2,
        "sft": stage | {"max_steps": 3, "max_length": 16},
        "ppo": stage
        | {"max_steps": 2, "prompt_max_tokens": 4, "max_prompt_length": 5, "max_completion_length": 6, "beta": 0.05},
    }
    return merged(recipe, changes)


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Nested update; None removes a key."""
    out = dict(old)
    for key, value in new.items():
        if value is None:
            out.pop(key, None)
        elif isinstance(value, dict) and isinstance(out.get(key), dict):
            out[key] = merged(out[key], value)
        else:
            out[key] = value
    return out


def write_recipe(folder: Path, **changes: Any) -> Path:
    """`settings` as folder/recipe.yaml, beside 64 reviews in folder/data.jsonl unless there is such a file."""
    if not (folder / "data.jsonl").exists():
        write_jsonl(folder / "data.jsonl", reviews(64))
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings(folder, **changes)), encoding="utf-8")
    return path


# The command ---------------------------------------------------------------------------------------------------


def environment(folder: Path) -> dict[str, str]:
    """One thread, and a ledger below `folder` whatever the recipe says."""
    return os.environ | {"OMP_NUM_THREADS": "1", "DPALIGN_LEDGER": str(folder / "ledger.sqlite")}


def start(folder: Path, *arguments: object) -> Started:
    """`dpalign ARGUMENTS` as a fresh process, that Ctrl-C ends also where the tests run in the background."""
    return Started(folder, [*map(str, arguments)], environment(folder))


def in_fresh_process(folder: Path, *arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `dpalign ARGUMENTS`."""
    process = start(folder, *arguments)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def in_this_process(words: list[str]) -> tuple[int, str]:
    """Exit status and standard output of a command, as a sweep has them of a process of its own: none has to start."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = main(words)
    return status, out.getvalue()


@dataclass
class Called:
    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Standard output, which must be exactly one line of JSON."""
        assert self.status == 0, self.err
        assert self.out.count("\n") == 1
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one sentence of a failure."""
        lines = self.err.splitlines()
        assert self.status in (1, 2) and self.out == ""
        assert [line for line in lines if line.startswith("dpalign: ")] == lines[-1:]
        assert lines[-1].startswith("dpalign: error: ") and "Traceback" not in self.err
        return lines[-1].removeprefix("dpalign: error: ")


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> Called:
    """`dpalign ARGUMENTS` in this process."""
    capsys.readouterr()
    status = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return Called(status, captured.out, captured.err)


# What a run leaves ---------------------------------------------------------------------------------------------


def ledger_rows(folder: Path, **where: Any) -> int:
    """Draws that the ledger of `folder` has journaled, read without dpalign."""
    query = "SELECT count(*) FROM intents" + "".join(f" {'AND' if i else 'WHERE'} {k} = ?" for i, k in enumerate(where))
    database = sqlite3.connect(folder / "ledger.sqlite")
    try:
        return database.execute(query, tuple(where.values())).fetchone()[0]
    finally:
        database.close()


def statement(run: Path) -> dict[str, Any]:
    return json.loads((run / "release" / "privacy.json").read_text(encoding="utf-8"))


def files_below(folder: Path, keep: Callable[[Path], bool] = lambda path: True) -> list[Path]:
    return sorted(f for f in folder.rglob("*") if f.is_file() and keep(f.relative_to(folder)))
