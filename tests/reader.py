"""What a reader of the documents has at hand: demo data, a small model and `python`; self-written, nothing is fetched."""

from __future__ import annotations

import contextlib
import gzip
import importlib
import io
import json
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dpalign.cli import main
from dpalign.models import embedded
from helpers import judged, reviews, write_jsonl

ROOT = Path(__file__).parent.parent


def at_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of dpalign below a home of its own, with demo data of a few records in it."""
    matplotlib.get_cachedir()  # once: its fonts stay where they are
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    cache = folder / ".cache" / "dpalign"
    snippets, preferences = cache / "movie-snippets", cache / "movie-preferences"
    public = rated(reviews(8, "morning"))
    files = {snippets / "private": reviews(64), snippets / "public": public}
    files |= {preferences / "texts": rated(reviews(32)), preferences / "prompts": rated(reviews(32, "noon"))}
    files |= {preferences / "public_prompts": public}
    files |= {preferences / "pairs": judged(32), preferences / "public_pairs": judged(8, start=900)}
    for file, records in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(file.with_suffix(".jsonl"), records)
    return cache


def rated(records: list[dict]) -> list[dict]:
    """With people's mean ratings, which follow the adjectives."""
    return [record | {"mean": number % 10 - 4.5} for number, record in enumerate(records)]


def small_model(folder: Path) -> Path:
    """A random model of the embedded one's architecture and tokenizer, a hundred times smaller."""
    source = embedded.resolve(embedded.TINY_REVIEW_LM)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.from_pretrained(source, **small, num_key_value_heads=2, head_dim=8, initializer_range=0.2)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def write_gzip(path: Path, records: list[dict]) -> Path:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return path


def run_here(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` for `python -m dpalign ...` and `python FILE ...`, in this process: none has to start."""
    python, *words = command
    assert python == sys.executable
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        if words[:2] == ["-m", "dpalign"]:
            status = main(words[2:])
        else:
            status = 0
            importlib.import_module(Path(words[0]).stem).main(words[1:])
    if status and options.get("check"):
        raise subprocess.CalledProcessError(status, command)
    return subprocess.CompletedProcess(command, status, out.getvalue(), "")
