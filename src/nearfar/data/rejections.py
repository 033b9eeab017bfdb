"""Rows that were turned away: counted by reason, with the first few of each kept as evidence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from nearfar.data.files import Json

__all__ = ["Rejection", "Rejections"]


@dataclass(frozen=True)
class Rejection:
    """One row that was not used: where it stood, what it held, and what exactly was wrong with it."""

    row: int | None
    value: str
    detail: str

    def as_dict(self) -> dict[str, object]:
        return {"row": self.row, "value": self.value, "detail": self.detail}


@dataclass
class Rejections:
    """A tally of rejected rows. Every row is counted; only the first ``keep`` of each reason are kept.

    >>> seen = Rejections(keep=1)
    >>> seen.add("empty text", row=7)
    >>> seen.add("empty text", row=9)
    >>> seen.add("unparsable SMILES", row=12, value="C1CC", detail="unclosed ring")
    >>> len(seen)
    3
    >>> print(seen.summary())
    3 rows rejected: empty text 2 (first: row 7), unparsable SMILES 1 (first: row 12 'C1CC', unclosed ring)
    """

    keep: int = 5
    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, list[Rejection]] = field(default_factory=dict)

    def add(self, reason: str, row: int | None = None, value: object = "", detail: str = "") -> None:
        """Count one rejected row under ``reason``; ``row`` is its line (or row number) in the source."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        kept = self.first.setdefault(reason, [])
        if len(kept) < self.keep:
            kept.append(Rejection(row, shorten(value), shorten(detail)))

    def shift(self, by: int) -> None:
        """Row numbers that were counted from the beginning of a part become those of the whole."""
        for reason, kept in self.first.items():
            self.first[reason] = [
                each if each.row is None else replace(each, row=each.row + by) for each in kept
            ]

    def extend(self, other: Rejections) -> None:
        """Take over what ``other`` counted, as when several stages read the same file."""
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            kept = self.first.setdefault(reason, [])
            kept.extend(other.first[reason][: max(0, self.keep - len(kept))])

    def clear(self) -> None:
        """Forget all rows, once they were taken over."""
        self.counts.clear()
        self.first.clear()

    def named(self, prefix: str) -> Rejections:
        """The same with ``prefix`` before every reason, where rows of several sources are counted together."""
        counts = {f"{prefix}{reason}": count for reason, count in self.counts.items()}
        first = {f"{prefix}{reason}": list(kept) for reason, kept in self.first.items()}
        return Rejections(self.keep, counts, first)

    @property
    def total(self) -> int:
        """All rejected rows."""
        return sum(self.counts.values())

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[str]:
        return iter(self.counts)

    def as_dict(self) -> dict[str, object]:
        """The JSON form that ``dataset_layout.json`` holds."""
        return {
            "total": self.total,
            "by_reason": dict(self.counts),
            "first": {reason: [kept.as_dict() for kept in rows] for reason, rows in self.first.items()},
        }

    @classmethod
    def from_dict(cls, saved: Json, keep: int = 5) -> Rejections:
        """What `as_dict` wrote."""
        first = {reason: [Rejection(**row) for row in rows] for reason, rows in saved["first"].items()}
        return cls(keep, dict(saved["by_reason"]), first)

    def summary(self) -> str:
        """One line for a log or an error message."""
        if not self.counts:
            return "no row rejected"
        parts = []
        for reason, count in sorted(self.counts.items(), key=lambda item: -item[1]):
            example = self.first[reason][0] if self.first[reason] else None
            parts.append(f"{reason} {count}" + _first_words(example))
        noun = "row" if len(self) == 1 else "rows"
        return f"{len(self)} {noun} rejected: " + ", ".join(parts)


def _first_words(example: Rejection | None) -> str:
    if example is None or (example.row is None and not example.value):
        return ""
    where = "" if example.row is None else f"row {example.row}"
    value = f"'{example.value}'" if example.value else ""
    words = " ".join(part for part in (where, value) if part)
    return f" (first: {words}" + (f", {example.detail})" if example.detail else ")")


def shorten(value: object, limit: int = 120) -> str:
    """``value`` on one line and no longer than ``limit`` characters."""
    line = " ".join(str(value).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
