"""One page that shows a finished run: guarantee, table, plot, completions. All text is printable and escaped."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import jinja2

from ..files import write_text
from ..printable import printable

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 } td, th { border: 1px solid #ccc; padding: .35rem .6rem;
text-align: left; vertical-align: top } .guarantee { background: #eef6ee; padding: .8rem 1rem;
border-left: 4px solid #393 }
img { max-width: 100% } .prompt { color: #777 }
</style></head><body><h1>{{ title }}</h1>
<p class="guarantee">{{ guarantee }}</p>
<table><tr><th>model</th><th>reward</th><th>KL (nats)</th><th>perplexity</th><th>distinct-2</th></tr>
{% for name, row in evaluation.items() %}<tr><td>{{ name }}</td>
<td>{{ "%.3f ± %.3f"|format(row.reward, row.reward_ci95) }}</td><td>{{ "%.2f"|format(row.kl) }}</td>
<td>{{ "%.1f"|format(row.perplexity) }}</td><td>{{ "%.3f"|format(row.distinct_2) }}</td></tr>{% endfor %}</table>
<p>Measured on prompts that are declared public. KL is against the model that the stage started from.</p>
{% if plot %}<img alt="noised reward" src="data:image/png;base64,{{ plot }}">{% endif %}
<h2>Completions of public prompts</h2>
<table><tr>{% for name in samples[0] if name != "prompt" %}<th>{{ name }}</th>{% endfor %}</tr>
{% for sample in samples %}<tr>{% for name, text in sample.items() if name != "prompt" %}
<td><span class="prompt">{{ sample.prompt }}</span>{{ text }}</td>{% endfor %}</tr>{% endfor %}</table>
</body></html>
"""


def write_report(
    target: Path, *, title: str, guarantee: str, evaluation: dict[str, Any], samples: list[dict[str, str]], plot: Path
) -> None:
    """Writes one self-contained HTML file.

    Args:
        evaluation: rows by model. samples: `prompt` and one completion by model. plot: a PNG, embedded if it exists.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, finalize=fit)
    image = base64.b64encode(plot.read_bytes()).decode() if plot.exists() else ""
    page = environment.from_string(PAGE).render(
        title=title, guarantee=guarantee, evaluation=evaluation, samples=samples, plot=image
    )
    write_text(target, page)


def fit(value: Any) -> Any:
    """What a template is given, with text made printable."""
    return printable(value, lines=True) if isinstance(value, str) else value
