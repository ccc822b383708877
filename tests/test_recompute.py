"""tools/recompute.py, which imports nothing of dpalign, finds the epsilon of every kind of statement."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from dpalign.files import dumps
from dpalign.privacy.accountant import SampledGaussian
from dpalign.privacy.parts import epsilon_of
from dpalign.privacy.statement import PrivacyStatement, StageStatement

TOOL = Path(__file__).parents[1] / "tools" / "recompute.py"
DELTA = 1e-5
SFT, POLICY = SampledGaussian(0.25, 1.3, 8), SampledGaussian(0.07, 0.9, 20, 2, 12.0)  # two passes, and metrics
QUERY = SampledGaussian(1.0, 3.7, 1)
REFIT = [SampledGaussian(0.1, 1.1, 7), SampledGaussian(0.1, 1.45, 12)]  # after an interruption


def stage(*mechanisms: SampledGaussian, part=(0.0, 1.0), dataset="d", split="key") -> StageStatement:
    return StageStatement("s", dataset, part, split, "record", 100, 1.0, 1.0, list(mechanisms), True)


KINDS = {
    "one query": [stage(QUERY)],
    "parallel": [stage(SFT, part=(0.0, 0.5)), stage(POLICY, part=(0.5, 1.0))],
    "sequential": [stage(SFT), stage(POLICY)],
    "mixed": [stage(SFT, part=(0.0, 0.6)), stage(QUERY, part=(0.4, 1.0)), stage(POLICY, part=(0.5, 0.7))],
    "refitted": [stage(*REFIT)],
    "many datasets": [stage(SFT), stage(QUERY, dataset="e"), stage(POLICY, dataset="e")],
    "keys that cannot be compared": [stage(SFT, part=(0.0, 0.5)), stage(QUERY, part=(0.5, 1.0), split="other")],
}


def written(folder: Path, stages: list[StageStatement], times: float = 1.0) -> Path:
    epsilon = epsilon_of([spending for one in stages for spending in one.spendings()], DELTA)
    path = folder / "privacy.json"
    path.write_text(dumps(PrivacyStatement(True, epsilon * times, DELTA, stages).as_dict()), encoding="utf-8")
    return path


def tool():
    """Its functions, without a process for each."""
    spec = importlib.util.spec_from_file_location("recompute", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_statement_is_found_to_three_digits_in_two_ways(kind, tmp_path):
    stated, module = json.loads(written(tmp_path, KINDS[kind]).read_text()), tool()
    for compose in (module.by_dp_accounting, module.by_numpy):
        found = max(compose(steps, DELTA) for steps in module.met(list(module.spendings(stated))))
        assert found == pytest.approx(stated["epsilon"], rel=1e-3), compose.__name__


def test_it_is_short_and_says_by_its_exit_status_whether_the_statement_holds(tmp_path):
    source = TOOL.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 80 and "import dpalign" not in source and "from dpalign" not in source

    def run(path: Path) -> tuple[int, str]:
        done = subprocess.run([sys.executable, "-P", TOOL, path], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    damaged = tmp_path / "damaged.json"
    damaged.write_text('{"epsilon": 1, "delta": 1e-5, "stages": [{"mechanisms": [3]}]}', encoding="utf-8")
    done = subprocess.run([sys.executable, "-P", TOOL, damaged], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr == "this is no privacy statement that can be added up (TypeError).\n"
    status, said = run(written(tmp_path, KINDS["mixed"]))
    assert status == 0 and said.startswith("stated ") and "recomputed " in said
    assert run(written(tmp_path, KINDS["mixed"], times=0.98))[0] == 1  # somebody has made it smaller
    bare = written(tmp_path, [stage(SampledGaussian(0.5, 0.0, 3))])
    assert run(bare)[0] == 0 and math.isinf(float(json.loads(bare.read_text())["epsilon"]))
