"""Hardness promised and delivered."""

from __future__ import annotations

import math
from itertools import pairwise

from nearfar.doctor.phases import hard_epochs, means_hard
from nearfar.doctor.rule import Evidence, Remedy, Rule, TooLittle
from nearfar.doctor.rules._remedies import advice, scaled
from nearfar.doctor.series import mean
from nearfar.doctor.signals import Signals

__all__ = ["RULES"]

#: realised over nominal hardness below which a promise is broken; greedy batches of k = 100, r = .5 end at .76 of it
DEPLETED = 0.8
#: the same of what exceeds random hardness, last quarter over first, a noisier measure
EXCESS_DEPLETED, LAST_TO_FIRST = 0.6, 0.7
QUARTERS = 4
#: hardness over random from which batches count as harder at all
HARDER = 1.1


Entries = list[tuple[int | None, tuple[float, ...]]]


def _hard(signals: Signals, name: str) -> Entries:
    """(epoch, values) of a field in epochs of hard batches."""
    return [
        (epoch, values)
        for epoch, values in signals.lists(name)
        if hard_epochs(signals, epoch) and all(map(math.isfinite, values))
    ]


def _hard_lists(signals: Signals, name: str) -> list[tuple[float, ...]]:
    return [values for _, values in _hard(signals, name)]


def _quarters(entries: Entries) -> list[tuple[float, ...]]:
    """By quarter of each epoch. Of a log with a value for each batch they are means; of one with a value for each
    epoch, or that names no epochs, the whole log is taken in quarters. [] of fewer than four values.
    """
    if any(len(values) > 1 for _, values in entries):
        return [values for _, values in entries if len(values) > 1]
    by_epoch: dict[int | None, list[float]] = {}
    for epoch, values in entries:
        by_epoch.setdefault(epoch, []).append(values[0])
    courses = [course for course in by_epoch.values() if len(course) >= QUARTERS]
    if not courses and len(entries) >= QUARTERS:
        courses = [[values[0] for _, values in entries]]
    return [tuple(mean(part) for part in _cut(course)) for course in courses]


def _cut(course: list[float]) -> list[list[float]]:
    ends = [round(i * len(course) / QUARTERS) for i in range(QUARTERS + 1)]
    return [course[a:b] for a, b in pairwise(ends)]


def _depleted(signals: Signals) -> Evidence | None:
    if not means_hard(signals):
        return None
    realised = _hard(signals, "realised_hard")
    promised = [v[0] for v in _hard_lists(signals, "nominal_hard")] or [
        v[0] for v in _hard_lists(signals, "hard_ratio")
    ]
    if not promised and signals.number("hard_ratio"):
        promised = [signals.number("hard_ratio") or 0.0]
    if realised and promised and mean(promised) > 0:
        # A schedule changes the promise: each value is read against its own.
        own = promised if len(promised) == len(realised) else [mean(promised)] * len(realised)
        shares: Entries = [
            (epoch, tuple(value / nominal for value in values))
            for (epoch, values), nominal in zip(realised, own, strict=True)
            if nominal > 0
        ]
        by_quarter = _quarters(shares) or [values for _, values in shares]
        whole, last = mean([mean(v) for v in by_quarter]), mean([v[-1] for v in by_quarter])
        if min(whole, last) >= DEPLETED:
            return None
        nominal = mean(promised)
        late = f", and {last * nominal:.2f} in the last quarter" if last < whole else ""
        epochs = f" of an epoch (mean of {len(by_quarter)} epochs)" if len(by_quarter) > 1 else ""
        return Evidence(
            f"{nominal:.2f} of a batch was to be hard; {whole * nominal:.2f} were{late}{epochs}.",
            {"nominal": nominal, "realised": whole * nominal, "realised_last_quarter": last * nominal},
        )
    quarters = _quarters(_hard(signals, "hardness"))
    chance = signals.number("hardness_random")
    if quarters and chance is not None:
        first, last = mean([v[0] for v in quarters]), mean([v[-1] for v in quarters])
        if first < HARDER * chance or last - chance >= EXCESS_DEPLETED * (first - chance):
            return None
        return Evidence(
            f"{first:.2f} of an item's nearest neighbours share its batch in the first quarter, {last:.2f} in the "
            f"last; random batches hold {chance:.2f}.",
            {"hardness_first": first, "hardness_last": last, "hardness_random": chance},
        )
    level = _hard_lists(signals, "last_to_first")
    if not level:
        raise TooLittle("no hard epoch was logged")
    ratio = mean([v[0] for v in level])
    if ratio >= LAST_TO_FIRST:
        return None
    return Evidence(
        f"The last tenth of an epoch is {ratio:.2f} as hard as the first.", {"last_to_first": ratio}
    )


def _depletion_remedy(signals: Signals) -> Remedy:
    more = scaled(signals, "hardness_k", 2) or "hardness_k=100"
    words = "Compose the epoch from the whole neighbour graph, so that hardness stays level; a larger k lasts longer."
    if signals.text("order") == "greedy":
        return Remedy("sampler.order=level", words, (more, "sampler=partition"))
    return Remedy("sampler=partition", words, (more,))


def _not_harder(signals: Signals) -> Evidence | None:
    if not means_hard(signals):
        return None
    hardness = _hard_lists(signals, "hardness")
    chance = [mean(v) for v in _hard_lists(signals, "hardness_random")]
    if not chance and signals.number("hardness_random") is not None:
        chance = [signals.number("hardness_random") or 0.0]
    if not hardness or not chance:
        raise TooLittle("no hard epoch was logged")
    realised, expected = mean([mean(v) for v in hardness]), mean(chance)
    if expected <= 0 or realised > HARDER * expected:
        return None
    return Evidence(
        f"{realised:.2f} of an item's nearest neighbours share its batch, random batches hold {expected:.2f} "
        f"(mean of {len(hardness)} hard epochs).",
        {"hardness": realised, "hardness_random": expected},
    )


RULES = (
    Rule(
        "hardness-not-above-random", "error", "Hard batches are no harder than random ones.",
        (("hardness", "hardness_random"),), _not_harder,
        looks_at="`hardness` over `hardness_random`, epochs of hard batches", threshold=f"at most {HARDER:g} times",
        cause="The neighbour list is in a different order from the data; or a batch is so large a part of few "
        "rows that chance brings as many neighbours together; or hard_ratio is very small.",
        remedy=advice("Compare the ids of the neighbour list with the loader's (sampler.check_ids, "
                      "neighbors.aligned_to); if they agree, take smaller batches, or sampler=random."),
        source="an A/A check: a sampler that does nothing must be told from one that does",
    ),
    Rule(
        "hardness-depleted", "warning", "Batches are less hard than was asked for: neighbours run out.",
        (("realised_hard", "nominal_hard"), ("realised_hard", "hard_ratio"), ("hardness", "hardness_random"),
         ("last_to_first",)), _depleted,
        looks_at="`realised_hard` over `nominal_hard`; without them `hardness` by quarter, or "
        "`last_to_first`; epochs of hard batches",
        threshold=f"below {DEPLETED:g} in the last quarter or on the whole; {EXCESS_DEPLETED:g} of the excess "
        f"over random; {LAST_TO_FIRST:g}",
        cause="Every item is used once, and pivots use up their neighbours: a small hardness_k gives fewer hard items.",
        remedy=_depletion_remedy,
        source="greedy batches of 32 from 4,000: k = 10, r = .5 realises 19 %; GCBS (Sachidananda et al. 2023)",
    ),
)  # fmt: skip
