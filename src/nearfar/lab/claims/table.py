"""Claims and their outcomes as tables for the terminal; the ledger is listed without PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from nearfar.lab.claims.ledger import OPEN, REFUTED, SUPPORTED, Claim

if TYPE_CHECKING:
    from nearfar.lab.claims.run import Outcome
    from nearfar.metrics import Estimate

__all__ = ["claim_table", "estimate_words", "outcome_table"]

STYLES = {SUPPORTED: "green", REFUTED: "red", OPEN: "yellow", "yes": "green", "no": "red"}


def claim_table(claims: Sequence[Claim]) -> Table:
    """The ledger: each statement, what a check on paper gave, and the experiment or what it waits for."""
    table = Table(title=f"{len(claims)} claims", title_justify="left")
    for column in ("claim", "row", "statement", "on paper", "experiment, seeds"):
        table.add_column(column, no_wrap=column in ("row", "on paper"))
    group = None
    for claim in claims:
        if claim.group != group:
            table.add_section()
            group = claim.group
        seeds = f", {claim.seeds}" if claim.seeds else ""
        how = f"waits for: {claim.waits_for}" if claim.waits_for else claim.experiment + seeds
        table.add_row(*map(escape, (claim.id, claim.row, claim.statement, claim.check[0], how)))
    return table


def outcome_table(outcomes: Sequence[Outcome], waiting: Sequence[Claim]) -> Table:
    """Each claim with its quantities, its verdict, and whether the prediction held; the other quantities are in
    ``claims.json``.
    """
    if any(outcome.quick for outcome in outcomes):
        title = "claims · quick: shows that everything runs; these verdicts are no results"
    else:
        title = "claims"
    table = Table(title=title, title_justify="left", show_lines=True)
    table.add_column("claim", ratio=4)
    table.add_column("quantity, 95 % interval", ratio=5)
    table.add_column("verdict", ratio=2)
    table.add_column("prediction held", ratio=2)
    for outcome in outcomes:
        verdict, prediction = (
            f"[{STYLES[word]}]{word}[/]" for word in (outcome.verdict, outcome.prediction_held)
        )
        table.add_row(_heading(outcome.claim), _quantities(outcome), verdict, prediction)
    for claim in waiting:
        table.add_row(_heading(claim), escape(f"waits for: {claim.waits_for}"), "–", "–", style="dim")
    return table


def _heading(claim: Claim) -> str:
    return f"[bold]{escape(claim.id)}[/]\n{escape(claim.statement)}"


def _quantities(outcome: Outcome) -> str:
    """Two lines for each: name and value with interval; what was claimed and predicted of it."""
    assert outcome.claim.prediction is not None
    sides = (("claimed", outcome.claim.criterion), ("predicted", outcome.claim.prediction.criterion))
    lines = []
    for name in outcome.claim.quantities:
        conditions = ", ".join(f"{side} {criterion[name]}" for side, criterion in sides if name in criterion)
        lines.append(escape(f"{name} {estimate_words(outcome.estimates[name])}"))
        lines.append(f"[dim]  {escape(conditions)}[/]")
    return "\n".join(lines)


def estimate_words(estimate: Estimate) -> str:
    """The value with as many decimals as its interval supports, and the interval where there is one.

    >>> from nearfar.metrics import Estimate
    >>> estimate_words(Estimate(-0.0658, -0.0697, -0.0619, 0.0, 5, False, "greedy"))
    '−0.0658 [−0.0697, −0.0619]'
    >>> estimate_words(Estimate(26805.0, 26805.0, 26805.0, 0.0, 1, False, "total"))
    '26805'
    """
    if estimate.low == estimate.high == estimate.value:
        return f"{estimate.value:.5g}".replace("-", "−")
    decimals = 4 if max(abs(estimate.low), abs(estimate.high)) < 0.1 else 3
    numbers = (f"{number:.{decimals}f}" for number in (estimate.value, estimate.low, estimate.high))
    return "{} [{}, {}]".format(*numbers).replace("-", "−")
