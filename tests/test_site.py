"""The documentation as a site: it builds without a warning, nothing is missing from it, and it reads well on a phone."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import dpalign
from browser import needs_chromium, too_wide
from dpalign.cli.plan import complete_plan
from dpalign.stages import STAGES, kind
from reader import ROOT

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Built as `make docs` builds it."""
    target = tmp_path_factory.mktemp("site")
    rule = re.search(
        r"^docs:.*\n\t\$\(BIN\)/python (-m sphinx .+?) docs build/docs", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    assert rule and "--fail-on-warning" in rule[1]
    done = subprocess.run([sys.executable, *rule[1].split(), DOCS, target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return target


def test_a_page_for_every_document(site):
    sources = {
        f.relative_to(DOCS).with_suffix(".html") for ending in ("md", "rst", "ipynb") for f in DOCS.rglob(f"*.{ending}")
    }
    pages = {f.relative_to(site) for f in site.rglob("*.html")}
    assert sources <= pages and len(sources) > 30
    linked = (site / "index.html").read_text(encoding="utf-8")
    assert not [page for page in sources - {Path("index.html")} if f'href="{page}"' not in linked]


def test_the_reference_has_every_name(site):
    reference = (site / "api.html").read_text(encoding="utf-8")
    names = set(dpalign.__all__) - {"__version__"}
    assert not [name for name in names if f'id="dpalign.{name}"' not in reference]


def test_every_stage_has_a_page_with_its_settings(site):
    for name in STAGES:
        page = (site / "stages" / f"{name}.html").read_text(encoding="utf-8")
        names = [field.name for field in fields(kind(name).Config)]
        assert names and not [field for field in names if f">{field}</span>" not in page], name


@needs_chromium
def test_no_page_has_to_be_scrolled_sideways(site, tmp_path):
    assert too_wide(sorted(site.rglob("*.html")), tmp_path) == []


# What the pages say ------------------------------------------------------------------------------------------------


def literals() -> str:
    """All texts of the source, one a line, with what is filled in left out."""
    found = []
    for file in (ROOT / "src" / "dpalign").rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_every_error_that_is_explained_exists():
    rows = re.findall(
        r"^\| (`.+?) \| .+ \| .+ \|$", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    quoted = [text for row in rows for text in re.findall(r"`([^`]+)`", row)]
    said = literals()
    assert len(rows) >= 20 and not [text for text in quoted if text not in said]
    assert "an error that nobody writes" not in said


def test_the_table_of_people_is_what_the_command_prints():
    text = (DOCS / "how_many_people.md").read_text(encoding="utf-8")
    rows = [
        [float(cell.replace(",", "")) for cell in row.split("|")]
        for row in re.findall(r"^\| ([\d,]+ \|.+) \|$", text, re.MULTILINE)
    ]
    assert len(rows) >= 5
    for people, sample, sigma, noise in rows:
        plan = complete_plan(units=people, batch_size=sample, steps=60, delta=1e-5, epsilon=4, noise_multiplier=None)
        assert (round(plan["noise_multiplier"], 4), round(plan["noise_per_update"], 6)) == (sigma, noise)


def test_one_version_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changes = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert citation["version"] == dpalign.__version__ and citation["license"] == "Apache-2.0"
    assert dpalign.__version__ in changes[:2]


def test_the_notebook_is_a_notebook():
    notebook = json.loads((DOCS / "notebook.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4 and len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
