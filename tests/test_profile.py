"""The profile of an iteration names every part of it, and goes on where it stopped."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
COMMAND = (
    "--model tiny --device cpu --prompts 6 --prompt_tokens 4 --completion_tokens 4 --micro_batch_size 2 --repeats 1"
)


def test_every_part_is_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    profile = importlib.import_module("profile_iteration")
    output = tmp_path / "profile.jsonl"
    arguments = [*COMMAND.split(), "--output", str(output), "--algorithms"]
    profile.main([*arguments, "ppo", "sft"])
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    expected = [(algorithm, variant) for algorithm in ("ppo", "sft") for variant in profile.VARIANTS]
    assert [(line["algorithm"], line["variant"]) for line in lines] == expected
    for line in lines:
        absent = {"generation", "reward", "reference"} if line["algorithm"] == "sft" else set()
        absent |= {"batching", "clip", "noise"} if line["variant"] == "plain" else set()
        assert set(line["seconds"]) == set(line["peak_bytes"]) == set(profile.PARTS) - absent
        assert min(line["seconds"].values()) > 0 and min(line["peak_bytes"].values()) > 0
        assert min(line["iteration_s"], line["floor_s"], line["training_tokens_per_s"]) > 0
        assert line["micro_batch_size_used"] == 2
    assert "nonprivate" in capsys.readouterr().out

    profile.main([*arguments, "rloo", "ppo", "sft"])  # only what is missing, and plain rloo is plain ppo
    added = [json.loads(line) for line in output.read_text().splitlines()]
    assert added[: len(lines)] == lines
    fresh = [(line["algorithm"], line["variant"]) for line in added[len(lines) :]]
    assert fresh == [("rloo", "private"), ("rloo", "nonprivate")]


@pytest.mark.parametrize("file", sorted(BENCHMARKS.parent.glob("docs/results/profile_*.jsonl")), ids=lambda f: f.stem)
def test_the_committed_measurements_are_shown(file, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    importlib.import_module("profile_iteration").main(["--show", str(file)])
    assert "gpt2-medium" in capsys.readouterr().out


def test_a_smaller_micro_batch_where_memory_runs_out(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    profile = importlib.import_module("profile_iteration")
    tried = []

    def run(job):
        tried.append(job.micro_batch_size)
        if job.micro_batch_size > 3:
            raise profile.torch.OutOfMemoryError
        return {}

    monkeypatch.setattr(profile, "run", run)
    line = profile.measure(profile.Job("tiny", "sft", "plain", "cpu", "float32", 16, 4, 4, 12, 1))
    assert (line["micro_batch_size"], line["micro_batch_size_used"]) == (12, 3)
    assert tried == [12, 6, 3, 3]  # and the warm-up
