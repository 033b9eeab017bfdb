"""Whether the numbers can mean what they seem to."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from itertools import combinations

from nearfar.data.files import Json
from nearfar.doctor.phases import lower_is_better, main_metric
from nearfar.doctor.rule import Evidence, Remedy, Rule, TooLittle
from nearfar.doctor.rules._remedies import advice
from nearfar.doctor.series import estimate_of, number, plain
from nearfar.doctor.signals import Signals
from nearfar.errors import NearfarError

__all__ = ["RULES", "of_splits"]

#: names of a share of queries that find their own among the first k
_CUTOFF = re.compile(
    r"(?:^|[/_ .-])(?:r|recall|hits?|hit_rate|top|success|acc|accuracy)(?:@|_at_|[_-])?(\d+)(?:_acc(?:uracy)?)?$",
    re.IGNORECASE,
)
_CONSTANT = "the constant baseline"
#: ratio of galleries from which chance differs enough to be seen, and from which it misleads
OTHER_GALLERY, OTHER_BY_FAR = 1.1, 4.0


def of_splits(signals: Signals) -> Iterator[tuple[str, str, Json]]:
    """(split, metric, estimate) of the final metrics and, where a split has none, of validation in the log."""
    final = signals.mapping("metrics")
    for split, metrics in final.items():
        metrics = plain(metrics)
        if not isinstance(metrics, Mapping):
            raise NearfarError(
                f"context['metrics']['{split}'] is {type(metrics).__name__}; {{metric: estimate}} is needed"
            )
        for name, value in metrics.items():
            yield str(split), str(name), estimate_of(value, name)
    if "val" not in final:
        beside = signals.mapping("estimates")
        for name, series in signals.named("val/*").items():
            yield "val", name, {"value": series.values[-1]} | dict(beside.get(name) or {})


def _gallery(signals: Signals, split: str, estimate: Json) -> float | None:
    known = estimate.get("gallery")
    if known is None:
        known = _part(signals, split).get("gallery")
    if known is None and split == "val":
        known = signals.number("gallery")
    return None if known is None else float(known)


def _part(signals: Signals, split: str) -> Json:
    part = signals.mapping("splits").get(split)
    if part is not None and not isinstance(part, Mapping):
        raise NearfarError(
            f"context['splits']['{split}'] is {type(part).__name__}; {{rows, hash, ids, gallery}} is needed"
        )
    return dict(part or {})


def _trivial(signals: Signals) -> Evidence | None:
    trivial, known = {}, 0
    for split, name, estimate in of_splits(signals):
        cut = _CUTOFF.search(name)
        gallery = _gallery(signals, split, estimate)
        known += "trivial" in estimate or (cut is not None and gallery is not None)
        if estimate.get("trivial") or (cut and gallery is not None and int(cut.group(1)) >= gallery):
            trivial[f"{split} {name}"] = -1.0 if gallery is None else gallery
    if not trivial:
        if not known:
            raise TooLittle("no metric says whether it is trivial, and none has both a cut-off and a gallery")
        return None
    listed = ", ".join(f"{name} ({_words(gallery)})" for name, gallery in trivial.items())
    return Evidence(f"Nothing can miss these: {listed}.", {"trivial": float(len(trivial))} | trivial)


def _words(gallery: float) -> str:
    return "marked trivial" if gallery < 0 else f"gallery {gallery:.0f}"


def _galleries(signals: Signals) -> Evidence | None:
    by_metric: dict[str, dict[str, float]] = {}
    for split, name, estimate in of_splits(signals):
        gallery = _gallery(signals, split, estimate)
        if gallery:
            by_metric.setdefault(name, {})[split] = gallery
    for split in signals.mapping("splits"):
        gallery = _part(signals, split).get("gallery")
        if gallery:
            by_metric.setdefault("gallery", {})[split] = float(gallery)
    several = {name: sizes for name, sizes in by_metric.items() if len(sizes) > 1}
    if not several:
        raise TooLittle("galleries of two splits are needed")
    name, sizes = max(several.items(), key=lambda item: max(item[1].values()) / min(item[1].values()))
    ratio = max(sizes.values()) / min(sizes.values())
    if ratio < OTHER_GALLERY:
        return None
    listed = ", ".join(f"{split} {size:.0f}" for split, size in sizes.items())
    return Evidence(
        f"{name}: candidates {listed}, a factor of {ratio:.1f}; the same model scores lower in the larger one.",
        {"ratio": ratio} | {f"gallery/{split}": size for split, size in sizes.items()},
        severity="warning" if ratio >= OTHER_BY_FAR else None,
    )


def _leak(signals: Signals) -> Evidence | None:
    for pair, shared in signals.mapping("leaks").items():
        count = _shared(shared)
        if count:
            return Evidence(f"{pair.replace('/', ' and ')} share {count:.0f} items.", {"shared": count})
    splits = signals.mapping("splits")
    known = 0
    for first, second in combinations(splits, 2):
        a, b = _part(signals, first), _part(signals, second)
        ids = a.get("ids"), b.get("ids")
        if ids[0] is not None and ids[1] is not None:
            known += 1
            one, other = ({str(item) for item in plain(x)} for x in ids)
            shared = one & other
            if shared:
                same = one == other
                return Evidence(
                    f"{first} and {second} share {len(shared)} of {len(other)} ids, such as {min(shared)}.",
                    {"shared": float(len(shared)), "rows": float(len(other))},
                    title=f"{second} is {first}." if same else None,
                )
        equal, judged = _same_hash(a, b)
        known += judged
        if equal:
            return Evidence(
                f"{first} and {second} have the same hash, {a.get('content') or a.get('hash')}: they are the "
                "same rows.",
                {"shared": float(a.get("rows") or 0)},
                title=f"{second} is {first}: the same rows under two names.",
            )
    if not known and not signals.has("leaks"):
        raise TooLittle("two splits with ids or hashes are needed")
    return None


def _same_hash(a: Json, b: Json) -> tuple[bool, bool]:
    """Whether two splits are the same, and whether that is known. A hash of content decides over one of ids."""
    for key in ("content", "hash"):
        if a.get(key) is not None and b.get(key) is not None:
            return a[key] == b[key], True
    return False, False


def _shared(value: object) -> float:
    """How many items leak. Rows numbered alike and texts shared by two compounds are none; structures and ids are."""
    if not isinstance(value, Mapping):
        return number(value, "leaks", "the context") or 0.0
    if "shared" in value:
        return number(value["shared"], "leaks: shared", "the context") or 0.0
    kinds = (
        [what for what in value if what not in ("text", "id")]
        if "structure" in value or "text" in value
        else value
    )
    return max((_shared(value[what]) for what in kinds), default=0.0)


def _baseline(signals: Signals) -> Evidence | None:
    baselines = signals.mapping("baselines")
    main = main_metric(signals, [name for _, name, _ in of_splits(signals)])
    judged = 0
    for split, name, estimate in of_splits(signals):
        baseline, kind = _lookup(baselines, split, name)
        if baseline is None and name == main:
            baseline, kind = _chance(signals, split, name, estimate), "chance"
        value = estimate.get("value")
        if baseline is None or value is None or estimate.get("trivial"):
            continue
        baseline, judged = float(baseline), judged + 1
        sign = -1.0 if lower_is_better(signals, name) else 1.0
        low = estimate.get("high" if sign < 0 else "low")
        worst = value if low is None else low
        gallery = _gallery(signals, split, estimate)
        if low is None and kind == "chance" and gallery:  # as many queries as keys, as far as one knows
            worst = value - sign * 2 * math.sqrt(baseline * max(0.0, 1 - baseline) / gallery)
        if sign * (worst - baseline) > 0:
            continue
        interval = "" if low is None else f" [{estimate.get('low'):.3g}, {estimate.get('high'):.3g}]"
        title = None if kind == _CONSTANT else f"{kind} does as well."
        return Evidence(
            f"{name} on {split} is {value:.3g}{interval}; {kind} scores {baseline:.3g}.",
            {"value": value, "baseline": baseline},
            title="The metric that matters is at chance." if kind == "chance" else title,
        )
    if not judged:
        raise TooLittle("no metric stands beside a baseline or chance level")
    return None


def _chance(signals: Signals, split: str, name: str, estimate: Json) -> float | None:
    """The chance level of a metric: as stated, or of a share of queries that find their own among the first k of a
    gallery that is known."""
    if estimate.get("chance") is not None:
        return float(estimate["chance"])
    cut, gallery = _CUTOFF.search(name), _gallery(signals, split, estimate)
    if cut is None or not gallery or "acc" in name.lower():
        return None
    return min(1.0, int(cut.group(1)) / gallery)


def _baseline_remedy(signals: Signals) -> Remedy:
    evidence = _baseline(signals)
    if evidence is not None and evidence.title is not None and "chance" not in evidence.title:
        words = "The simpler model is as good here: look at what the other one costs, at its training, and at the data."
    elif evidence is not None and evidence.title is not None:
        words = (
            "Nothing that was learned carries over to these rows: see what else is found, and check that queries "
            "and keys of a pair stand in one order."
        )
    else:
        words = "Report the baseline beside the metric, and choose one that a constant cannot score on (macro F1)."
    return Remedy("", words)


def _lookup(baselines: Json, split: str, name: str) -> tuple[float | None, str]:
    """The score of the baseline and what it is called: a constant, unless the entry has a ``name``."""
    baseline = baselines.get(name, baselines.get(f"val/{name}"))
    if baseline is None and isinstance(baselines.get(split), Mapping):
        baseline = baselines[split].get(name)
    kind = str(baseline["name"]) if isinstance(baseline, Mapping) and "name" in baseline else _CONSTANT
    return None if baseline is None else estimate_of(baseline, name)["value"], kind


def _training_mode(signals: Signals) -> Evidence | None:
    flags = signals.series("evaluated_in_training").finite()
    if not flags or flags.numbers.max() <= 0:
        return None
    count = int((flags.numbers > 0).sum())
    return Evidence(
        f"In {count} of {len(flags)} evaluations dropout drew, or BatchNorm took the statistics of the rows at hand.",
        {"evaluations": float(count)},
    )


RULES = (
    Rule(
        "evaluated-in-training-mode", "warning", "The model was evaluated in training mode.",
        (("evaluated_in_training",),), _training_mode,
        looks_at="`evaluated_in_training`", threshold="one evaluation",
        cause="`model.train()` in the evaluation, or no `model.eval()` before it: dropout makes embeddings noisy, and "
        "with BatchNorm a row's embedding depends on the rows beside it, which may give partners away.",
        remedy=advice("Call `model.eval()` before the evaluation and `model.train()` after it; hand the evaluation to "
                      "`Monitor(evaluate=...)`, which does."),
        source="Ioffe and Szegedy 2015, batch normalization: inference uses fixed statistics",
    ),
    Rule(
        "split-leak", "error", "Splits share items: the score is of rows the model was trained or chosen on.",
        (("splits",), ("leaks",)), _leak,
        looks_at="`splits`: ids and hashes; `leaks`", threshold="one shared id, or equal hashes",
        cause="The test loader reads validation data, rows stand twice in the source, or the split is by row "
        "where it must be by group.",
        remedy=advice("Remove the shared rows from one of the splits, and split by the group that repeats."),
        source="Kapoor and Narayanan 2023, leakage and the reproducibility crisis",
    ),
    Rule(
        "metric-trivial", "warning", "A metric could not have had a different value.",
        (("metrics",), ("val/*",), ("estimates",)), _trivial,
        looks_at="`trivial`, or k in the metric's name beside its gallery", threshold="k at or above the gallery",
        cause="The gallery is no larger than the cut-off, as with a small last batch or one batch as gallery.",
        remedy=advice("Use the whole split as gallery, or a smaller k."),
        source="R@k with k candidates is 1 for every model",
    ),
    Rule(
        "gallery-mismatch", "note", "Splits are scored against galleries of different size.",
        (("metrics",), ("splits",)), _galleries,
        looks_at="gallery of each metric by split",
        threshold=f"a factor of {OTHER_GALLERY:g}; a warning from {OTHER_BY_FAR:g} on",
        cause="Splits of different size, or a gallery of one batch on one side.",
        remedy=advice("Compare within a split only, or draw galleries of one size."),
        source="chance is k over the gallery: the numbers are of different tasks",
    ),
    Rule(
        "baseline-not-beaten", "warning", "A constant predictor, or chance, does as well.",
        (("metrics", "baselines"), ("val/*", "baselines"), ("metrics",), ("val/*", "estimates"), ("val/*", "gallery")),
        _baseline,
        looks_at="every metric beside `baselines`; the monitored one beside its chance",
        threshold="the value, or the near end of its interval, does not exceed it",
        cause="The metric rewards what most rows have anyway, or nothing was learned.",
        remedy=_baseline_remedy,
        source="a constant 'neutral' scores 80.3 weighted F1 where 80 % are neutral",
    ),
)  # fmt: skip
