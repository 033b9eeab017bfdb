"""What the batches held: false negatives, duplicates, old rows, and whether losses of two splits can be compared."""

from __future__ import annotations

import math
from statistics import median

from nearfar.doctor.phases import means_hard
from nearfar.doctor.rule import Evidence, Remedy, Rule
from nearfar.doctor.rules._remedies import advice, short
from nearfar.doctor.signals import Signals

__all__ = ["RULES"]

#: anchors with a likely false negative: named, and worth masking
SOME_FALSE, MANY_FALSE = 0.02, 0.1
#: rows of a batch where the log does not say
USUAL_BATCH = 64.0
#: share of rows with an unmasked copy, at which one row in a hundred is told to flee its own positive
COPIES = 0.01
#: steps over which embeddings drift slowly enough to serve as negatives
SLOW_DRIFT = 1000
#: difference of the guessing levels, in nats, and of the losses, that makes two compositions two scales
OTHER_SCALE, OTHER_LOSS = 0.05, 0.1


def _false_negatives(signals: Signals) -> Evidence | None:
    threshold = signals.number("false_negative_threshold")
    at = f" (similarity {threshold:g} or more)" if threshold is not None else ""
    share = signals.series("false_negative_share").finite()
    if share:
        candidates = signals.number("candidates") or signals.number("batch_size") or USUAL_BATCH
        late = share.tail()
        expected = late.mean() * max(candidates - 1, 1)
        anchors = 1 - math.exp(-expected)
        where = late.where_text()
        text = f"{late.mean():.2%} of the negatives are likely positives{at} in {where}, {expected:.2f} for each row"
    else:
        # The plan counts pairs before any mask; a threshold among the options masks them.
        if signals.context.get("false_negative_threshold") is not None:
            return None
        hit = signals.series("anchors_with_false_negative").finite()
        pairs = signals.series("false_negatives").finite().tail()
        if hit:
            late, anchors = hit.tail(), hit.tail().mean()
            text = f"{anchors:.1%} of the rows have a likely positive{at} among their negatives in {late.where_text()}"
        else:
            size = signals.number("candidates") or signals.number("batch_size") or USUAL_BATCH
            anchors = 1 - math.exp(-pairs.mean() * (size - 1))
            text = f"{pairs.mean():.2%} of the in-batch pairs are likely positives{at}"
    if not anchors >= SOME_FALSE:
        return None
    severity = "warning" if anchors >= MANY_FALSE else "note"
    return Evidence(text + ".", {"rows_with_false_negative": anchors}, severity=severity)  # type: ignore[arg-type]


def _filter(signals: Signals) -> Remedy:
    threshold = signals.number("false_negative_threshold") or 0.95
    if signals.context.get("false_negative_threshold") is not None:
        return Remedy(
            f"false_negative_threshold={short(threshold - 0.05)}",
            "The mask lets some through: lower its threshold.",
        )
    return Remedy(
        f"false_negative_threshold={short(threshold)}", "Mask negatives as similar as that to the positive."
    )


def _duplicates(signals: Signals) -> Evidence | None:
    share = signals.series("duplicate_keys").finite()
    if not share or share.mean() <= COPIES:
        return None
    return Evidence(
        f"{share.mean():.1%} of the rows have an equal other row among their negatives in {share.where_text()}.",
        {"duplicate_keys": share.mean()},
    )


def _duplicate_remedy(signals: Signals) -> Remedy:
    if signals.context.get("mask_duplicates") is True:
        return Remedy(
            "", "They are equal, and yet not marked as such: remove them from the data, or mark them."
        )
    return Remedy("mask_duplicates=true", "Mask equal rows, or remove them from the data.")


def _epoch_steps(signals: Signals) -> float | None:
    ends = signals.series("train_loss")
    if ends:
        first = ends.points[0]
        return first.step / first.epoch if first.epoch else None
    points = [p for p in signals.series("memory_age").points if p.epoch is not None]
    last = max((p.epoch for p in points if p.epoch is not None), default=0)
    inside = [p.step for p in points if p.epoch is not None and p.epoch < last]
    return max(inside) / (last - 1) if inside else None


def _stale(signals: Signals) -> Evidence | None:
    age = signals.series("memory_age").finite().tail()
    epoch = _epoch_steps(signals)
    limit = min(epoch or SLOW_DRIFT, SLOW_DRIFT)
    if not age or age.mean() <= limit:
        return None
    what = "an epoch has" if epoch is not None and epoch <= SLOW_DRIFT else "embeddings drift slowly over"
    return Evidence(
        f"The rows of the memory are {age.mean():.0f} steps old on average in {age.where_text()}; {what} "
        f"{limit:.0f} steps.",
        {"memory_age": age.mean(), "limit": limit},
    )


def _shorter_memory(signals: Signals) -> Remedy:
    evidence, memory = _stale(signals), signals.number("memory")
    if evidence is None or not memory:
        return Remedy("", "Keep fewer rows: at most those of one epoch.")
    rows = int(memory * evidence.numbers["limit"] / evidence.numbers["memory_age"])
    return Remedy(f"memory={rows}", "Keep fewer rows: at most those of one epoch.")


def _usual(signals: Signals, name: str) -> float | None:
    """The median over the run: the last batch of an epoch is smaller than the others."""
    series = signals.series(name).finite()
    return median(series.values) if series else None


def _composition(signals: Signals) -> Evidence | None:
    ours, theirs = _usual(signals, "uniform_level"), _usual(signals, "val_uniform_level")
    if ours is None or theirs is None:
        a, b = _usual(signals, "candidates"), _usual(signals, "val_candidates")
        ours, theirs = (math.log(a), math.log(b)) if a and b and min(a, b) > 0 else (None, None)
    if ours and theirs and abs(ours - theirs) > OTHER_SCALE:
        return Evidence(
            f"Guessing costs {ours:.3f} in training batches and {theirs:.3f} in validation batches: their "
            "losses have other scales.",
            {"uniform_level": ours, "val_uniform_level": theirs},
        )
    same = signals.series("train_loss_same_composition").finite()
    loss = (signals.series("loss").finite() or signals.series("train_loss").finite()).tail()
    if not same or not loss or not means_hard(signals):
        return None
    apart = loss.mean() - same.tail().mean()
    if abs(apart) <= OTHER_LOSS + 2 * loss.error():
        return None
    return Evidence(
        f"Training rows cost {loss.mean():.3f} in the sampler's batches and {same.tail().mean():.3f} in "
        "random ones: compare val_loss with the latter.",
        {"loss": loss.mean(), "train_loss_same_composition": same.tail().mean()},
    )


RULES = (
    Rule(
        "false-negatives", "warning", "Likely positives are treated as negatives.",
        (("false_negative_share",), ("anchors_with_false_negative",), ("false_negatives",)), _false_negatives,
        looks_at="`false_negative_share` × candidates; or the plan's `anchors_with_false_negative` where no "
        "mask is set",
        threshold=f"a note from {SOME_FALSE:.0%} of the rows, a warning from {MANY_FALSE:.0%}",
        cause="Near-duplicates in one batch: neighbours of one text are often the same thing said twice.",
        remedy=_filter, source="RocketQA (Qu et al. 2021): MRR@10 32.4 falls to 26.0 unfiltered, 36.4 denoised",
    ),
    Rule(
        "duplicates", "warning", "Copies of a row are its negatives.", (("duplicate_keys",),), _duplicates,
        looks_at="`duplicate_keys`, whole run", threshold=f"more than {COPIES:.0%} of the rows",
        cause="The batch holds equal rows, from oversampling or repeated data, and no mask tells that they are equal.",
        remedy=_duplicate_remedy, source="a copy of the positive among the negatives has gradient against itself",
    ),
    Rule(
        "queue-stale", "warning", "The memory holds rows of an encoder that is long gone.", (("memory_age",),), _stale,
        looks_at="`memory_age`, last quarter, beside the steps of an epoch", threshold=f"more than one epoch or "
        f"{SLOW_DRIFT} steps",
        cause="The memory is longer than the epoch: it holds every row several times, some of them the batch's own.",
        remedy=_shorter_memory, source="XBM (Wang et al. 2020): embeddings drift slowly, over about a thousand steps",
    ),
    Rule(
        "composition-differs", "note", "Training and validation loss are of batches composed otherwise.",
        (("uniform_level", "val_uniform_level"), ("candidates", "val_candidates"),
         ("loss", "train_loss_same_composition"), ("train_loss", "train_loss_same_composition")), _composition,
        looks_at="`uniform_level` beside `val_uniform_level`; `loss` beside `train_loss_same_composition`",
        threshold=f"{OTHER_SCALE:g} nats of guessing, {OTHER_LOSS:g} nats of loss",
        cause="A different batch size, mask, memory or sampler in training than in validation.",
        remedy=advice("Read train_loss_same_composition beside val_loss: the same rows, the same composition."),
        source="the loss of a batch depends on who is in it",
    ),
)  # fmt: skip
