"""`dpalign sweep`: a recipe over epsilons and seeds, as in the paper's tables and figure."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import DPAlignError
from ..parsing import recipe_from
from .arguments import Parser, number

DESCRIPTION = """Runs a recipe once for each epsilon and seed, each run in a process of its own, and prints the mean and
95% interval over seeds. Epsilon 0 is the pretrained model, inf the run without privacy, free the policy stage on
prompts that the model writes itself, for which no private data is needed.

Every finished run is appended to OUTPUT_DIR/runs.jsonl and is not run again, so the same command goes on after an
interruption. Every run is in the ledger: on private data all of them add up, and the report says to what. To
tune without that cost, tune on public text of the same kind (--public_proxy FILE)."""
EXAMPLES = """examples:
  dpalign sweep recipe.yaml --epsilons 0 1 2:1 4 8:1 inf --seeds 3 --output_dir runs/sweep
  dpalign sweep recipe.yaml --epsilons 4 --vary ppo.num_ppo_epochs 1 2 4 8 --output_dir runs/passes
  dpalign sweep recipe.yaml --epsilons 4 --public_proxy public.jsonl --vary ppo.learning_rate 2e-3 4e-3 8e-3
  dpalign sweep recipe.yaml --epsilons 4 inf --at inf ppo.learning_rate=2e-3 --ppo.max_steps 20"""


def run(arguments: list[str], as_json: bool) -> dict[str, Any]:
    """Returns the table's rows, and what all runs spent together."""
    given, overrides = _parser().parse_known_args(arguments)
    epsilons, at = _epsilons(given), _at(given)
    recipe_from("sweep", [given.recipe, *overrides])

    from ..reporting.progress import Reporter  # these import torch
    from ..reporting.sweep import bought_sentences, sweep_table
    from ..reporting.terminal import Terminal
    from ..sweep import run_sweep

    result = run_sweep(
        given.recipe,
        epsilons=epsilons,
        vary=(given.vary[0], given.vary[1:]) if given.vary else None,
        at=at,
        public_proxy=given.public_proxy,
        overrides=overrides,
        output_dir=given.output_dir,
        compare=given.compare,
        reporter=Reporter(quiet=as_json),
    )
    value = result.to_json()
    if not as_json:
        console = Terminal()
        console.print(sweep_table(value))
        for sentence in bought_sentences(value):
            console.say(sentence)
        for entry in result.spent_by_tuning:
            console.say(entry["sentence"])
        console.say(f"{result.folder}/report.html, sweep.json, sweep.md, sweep.png; one line per run in runs.jsonl")
    return value


def _parser() -> Parser:
    parser = Parser(
        prog="dpalign sweep",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="the recipe; its fields can be overridden as in `dpalign run`")
    parser.add_argument(
        "--epsilons",
        nargs="+",
        default=["0", "1", "2", "4", "8", "inf"],
        metavar="EPSILON[:SEEDS]",
        help="epsilons, each perhaps with a number of seeds of its own (default: 0 1 2 4 8 inf)",
    )
    parser.add_argument("--seeds", type=number(int, "[1, 10000]"), default=3, help="seeds of each epsilon (default 3)")
    parser.add_argument("--vary", nargs="+", metavar=("FIELD", "VALUE"), help="also run every value of this field")
    parser.add_argument(
        "--at",
        nargs="+",
        action="append",
        default=[],
        metavar=("EPSILON", "FIELD=VALUE"),
        help="overrides for one epsilon alone (a learning rate tuned for it, say); may be given several times",
    )
    parser.add_argument(
        "--public_proxy", help="public file that takes the place of all private data: tuning on it is free"
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="also run epsilons 0, free (what needs no private data) and inf: what did the private data buy?",
    )
    parser.add_argument("--output_dir", default="runs/sweep", help="where all runs and the report go")
    return parser


def _epsilons(given: argparse.Namespace) -> dict[str | float, int]:
    """Number of seeds by epsilon."""
    counts: dict[str | float, int] = {}
    for text in given.epsilons:
        epsilon, _, count = text.partition(":")
        try:
            counts[epsilon] = int(count or given.seeds)
        except ValueError:
            raise DPAlignError(
                f"--epsilons {text!r}: expected an epsilon (0, 4, inf), perhaps with seeds (4:3)."
            ) from None
    return counts


def _at(given: argparse.Namespace) -> dict[str | float, dict[str, str]]:
    """Values by field, by epsilon."""
    at: dict[str | float, dict[str, str]] = {}
    for epsilon, *fields in given.at:
        for text in fields:
            name, equals, value = text.partition("=")
            if not equals:
                raise DPAlignError(f"--at {epsilon} {text}: expected FIELD=VALUE, such as ppo.learning_rate=2e-3.")
            at.setdefault(epsilon, {})[name] = value
    return at
