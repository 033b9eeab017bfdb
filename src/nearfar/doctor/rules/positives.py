"""Whether the rows of a batch have anything to be pulled to."""

from __future__ import annotations

import numpy as np

from nearfar.doctor.levels import by_class
from nearfar.doctor.rule import Evidence, Remedy, Rule
from nearfar.doctor.rules._remedies import advice, fixed
from nearfar.doctor.series import Series, mean
from nearfar.doctor.signals import Signals

__all__ = ["RULES"]

#: share of rows without a positive: a tenth of each batch then teaches nothing; nearly all is no training at all
WITHOUT, NEARLY_ALL = 0.1, 0.9
#: positives per row of a loss by classes, below which it is a loss of single pairs with gaps in between
FEW = 1.5
#: share of the candidates that are positives, from which there is little left to be told apart (ln(4/3) = 0.29 nats)
MANY = 0.75
#: share of rows that carry the mass which the target is named after; a tenth changes the mean gradient by less
#: than a tenth
INERT = 0.1
#: share of steps without anchors from which the loss is mostly absent
NO_ANCHORS = 0.5
#: difference between a group's share among anchors and in the batch below which the score does not pick the group
BLIND = 0.05


def _without(signals: Signals) -> Evidence | None:
    if signals.has("anchors"):
        return None  # such a loss says by its anchors that it had none
    without = signals.series("rows_without_positives").finite().tail()
    rows = signals.number("rows") or signals.number("batch_size") or signals.number("candidates")
    if not without or (without.mean() < 1 if not rows else without.mean() <= WITHOUT * rows):
        return None
    share = min(1.0, without.mean() / rows) if rows else None
    part = "" if share is None else f" ({share:.0%})"
    return Evidence(
        f"{without.mean():.1f} rows per batch{part} have no positive in {without.where_text()}; they are left "
        "out of the loss.",
        {"rows_without_positives": without.mean()} | ({} if share is None else {"share": share}),
        severity="error" if share is not None and share >= NEARLY_ALL else None,
    )


def _few(signals: Signals) -> Evidence | None:
    if signals.has("anchors") or signals.has("rows_with_neighbors"):
        return None
    count = signals.series("positives_per_row").finite().tail()
    classes = by_class(signals)
    if classes is None:
        # A loss of pairs has exactly one positive in every row; anything else counts them by class.
        pairs = all(value == 1.0 for value in count.values)
        classes = signals.number("classes") is not None or not pairs
    if not classes or count.mean() >= FEW:
        return None
    return Evidence(
        f"{count.mean():.2f} positives per row in {count.where_text()}.",
        {"positives_per_row": count.mean()},
    )


def _many(signals: Signals) -> Evidence | None:
    if signals.has("anchors"):
        return None
    count = signals.series("positives_per_row").finite()
    share = (
        signals.paired(count, "candidates", lambda a, b: np.divide(a, b, out=np.zeros_like(a), where=b != 0))
        .finite()
        .tail()
    )
    if not share or share.mean() < MANY:
        return None
    return Evidence(
        f"{share.mean():.0%} of a row's candidates are positives in {share.where_text()}.",
        {"share": share.mean()},
    )


def _inert(signals: Signals) -> Evidence | None:
    rows = signals.series("rows_with_neighbors").finite()
    late = rows.tail()
    if not late or late.mean() >= INERT:
        return None
    return Evidence(
        f"{late.mean():.2%} of the rows have a neighbour in their batch in {late.where_text()}.",
        {"rows_with_neighbors": late.mean()},
    )


def _no_anchors(signals: Signals) -> Evidence | None:
    anchors = signals.series("anchors").finite()
    share = mean([float(value == 0) for value in anchors.tail().values])
    if share < NO_ANCHORS:
        return None
    return Evidence(
        f"{share:.0%} of the logged steps in {anchors.tail().where_text()} have no anchors, so that the loss "
        "is 0 there.",
        {"steps_without_anchors": share},
    )


def _blind(signals: Signals) -> Evidence | None:
    anchors = signals.named("anchor_share/*")
    batch = signals.named("group_share/*")
    gaps = {name: _gap(anchors[name], batch[name]) for name in anchors if name in batch}
    if not gaps or max(map(abs, gaps.values())) >= BLIND:
        return None
    group = max(gaps, key=lambda name: anchors[name].mean())
    return Evidence(
        "The largest difference between a group's share among the anchors and in the batch is "
        f"{max(map(abs, gaps.values())):.3f}; {group} has {anchors[group].mean():.0%} of the anchors and "
        f"{batch[group].mean():.0%} of the batch.",
        {f"gap/{name}": gap for name, gap in gaps.items()},
    )


def _gap(anchors: Series, batch: Series) -> float:
    return anchors.mean() - batch.mean()


def _anchor_remedy(signals: Signals) -> Remedy:
    return Remedy(
        "top_fraction=0.4 bottom_fraction=0.4",
        "Take the lowest and highest scores of each batch (threshold=None) instead of a fixed threshold.",
    )


RULES = (
    Rule(
        "no-positives", "warning", "Rows have no positive in their batch and teach nothing.",
        (("rows_without_positives",),), _without,
        looks_at="`rows_without_positives` over `rows` (or `batch_size`, `candidates`), last quarter",
        threshold=f"more than {WITHOUT:.0%} of the rows (one row where their number is not known); an error "
        f"from {NEARLY_ALL:.0%}",
        cause="Classes with one row in the batch: there are many classes, or rare ones, and batches are "
        "drawn at random.",
        remedy=fixed("sampler=balanced", "Draw several rows of each class into a batch, or take larger batches."),
        source="rows without a positive are left out of the mean (Khosla et al. 2020, SupCon, sums over positives)",
    ),
    Rule(
        "few-positives", "warning", "A loss by classes has hardly more than one positive per row.",
        (("positives_per_row",),), _few,
        looks_at="`positives_per_row`, last quarter, of a loss by classes (`loss`, `classes`, or counts other than 1)",
        threshold=f"below {FEW:g}",
        cause="The batch holds too few rows of each class for the loss to be other than one of single pairs.",
        remedy=fixed("sampler=balanced", "Draw more rows of each class into a batch, or take larger batches."),
        source="Khosla et al. 2020, SupCon: more positives help, mildly, from 1 to 9 per anchor",
    ),
    Rule(
        "too-many-positives", "warning", "Nearly all candidates are positives: little is left to tell apart.",
        (("positives_per_row", "candidates"),), _many,
        looks_at="`positives_per_row` over `candidates`, last quarter", threshold=f"{MANY:.0%} or more",
        cause="Labels are so coarse, or overlap counts so loosely, that nearly every pair belongs together.",
        remedy=advice("Use finer labels, weigh positives by overlap (Jaccard) without a constant for every pair, or a "
                      "sampler that mixes classes."),
        source="the loss lies between its floor and ln(candidates); with 3 of 4 positive that is 0.29 nats",
    ),
    Rule(
        "target-inert", "warning", "The target is inert: hardly a row has the mass that the loss is named after.",
        (("rows_with_neighbors",),), _inert,
        looks_at="`rows_with_neighbors`, last quarter", threshold=f"below {INERT:.0%} of the rows",
        cause="Random batches out of many rows almost never hold a row's neighbour, so that the loss is CLIP's.",
        remedy=fixed("sampler=spatial", "Compose batches from neighbourhoods, so that neighbours meet."),
        source="for 190,000 spots and batches of 32 a spot's six neighbours are in its batch with probability .001",
    ),
    Rule(
        "no-anchors", "error", "The loss has no anchors.", (("anchors",),), _no_anchors,
        looks_at="`anchors`, last quarter", threshold=f"0 in {NO_ANCHORS:.0%} of the steps or more",
        cause="A fixed threshold below all scores (0.5 where all exceed 0.9), or batches too small to be split.",
        remedy=_anchor_remedy, source="a sum over no anchors is 0, which reads like a solved task",
    ),
    Rule(
        "anchors-ignore-group", "note", "The score does not pick out a group: contrast by score cannot close a gap.",
        (("anchor_share/*", "group_share/*"),), _blind,
        looks_at="`anchor_share/*` − `group_share/*`, whole run", threshold=f"all differences below {BLIND:g}",
        cause="Low scores fall on all groups alike, so that pulling them up moves all groups alike.",
        remedy=advice("Take anchors by group, or measure the area under the curve of score against group first."),
        source="a gain of all rows is common mode; only anchors of one group move the gap",
    ),
)  # fmt: skip
