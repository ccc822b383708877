"""The documentation as a site: `make docs`. Pages are Markdown; the reference is made from docstrings."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

import docstring_parser  # noqa: E402
from docutils import nodes  # noqa: E402
from sphinx.util import logging  # noqa: E402
from sphinx.util.docutils import SphinxDirective  # noqa: E402

from dpalign.version import __version__  # noqa: E402

project, author, release = "dpalign", "the dpalign authors", __version__
copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext", ".ipynb": "markdown"}
exclude_patterns = ["_static"]
html_theme = "furo"
html_title = f"dpalign {__version__}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = html_copy_source = False

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 80
napoleon_custom_sections = [("Raises", "params_style")]


TITLES = {  # of tables that sweeps have written
    "adam_noise_correction": "Adam's noise correction",
    "passes": "Passes over one sample",
    "preferences_one_private_step": "One private step",
    "quickstart_preferences": "Preferences",
    "quickstart_sentiment": "Sentiment",
    "rloo": "RLOO",
    "smollm2": "SmolLM2",
    "ukp_convincingness": "Convincing arguments",
}


def as_page(app: object, name: str, source: list[str]) -> None:
    """A notebook's cells in their order, without what they printed; a title for a table that a sweep has written."""
    if name.startswith("results/") and not source[0].startswith("# "):
        source[0] = f"# {TITLES[name.removeprefix('results/')]}\n\n{source[0]}"
    if name == "index" and not (ROOT / "docs" / "coming_from_trl.md").exists():
        source[0] = source[0].replace("coming_from_trl\n", "")
    if not source[0].startswith("{"):
        return
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(source[0])["cells"]]
    source[0] = "\n\n".join(text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in cells)


def plain_docstring(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings are written with Markdown's single backticks: they are code."""
    for number, line in enumerate(lines):
        parts = line.split("`")  # every second one is code
        parts[::2] = [part.replace("*", r"\*") for part in parts[::2]]
        lines[number] = "``".join(parts)


def interval_of(domain: object) -> str:
    """As in mathematics."""
    low, high = (f"{end:g}".replace("e+0", "e") for end in (domain.low, domain.high))
    shown = f"{'[' if domain.with_low else '('}{low}, {high}{']' if domain.with_high else ')'}"
    return shown + (" or inf" if domain.or_inf else "")


class Settings(SphinxDirective):
    """The fields of a config, `module:Class`: name, default, what it may be, and what its docstring says."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        module, _, name = self.arguments[0].partition(":")
        config = getattr(importlib.import_module(module), name)
        said = {
            argument: parameter.description or ""
            for base in reversed(config.__mro__)
            for parameter in docstring_parser.parse(base.__doc__ or "").params
            for argument in parameter.arg_name.split(", ")
        }
        lines = []
        homes = [vars(base).get("__annotations__", ()) for base in config.__mro__]
        own_first = sorted(fields(config), key=lambda one: [one.name in home for home in homes], reverse=True)
        for one in own_first:
            default = one.default_factory() if one.default_factory is not MISSING else one.default
            shown = (
                "its own defaults" if is_dataclass(default) else f"`{default}`" if default not in (None, "") else "none"
            )
            domain = one.metadata.get("domain")
            interval = f", in `{interval_of(domain)}`" if domain is not None else ""
            text = " ".join(said.get(one.name, "").split()).rstrip(".")
            if not text:
                logging.getLogger(__name__).warning("%s.%s has no sentence in a docstring", name, one.name)
            lines.append(f"- **`{one.name}`**, default {shown}{interval}: {text}.")
        return self.parse_text_to_nodes("\n".join(lines))


def setup(app) -> None:
    app.add_directive("settings", Settings)
    app.connect("source-read", as_page)
    app.connect("autodoc-process-docstring", plain_docstring, priority=100)
