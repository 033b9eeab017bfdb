"""Run claims over their seeds and judge them; the record as JSON."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

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

__all__ = ["Outcome", "run_claim", "run_claims", "write_outcomes"]


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
