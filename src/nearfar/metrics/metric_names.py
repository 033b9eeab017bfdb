"""Names of retrieval metrics: which there are, what each counts, and how a cut-off is written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nearfar.arguments import shown
from nearfar.errors import NearfarError, nearest_name

__all__ = ["KINDS", "NamedMetric", "read_metrics"]

#: name without cut-off: whether it has one ("needed", "possible", "none"), and what it is
KINDS: dict[str, tuple[str, str]] = {
    "nDCG": ("possible", "discounted gain of graded relevance over that of the best order"),
    "MAP": ("possible", "mean average precision; of the first k: over all relevant keys, as trec_eval"),
    "MAP@R": ("none", "average precision of the first R, R the number of relevant keys"),
    "recall": ("needed", "share of the relevant keys that are among the first k"),
    "precision": ("needed", "share of the first k that are relevant"),
    "R-precision": ("none", "share of the first R that are relevant, R the number of relevant keys"),
    "hit": ("needed", "whether a relevant key is among the first k"),
    "R": ("needed", "the same under the name that retrieval_metrics gives it"),
    "MRR": ("possible", "reciprocal rank of the best relevant key; 0 beyond k"),
    "mean_rank": ("none", "rank of the best relevant key"),
    "median_rank": ("none", "rank of the best relevant key, its median"),
}
#: what else they are called
ALSO = {
    "p": "precision",
    "rprec": "R-precision",
    "success": "hit",
    "hit_rate": "hit",
    "hits": "hit",
    "accuracy": "hit",
    "rr": "MRR",
    "recip_rank": "MRR",
    "ap": "MAP",
}
_FORM = re.compile(r"(?P<name>[A-Za-z_-]+)(?:@(?P<cut>[0-9]+|k|K))?")


@dataclass(frozen=True)
class NamedMetric:
    """A kind of ``KINDS`` with its cut-off, None where it takes the whole ranking."""

    kind: str
    k: int | None = None

    def __str__(self) -> str:
        return self.kind if self.k is None else f"{self.kind}@{self.k}"

    @property
    def of_best(self) -> bool:
        """Whether the best relevant key decides."""
        return self.kind in ("hit", "R", "MRR", "mean_rank", "median_rank")


def read_metrics(metrics: Iterable[str] | str, ks: Iterable[int]) -> list[NamedMetric]:
    """Metrics by name, each once; ``@k`` stands for every one of ``ks``.

    >>> [str(each) for each in read_metrics(["nDCG@10", "recall@k", "map", "P@1"], (1, 5))]
    ['nDCG@10', 'recall@1', 'recall@5', 'MAP', 'precision@1']
    >>> read_metrics("recall", (1, 5))
    Traceback (most recent call last):
    nearfar.errors.NearfarError: metrics: recall needs a cut-off, such as recall@10, or recall@k for each of ks
    """
    names = [metrics] if isinstance(metrics, str) else metrics
    if (
        isinstance(names, (bytes, Mapping))
        or not isinstance(names, Iterable)
        or getattr(names, "shape", 1) == ()
    ):
        raise NearfarError(
            f"metrics is {shown(metrics)}; names are needed, such as ['nDCG@10', 'MAP', 'R@1']"
        )
    wanted: list[NamedMetric] = []
    ks = tuple(ks)
    for name in names:
        wanted += _read(name, ks)
    if not wanted:
        raise NearfarError(f"metrics names none; there are {', '.join(KINDS)}")
    return list(dict.fromkeys(wanted))


def _read(name: object, ks: tuple[int, ...]) -> list[NamedMetric]:
    if not isinstance(name, str):
        raise NearfarError(f"metrics holds {shown(name)}; names are needed, such as 'nDCG@10' or 'MAP'")
    if name.lower() == "map@r":
        return [NamedMetric("MAP@R")]
    form = _FORM.fullmatch(name.strip())
    by_small = {kind.lower(): kind for kind in KINDS}
    small = form["name"].lower() if form else ""
    kind = by_small.get(ALSO.get(small, small).lower())
    if form is None or kind is None:
        raise NearfarError(
            f"metrics: {name!r} is none of them: {nearest_name(name.split('@')[0], list(KINDS))} Cut-offs are "
            "written as in nDCG@10"
        )
    need = KINDS[kind][0]
    cut = form["cut"]
    if cut is None and need == "needed":
        raise NearfarError(f"metrics: {kind} needs a cut-off, such as {kind}@10, or {kind}@k for each of ks")
    if cut is not None and need == "none":
        raise NearfarError(f"metrics: {name!r}: {kind} has no cut-off")
    if cut is None:
        return [NamedMetric(kind)]
    if cut in "kK":
        return [NamedMetric(kind, k) for k in ks]
    if not 0 < int(cut) < 2**31:
        raise NearfarError(f"metrics: {name!r}: a cut-off is a whole number of at least 1")
    return [NamedMetric(kind, int(cut))]
