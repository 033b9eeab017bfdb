"""Examples for the report of a retrieval system: queries with what was found for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

__all__ = ["retrieval_examples"]

#: how many hits are shown, examples of each kind, and queries looked at for them
HITS, EXAMPLES, LOOKED_AT = 5, 3, 2000
KINDS = ("right", "nearly", "wrong")


def retrieval_examples(
    queries: Float[Tensor, "n d"],
    keys: Float[Tensor, "n d"],
    query: Callable[[int], dict[str, Any]],
    item: Callable[[int], dict[str, Any]],
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Queries whose partner came first (right), up to tenth (nearly) and later (wrong), chosen by ``seed``.

    ``query`` and ``item`` say what is shown of a position: a ``text``, perhaps an ``svg``.

    >>> rows = torch.eye(3)
    >>> found = retrieval_examples(rows, rows, lambda i: {"text": f"q{i}"}, lambda i: {"text": f"k{i}"})
    >>> found[0]["kind"], found[0]["rank"], found[0]["gallery"], found[0]["items"][0]["correct"]
    ('right', 1, 3, True)
    """
    queries, keys = normalize(queries.float(), dim=1), normalize(keys.float(), dim=1)
    order = torch.randperm(len(queries), generator=torch.Generator().manual_seed(seed))
    wanted = dict.fromkeys(KINDS, EXAMPLES)
    found: list[dict[str, Any]] = []
    for at in order[:LOOKED_AT].tolist():
        scores = keys @ queries[at]
        # Ties count by expectation, as in the metrics: among equal scores nothing says which comes first.
        equal = int((scores == scores[at]).sum())
        rank = 1 + int((scores > scores[at]).sum()) + (equal - 1) / 2
        kind = "right" if rank == 1 else "nearly" if rank <= 10 else "wrong"
        if not wanted[kind]:
            continue
        wanted[kind] -= 1
        best = scores.topk(min(HITS, len(scores))).indices.tolist()
        found.append(
            {
                "kind": kind,
                "query": query(at),
                "rank": int(rank) if rank == int(rank) else rank,
                "gallery": len(keys),
                "items": [
                    {"rank": place + 1, "score": float(scores[hit]), "correct": hit == at, **item(hit)}
                    for place, hit in enumerate(best)
                ],
            }
        )
        if not any(wanted.values()):
            break
    return sorted(found, key=lambda example: KINDS.index(example["kind"]))
