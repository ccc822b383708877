"""`dpalign audit`: tries the guarantee from outside, and shows lower bounds on epsilon beside the claim."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import DPAlignError
from ..files import write_json
from ..parsing import recipe_from
from ..stages import STAGES
from .arguments import Parser, number

DESCRIPTION = """Tries the guarantee from outside, with the very code that a run trains with. No record is trained
on, and nothing is spent: the audit writes its own units, and its ledger is a temporary one.

Without a recipe it audits DPO of a model of two layers, in about ten seconds. With one it audits the stages of that
recipe: their rates, noise, clipping, micro-batches and rewards, on their own model.

  step       the gate and the mechanism on known inputs: size, shape, independence and grid of the noise, across a
             restart too; the clip; the metrics block; who is drawn, and how often
  white box  one run, interrupted and resumed, with canaries: units more than there are, each of which pushes a
             parameter of its own that nothing else touches. Fair coins say which are in. From what is released,
             four methods bound epsilon from below; and the run's noise, updates and canaries' shares are checked
  black box  with --black_box: one more run, on canary texts that the audit writes, and lower bounds from how much
             the trained model has learned of them

A bound is not above the true epsilon with the confidence asked for, by itself; a check is rejected once in a million
times by chance. Exit status 1: a bound is above the claim, or a check is rejected.
Passing is no proof: an audit finds faults that move what it looks at, and says nothing of others."""
EXAMPLE = """examples:
  dpalign audit
  dpalign audit --epsilon 1 --canaries 4000 --confidence 0.99
  dpalign audit recipe.yaml --stage dpo --to audit/ --dpo.micro_batch_size 8"""


def run(arguments: list[str], as_json: bool) -> dict[str, Any]:
    """Returns every audited stage.

    Raises:
        DPAlignError: a stage that cannot be audited; and, when all is shown, what was found.
    """
    of_recipe = bool(arguments) and not arguments[0].startswith("-")
    given, fields = _parser().parse_known_args(arguments[of_recipe:])
    if not of_recipe:
        if fields or given.stage:
            raise DPAlignError(f"{(fields or ['--stage'])[0]} belongs to a recipe: dpalign audit RECIPE.yaml ...")
    elif given.epsilon is not None or given.delta is not None:
        raise DPAlignError("what a recipe's stages claim stands in it: --target_epsilon and --target_delta change it.")
    recipe = recipe_from("plan", [arguments[0], *fields]) if of_recipe else None

    from ..audit.small import small_subject  # these import torch
    from ..reporting.audits import plot_audit
    from ..reporting.progress import Reporter
    from .audit_recipe import audits_of, shown_of, stop_if_found, subjects_of
    from .plan_recipe import planned

    if recipe is None:
        subjects = [small_subject(given.epsilon or 4.0, given.delta or 1e-5)]
    else:
        subjects = subjects_of(planned(recipe), given.stage)
    audits = audits_of(
        subjects,
        Reporter(quiet=as_json),
        canaries=given.canaries,
        confidence=given.confidence,
        with_black_box=given.black_box,
        as_json=as_json,
    )
    shown = shown_of(audits)
    if given.to is not None:
        target = Path(given.to)
        target.mkdir(parents=True, exist_ok=True)
        write_json(target / "audit.json", shown)
        for audit in audits:
            plot_audit(audit, target / f"audit_{audit.stage}.png")
    stop_if_found(shown)
    return shown


def _parser() -> Parser:
    """Our own options; those of the recipe are left over."""
    parser = Parser(
        prog="dpalign audit",
        usage="dpalign audit [RECIPE.yaml] [OPTIONS] [--FIELD VALUE ...]",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--stage", choices=list(STAGES), help="of the recipe: only this one (default: all that draw)")
    parser.add_argument("--epsilon", type=number(float, "(0, 100]"), help="the claim without a recipe (default 4)")
    parser.add_argument("--delta", type=number(float, "(0, 1)"), help="of the claim without a recipe (default 1e-5)")
    parser.add_argument(
        "--canaries", type=number(int, "[20, 100000]"), default=1000, help="tried; about half are in (default 1000)"
    )
    parser.add_argument(
        "--confidence", type=number(float, "(0.5, 1)"), default=0.999, help="of each lower bound (default 0.999)"
    )
    parser.add_argument(
        "--black_box",
        action="store_true",
        help="also train on canary texts and attack the model",
    )
    parser.add_argument("--to", metavar="FOLDER", help="write audit.json and one plot for each stage there")
    return parser
