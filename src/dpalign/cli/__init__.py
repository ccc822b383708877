"""The `dpalign` command. Each subcommand is a module with `run(arguments, as_json)`: a dict for --json, or help."""

from __future__ import annotations

import importlib
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import RECORDS_READ, DPAlignError, FoundError
from ..files import dumps, owner_only
from ..launched import Place, place
from ..printable import printable
from ..stages import RENAMED, STAGES
from ..version import __version__

TRAINING = [*(name for name, listed in STAGES.items() if listed.is_command), "run"]
COMMANDS = {
    "quickstart": "align a small model on demo data: the whole pipeline, no settings needed",
    "plan": "epsilon, noise, batch size or steps, or the budget of RECIPE.yaml, before anything runs",
    **{name: listed.help for name, listed in STAGES.items() if listed.is_command},
    "run": "all stages of RECIPE.yaml under one budget; resumes, skips what is done",
    "generate": "sample completions from a model or a release",
    "evaluate": "models side by side on public prompts: reward, win rate, ROUGE, KL, perplexity",
    "sweep": "a recipe over epsilons and seeds: the privacy-utility table and figure",
    "report": "one page about a finished run: guarantee, mechanisms, curves, results, completions",
    "ledger": "what has been spent on which data, by all runs",
    "audit": "the guarantee tried from outside: lower bounds on epsilon beside the claim",
    "export": "copy a release, or merge it into full weights",
}
EXAMPLES = """examples:
  dpalign quickstart
  dpalign plan --units 12500 --batch_size 256 --steps 4883 --delta 4e-5 --epsilon 4
  dpalign run recipe.yaml --ppo.learning_rate 0.01
  dpalign ppo --help"""
LONGEST = 500  # characters of a library's message


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status (0; 1 for a failure, 2 for a wrong call, 128 + n for signal n)."""
    arguments = [_spelled(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"dpalign {__version__}")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        command = f"{command} (it is called {RENAMED[command]} now)" if command in RENAMED else command
        _say(f"error: unknown command {command!r}; choose from {', '.join(COMMANDS)}.")
        return 2
    quiet_libraries()
    RECORDS_READ.clear()
    where = Place()
    try:
        where = place()
        with signals(), owner_only():
            if where.size > 1:
                from .together import meet

                if not meet(where, command, rest):
                    return 0
            _run(command, rest)
            sys.stdout.flush()
        return 0
    except BrokenPipeError:
        return _ended(signal.SIGPIPE)
    except KeyboardInterrupt as error:
        number = error.number if isinstance(error, Ended) else signal.SIGINT
        return _ended(number) if where.rank == 0 else 128 + number
    except Exception as error:
        if os.environ.get("DPALIGN_DEBUG") and not isinstance(error, DPAlignError | OSError):
            raise
        if not getattr(error, "said_elsewhere", False):
            _say(f"error: {f'process {where.rank}: ' if where.rank else ''}{_sentence(error)}")
        return 1


def _spelled(word: str) -> str:
    """Options have underscores; one with hyphens is the same."""
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if re.match(r"--\w", word) else word


def _run(command: str, rest: list[str]) -> None:
    as_json = "--json" in rest
    rest = [a for a in rest if a != "--json"]
    module = importlib.import_module(f".{'train' if command in TRAINING else command}", __name__)
    try:
        result = module.run([command, *rest] if command in TRAINING else rest, as_json)
    except FoundError as error:
        if as_json:
            print(dumps(error.result, indent=None))
        raise
    if isinstance(result, str):
        print(result)
    elif as_json and result is not None:
        print(dumps(result, indent=None))


def _sentence(error: Exception) -> str:
    """What a person is told. A library's message may quote a record once there are records, and is not shown then."""
    if isinstance(error, DPAlignError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{type(error).__name__}: {error.strerror} ({error.filename})."
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"internal error {type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"
    if RECORDS_READ.is_set():
        return (
            f"{place}; its message is withheld because it may quote private data (set DPALIGN_DEBUG=1 to see it "
            "yourself)."
        )
    return f"{place}: {printable(str(error), longest=LONGEST)} (DPALIGN_DEBUG=1 shows where)."


# Signals -------------------------------------------------------------------------------------------------------------


class Ended(KeyboardInterrupt):
    """A signal asks the process to end; what an interrupt from the keyboard leaves in order, this does too."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def signals() -> Iterator[None]:
    """SIGTERM, SIGHUP and SIGINT end the block in order. One that is ignored, as under nohup, stays ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    told: list[int] = []

    def end(number: int, frame: object) -> None:
        if told and place().size > 1:
            return  # a launcher repeats what the terminal has told all processes
        told.append(number)
        raise Ended(number)

    ours = [n for n in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in ours}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ended(number: int) -> int:
    """Says which signal has ended the command; returns the status that shells give it."""
    if number == signal.SIGPIPE:
        # Nobody reads any more; what is left in the buffer would be complained about when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        _say("nobody reads the output any more (SIGPIPE), so the rest of it is not written.")
    else:
        name = signal.Signals(number).name
        _say(f"ended by {name}; the same command goes on from where the run was last saved.")
    return 128 + number


def _say(text: str) -> None:
    """One line on standard error."""
    try:
        print(f"dpalign: {printable(text)}", file=sys.stderr, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def quiet_libraries() -> None:
    """Libraries' own bars and advice stay off: they are not ours to vouch for. Set before torch is imported."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads are many times slower on shared cores
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if not sys.warnoptions:
        import warnings

        warnings.simplefilter("ignore")


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            f"dpalign {__version__}: align language models with private data under one (epsilon, delta).",
            "",
            "usage: dpalign COMMAND [OPTIONS]   (dpalign COMMAND --help teaches each; --json prints one JSON object;",
            "an option with hyphens is the one with underscores)",
            "",
            *lines,
            "",
            EXAMPLES,
        ]
    )
