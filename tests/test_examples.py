"""The examples run as a reader runs them, and say what is true."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

from dpalign.privacy.accountant import SampledGaussian, epsilon

EXAMPLE = Path(__file__).parent.parent / "examples" / "one_private_step.py"


def test_one_private_step(tmp_path):
    """It learns, and its epsilon is that of the draws in the ledger, read and counted here without the library."""
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 120
    ledger = tmp_path / "ledger.sqlite"
    done = subprocess.run(
        [sys.executable, EXAMPLE, ledger], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    spent, sigma = map(float, re.findall(r"epsilon ([\d.]+) .* noise multiplier ([\d.]+)", done.stdout)[0])
    rows = sqlite3.connect(ledger).execute("SELECT sampling_rate, noise_multiplier, passes FROM intents").fetchall()
    assert len(rows) == 30 and {(q, round(s, 4), passes) for q, s, passes in rows} == {(0.2, sigma, 1)}
    truth = epsilon([SampledGaussian(0.2, (1 / sigma**2 + 1 / (3 * sigma) ** 2) ** -0.5, 30)], 1e-5)
    assert 1.98 < spent <= 2 and abs(spent - truth) < 2e-3
    weights = [float(w) for w in re.findall(r"weights \[(.*)\]", done.stdout)[0].split(",")]
    assert max(abs(w - true) for w, true in zip(weights, [1, -2, 0, 3, 0.5], strict=True)) < 1.5
