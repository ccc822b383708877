"""The wheel holds everything that a run needs, and works where only it is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import torch

from dpalign.version import __version__

ROOT = Path(__file__).parent.parent


def run(*command: object, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that nothing is left in the working tree and nothing stale gets in."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", source / "dist", cwd=source)
    (built,) = (source / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """Environment with the wheel installed, which sees this environment's other packages and not the working tree."""
    venv = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv)
    run(
        sys.executable, "-m", "pip", "--python", venv / "bin" / "python", "install", "--no-deps", "--no-index",
        "--quiet", wheel, cwd=venv,
    )  # fmt: skip
    packages = run(venv / "bin" / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=venv)
    others = {sysconfig.get_path("purelib"), str(Path(torch.__file__).parent.parent)}
    Path(packages.strip(), "others.pth").write_text("\n".join(sorted(others)) + "\n")
    return venv


def test_the_wheel_is_complete(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata_name = next(n for n in names if n.endswith("METADATA"))
        metadata = message_from_bytes(archive.read(metadata_name))
        scripts = archive.read(metadata_name.replace("METADATA", "entry_points.txt")).decode()
    assert wheel.name == f"dpalign-{__version__}-py3-none-any.whl"
    model = "dpalign/assets/tiny-review-lm"
    needed = {"dpalign/reporting/report.css", "dpalign/reporting/report.html.jinja"}
    needed |= {f"{model}/{f}" for f in ("config.json", "model.safetensors", "tokenizer.json", "README.md")}
    needed |= {"dpalign/recipes/quickstart.yaml", "dpalign/py.typed"}
    needed |= {str(f.relative_to(ROOT / "src")) for f in (ROOT / "src" / "dpalign").rglob("*.py")}
    assert needed <= names
    assert {n.split("/")[0] for n in names} == {"dpalign", metadata_name.split("/")[0]}
    assert not [n for n in names if n.endswith((".pt", ".bin", ".pkl", ".pyc"))]
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Requires-Python"] == ">=3.11"
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert any(r.startswith("dp-accounting") for r in metadata.get_all("Requires-Dist"))
    assert "dpalign = dpalign.cli:main" in scripts


def test_the_installed_command_works(installed, tmp_path):
    command = installed / "bin" / "dpalign"
    where = run(installed / "bin" / "python", "-c", "import dpalign; print(dpalign.__file__)", cwd=tmp_path)
    assert where.startswith(str(installed))
    assert run(command, "--version", cwd=tmp_path) == f"dpalign {__version__}\n"
    arguments = ("--units", 12500, "--batch-size", 4096, "--steps", 305, "--delta", 4e-5, "--epsilon", 4)
    plan = json.loads(run(command, "plan", *arguments, "--json", cwd=tmp_path))
    assert 5.860 <= plan["noise_multiplier"] <= 5.860 * 1.002
    said = json.loads(
        run(command, "generate", "tiny-review-lm", "--prompt", "This film", "--prepend_bos", "--json", cwd=tmp_path)
    )
    assert said["completions"][0]["completion"].strip()
    assert not list(tmp_path.iterdir())
