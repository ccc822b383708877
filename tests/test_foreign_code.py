"""Whatever a person's reward raises, no run ends by it and nobody learns of it; a real Ctrl-C still stops."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator

import pytest

from dpalign.errors import DPAlignError
from dpalign.rewards import Reward, check_reward
from dpalign.rewards.foreign import Raised, contained, import_function
from helpers import call, ledger_rows, reviews, start, write_jsonl, write_recipe

ENDS = [SystemExit(0), KeyboardInterrupt(), GeneratorExit(), MemoryError(), RecursionError(), ValueError("zebrafinch")]


def raiser(error: BaseException, when: str = "bad"):
    def reward(prompts, completions, **columns):
        if any(when in p for p in prompts):
            raise error
        return [0.5 for _ in completions]

    return reward


@pytest.mark.parametrize("error", ENDS, ids=lambda error: type(error).__name__)
def test_a_row_that_ends_the_program_counts_as_none(error, capsys):
    reward = Reward(raiser(error), -1.0, 1.0)
    scores = reward(["good", "bad", "good"], ["x", "y", "z"]).tolist()
    assert scores[0] == scores[2] == 0.5 and scores[1] != scores[1]
    assert capsys.readouterr() == ("", "")
    batched = Reward(raiser(error), -1.0, 1.0, rows_at_once=32)
    assert batched(["good", "bad", "good"], ["x", "y", "z"]).nan_to_num(9).tolist() == [0.5, 9, 0.5]


@pytest.mark.parametrize("error", ENDS, ids=lambda error: type(error).__name__)
def test_on_the_public_probe_it_is_an_error(error):
    with pytest.raises(DPAlignError, match=f"raised {type(error).__name__} on the public probe texts"):
        check_reward(raiser(error, ""), "bad")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """As in a terminal: a job in the background, as the tests may be, starts without SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_signal_from_outside_goes_on():
    before = signal.getsignal(signal.SIGINT)

    def interrupted():
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(10**7):  # until the interpreter hands it on
            pass

    with pytest.raises(KeyboardInterrupt):
        contained(interrupted)
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(Raised):
        contained(lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert contained(lambda: 3) == 3


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("then", [lambda: 3, lambda: 1 / 0], ids=["swallows", "raises another"])
def test_a_signal_goes_on_whatever_the_code_does_with_it(then):
    def interrupted():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            return then()

    with pytest.raises(KeyboardInterrupt):
        contained(interrupted)


WAITING = """
import pathlib, time

def score(prompts, completions, **columns):
    if any("zebra" in prompt for prompt in prompts):
        pathlib.Path("reached").touch()
        time.sleep(60)
    return [0.1 * len(c) % 1 for c in completions]
"""


def test_ctrl_c_inside_a_reward_ends_the_run(tmp_path):
    (tmp_path / "waiting.py").write_text(WAITING)
    write_jsonl(tmp_path / "data.jsonl", [{"text": f"zebrafinch {r['text']}"} for r in reviews(32)])
    reward = {"source": "waiting:score", "is_public": True, "low": 0.0, "high": 1.0}
    recipe = write_recipe(tmp_path, sft=None, ppo={"expected_batch_size": 32, "reward": reward})
    running = start(tmp_path, "run", recipe, "--json")
    until = time.monotonic() + 120
    while not (tmp_path / "reached").exists():
        assert running.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=20)
    assert (running.returncode, out) == (130, "") and "Traceback" not in err
    assert err.splitlines()[-1].startswith("dpalign: ended by SIGINT; the same command goes on")
    assert ledger_rows(tmp_path) == 1 and not (tmp_path / "run" / "release").exists()


FILES = {
    "def score(:": "SyntaxError", "import sys; sys.exit(0)": "SystemExit", "raise KeyboardInterrupt": "KeyboardInterrupt",
    "1 / 0": "ZeroDivisionError", "import nothing_of_the_kind": "ModuleNotFoundError", "\0": "SyntaxError|ValueError", "other = 1": "AttributeError",
    "score = 3": "is not a function",
}  # fmt: skip


@pytest.mark.parametrize(("content", "says"), FILES.items())
def test_a_file_with_a_fault_is_one_sentence(content, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "faulty_reward", raising=False)
    (tmp_path / "faulty_reward.py").write_text(content)
    with pytest.raises(DPAlignError, match=says) as raised:
        import_function("faulty_reward:score", "reward")
    assert str(raised.value).count("\n") == 0


QUITTER = """
import pathlib

def score(prompts, completions, **columns):
    if any("zebra" in prompt for prompt in prompts):
        pathlib.Path("reached").touch()
        raise SystemExit(0)
    return [0.1 * len(c) % 1 for c in completions]
"""


def test_exit_on_one_private_prompt_changes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "quitter", raising=False)
    (tmp_path / "quitter.py").write_text(QUITTER)
    texts = reviews(32)
    write_jsonl(tmp_path / "data.jsonl", [{"id": r["id"], "text": f"zebrafinch {r['text']}"} for r in texts])
    reward = {"source": "quitter:score", "is_public": True, "low": 0.0, "high": 1.0}
    recipe = write_recipe(tmp_path, sft=None, ppo={"expected_batch_size": 32, "max_steps": 2, "reward": reward})
    done = call(capsys, "run", recipe, "--json")
    assert (
        done.json["release"]
        and (tmp_path / "reached").exists()
        and ledger_rows(tmp_path) == 2
        and "zebrafinch" not in done.err + done.out
    )
