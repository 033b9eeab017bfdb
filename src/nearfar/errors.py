"""What nearfar raises when the user can mend it: what was wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["NearfarError", "nearest_name"]


class NearfarError(ValueError):
    """Bad input or a promise that cannot be kept.

    The command line prints its text without a traceback; in a notebook it is a plain ``ValueError``.
    """


def nearest_name(word: str, names: Iterable[str]) -> str:
    """A half sentence that offers the known name closest to ``word``, or lists what there is.

    >>> nearest_name("hard_rato", ["hard_ratio", "hardness_k", "lr"])
    "did you mean 'hard_ratio'?"
    >>> nearest_name("zzz", ["hard", "random"])
    'known: hard, random'
    """
    known = sorted(set(names))
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return "known: " + ", ".join(known)
