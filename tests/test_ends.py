"""However a command ends, it says so in one sentence, with the status that shells know."""

from __future__ import annotations

import os
import pkgutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpalign.cli import Ended
from dpalign.privacy.ledger import Ledger
from helpers import call, environment, ledger_rows, start, write_recipe

# `dpalign ledger`, but with something else to do.
WAITING = """
import sys, time
import dpalign.cli.ledger
from dpalign import cli

def run(arguments, as_json):
    print("ready", flush=True)
    time.sleep(60)

dpalign.cli.ledger.run = run
sys.exit(cli.main(["ledger"]))
"""
TALKING = WAITING.replace("    time.sleep(60)\n", '    sys.stdin.readline()\n    print("x" * 200_000)\n')


def process(folder: Path, code: str, ignored: tuple[int, ...] = ()) -> subprocess.Popen[str]:
    """In a state in which it can be told to end, also where the tests themselves run in the background (no SIGINT)."""

    def signals() -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)

    started = subprocess.Popen(
        [sys.executable, "-c", code], env=environment(folder), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=signals,
    )  # fmt: skip
    assert started.stdout.readline() == "ready\n"
    return started


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_ends_with_one_sentence(number, tmp_path):
    waiting = process(tmp_path, WAITING)
    waiting.send_signal(number)
    _, err = waiting.communicate(timeout=30)
    assert waiting.returncode == 128 + number
    assert err == f"dpalign: ended by {number.name}; the same command goes on from where the run was last saved.\n"


def test_what_is_ignored_stays_ignored(tmp_path):
    waiting = process(tmp_path, WAITING, ignored=(signal.SIGHUP,))
    waiting.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert waiting.poll() is None
    waiting.send_signal(signal.SIGTERM)
    _, err = waiting.communicate(timeout=30)
    assert waiting.returncode == 143 and err.count("\n") == 1


def test_a_reader_that_goes_away_ends_it_with_one_sentence(tmp_path):
    talking = process(tmp_path, TALKING)
    talking.stdout.close()
    talking.stdin.write("go\n")
    talking.stdin.flush()
    err = talking.stderr.read()
    assert talking.wait(timeout=30) == 141
    assert err.startswith("dpalign: nobody reads the output any more") and err.count("\n") == 1


def test_a_run_that_is_told_to_end_goes_on(tmp_path, capsys):
    recipe = write_recipe(tmp_path, ppo=None, sft={"max_steps": 16, "save_steps": 16})
    running = start(tmp_path, "run", recipe, "--json")
    log, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not log.exists() or log.read_text().count("\n") < 3:
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    running.send_signal(signal.SIGTERM)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 143 and out == ""
    assert err.splitlines()[-1].startswith("dpalign: ended by SIGTERM") and "Traceback" not in err
    assert call(capsys, "run", recipe, "--json").json["epsilon"] <= 2


def ended_in_sft(place: str, at: int, folder: Path, capsys, monkeypatch) -> str:
    """Ends a run when something is called for the `at`-th time; what the same command says then."""
    recipe = write_recipe(folder, ppo=None, sft={"max_steps": 8, "save_steps": 8})
    owner, _, name = place.rpartition(".")
    original, called = getattr(pkgutil.resolve_name(owner), name), []

    def ending(*arguments, **options):
        called.append(1)
        if len(called) == at:
            raise Ended(signal.SIGTERM)
        return original(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(place.replace(":", "."), ending)
        ended = call(capsys, "run", recipe, "--json")
    assert ended.status == 143 and ended.err.splitlines()[-1].startswith("dpalign: ended by SIGTERM")
    done = call(capsys, "run", recipe, "--json")
    assert done.json["epsilon"] <= 2
    return done.err


def test_what_is_done_is_saved_when_it_ends(tmp_path, capsys, monkeypatch):
    """Between two updates the state is whole: the one draw that was under way is lost, and no other."""
    said = ended_in_sft("dpalign.training.loop:Stage._accumulate", 6, tmp_path, capsys, monkeypatch)
    assert "resumes after step 5 of 8" in said and "1 drawn steps were lost" in said
    assert ledger_rows(tmp_path, attempt=0) == 6


def test_a_half_made_update_is_not_saved(tmp_path, capsys, monkeypatch):
    said = ended_in_sft("torch.optim:AdamW.step", 6, tmp_path, capsys, monkeypatch)
    assert "resumes after" not in said and "6 drawn steps were lost" in said


def test_a_message_is_withheld_only_once_there_are_records(tmp_path, capsys, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no\x1b[31m luck\n" + "a" * 1000)

    Ledger(tmp_path / "ledger.sqlite").close()
    monkeypatch.setattr("dpalign.cli.ledger.Ledger", fail)
    shown = call(capsys, "ledger")
    assert shown.status == 1 and r"RuntimeError at test_ends.py:" in shown.error and r"no\x1b[31m luck\n" in shown.err
    assert len(shown.err) < 700 and "Traceback" not in shown.err
    monkeypatch.setattr("dpalign.cli.plan_recipe.make_plan", fail)
    declared = write_recipe(tmp_path, ppo=None, data={"declared_units": 64})
    assert "luck" in call(capsys, "plan", declared).error
    counted = call(capsys, "plan", write_recipe(tmp_path, ppo=None))  # reads the records to count them
    assert "luck" not in counted.err and "withheld" in counted.error


# Export --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """A folder that looks like a finished run."""
    release = tmp_path / "run" / "release"
    release.mkdir(parents=True)
    (release / "privacy.json").write_text("{}")
    (release / "README.md").write_text("# card")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "privacy.json").write_text("{}")  # looks like an export, or like another release
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    (tmp_path / "back").symlink_to(release)
    return tmp_path / "run"


@pytest.mark.parametrize(
    "to", ["run/release", "run", ".", "run/release/x", "run/../run/release/", "back", "back/x", "full", "file", "link"]
)
def test_an_export_writes_over_nothing(to, run, tmp_path, capsys):
    before = {p: p.read_bytes() if p.is_file() else b"" for p in tmp_path.rglob("*")}
    assert f"--to {tmp_path / to}" in call(capsys, "export", run, "--to", os.path.join(tmp_path, to)).error.replace(
        os.path.join(tmp_path, to), str(tmp_path / to)
    )
    assert {p: p.read_bytes() if p.is_file() else b"" for p in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("to", ["new", "run/exported", "empty", "deep/new"])
def test_an_export_goes_to_a_new_folder(to, run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert call(capsys, "export", run, "--to", tmp_path / to).status == 0
    assert {f.name for f in (tmp_path / to).iterdir()} == {"privacy.json", "README.md"}
    assert not [p for p in (tmp_path / to).parent.iterdir() if p.name.startswith(".")]
