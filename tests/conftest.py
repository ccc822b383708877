import os
from collections.abc import Iterator
from pathlib import Path

# Two processes of tests on two cores: more threads would only wait for each other. Before torch reads it.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from dpalign.models import plain_logits, precision, verify

torch.set_num_threads(1)
FRESH = verify.in_fresh_process
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
