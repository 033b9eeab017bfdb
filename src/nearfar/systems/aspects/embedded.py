"""A generated set for a first run without data: reviews of phones put together from phrases, labels included.

Half of what is said fits one aspect alone ("drains by noon"), the other half all of them ("could be better"), so that
which saying belongs to which aspect is a question of order too. It shows how the system works. Nothing follows from its
scores.
"""

from __future__ import annotations

import numpy as np

from nearfar.systems.aspects.labels import NEGATIVE, NEUTRAL, POSITIVE
from nearfar.systems.aspects.records import Records

__all__ = ["embedded_records"]

_THINGS = {
    "BATTERY": ("the battery", "battery life", "a full charge"),
    "CAMERA": ("the camera", "every photo", "the lens"),
    "DESIGN": ("the case", "the look of it", "the back cover"),
    "PERFORMANCE": ("the processor", "gaming", "switching apps"),
    "PRICE": ("the price", "what it costs", "the discount"),
    "SCREEN": ("the screen", "the display", "touch"),
    "SERVICE": ("the shop", "the staff", "delivery"),
}
_SAYINGS = {
    POSITIVE: ("is great", "is better than expected", "is not bad at all", "is what I wanted"),
    NEUTRAL: ("is average", "is neither good nor bad", "is as expected", "is all right"),
    NEGATIVE: ("is bad", "could be better", "is not great", "is not what I wanted"),
}
_OWN_SAYINGS = {
    "BATTERY": {POSITIVE: "lasts two days", NEUTRAL: "lasts a day", NEGATIVE: "drains by noon"},
    "CAMERA": {POSITIVE: "came out sharp", NEUTRAL: "is usable by day", NEGATIVE: "came out blurred"},
    "DESIGN": {POSITIVE: "feels solid", NEUTRAL: "looks like any other", NEGATIVE: "scratches at once"},
    "PERFORMANCE": {POSITIVE: "runs smoothly", NEUTRAL: "takes a moment", NEGATIVE: "lags and freezes"},
    "PRICE": {POSITIVE: "is a bargain", NEUTRAL: "is in the usual range", NEGATIVE: "is too high"},
    "SCREEN": {POSITIVE: "shows rich colours", NEUTRAL: "is readable indoors", NEGATIVE: "flickers"},
    "SERVICE": {POSITIVE: "was friendly", NEUTRAL: "took the stated time", NEGATIVE: "never answered"},
}
_BETWEEN = ("", "", ", to be honest,", " of this phone", " for me")
_JOINS = (", ", ". ", " and ", " but ", "; ", "... ")
_FILLERS = (
    "bought it last week",
    "second phone of this kind",
    "writing after a month",
    "ok",
    "for my mother",
    "hm",
)


def embedded_records(n: int = 4000, seed: int = 0) -> tuple[Records, list[str]]:
    """``n`` different reviews and the aspects that they speak of; the same for the same ``n`` and ``seed``."""
    rng = np.random.default_rng(seed)
    aspects = sorted(_THINGS)
    share = np.linspace(1.0, 0.2, len(aspects))
    texts: dict[str, dict[str, int]] = {}
    while len(texts) < n:
        count = 1 + int(rng.integers(4))
        chosen = rng.choice(len(aspects), size=count, replace=False, p=share / share.sum())
        labels: dict[str, int] = {}
        parts = [_one(rng, _FILLERS)] if rng.random() < 0.5 else []
        for a in chosen:
            aspect = aspects[a]
            code = int(rng.choice([POSITIVE, NEUTRAL, NEGATIVE], p=[0.55, 0.1, 0.35]))
            thing, between, said = (_one(rng, some) for some in (_THINGS[aspect], _BETWEEN, _SAYINGS[code]))
            if rng.random() < 0.5:
                said = _OWN_SAYINGS[aspect][code]
            parts.append(f"{thing}{between} {said}")
            labels[aspect] = code
        text = parts[0]
        for part in parts[1:]:
            text += _one(rng, _JOINS) + part
        texts.setdefault(text, labels)
    return (
        Records(
            "embedded",
            list(texts),
            list(texts.values()),
            [str(i) for i in range(n)],
            n,
            "generated",
        ),
        aspects,
    )


def _one(rng: np.random.Generator, some: tuple[str, ...]) -> str:
    return some[int(rng.integers(len(some)))]
