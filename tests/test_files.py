"""Files survive a kill at every operation, are their owner's alone, and a log's last line is whole or gone."""

from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path

import pytest

from dpalign import files
from dpalign.errors import DPAlignError
from dpalign.files import (
    append_line,
    check_is_there,
    is_missing,
    mend_lines,
    owner_only,
    read_lines,
    replace_folder,
    sweep_temporaries,
    write_text,
)
from dpalign.models.embedded import resolve
from dpalign.models.loading import loaded
from dpalign.privacy.ledger import Ledger
from helpers import call, files_below, write_recipe

NAMES = [f"part-{i}" for i in range(4)]
OPERATIONS = ["rename", "replace", "unlink", "rmdir", "fsync", "mkdir", "open"]


def write_release(folder: Path, version: str) -> None:
    with replace_folder(folder) as temporary:
        (temporary / "below").mkdir()
        for name in NAMES:
            (temporary / name).write_text(version)
            (temporary / "below" / name).write_text(version)


def version_of(folder: Path) -> str:
    """The version of a release; the whole of it must be of that one."""
    found = {(folder / below / name).read_text() for below in ("", "below") for name in NAMES}
    assert len(found) == 1
    return found.pop()


def killed_at(number: int, action) -> bool:
    """Runs it in a process that dies at its `number`-th file operation; whether it came that far."""
    child = os.fork()
    if child == 0:
        left = [number]

        def deadly(operation):
            def call(*arguments, **options):
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)
                return operation(*arguments, **options)

            return call

        for name in OPERATIONS:
            setattr(os, name, deadly(getattr(os, name)))
        files._exchange = deadly(files._exchange)
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def kill_everywhere(folder: Path, action, check) -> int:
    """How many operations the action has; `check` looks at what each kill leaves."""
    number = 0
    while killed_at(number, action):
        check()
        number += 1
        assert number < 500
    return number


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "aside"])
def test_a_release_is_the_old_one_or_the_new_one_wherever_it_is_killed(exchanges, tmp_path, monkeypatch):
    release = tmp_path / "release"
    stranger = [tmp_path / ".notes.dpalign-old", tmp_path / ".release.tmp", tmp_path / "x.dpalign-abcdefgh"]
    for file in stranger:
        file.write_text("not ours")
    write_release(release, "old")
    if exchanges:
        assert files._exchange(release, release)  # else this file system tests nothing
    else:
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    seen = set()

    def check():
        if exchanges:
            seen.add(version_of(release))  # at once: nobody has to start anything for it
        sweep_temporaries(tmp_path)
        seen.add(version_of(release))
        assert {f.name for f in tmp_path.iterdir()} == {"release", *(f.name for f in stranger)}
        write_release(release, "old")

    assert kill_everywhere(tmp_path, lambda: write_release(release, "new"), check) > 20
    assert seen == {"old", "new"} and version_of(release) == "new"


def test_a_reader_never_misses_a_release(tmp_path):
    release, stop, missed = tmp_path / "release", threading.Event(), []
    write_release(release, "0")

    def read():
        while not stop.is_set():
            try:
                handle = os.open(release, os.O_RDONLY)
            except OSError as error:
                missed.append(error)
                return
            os.close(handle)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(50):
        write_release(release, str(number))
    stop.set()
    reader.join()
    assert not missed


def test_a_file_is_the_old_one_or_the_new_one_wherever_it_is_killed(tmp_path):
    file, seen = tmp_path / "a.json", set()
    write_text(file, "old")

    def check():
        seen.add(file.read_text())
        sweep_temporaries(tmp_path)
        assert [f.name for f in tmp_path.iterdir()] == ["a.json"]
        write_text(file, "old")

    assert kill_everywhere(tmp_path, lambda: write_text(file, "new"), check) >= 3
    assert seen == {"old", "new"} and file.read_text() == "new"


def test_what_a_living_process_writes_is_not_swept(tmp_path):
    with replace_folder(tmp_path / "release") as temporary:
        (temporary / "part").write_text("x")
        sweep_temporaries(tmp_path)
        assert (temporary / "part").exists()
    assert (tmp_path / "release" / "part").exists()


def test_a_link_that_is_called_as_ours_is_not_followed(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("x")
    (tmp_path / ".a.dpalign-abcdefgh").symlink_to(tmp_path / "kept")
    sweep_temporaries(tmp_path)
    assert (tmp_path / "kept" / "file").exists()


@pytest.mark.parametrize("cut", range(1, 12))
def test_half_a_line_is_gone_at_the_next_start(cut, tmp_path):
    log = tmp_path / "log.jsonl"
    append_line(log, {"step": 1})
    append_line(log, {"step": 2})
    log.write_bytes(log.read_bytes()[:-cut])
    assert read_lines(log) == [{"step": 1}, {"step": 2}][: 1 + (cut == 1)]
    append_line(log, {"step": 3})
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 3]


def test_a_log_of_an_older_version_is_read_around_its_broken_line(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n{"step": 2, "rew{"step": 2}\n{"step": 3}\n')
    assert [line["step"] for line in read_lines(log)] == [1, 3]


def test_a_log_that_is_only_half_a_line_is_emptied(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"st')
    mend_lines(log)
    assert log.read_text() == ""


def test_text_with_line_separators_is_one_line(tmp_path):
    log, text = tmp_path / "log.jsonl", "a\u2028b\x85c\x1b[31m"
    append_line(log, {"text": text})
    assert len(log.read_text(encoding="utf-8").splitlines()) == 1 and read_lines(log) == [{"text": text}]


@pytest.fixture
def umask():
    before = os.umask(0)
    yield
    os.umask(before)


def test_a_mask_lasts_as_long_as_its_block(umask, tmp_path):
    with pytest.raises(KeyError), owner_only():
        raise KeyError
    (tmp_path / "open").touch()
    assert stat.S_IMODE((tmp_path / "open").stat().st_mode) == 0o666


def test_a_run_and_its_ledger_are_their_owners_alone_whatever_the_umask(umask, tmp_path, capsys):
    recipe = write_recipe(tmp_path, ledger=str(tmp_path / "own" / "deep" / "ledger.sqlite"))
    made = call(capsys, "run", recipe, "--output_dir", tmp_path / "new" / "run", "--report_to", "tensorboard", "--json")
    assert made.status == 0, made.err
    run = tmp_path / "new" / "run"
    release = run / "release"
    below = [run, *run.rglob("*"), *tmp_path.glob("own/**/*")]
    modes = {p: stat.S_IMODE(p.stat().st_mode) for p in below}
    assert modes[run] == modes[tmp_path / "own" / "deep"] == 0o700
    assert modes[tmp_path / "own" / "deep" / "ledger.sqlite"] == 0o600
    ours = {p: mode for p, mode in modes.items() if release not in [p, *p.parents]}
    assert {mode for p, mode in ours.items() if p.is_dir()} == {0o700}
    assert {mode for p, mode in ours.items() if p.is_file()} == {0o600}
    # Behind the run's folder, the release alone is as it will be shared: others may read it, and not write.
    assert modes[release] == 0o755 and {modes[f] for f in files_below(release)} == {0o644}
    to = tmp_path / "exported"
    assert call(capsys, "export", run, "--to", to).status == 0
    assert stat.S_IMODE(to.stat().st_mode) == 0o755
    assert {stat.S_IMODE(f.stat().st_mode) for f in to.iterdir()} == {0o644}
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".")]  # no temporaries


def test_a_ledger_by_itself_is_its_owners_alone(umask, tmp_path):
    Ledger(tmp_path / "own" / "ledger.sqlite").close()
    assert stat.S_IMODE((tmp_path / "own").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "own" / "ledger.sqlite").stat().st_mode) == 0o600


# Names of models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", ".", "~", "/", "./x", "/x/y", "~/x", "a/b/c", "x/", "a/x/"])
def test_what_can_only_be_a_path_has_to_be_there(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_missing(name) == (name not in (".", "/"))
    with pytest.raises(DPAlignError, match=r"model './x' is neither a folder here nor the name of a model on the hub"):
        check_is_there("./x")


def test_a_folder_or_a_name_of_the_hub_is_not_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a/b/c").mkdir(parents=True)
    for name in ("gpt2", "someone/model", "a/b/c", "./a", "a/", str(tmp_path / "a")):
        assert not is_missing(name)
        check_is_there(name)
    with pytest.raises(DPAlignError, match=r"the base of x, model './y' is"):
        resolve("./y", "the base of x, model")


def test_what_the_hub_does_not_give_is_said_to_be_no_folder_either(tmp_path, monkeypatch):
    """`runs/release` may be a name of the hub, and is asked for there."""
    monkeypatch.chdir(tmp_path)

    def fails():
        raise OSError("Cannot reach it.")

    with pytest.raises(
        DPAlignError, match="from 'runs/x': Cannot reach it; there is no such folder here either; save it"
    ):
        loaded("a model", "runs/x", fails, "; save it")
    with pytest.raises(DPAlignError, match=r"from '/runs/x/release': there is no such folder.$"):
        loaded("a model", "/runs/x/release", fails, "; save it")
    for there in ("tiny-review-lm", str(tmp_path)):
        with pytest.raises(DPAlignError, match="Cannot reach it; save it"):
            loaded("a model", there, fails, "; save it")
