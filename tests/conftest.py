import os
import zlib
from collections.abc import Iterator
from pathlib import Path

# Two processes of tests on two cores: more threads would only wait for each other. Before torch reads it.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch

from dpalign import run
from dpalign.models import plain_logits, precision, verify
from dpalign.privacy.entropy import SystemEntropy

torch.set_num_threads(1)
FRESH, DRAWN = verify.in_fresh_process, SystemEntropy.bytes
CHECKED, ALWAYS = {}, [False]
precision.SMALL = 10**9  # what a test finds must not depend on the machine: every model is float32


@pytest.fixture(scope="session", autouse=True)
def _releases_are_checked_here() -> Iterator[None]:
    """Hundreds of releases, and five seconds of imports for each: tests/test_release.py checks in processes of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "in_fresh_process", plain_logits.logits)
        yield


@pytest.fixture(autouse=True)
def _own_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test touches the user's ledger."""
    monkeypatch.setenv("DPALIGN_LEDGER", str(tmp_path / "ledger.sqlite"))


@pytest.fixture(autouse=True)
def _the_same_chance(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test draws the same coins every day, its own, so that what it finds is the code's doing.

    Not those of tests/privacy, which are about the operating system's coins, nor of processes that a test starts.
    `DPALIGN_TEST_CHANCE=N` gives every test other coins: how much of a result is chance?
    """
    if request.path.parent.name == "privacy":
        return
    seed = zlib.crc32(request.node.nodeid.encode()), int(os.environ.get("DPALIGN_TEST_CHANCE", "0"))
    drawn = np.random.default_rng(seed)
    monkeypatch.setattr(SystemEntropy, "bytes", lambda self, count: drawn.bytes(count))


@pytest.fixture(scope="session", autouse=True)
def _each_stage_is_tried_once() -> Iterator[None]:
    """Hundreds of runs have the same few stages: a self-check says the same of each. The mark `self_check` has them all."""
    check = run.check_stage

    def once(model: object, kind: type, config: object, rewards: dict[str, object], **records: bool) -> float:
        key = (kind, type(model.model.get_base_model() if model.adapters else model.model), *rewards, *records.items())
        if ALWAYS[0] or key not in CHECKED:
            with pytest.MonkeyPatch.context() as patch:  # whichever test is first: not with its coins
                patch.setattr(SystemEntropy, "bytes", DRAWN)
                CHECKED[key] = check(model, kind, config, rewards, **records)
        return CHECKED[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "check_stage", once)
        yield


@pytest.fixture(autouse=True)
def _marked(request: pytest.FixtureRequest) -> Iterator[None]:
    ALWAYS[0] = request.node.get_closest_marker("self_check") is not None
    yield
    ALWAYS[0] = False
