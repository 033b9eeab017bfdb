"""One table of names: what data sets call a relation, and the ten relations that they are read as."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from nearfar.errors import NearfarError, nearest_name

__all__ = ["ALL10", "TOP5", "chosen_relations", "relation_of", "table"]

TOP5 = ("on", "above", "under", "next to", "below")
ALL10 = (*TOP5, "left of", "right of", "near", "inside", "outside")

#: relation → the further names under which it goes. Names that also say what is done (`sit on`, `ride`) are not here:
#: they are other words than "where is it".
SYNONYMS: dict[str, tuple[str, ...]] = {
    "on": ("on top of", "on the top of", "atop", "upon"),
    "above": ("over",),
    "under": ("underneath",),
    "next to": ("beside", "adjacent to", "by", "alongside"),
    "below": ("beneath",),
    "left of": ("on the left of", "to the left of", "on left of"),
    "right of": ("on the right of", "to the right of", "on right of"),
    "near": ("near to", "close to", "nearby"),
    "inside": ("in", "inside of", "within"),
    "outside": ("outside of",),
}
_OF = {name: relation for relation, names in SYNONYMS.items() for name in (relation, *names)}


def relation_of(predicate: str, synonyms: bool = True) -> str | None:
    """The relation that a predicate names, None if it names none of the ten.

    Case, underscores and repeated blanks do not count; without ``synonyms`` the ten names alone are known.

    >>> relation_of("On_the left  of"), relation_of("beneath"), relation_of("wear")
    ('left of', 'below', None)
    >>> relation_of("beneath", synonyms=False) is None
    True
    """
    name = " ".join(str(predicate).replace("_", " ").lower().split())
    return _OF.get(name) if synonyms else (name if name in ALL10 else None)


def table() -> list[tuple[str, str]]:
    """(predicate, relation) of every name that is known, in order of the relations."""
    return [(name, relation) for relation, names in SYNONYMS.items() for name in (relation, *names)]


def chosen_relations(option: Any) -> tuple[str, ...]:
    """The classes that ``relations=`` asks for: "top5", "all10", or a list of names of the ten.

    >>> chosen_relations(["under", "on"])
    ('under', 'on')
    >>> chosen_relations("top6")
    Traceback (most recent call last):
    nearfar.errors.NearfarError: relations=top6: top5, all10 or a list such as [on,under] is needed.
    """
    if isinstance(option, str):
        if option not in ("top5", "all10"):
            raise NearfarError(f"relations={option}: top5, all10 or a list such as [on,under] is needed.")
        return TOP5 if option == "top5" else ALL10
    if not isinstance(option, Iterable):
        raise NearfarError(f"relations={option}: top5, all10 or a list such as [on,under] is needed.")
    names: Sequence[str] = [str(name) for name in option]
    for name in names:
        if name not in ALL10:
            raise NearfarError(f"relations: there is no relation '{name}'; {nearest_name(name, ALL10)}")
    if len(set(names)) != len(names) or len(names) < 2:
        raise NearfarError(f"relations={list(names)}: at least two relations, each once, are needed.")
    return tuple(names)
