"""Whether embeddings use the room they have."""

from __future__ import annotations

from collections.abc import Iterator

from nearfar.doctor.levels import by_class
from nearfar.doctor.rule import Evidence, Remedy, Rule
from nearfar.doctor.rules._remedies import advice, lower_learning_rate, scaled
from nearfar.doctor.series import Series
from nearfar.doctor.signals import Signals

__all__ = ["RULES"]

#: variance (1: uniform on the sphere) and mean cosine at which all rows are one; the two add up to about 1
NO_VARIANCE, ONE_DIRECTION = 0.05, 0.95
#: standard deviation of a dimension, and its share of the largest so far: beside 1/√d of unit vectors, which is .03 at
#: 1,024 and .01 at 10,000 dimensions
NO_STD, STD_LOST = 0.01, 0.2
#: 1 − mean cosine of rows with themselves before training up to which they stand still
MOVED = 1e-6
#: uniformity of rows with mean cosine .95; well spread ones have about -4
NOT_UNIFORM = -0.2
#: share of the directions that could be used, below which most of the space is empty
FEW_DIRECTIONS = 0.1
#: distance of the two views' means (0: one cloud, 2: opposite points) from which they are two clouds
APART = 0.8
#: skewness of k-occurrence from which few keys answer most queries; 0 where all are found alike
HUBS = 3.0
#: temperatures at which all candidates score alike, and at which one of them takes the whole gradient
BLUNT, SHARP = 0.5, 0.005


def _views(signals: Signals, pattern: str) -> Iterator[tuple[str, Series]]:
    """Each view with its last probes: at the start of a run embeddings may be anything."""
    for view, series in signals.named(pattern).items():
        yield view, series.tail(least=1)


def _collapsed(signals: Signals) -> dict[str, tuple[str, float, Series]]:
    collapsed = {}
    for view, series in _views(signals, "*/uniformity"):
        if series.mean() > NOT_UNIFORM:
            collapsed[view] = ("uniformity", series.mean(), series)
    for view, series in _views(signals, "*/mean_cosine"):
        if series.mean() > ONE_DIRECTION:
            collapsed[view] = ("mean cosine", series.mean(), series)
    for view, series in _views(signals, "*/variance"):
        if series.mean() < NO_VARIANCE:
            collapsed[view] = ("variance", series.mean(), series)
    for view, series in _views(signals, "*/std"):
        largest = max(signals.series(f"{view}/std").finite().values)
        if series.mean() < NO_STD and (
            series.mean() < STD_LOST * largest or series.mean() < STD_LOST * NO_STD
        ):
            collapsed[view] = ("standard deviation", series.mean(), series)
    return collapsed


def _still(signals: Signals) -> Evidence | None:
    """All views: one that stands still beside one that moves may be frozen on purpose, which is a note."""
    every = {view: series.tail(least=1) for view, series in signals.named("*/moved").items()}
    moved = {view: series for view, series in every.items() if series.mean() <= MOVED}
    if not moved:
        return None
    some = len(moved) < len(every)
    listed = ", ".join(f"{view} {series.mean():.1g}" for view, series in moved.items())
    where = next(iter(moved.values())).where_text()
    return Evidence(
        f"1 − cosine of each row's embedding with that before training: {listed} in {where}.",
        {f"{view}/moved": series.mean() for view, series in moved.items()},
        severity="note" if some else None,
        title="One view does not move: it is frozen, or its gradient is cut off." if some else None,
    )


def _collapse(signals: Signals) -> Evidence | None:
    collapsed = _collapsed(signals)
    if not collapsed:
        return None
    parts = [
        f"{what} of {view} is {value:.3g} in {where.where_text()}"
        for view, (what, value, where) in collapsed.items()
    ]
    text = "; ".join(parts)
    return Evidence(
        text[0].upper() + text[1:] + ".",
        {f"{view}/{what.replace(' ', '_')}": value for view, (what, value, _) in collapsed.items()},
    )


def _collapse_remedy(signals: Signals) -> Remedy:
    words = "Look for a loss without negatives, an extreme temperature, or a learning rate that killed the last layer."
    temperature = signals.number("temperature") or 0.0
    if temperature >= BLUNT or 0 < temperature <= SHARP:
        return Remedy("temperature=0.07", words)
    return Remedy(lower_learning_rate(signals), words)


def _room(signals: Signals, view: str) -> float | None:
    """The directions a view could use; of a loss by classes, those that tell its classes apart."""
    limits = [signals.series(f"{view}/{name}").finite() for name in ("rank_limit", "dimensions")]
    known = [series.tail(least=1).mean() for series in limits if series]
    rows = signals.number("probe_rows")
    if not known:
        return None
    if rows is not None:
        known.append(rows - 1)
    if by_class(signals) is False:
        return min(known)
    classes, positives = signals.number("classes"), signals.number("positives_per_row")
    batch = signals.number("rows") or signals.number("batch_size") or signals.number("candidates")
    if classes is None and positives is not None and positives > 1 and batch is not None:
        classes = batch / (positives + 1)
    if classes is not None:
        known.append(max(classes - 1, 1.0))
    return min(known)


def _dimensional(signals: Signals) -> Evidence | None:
    collapsed = _collapsed(signals)
    for view, rank in _views(signals, "*/effective_rank"):
        room = _room(signals, view)
        if room is None or view in collapsed or rank.mean() >= FEW_DIRECTIONS * room:
            continue
        return Evidence(
            f"The embeddings of {view} have an effective rank of {rank.mean():.1f} out of {room:.0f} in "
            f"{rank.where_text()}.",
            {f"{view}/effective_rank": rank.mean(), f"{view}/rank_limit": room},
        )
    return None


def _dimensional_remedy(signals: Signals) -> Remedy:
    return Remedy(
        scaled(signals, "temperature", 0.5),
        "A lower temperature spreads embeddings; less augmentation and a projection head in training keep "
        "more directions.",
    )


def _gap(signals: Signals) -> Evidence | None:
    gap = signals.series("modality_gap").finite().tail(least=1)
    if not gap or gap.mean() <= APART:
        return None
    return Evidence(
        f"The views' mean directions are {gap.mean():.2f} apart in {gap.where_text()}.",
        {"modality_gap": gap.mean()},
    )


def _hubs(signals: Signals) -> Evidence | None:
    skew = signals.series("hubness").finite().tail(least=1)
    if not skew or skew.mean() <= HUBS:
        return None
    return Evidence(
        f"How often a key is among the ten nearest has a skewness of {skew.mean():.1f} in {skew.where_text()}.",
        {"hubness": skew.mean()},
    )


RULES = (
    Rule(
        "embeddings-still", "error", "The embeddings have not moved since the start.", (("*/moved",),), _still,
        looks_at="`*/moved` of every view, last probes", threshold=f"{MOVED:g} or less in all of them",
        cause="The optimiser does not hold the encoder's weights, they are frozen, the embeddings were detached from "
        "the loss, or the learning rate is nothing.",
        remedy=advice("Check that the optimiser was made of the parameters of the model that is embedded, that none of "
                      "it is under `no_grad` or `.detach()`, and that `optimizer.step()` is called."),
        source="weights that move change what they embed",
    ),
    Rule(
        "collapse", "error", "The embeddings have collapsed into one direction.",
        (("*/variance",), ("*/mean_cosine",), ("*/uniformity",), ("*/std",)), _collapse,
        looks_at="`*/variance`, `*/mean_cosine`, `*/uniformity`, `*/std`, last probes",
        threshold=f"variance below {NO_VARIANCE:g}, mean cosine above {ONE_DIRECTION:g}, uniformity above "
        f"{NOT_UNIFORM:g}, standard deviation below {NO_STD:g} and {STD_LOST:.0%} of its largest",
        cause="Nothing pushes rows apart: no negatives, a temperature so high that all candidates score "
        "alike or so low that only one of them counts, or a learning rate that drove an activation to 0.",
        remedy=_collapse_remedy, source="Wang and Isola 2020, alignment and uniformity",
    ),
    Rule(
        "dimensional-collapse", "warning", "The embeddings use few of their dimensions.",
        (("*/effective_rank", "*/rank_limit"), ("*/effective_rank", "*/dimensions")), _dimensional,
        looks_at="`*/effective_rank` over `*/rank_limit` (at most classes − 1 for a loss by classes), last probes",
        threshold=f"below {FEW_DIRECTIONS:.0%}",
        cause="Strong augmentation, a deep linear head, or a high temperature let the spectrum fall.",
        remedy=_dimensional_remedy, source="Jing et al. 2022, dimensional collapse; Roy and Vetterli 2007, "
        "effective rank",
    ),
    Rule(
        "modality-gap", "note", "The two views lie in two separate clouds.", (("modality_gap",),), _gap,
        looks_at="`modality_gap`, last probes", threshold=f"above {APART:g}",
        cause="Encoders start in different cones, and a low temperature has no reason to join them.",
        remedy=advice("No fault where queries only meet keys; do not mix the views in one index."),
        source="Liang et al. 2022, Mind the gap",
    ),
    Rule(
        "hubness", "note", "A few keys are near to nearly every query.", (("hubness",),), _hubs,
        looks_at="`hubness`, last probes", threshold=f"above {HUBS:g}",
        cause="In many dimensions points near the mean are near to all; queries far from all keys make it worse.",
        remedy=advice("Centre the embeddings, or score with a local scaling (CSLS) at search time."),
        source="Radovanović et al. 2010, hubs in space",
    ),
)  # fmt: skip
