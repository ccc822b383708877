"""An audit for people: the claim and the lower bounds, the checks, and a plot."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from rich.table import Table

from ..audit import Audit
from ..audit.found import NO_PROOF
from ..printable import figure_text
from .numbers import at_most
from .terminal import Terminal


def print_audit(audit: Audit) -> None:
    """Two tables and a verdict."""
    console = Terminal()
    about = (
        f"stage {audit.stage}: {audit.steps} steps at rate {audit.sampling_rate:.4g}, noise multiplier "
        f"{audit.noise_multiplier:.4f}; {audit.canaries} canaries"
    )
    table = Table(title=about, title_justify="left")
    table.add_column("epsilon")
    table.add_column("by")
    table.add_column("source")
    table.add_row(at_most(audit.epsilon), f"the claim, at delta {audit.delta:.3g}", "the audit's own ledger")
    for bound in audit.all_bounds:
        above = ": ABOVE THE CLAIM" if bound.method in audit.exceeded else ""
        table.add_row(
            f"> {bound.epsilon:.3f}", f"{bound.method}, {audit.confidence:.4g} confidence{above}", bound.source
        )
    console.print(table)
    checks = Table()
    for column in ("layer", "check", "found", "expected", "p-value"):
        checks.add_column(column)
    for layer, found in audit.checks.items():
        for check in found:
            verdict = f"{check.p_value:.2g}" if check.passed else f"{check.p_value:.2g} REJECTED"
            checks.add_row(layer, check.name, f"{check.found:.4g}", f"{check.expected:.4g}", verdict)
    console.print(checks)
    if audit.attack is not None:
        console.print(
            f"black box: members are told from others with an area of {audit.attack.area:.3f} (0.5 is a coin)"
        )
    verdict = "no layer found anything." if audit.passed else f"found: {', '.join([*audit.exceeded, *audit.rejected])}."
    console.say(f"stage {audit.stage}: {verdict}")
    console.say(NO_PROOF)


def plot_audit(audit: Audit, target: Path) -> None:
    """The lower bounds as bars, and the claim as a line that none may cross."""
    figure, axes = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    names = [f"{bound.method} ({bound.source})" for bound in audit.all_bounds]
    colours = ["firebrick" if bound.method in audit.exceeded else "steelblue" for bound in audit.all_bounds]
    axes.barh([figure_text(name) for name in names], [bound.epsilon for bound in audit.all_bounds], color=colours)
    axes.axvline(audit.epsilon, color="black", linestyle="--", label=f"claim: {at_most(audit.epsilon)}")
    axes.set(
        xlabel=f"lower bound on epsilon at delta {audit.delta:.3g}, {audit.confidence:.4g} confidence each",
        xlim=(0, 1.1 * max([audit.epsilon, *(bound.epsilon for bound in audit.all_bounds)])),
    )
    axes.invert_yaxis()
    axes.legend(loc="lower right")
    figure.suptitle(f"stage {audit.stage}: passing is no proof", fontsize=10)
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
