"""One batch explained: for each row its positives, its negatives, what was left out and why, and which may be false."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from nearfar.arguments import entries, instance, mapping, number, whole_number, whole_numbers
from nearfar.arguments import shown as shown_value
from nearfar.contrast import Mask
from nearfar.contrast.masks import as_mask
from nearfar.contrast.numerics import unit_rows
from nearfar.errors import NearfarError
from nearfar.labels import whole_labels

__all__ = ["BatchExplanation", "ExplainedRow", "Other", "explain_batch"]


@dataclass(frozen=True)
class Other:
    """A key beside a query: its position in the batch, its similarity, the probability that the loss gives it (0 where
    it is left out), what it shows, and why it is left out, or suspected to be a positive ("" otherwise)."""

    position: int
    similarity: float
    probability: float
    shown: str = ""
    why: str = ""


@dataclass(frozen=True)
class ExplainedRow:
    """A query of a batch: its ``positives``, its hardest ``negatives`` (most similar first), what was ``left_out``
    (most similar first); ``candidates`` counts what it chooses from, ``masked`` all that was left out."""

    position: int
    positives: Sequence[Other]
    negatives: Sequence[Other]
    left_out: Sequence[Other]
    candidates: int
    masked: int
    shown: str = ""

    @property
    def likely_false(self) -> list[Other]:
        """The negatives that are likely positives."""
        return [other for other in self.negatives if other.why]

    @property
    def p_positive(self) -> float:
        """The probability given to all positives."""
        return sum(other.probability for other in self.positives)


@dataclass(frozen=True)
class BatchExplanation:
    """The rows of a batch, explained; printed as a text, shown as a table in a notebook."""

    rows: Sequence[ExplainedRow]
    queries: int
    keys: int
    temperature: float
    notes: Sequence[str] = field(default_factory=tuple)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[ExplainedRow]:
        return iter(self.rows)

    def __getitem__(self, at: int) -> ExplainedRow:
        return self.rows[at]

    @property
    def likely_false(self) -> int:
        """Negatives shown here that are likely positives."""
        return sum(len(row.likely_false) for row in self.rows)

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.queries} queries among {self.keys} keys at temperature {self.temperature:g}", *self.notes,
        ]  # fmt: skip
        for row in self.rows:
            shown = f"  {row.shown}" if row.shown else ""
            lines.append(
                f"row {row.position}{shown}: {row.candidates} candidates, {row.masked} left out, p(positive) "
                f"{row.p_positive:.3f}"
            )
            for kind, others in (("+", row.positives), ("-", row.negatives), ("x", row.left_out)):
                lines.extend(_line(kind, other) for other in others)
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        body = []
        for row in self.rows:
            head = f"row {row.position}" + (f": {html.escape(row.shown)}" if row.shown else "")
            counts = f"{row.candidates} candidates, {row.masked} left out"
            body.append(
                f"<tr><th colspan='5' style='text-align:left'>{head} <small>({counts})</small></th></tr>"
            )
            for kind, others in (
                ("positive", row.positives),
                ("negative", row.negatives),
                ("left out", row.left_out),
            ):
                for other in others:
                    color = "#b00" if kind == "negative" and other.why else "inherit"
                    cells = (kind, str(other.position), f"{other.similarity:.3f}", f"{other.probability:.3f}",
                             html.escape(" ".join(filter(None, (other.shown, other.why)))))  # fmt: skip
                    body.append(
                        f"<tr style='color:{color}'>"
                        + "".join(f"<td>{cell}</td>" for cell in cells)
                        + "</tr>"
                    )
        names = "".join(f"<th>{name}</th>" for name in ("", "row", "similarity", "probability", ""))
        return f"<table><tr>{names}</tr>{''.join(body)}</table>"


def _line(kind: str, other: Other) -> str:
    words = "  ".join(filter(None, (other.shown, other.why)))
    return (
        f"  {kind} {other.position:>5}  {other.similarity:+.3f}  p {other.probability:.3f}  {words}".rstrip()
    )


def explain_batch(
    queries: Float[Tensor, "n d"] | None = None,
    keys: Float[Tensor, "m d"] | None = None,
    *,
    similarities: Float[Tensor, "n m"] | None = None,
    temperature: float = 0.07,
    positives: Tensor | None = None,
    labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    masks: Mapping[str, Mask | Tensor] | None = None,
    shown: Sequence[str] | None = None,
    key_shown: Sequence[str] | None = None,
    suspect: Mapping[str, Mask | Tensor] | None = None,
    margin: float = 0.0,
    rows: Sequence[int] | None = None,
    k: int = 5,
) -> BatchExplanation:
    """What a contrastive loss sees in a batch, row by row; for any loss, given embeddings or similarities.

    Args:
        queries, keys: embeddings, brought to unit length; without ``keys`` the queries themselves, each without itself.
        similarities: instead of embeddings, a matrix (n, m) of any similarity.
        temperature: by which similarities are divided in the softmax.
        positives: a Boolean matrix (n, m). By default pairs of equal ``labels`` or, without labels, key i of query i.
        labels, key_labels: classes; a missing one (−1) is equal to none.
        masks: what is left out of the negatives, by the reason that is shown: ``{"same text": DuplicateMask(ids)}``; a
            mask of `nearfar.contrast` or a Boolean matrix. Positives always stay in.
        shown, key_shown: a text for each query and key.
        suspect: negatives that may be positives, by reason, as ``masks``: ``{"alike before training":
            SimilarityMask(reference, 0.9)}``.
        margin: a negative is suspect, too, where its similarity exceeds that of the best positive less this margin, as
            GISTEmbed does (Solatorio 2024).
        rows: the queries that are explained; None: all.
        k: the most positives, negatives and left-out keys that are listed of a row.

    Returns:
        A `BatchExplanation`: an ``ExplainedRow`` for each query.

    Raises:
        NearfarError: shapes that do not fit, rows that are not there, a temperature that is not positive.

    >>> x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    >>> explained = explain_batch(x, x.flip(0), shown=["a", "b", "c"], k=1)
    >>> print(explained[0].positives[0].position, explained[0].negatives[0].position, explained[0].negatives[0].why)
    0 2 nearer than the positive
    """
    temperature = number("temperature", temperature, above=0.0)
    k, margin = whole_number("k", k, 1), number("margin", margin)
    given = {"queries": queries, "keys": keys, "similarities": similarities, "positives": positives}
    for name, value in (given | {"labels": labels, "key_labels": key_labels}).items():
        if value is not None:
            instance(name, value, Tensor, "a tensor")
    for name, value in given.items():
        if value is not None and (value.ndim != 2 or not value.numel()):
            raise NearfarError(f"{name} has shape {tuple(value.shape)}; a matrix with rows is needed")
    for name, value in (("labels", labels), ("key_labels", key_labels)):
        if value is not None and value.ndim != 1:
            raise NearfarError(f"{name} has shape {tuple(value.shape)}; one label for each row is needed")
    for name, masks_of in (("masks", masks), ("suspect", suspect)):
        if masks_of is not None:
            mapping(name, masks_of)
    texts_of = {
        name: None if each is None else [str(text) for text in entries(name, each)]
        for name, each in (("shown", shown), ("key_shown", key_shown))
    }
    shown, key_shown = texts_of["shown"], texts_of["key_shown"]
    rows = None if rows is None else whole_numbers("rows", rows).reshape(-1).tolist()
    own = False
    if similarities is None:
        if queries is None:
            raise NearfarError("give queries (and keys), or similarities")
        for name, value in (("queries", queries), ("keys", keys)):
            if value is not None and not value.is_floating_point():
                raise NearfarError(f"{name} are {value.dtype}; embeddings are numbers with a fraction")
        own = keys is None
        x = unit_rows(queries.detach().float())
        y = x if keys is None else unit_rows(keys.detach().float())
        if x.shape[1] != y.shape[1]:
            raise NearfarError(
                f"queries have {x.shape[1]} dimensions and keys {y.shape[1]}: they cannot be compared"
            )
        similarities = x @ y.T
    similarities = similarities.detach().float().cpu()
    if similarities.ndim != 2:
        raise NearfarError(
            f"similarities have shape {tuple(similarities.shape)}; a matrix (queries, keys) is needed"
        )
    n, m = similarities.shape
    itself = torch.eye(n, m, dtype=torch.bool) if own else torch.zeros(n, m, dtype=torch.bool)
    positive = _positives(n, m, own, positives, labels, key_labels) & ~itself
    reasons = {name: _matrix(name, mask, n, m) & ~positive & ~itself for name, mask in (masks or {}).items()}
    suspects = {name: _matrix(name, mask, n, m) for name, mask in (suspect or {}).items()}
    left_out = torch.stack(list(reasons.values())).any(0) if reasons else torch.zeros(n, m, dtype=torch.bool)
    candidate = ~left_out & ~itself
    probability = (similarities / temperature).masked_fill(~candidate, -torch.inf).softmax(dim=1).nan_to_num()
    for name, texts, size in (("shown", shown, n), ("key_shown", key_shown, m)):
        if texts is not None and len(texts) != size:
            raise NearfarError(f"{name} has {len(texts)} texts for {size} rows")
    key_texts = key_shown if key_shown is not None else (shown if n == m else None)
    chosen = range(n) if rows is None else list(rows)
    explained = []
    for i in chosen:
        if not 0 <= i < n:
            raise NearfarError(f"rows: {i} is not there; the batch has rows 0 to {n - 1}")
        best = float(similarities[i][positive[i]].max()) if bool(positive[i].any()) else None

        def why(j: int, i: int = i, best: float | None = best) -> str:
            words = [name for name, matrix in suspects.items() if bool(matrix[i, j])]
            if best is not None and float(similarities[i, j]) > best - margin:
                words.append("nearer than the positive" if margin <= 0 else "as near as the positive")
            return ", ".join(words)

        def masked_by(j: int, i: int = i) -> str:
            return ", ".join(name for name, each in reasons.items() if bool(each[i, j]))

        def listed(which: Tensor, reason: Callable[[int], str], i: int = i) -> list[Other]:
            at = which.nonzero()[:, 0]
            order = at[torch.argsort(similarities[i, at], descending=True, stable=True)][:k].tolist()
            return [
                Other(
                    j,
                    float(similarities[i, j]),
                    float(probability[i, j]),
                    key_texts[j] if key_texts else "",
                    reason(j),
                )
                for j in order
            ]

        explained.append(
            ExplainedRow(
                i,
                listed(positive[i], lambda j: ""),
                listed(candidate[i] & ~positive[i], why),
                listed(
                    left_out[i],
                    masked_by,
                ),
                int(candidate[i].sum()),
                int(left_out[i].sum()),
                shown[i] if shown else "",
            )
        )
    without = int((~positive.any(1)).sum())
    notes = (f"{without} rows have no positive",) if without else ()
    return BatchExplanation(explained, n, m, temperature, notes)


def _matrix(name: str, mask: Mask | Tensor, n: int, m: int) -> Tensor:
    """A mask as a matrix."""
    if not hasattr(mask, "tile"):
        raise NearfarError(
            f"masks, suspect: '{name}' is {shown_value(mask)}; a mask or a Boolean matrix is needed"
        )
    known = as_mask(mask)
    if tuple(known.shape) != (n, m):
        raise NearfarError(f"the mask '{name}' has shape {tuple(known.shape)}; the batch has {n} × {m} pairs")
    return known.tile(slice(0, n), slice(0, m)).cpu()


def _positives(
    n: int, m: int, own: bool, positives: Tensor | None, labels: Tensor | None, key_labels: Tensor | None
) -> Tensor:
    if positives is not None:
        if positives.shape != (n, m) or positives.dtype != torch.bool:
            raise NearfarError(
                f"positives are {tuple(positives.shape)} {positives.dtype}; a Boolean matrix of {n} × {m} is needed, "
                "as similarities (queries, keys) are"
            )
        return positives.cpu()
    if labels is not None:
        rows = whole_labels(labels)
        columns = rows if key_labels is None else whole_labels(key_labels, "key_labels")
        if rows.shape != (n,) or columns.shape != (m,):
            raise NearfarError(
                f"labels and key_labels: there are {len(rows)} and {len(columns)} for {n} × {m} queries and keys"
            )
        return ((rows[:, None] == columns[None]) & (rows[:, None] >= 0)).cpu()
    if own or n != m:
        raise NearfarError(
            "which keys are positives is not known: give labels or positives (without keys, or with more or fewer "
            "keys than queries, no key belongs to a query by its place)"
        )
    return torch.eye(n, dtype=torch.bool)
