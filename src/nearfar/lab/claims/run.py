"""Run claims over their seeds and judge them: the record as JSON, the outcomes as tables for the terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from nearfar.errors import NearfarError
from nearfar.lab.claims.ledger import (
    OPEN,
    REFUTED,
    SUPPORTED,
    Claim,
    Criterion,
    Experiment,
    Share,
    combine,
    load,
)
from nearfar.metrics import Estimate, few_runs, wilson

if TYPE_CHECKING:
    from nearfar.metrics import Estimate

__all__ = [
    "Outcome",
    "claim_table",
    "estimate_words",
    "outcome_table",
    "run_claim",
    "run_claims",
    "write_outcomes",
]


CONFIDENCE = 0.95
QUICK_SEEDS = 2
#: whether a prediction held, from the verdict on its criterion
HELD = {SUPPORTED: "yes", REFUTED: "no", OPEN: OPEN}


@dataclass(frozen=True)
class Outcome:
    """The result of a claim: an estimate of each quantity, the claim's verdict, and that of its prediction.

    ``verdict`` is "supported", "refuted" or "not distinguishable"; ``prediction_held`` is "yes", "no" or "not
    distinguishable". ``quick`` runs only show that everything works: their verdicts are no results.
    """

    claim: Claim
    estimates: Mapping[str, Estimate]
    per_seed: Mapping[str, Sequence[float]]
    words: Mapping[str, str]
    verdict: str
    prediction_held: str
    options: Mapping[str, object]
    seeds: int
    quick: bool
    cpu_seconds: float

    def to_dict(self) -> dict[str, object]:
        """Plain data for ``claims.json``."""
        claim = self.claim
        assert claim.prediction is not None
        return {
            **_claim_fields(claim),
            "experiment": claim.experiment,
            "options": dict(self.options),
            "seeds": self.seeds,
            "quick": self.quick,
            "cpu_seconds": round(self.cpu_seconds, 2),
            "verdict": self.verdict,
            "criterion": {name: str(condition) for name, condition in claim.criterion.items()},
            "prediction": {
                "words": claim.prediction.words,
                "criterion": {name: str(c) for name, c in claim.prediction.criterion.items()},
                "held": self.prediction_held,
            },
            "quantities": {
                name: {"words": self.words[name]} | _plain(estimate) | {"per_seed": list(self.per_seed[name])}
                for name, estimate in self.estimates.items()
            },
        }


def run_claims(
    claims: Sequence[Claim],
    *,
    seeds: int | None = None,
    quick: bool = False,
    before: Callable[[Claim], object] = lambda claim: None,
) -> list[Outcome]:
    """Run every claim that has an experiment, in order; ``before`` is called with each.

    ``seeds`` replaces the ledger's number for experiments that have any. Options and quantities of all claims are
    checked before the first one runs.
    """
    tested = [claim for claim in claims if not claim.waits_for]
    experiments = {claim.id: _checked(claim) for claim in tested}
    if seeds is not None and seeds < 1:
        raise NearfarError(f"seeds is {seeds}; give a number of at least 1 (one alone gives no interval)")
    outcomes = []
    ran: dict[str, list[Mapping[str, float | Share]]] = {}
    for claim in tested:
        before(claim)
        outcomes.append(run_claim(claim, experiments[claim.id], seeds=seeds, quick=quick, ran=ran))
    return outcomes


def run_claim(
    claim: Claim,
    experiment: Experiment | None = None,
    *,
    seeds: int | None = None,
    quick: bool = False,
    ran: dict[str, list[Mapping[str, float | Share]]] | None = None,
) -> Outcome:
    """Run one claim over its seeds (0, 1, …) and judge claim and prediction.

    ``ran`` holds what experiments gave before, for claims that ask the same experiment under the same options.
    """
    experiment = _checked(claim) if experiment is None else experiment
    options = {**claim.options, **(claim.quick if quick else {})}
    number = (seeds or (QUICK_SEEDS if quick else claim.seeds)) if experiment.seeded else 0
    started = time.process_time()
    ran = {} if ran is None else ran
    key = repr((experiment.name, sorted(options.items()), number))
    if key not in ran:
        with _one_thread():
            if experiment.seeded:
                ran[key] = [experiment.run(seed, **options) for seed in range(number)]
            else:
                ran[key] = [experiment.run(**options)]
    results = ran[key]
    values: dict[str, list[float | Share]] = {
        name: [one[name] for one in results] for name in experiment.quantities
    }
    estimates = {name: _estimate(name, value, experiment.seeded, claim.id) for name, value in values.items()}
    assert claim.prediction is not None
    return Outcome(
        claim=claim,
        estimates=estimates,
        per_seed={name: [_number(one) for one in value] for name, value in values.items()},
        words=experiment.quantities,
        verdict=_judge(claim.criterion, estimates),
        prediction_held=HELD[_judge(claim.prediction.criterion, estimates)],
        options=experiment.options | options,
        seeds=number,
        quick=quick,
        cpu_seconds=time.process_time() - started,
    )


def write_outcomes(outcomes: Sequence[Outcome], waiting: Sequence[Claim], folder: Path) -> Path:
    """Write ``claims.json`` into a folder, atomically; returns its path."""
    from nearfar import __version__
    from nearfar.training.run_folder import RunFolder, environment

    content = {
        "nearfar": __version__,
        "confidence": CONFIDENCE,
        "claims": [outcome.to_dict() for outcome in outcomes],
        "waiting": [_claim_fields(claim) | {"waits_for": claim.waits_for} for claim in waiting],
        "environment": environment(),
    }
    return RunFolder(folder).write_json("claims.json", content)


def _checked(claim: Claim) -> Experiment:
    experiment, where = load(claim.experiment), f"claim '{claim.id}'"
    experiment.check_options({**claim.options, **claim.quick}, where)
    experiment.check_quantities(claim.quantities, where)
    if bool(claim.seeds) != experiment.seeded:
        raise NearfarError(
            f"{where}: seeds is {claim.seeds}, but experiment '{claim.experiment}' "
            + (
                "draws at random; give at least 2"
                if experiment.seeded
                else "is a computation; leave seeds out"
            )
        )
    return experiment


def _judge(criterion: Criterion, estimates: Mapping[str, Estimate]) -> str:
    return combine(
        condition.judge(estimates[name].low, estimates[name].high) for name, condition in criterion.items()
    )


def _number(value: float | Share) -> float:
    return value.hits / value.n if isinstance(value, Share) else float(value)


def _estimate(name: str, values: Sequence[float | Share], seeded: bool, where: str) -> Estimate:
    numbers = [_number(value) for value in values]
    if not all(map(math.isfinite, numbers)):
        raise NearfarError(
            f"claim '{where}': its experiment gave {numbers} for '{name}', which is no finite number"
        )
    shares = [value for value in values if isinstance(value, Share)]
    if shares:
        hits, n = sum(s.hits for s in shares), sum(s.n for s in shares)
        value, (low, high), method = hits / n, wilson(hits / n, n, CONFIDENCE), "Wilson"
    elif seeded:
        n, value = len(numbers), math.fsum(numbers) / len(numbers)
        (low, high), method = few_runs(numbers, CONFIDENCE), "t over seeds"
    else:
        n, value, low, high, method = 1, numbers[0], numbers[0], numbers[0], "computed: no interval"
    protocol = {"interval": method, "confidence": CONFIDENCE, "seeds": len(numbers) if seeded else 0}
    return Estimate(value, low, high, math.nan, n, False, name, protocol)


def _plain(estimate: Estimate) -> dict[str, object]:
    """An estimate without what a quantity of an experiment does not have: a chance level."""
    return {
        key: value for key, value in estimate.to_dict().items() if key not in ("metric", "chance", "trivial")
    }


def _claim_fields(claim: Claim) -> dict[str, object]:
    code, reason = claim.check
    return {
        "id": claim.id,
        "row": claim.row,
        "statement": claim.statement,
        "source": claim.source,
        "check": {"verdict": code, "found": reason},
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in the same order on every machine; threads would only slow such small matrices down."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
