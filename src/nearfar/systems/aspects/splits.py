"""Splits that share no text: what stands twice is taken out, and what is held out is drawn by text."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from nearfar.errors import NearfarError
from nearfar.systems.aspects.records import AspectSplit, text_key

__all__ = ["hold_out", "separate"]


def separate(parts: dict[str, AspectSplit]) -> dict[str, int]:
    """Take texts that stand twice out of ``parts``, in place: train gives way to val and test, val to test; of copies
    in train with the same labels one stays. Official val and test rows stay as they are."""
    keys = {name: [text_key(text) for text in split.texts] for name, split in parts.items()}
    left_out: dict[str, int] = {}
    for name, others in (("train", ("val", "test")), ("val", ("test",))):
        if name not in parts:
            continue
        taken = set().union(*(keys[other] for other in others if other in keys))
        crossing = np.array([key in taken for key in keys[name]], dtype=bool)
        repeated = np.zeros(len(crossing), dtype=bool)
        if name == "train":
            seen: set[tuple[str, bytes]] = set()
            for i, key in enumerate(keys[name]):
                content = (key, parts[name].codes[i].tobytes())
                repeated[i] = content in seen
                seen.add(content)
        for words, which in (
            (f"{name}, its text also stands in {' or '.join(o for o in others if o in keys)}", crossing),
            (f"{name}, the same text and labels again", repeated & ~crossing),
        ):
            if which.any():
                left_out[words] = int(which.sum())
        kept = np.flatnonzero(~crossing & ~repeated)
        if not len(kept):
            raise NearfarError(f"every text of {name} also stands in another split: nothing is left of it.")
        parts[name] = parts[name].take(kept, name)
        keys[name] = [keys[name][i] for i in kept]
    return left_out


def hold_out(split: AspectSplit, fraction: float, name: str, seed: int) -> tuple[AspectSplit, AspectSplit]:
    """Two parts that share no text, drawn by ``seed``; copies of a text stay together."""
    keys = [text_key(text) for text in split.texts]
    distinct = sorted(set(keys))
    out = max(1, round(fraction * len(distinct)))
    if len(distinct) - out < 2:
        raise NearfarError(
            f"{split.source} has {len(distinct)} different texts: too few to hold {out} of them out as {name}."
        )
    drawn: Int[ndarray, " n"] = np.random.default_rng([seed, len(distinct)]).permutation(len(distinct))[:out]
    chosen = {distinct[i] for i in drawn}
    held = np.array([key in chosen for key in keys])
    return split.take(np.flatnonzero(~held), split.name), split.take(np.flatnonzero(held), name)
