"""Text of other people reaches terminals, reports, cards and logs only as text."""

from __future__ import annotations

import ast
import io
import json
import re
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from typing import ClassVar

import pytest
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.table import Table

import dpalign
from dpalign.files import dumps
from dpalign.models import embedded
from dpalign.printable import UNFIT, code_span, printable
from dpalign.privacy.accountant import SampledGaussian
from dpalign.privacy.ledger import Intent, Ledger
from dpalign.privacy.statement import PrivacyStatement, StageStatement
from dpalign.release import PromptFormat, write_release
from dpalign.reporting.html import write_report
from dpalign.reporting.plots import plot_evaluation
from dpalign.reporting.progress import Reporter
from dpalign.reporting.sweep import write_markdown
from dpalign.reporting.tables import evaluation_table
from dpalign.reporting.terminal import Terminal, plain
from finished import finished_run
from helpers import call, write_jsonl, write_recipe

# Clears the screen, turns the text round, ends the line in four ways, and is markup of rich, Markdown, HTML and TeX.
FILE_NAME = "x\x1b[2J\x9b31m\u202e\x07\r\u2028\n# Big\n---\n[bold]a[b] [b](c)<script>`|\"' $\\x_{$ :cat:"
HOSTILE = (
    FILE_NAME + "[/b][/]\n\n# Heading\n<script>alert(1)</script>\n[link](http://evil.example) http://evil.example a@b.c"
)


def unfit(text: str) -> set[str]:
    """What must never be shown, but for the line ends and tabs of our own."""
    return {c for c in text if unicodedata.category(c) in UNFIT and c not in "\n\t\u200c\u200d"}


anything = st.text() | st.text(st.sampled_from(HOSTILE))


@given(anything)
def test_nothing_unfit_survives(text):
    assert not unfit(printable(text, lines=True))
    line = printable(text)
    assert not unfit(line) and not {"\n", "\t"} & set(line) and len(line.splitlines()) <= 1
    assert printable(line) == line
    assert not unfit(text + line) - unfit(text)


@given(anything)
def test_text_that_is_fit_is_not_changed(text):
    fit = "".join(c for c in text if not unfit(c))
    assert printable(fit, lines=True) == fit


def test_the_escapes_by_hand():
    assert printable("a\x1b[31m\u202e\n\t\x9b\U000e0001") == r"a\x1b[31m\u202e\n\t\x9b\U000e0001"
    assert printable("ab", longest=2) == "ab" and printable("a\nb", longest=3) == r"a\…"
    assert printable("naïve 日本\u3000語 👩\u200d💻\n", lines=True) == "naïve 日本\u3000語 👩\u200d💻\n"
    assert printable(b"\xff.txt".decode("utf-8", "surrogateescape")) == r"\udcff.txt"


@given(anything)
def test_json_stays_the_same_and_is_fit(text):
    for indent in (None, 2):
        written = dumps({text: [text]}, indent)
        assert json.loads(written) == {text: [text]} and not unfit(written)
    assert "\n" not in dumps(text, None) and len(dumps(text, None).splitlines()) == 1


@given(anything)
def test_a_terminal_shows_text_as_text(text):
    file = io.StringIO()
    terminal = Terminal(file=file, width=10_000)
    terminal.print(plain(text))
    terminal.say(text)
    assert file.getvalue() == f"{printable(text)}\n" * 2
    table = Table(title=plain(text))
    table.add_column(plain(text))
    table.add_row(plain(text))
    terminal.print(table)
    terminal.print(text, markup=False)  # not as it should be called, and still harmless
    assert not unfit(file.getvalue())


def kinds(markdown: str) -> list[str]:
    """Kinds of everything in a Markdown text, code and words left out."""
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    return [t.type for token in tokens for t in [token, *(token.children or [])]]


@given(anything)
def test_code_holds_no_markup(text):
    for before in ("", "# ", "- ", "word "):
        assert set(kinds(before + code_span(text))) <= set(kinds(before + "`a`"))
    row = f"| a | b |\n|---|---|\n| {code_span(text)} | c |\n"
    assert kinds(row) == kinds("| a | b |\n|---|---|\n| `a` | c |\n")


# Through every command ---------------------------------------------------------------------------------------------


def check(called, *, names: int = 1) -> None:
    assert called.status == 0, called.err
    assert not unfit(called.out) and not unfit(re.sub("\rLoading weights.*", "", called.err))  # a bar of transformers
    assert (called.out + called.err).replace("\n", "").count(r"\x1b") >= names
    assert "\n# Big" not in called.out and "🐱" not in called.out


def ledger_with(path: Path) -> None:
    ledger = Ledger(path)
    ledger.secret(HOSTILE)
    ledger.write(
        [
            Intent(
                dataset=HOSTILE, run=HOSTILE, stage=HOSTILE, step=0, attempt=0, split="", low=0.0, high=1.0,
                sampling_rate=0.1, noise_multiplier=1.0, metrics_noise_multiplier=0.0, passes=1, max_grad_norm=1.0,
                unit="record", units=100.0, fingerprint="f", config_hash="c", private=True,
            )
        ]
    )  # fmt: skip
    ledger.close()


def test_ledger(tmp_path, capsys):
    path = tmp_path / "ledger.sqlite"
    ledger_with(path)
    check(call(capsys, "ledger", "--ledger", path), names=2)
    as_json = call(capsys, "ledger", "--ledger", path, "--json")
    assert not unfit(as_json.out) and as_json.json["datasets"][0]["dataset"] == HOSTILE
    refused = call(capsys, "ledger", "--ledger", path, "--dataset", f"{HOSTILE}!")
    assert not unfit(refused.err) and r"\x1b" in refused.error


def test_plan(tmp_path, capsys):
    """A stranger's model, and what its statement says."""
    model = tmp_path / "model"
    model.mkdir()
    for file in Path(embedded.resolve("tiny-review-lm")).iterdir():
        (model / file.name).symlink_to(file)
    mechanism = SampledGaussian(0.1, 1.0, 2)
    stage = StageStatement(HOSTILE, HOSTILE, (0.0, 1.0), "s", HOSTILE, 10.0, 1.0, 1.0, [mechanism], True)
    stated = PrivacyStatement(True, 1.0, 1e-5, [stage], assumptions=[HOSTILE])
    (model / "privacy.json").write_text(dumps(stated.as_dict()))
    recipe = write_recipe(
        tmp_path, ppo=None, data={"declared_units": 64}, model={"name_or_path": str(model)}, units_disjoint="declared",
        target_epsilon=100,
    )  # fmt: skip
    check(call(capsys, "plan", recipe), names=2)
    refused = call(capsys, "plan", recipe, "--units_disjoint", "checked").error
    assert not unfit(refused) and r"\x1b" in refused


def test_generate(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dpalign.models.Policy.decode", lambda policy, rollouts: [HOSTILE])
    sampled = call(capsys, "generate", "tiny-review-lm", "--prompt", HOSTILE, "--prepend_bos")
    assert sampled.status == 0 and not unfit(sampled.out)
    assert (
        sampled.out.count(r"\x1b") == 2
        and "[bold]a[b]" in sampled.out
        and "[/b][/]" in sampled.out
        and ":cat:" in sampled.out
    )
    refused = call(capsys, "generate", HOSTILE, "--prompt", "x")
    assert refused.status == 1 and not unfit(refused.err) and "\n" not in refused.err.rstrip("\n")


def test_evaluate(tmp_path, capsys):
    model = tmp_path / FILE_NAME
    model.symlink_to(embedded.resolve("tiny-review-lm"))
    data = write_jsonl(tmp_path / f"{FILE_NAME}.jsonl", [{"prompt": f"This film {i}"} for i in range(3)])
    words = ("evaluate", model, "--data", data, "--eval_is_public", "--prepend_bos", "--max_completion_length", 2)
    check(call(capsys, *words, "--plot", tmp_path / "a.png"))


def test_progress(capsys):
    Reporter().note(HOSTILE)
    err = capsys.readouterr().err
    assert not unfit(err) and err.count("\n") == 1


# Files that others read --------------------------------------------------------------------------------------------


class NoPolicy:
    quantization: ClassVar[dict[str, str]] = {}

    def save_adapter(self, folder: Path, base_model: str) -> None:
        (folder / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize("base_model", ["/home/a \"b\" 'c'/base", FILE_NAME, "a: b", "# a", "x\n---\ny", "é"])
def test_a_card_holds_no_markup_of_others(base_model, tmp_path, monkeypatch):
    monkeypatch.setattr("dpalign.release.check_release", lambda *release: None)  # there is no model

    def written(text: str, base: str) -> Path:
        mechanism = SampledGaussian(0.1, 1.0, 2)
        stage = StageStatement(text, text, (0.0, 1.0), "s", text, 10.0, 1.0, 1.0, [mechanism], True)
        account = {
            "dataset": text, "unit_kinds": [text, "b"], "runs": 1, "runs_without_privacy": 0,
            "epsilon_of_all_private_runs": 1.0, "delta": 1e-5, "demo_data": False,
        }  # fmt: skip
        statement = PrivacyStatement(True, 1.0, 1e-5, [stage], assumptions=[text], ledger=[account])
        write_release(tmp_path / "release", NoPolicy(), statement, base, f"{text}, aligned privately", PromptFormat())
        return tmp_path / "release" / "README.md"

    # The same Markdown as with harmless names, and front matter that says what was meant.
    harmless = ModelCard.load(written("a", "base")).text
    path = written(HOSTILE, base_model)
    card = ModelCard.load(path)
    assert kinds(card.text) == kinds(harmless) and "table_open" in kinds(harmless)
    assert card.data.base_model == base_model and card.data.tags == ["differential-privacy", "dpalign", "lora"]
    assert card.data.pipeline_tag == "text-generation" and card.data.library_name == "peft"
    assert card.data["differential_privacy"] == {"private": True, "epsilon": "1.0", "delta": 1e-5}
    assert not unfit(path.read_text(encoding="utf-8")) and "<script" not in card.text
    assert path.read_text(encoding="utf-8").count("\n---\n") == 1


class Elements(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)


def test_a_report_holds_no_markup_of_others(tmp_path):
    def written(text: str) -> str:
        folder = finished_run(tmp_path / "run", said=text, unit=text)
        write_report(folder)
        pages = [folder / "report.html", folder / "private" / "report.html"]
        return "".join(page.read_text(encoding="utf-8") for page in pages)

    page = written(HOSTILE)
    assert not unfit(page) and page.count(r"\x1b") >= 24
    assert Elements(page).found == Elements(written("a")).found and "script" not in Elements(page).found


def test_a_figure_shows_formulas_as_text(tmp_path):
    rows = {HOSTILE: {"reward": 0.1, "kl": 0.2, "epsilon": float("inf")}}
    plot_evaluation(rows, tmp_path / "a.png", title="t")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_a_sweeps_table_keeps_its_cells(tmp_path):
    row = {"epsilon": 4.0, "value": HOSTILE, "reward_mean": 0.5, "interval_over": "seeds", "seeds": 2}
    spent = [{"sentence": f"The ledger has 2 runs on {HOSTILE!r}."}]
    result = {"varied": HOSTILE, "rows": [row], "command": f"dpalign sweep {HOSTILE}", "spent_by_tuning": spent}
    write_markdown(tmp_path / "a.md", result)
    text = (tmp_path / "a.md").read_text(encoding="utf-8")
    found = kinds(text)
    assert found.count("table_open") == 1 and found.count("td_open") == 4 and not unfit(text)
    assert not {"html_inline", "html_block", "link_open", "heading_open"} & set(found)


def test_a_table_of_models_is_plain():
    file = io.StringIO()
    Terminal(file=file, width=400).print(evaluation_table({HOSTILE: {"reward": 0.1, "unscored": 1, "prompts": 2}}))
    assert not unfit(file.getvalue()) and file.getvalue().count(r"\x1b") == 2


def test_terminals_are_reached_through_one_place():
    """Nothing else makes a console, prints, or writes to a standard stream."""
    source = Path(dpalign.__file__).parent
    found = {
        (str(file.relative_to(source)), ast.unparse(node.func))
        for file in source.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("print", "Console", "rich.print", "sys.stdout.write", "sys.stderr.write")
    }
    assert found == {("cli/__init__.py", "print")}
