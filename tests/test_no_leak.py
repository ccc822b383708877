"""Nothing un-noised leaves private/: no text, no statistic, no batch size, no key, no seed."""

from __future__ import annotations

import re
import struct
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dpalign.models import embedded
from dpalign.privacy.entropy import SystemEntropy
from dpalign.privacy.ledger import Ledger
from dpalign.privacy.mechanism import GaussianMechanism
from dpalign.reporting.progress import Reporter
from dpalign.training import Stage
from helpers import Called, call, files_below, judged, reviews, small_model, write_jsonl, write_recipe

MARKER = "zebrafinch"
SIZES = [167, 173, 179]  # of the drawn samples: numbers that nothing public here has
KEYED = re.compile(rb'"[0-9a-f]{16}"')  # identities in privacy.json
HOST, USER, SEED = "planted-host", "planted-user", 918273645
DRAWN = re.compile(rb' (?:[xy][12]?|c[xy]|r|d|width|height|viewBox|points|transform)="[^"]*"')  # places in a chart, in SVG
NUMBER = re.compile(rb"-?\d+\.?\d*(?:[eE][-+]?\d+)?")
REWARD = '''
def exact(prompts, completions, **columns):
    """Tells nothing else: characteristic digits, different for every text."""
    return [0.7312459 + len(c) * 1.2345e-4 for c in completions]
def quoting(prompts, completions, **columns):
    if columns.get("id", [None])[0] is not None:
        raise ValueError(f"cannot score {prompts[0]} {columns['id'][0]} {columns['note'][0]}")
    return [0.5 for _ in completions]
'''


@dataclass
class Secrets:
    """What a run must not show: texts, random bytes, un-noised statistics, sizes of the samples."""

    texts: set[str] = field(default_factory=lambda: {MARKER, "person-"})
    coins: set[bytes] = field(default_factory=set)
    numbers: set[float] = field(default_factory=set)


@pytest.fixture
def secrets(monkeypatch) -> Secrets:
    """Makes the drawn sizes known, and records what goes into the mechanism and out of the generator."""
    found, calls = Secrets(), iter(SIZES * 9)
    add, release, draw_bytes = GaussianMechanism.add, GaussianMechanism.release, SystemEntropy.bytes

    def watched_add(self, grads, metrics=None):
        if metrics is not None:
            drawn = metrics[~metrics.isnan().all(1)]  # the others only fill the micro-batch up
            self.raw = [*getattr(self, "raw", []), drawn.double().nan_to_num(0.0)]
        norms = torch.cat([g.flatten(1) for g in grads], 1).norm(dim=1).double()
        found.numbers.update([norms.mean().item(), norms.max().item(), norms.min().item()])
        add(self, grads, metrics)

    def watched_release(self):
        nothing = [torch.zeros(1, len(self.metrics)).double()]  # where a run tries its stages on text of its own
        self.rows = torch.cat(getattr(self, "raw", nothing))  # (units, metrics)
        for statistic in (self.rows.sum(0), self.rows.mean(0), self.rows.sum(0) / self.divisor, self.rows.std(0)):
            found.numbers.update(statistic.tolist())
        found.numbers.update((self._metrics_sum * self.metrics_grid).tolist())
        found.numbers.update(float(total.double().norm()) * self.grid for total in self._sums)
        return release(self)

    def watched_bytes(self, count):
        value = draw_bytes(self, count)
        if count >= 8:
            found.coins.add(value[:8])
        return value

    def draw(units, rate, entropy):
        return np.sort(np.random.default_rng().permutation(units)[: next(calls)])

    monkeypatch.setattr(GaussianMechanism, "add", watched_add)
    monkeypatch.setattr(GaussianMechanism, "release", watched_release)
    monkeypatch.setattr(SystemEntropy, "bytes", watched_bytes)
    monkeypatch.setattr("dpalign.privacy.gate.poisson_sample", draw)
    return found


def train(folder: Path, capsys, monkeypatch, reward: str = "exact", **changes) -> Called:
    """SFT and PPO on marked texts with everything on: tensorboard, evaluation on public prompts, the terminal."""
    (folder / "leak_rewards.py").write_text(REWARD)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "leak_rewards", raising=False)
    records = [r | {"note": f"{MARKER}note{i}"} for i, r in enumerate(reviews(400, MARKER))]
    write_jsonl(folder / "data.jsonl", records)
    public = write_jsonl(folder / "public.jsonl", reviews(4, "public"))
    stage = {"expected_batch_size": 160, "noise_multiplier": 1.0, "metrics_noise_ratio": 0.5, "micro_batch_size": 64}
    source = {
        "source": f"leak_rewards:{reward}",
        "is_public": True,
        "low": -1.0,
        "high": 1.0,
        "columns": ["id", "note"],
    }
    recipe = write_recipe(
        folder, report_to="tensorboard", target_epsilon=100, data={"eval_path": str(public), "eval_is_public": True},
        sft=stage | {"max_steps": 1}, ppo=stage | {"max_steps": 1, "reward": source}, **changes,
    )  # fmt: skip
    return call(capsys, "run", recipe, "--json")


def numbers(content: bytes) -> np.ndarray:
    """All that reads like one."""
    return np.array([float(n) for n in NUMBER.findall(content)] or [0.0])


def leaks(folder: Path, called: Called, secrets: Secrets) -> list[str]:
    """Where outside private/ one of the secrets can be found: in text, as a number, or as a binary float."""
    places, words = told(folder, called), spelled(folder, secrets)
    public = {f.read_bytes() for f in Path(embedded.resolve(embedded.TINY_REVIEW_LM)).iterdir()}
    telling = {v for v in secrets.numbers if v != round(v, 3)}  # 6.0 tokens is nobody's fingerprint
    assert len(telling) > 20
    found = []
    for place, content in places.items():
        if content in public:
            continue
        found += [f"{place}: {word!r}" for word in words if word in content]
        if place.endswith(("tokenizer.json", ".safetensors")):
            continue  # public numbers, and the noised weights
        binary = {struct.pack(form, v): v for v in telling for form in ("<f", "<d")}
        found += [f"{place}: {v} in binary" for raw, v in binary.items() if raw in content]
        if "tfevents" in place:
            continue
        without_names = KEYED.sub(b'""', content)  # digits of a hash are no number: they may hold a size by chance
        shown, whole = numbers(without_names), numbers(DRAWN.sub(b"", without_names))  # and so may a point of a chart
        found += [f"{place}: {v}" for v in telling if (np.abs(shown - v) <= 1e-6 * abs(v)).any()]
        found += [f"{place}: sample size {v}" for v in SIZES if (whole == v).any()]
    return found


def told(folder: Path, called: Called) -> dict[str, bytes]:
    """What lies outside private/, with the names of the files, and what the terminal was told."""
    run = folder / "run"
    files = files_below(run, lambda path: path.parts[0] != "private")
    assert any("tfevents" in f.name for f in files) and run / "summary.json" in files and run / "metrics.jsonl" in files
    places = {str(f.relative_to(run)): f.read_bytes() for f in files}
    return places | {"stdout": called.out.encode(), "stderr": called.err.encode(), "names": "\n".join(places).encode()}


def spelled(folder: Path, secrets: Secrets) -> set[bytes]:
    """The secret texts and bytes, as they might be written."""
    words = {w.encode() for w in secrets.texts}
    for raw in {Ledger(folder / "ledger.sqlite").secret("reviews"), *secrets.coins}:
        words |= {raw, raw.hex().encode(), str(int.from_bytes(raw, "little")).encode()}
    return words


def test_nothing_private_leaves(tmp_path, capsys, monkeypatch, secrets):
    called = train(tmp_path, capsys, monkeypatch)
    assert called.json["private"] and called.json["evaluation"]
    assert leaks(tmp_path, called, secrets) == []
    # The search knows what it looks for: all of this is in private/ or in the data.
    assert (tmp_path / "data.jsonl").read_text().count(MARKER) == 800
    assert any(0.73 < v < 0.75 for v in secrets.numbers), "the exact mean reward was seen"
    assert len(secrets.coins) > 4, "the random bytes were seen"


def raw_means(monkeypatch):
    """The loop logs what the metrics were before the noise."""

    def released(self):
        return {m.name: float(v) for m, v in zip(self.metrics, self.rows.mean(0), strict=True)}

    monkeypatch.setattr(GaussianMechanism, "_release_metrics", released)


def raw_means_for_the_tracker(monkeypatch):
    """Only the tracker gets them."""
    step, release_metrics = Reporter.step, GaussianMechanism._release_metrics
    raw = {}

    def released(self):
        raw.update({m.name: float(v) for m, v in zip(self.metrics, self.rows.mean(0), strict=True)})
        return release_metrics(self)

    def tracked(self, report):
        self._tracker.say(report.step, {"raw": raw[next(iter(report.metrics))]})
        step(self, report)

    monkeypatch.setattr(GaussianMechanism, "_release_metrics", released)
    monkeypatch.setattr(Reporter, "step", tracked)


def sample_sizes(monkeypatch):
    """The loop tells how many units were drawn."""
    step = Stage._step

    def telling(self, phase, positions, *rest):
        self.tell(f"step with {len(positions)} units")
        return step(self, phase, positions, *rest)

    monkeypatch.setattr(Stage, "_step", telling)


def a_record(monkeypatch):
    """The log quotes the first record of the sample."""
    step = Stage._step

    def quoting(self, phase, positions, *rest):
        with open(self.log, "a") as file:
            file.write(f'{{"first": "{self.data.units[positions[0]][0]["text"]}"}}\n')
        return step(self, phase, positions, *rest)

    monkeypatch.setattr(Stage, "_step", quoting)


def clip_norms(monkeypatch):
    """Aggregate norm of the clipped sum, before the noise."""
    release = GaussianMechanism.release

    def printing(self):
        norms = [float(t.double().norm()) * self.grid for t in self._sums]
        print("norm", norms[0], *norms)
        return release(self)

    monkeypatch.setattr(GaussianMechanism, "release", printing)


@pytest.mark.parametrize(
    ("mutant", "place"),
    [
        (raw_means, "metrics.jsonl: 0.7"),
        (raw_means_for_the_tracker, "in binary"),
        (sample_sizes, "stderr: sample size"),
        (a_record, "metrics.jsonl: b'zebrafinch'"),
        (clip_norms, "stdout: "),
    ],
)
def test_the_search_finds(mutant, place, tmp_path, capsys, monkeypatch, secrets):
    mutant(monkeypatch)
    called = train(tmp_path, capsys, monkeypatch)
    assert called.status == 0
    assert any(place in leak for leak in leaks(tmp_path, called, secrets))


def test_a_reward_that_raises_and_quotes_its_row_is_not_heard(tmp_path, capsys, monkeypatch, secrets):
    called = train(tmp_path, capsys, monkeypatch, reward="quoting")
    assert called.status == 0 and called.json["epsilon"] < 100
    assert MARKER not in called.out + called.err and "cannot score" not in called.err
    assert leaks(tmp_path, called, secrets) == []


# Every stage ---------------------------------------------------------------------------------------------------------

SHORT = {"prompt_max_tokens": 4, "max_prompt_length": 5, "max_completion_length": 6}
TOGETHER = {  # all stages, in as few runs as a recipe's rules allow
    "ppo": ["sft", "reward_model", "dpo", "ppo", "measurement"],
    "rloo": ["reward_query", "rloo"],
    "grpo": ["grpo"],
    "offline": ["offline"],
}


def train_together(folder: Path, kind: str, capsys: Any, monkeypatch: Any) -> Called:
    """The stages, each on records of its own that are marked, on a machine with a name and by somebody who has one."""
    monkeypatch.setattr("socket.gethostname", lambda: HOST)
    for name in ("LOGNAME", "USER", "HOSTNAME"):
        monkeypatch.setenv(name, HOST if name == "HOSTNAME" else USER)
    monkeypatch.chdir(folder)
    source = {"source": "reward_model"} if kind == "ppo" else {"source": "vader"}
    common = {"expected_batch_size": 160, "noise_multiplier": 1.0, "micro_batch_size": 64, "max_steps": 1, "seed": SEED}
    common |= {"adapter": {"r": 2}, "prepend_bos": True}
    own = {
        "sft": {"max_length": 16},
        "reward_model": {"max_length": 20},
        "reward_query": {"max_length": 20, "directions": 4, "own_texts": 40, "noise_multiplier": 4.0, "seed": SEED},
        "dpo": {"max_length": 20},
        "measurement": {"noise_multiplier": 4.0},
    }
    changes: dict[str, Any] = {"sft": None, "ppo": None}
    for start, stage in enumerate(TOGETHER[kind]):
        pairs = stage in ("reward_model", "reward_query", "dpo")
        records = judged(190, MARKER, 200 * start) if pairs else reviews(190, f"{MARKER}{start}")
        path = write_jsonl(folder / f"{stage}.jsonl", records)
        changes[f"{stage}_data"] = {"name": "reviews" if not start else stage, "path": path.name}
        section = own.get(stage, SHORT | {"reward": source})
        changes[stage] = section if stage in ("reward_query", "measurement") else common | section
    recipe = write_recipe(
        folder, output_dir="run", report_to="tensorboard", target_epsilon=1000, units_disjoint="declared", **changes
    )
    return call(capsys, "run", recipe, "--json")


def planted(folder: Path, called: Called, secrets: Secrets) -> list[str]:
    """Where one of the secret words can be found."""
    secrets.texts |= {HOST, USER, str(SEED), str(folder), small_model()}
    words = spelled(folder, secrets)
    places = told(folder, called).items()
    found = [f"{place}: {word!r}" for place, content in places for word in words if word in content]
    listed = [(place, content) for place, content in places if place.endswith((".json", ".jsonl", ".md", "stdout", "stderr"))]
    sizes = [(place, numbers(KEYED.sub(b'""', content))) for place, content in listed if "tokenizer" not in place]
    return found + [f"{place}: sample size {v}" for place, shown in sizes for v in SIZES if (shown == v).any()]


@pytest.mark.parametrize("kind", TOGETHER)
def test_no_stage_lets_out_what_is_planted(kind, tmp_path, capsys, monkeypatch, secrets):
    called = train_together(tmp_path, kind, capsys, monkeypatch)
    assert called.status == 0, called.err
    assert [stage["stage"] for stage in called.json["stages"]] == TOGETHER[kind] and len(secrets.coins) > 2
    assert planted(tmp_path, called, secrets) == []


def where_the_base_lies(monkeypatch):
    """A release names its base as it was loaded."""
    monkeypatch.setattr("dpalign.release.told", lambda base: base)


def the_machines_name(monkeypatch):
    """TensorBoard puts it into the name of its file."""
    import tensorboard.summary.writer.event_file_writer as writer

    monkeypatch.setattr("dpalign.reporting.trackers._options", lambda *of: {})
    monkeypatch.setattr(writer, "socket", SimpleNamespace(gethostname=lambda: HOST))


def the_seed(monkeypatch):
    """The card says how to train it again."""
    monkeypatch.setattr("dpalign.release.heldout_line", lambda measured: f"Trained with seed {SEED}.")


@pytest.mark.parametrize(
    ("mutant", "place"),
    [
        (where_the_base_lies, "release/adapter_config.json: b'/"),
        (the_machines_name, "names: b'planted-host'"),
        (the_seed, f"release/README.md: b'{SEED}'"),
    ],
)
def test_the_search_finds_what_is_planted(mutant, place, tmp_path, capsys, monkeypatch, secrets):
    mutant(monkeypatch)
    called = train_together(tmp_path, "offline", capsys, monkeypatch)
    assert any(found.startswith(place) for found in planted(tmp_path, called, secrets)), called.err
