"""The `dpalign` command. Each subcommand is a module with `run(arguments) -> dict | None`."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from pathlib import Path

from ..errors import DPAlignError
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
    "ledger": "what has been spent on which data, by all runs",
    "export": "copy a release, or merge it into full weights",
}
EXAMPLES = """examples:
  dpalign quickstart
  dpalign plan --units 12500 --batch-size 256 --steps 4883 --delta 4e-5 --epsilon 4
  dpalign run recipe.yaml --ppo.learning_rate 0.01
  dpalign ppo --help"""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status (0; 1 for a failure, 2 for a wrong call)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"dpalign {__version__}")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        command = f"{command} (it is called {RENAMED[command]} now)" if command in RENAMED else command
        print(f"dpalign: error: unknown command {command!r}; choose from {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    quiet_libraries()
    as_json = "--json" in rest
    rest = [a for a in rest if a != "--json"]
    module = importlib.import_module(f".{'train' if command in TRAINING else command}", __name__)
    try:
        result = module.run([command, *rest] if command in TRAINING else rest, as_json)
    except DPAlignError as error:
        print(f"dpalign: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("dpalign: interrupted; the same command goes on from the last checkpoint.", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"dpalign: error: {type(error).__name__}: {error.strerror} ({error.filename}).", file=sys.stderr)
        return 1
    except Exception as error:
        # A library's message may quote a record, so it is not shown; $DPALIGN_DEBUG=1 is for the data holder.
        if os.environ.get("DPALIGN_DEBUG"):
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        print(
            f"dpalign: internal error {type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}; its "
            "message is withheld because it may quote private data (set DPALIGN_DEBUG=1 to see it yourself).",
            file=sys.stderr,
        )
        return 1
    if as_json and result is not None:
        from ..files import dumps

        print(dumps(result, indent=None))
    return 0


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
            "usage: dpalign COMMAND [OPTIONS]   (dpalign COMMAND --help teaches each; --json prints one JSON object)",
            "",
            *lines,
            "",
            EXAMPLES,
        ]
    )
