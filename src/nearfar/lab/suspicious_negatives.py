"""The negatives of a run that are most likely positives: ``nearfar doctor RUN --false-negatives``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from nearfar.data.files import Json
from nearfar.errors import NearfarError
from nearfar.lab.explain_run import Shown, run_of_views
from nearfar.lab.report import write_page
from nearfar.mining import mine_negatives
from nearfar.models.views import ViewModel
from nearfar.serving.stream import TABLE_ENDINGS, write_rows
from nearfar.systems.view_system import GROUP, PRESENT, ViewSystem
from nearfar.training.checkpoint import find_checkpoint
from nearfar.training.run_folder import RunFolder

__all__ = ["SuspiciousNegative", "suspicious_negatives"]

_EACH = 3  # negatives of one query at most
_BATCH = 256


@dataclass(frozen=True)
class SuspiciousNegative:
    """Two training items that count as negatives of each other: their cosine between the two views, that of the query
    with its own partner, and positions in the training split."""

    views: tuple[str, str]
    query: int
    negative: int
    score: float
    positive_score: float
    text: str = ""

    @property
    def excess(self) -> float:
        """By how much the negative is nearer than the own partner."""
        return self.score - self.positive_score


def suspicious_negatives(
    run: Path,
    output: Path,
    *,
    rows: int = 100,
    checkpoint: str = "best",
    page: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[SuspiciousNegative]:
    """Write the pairs of training items that a run's model holds for nearer than own pairs, to be marked and fed back.

    For each query the nearest items that are no positives and no copies of one are compared with its own partner; of
    all of them those come first that exceed it most. The table has ``query_id``, ``negative_id``, what both show, the
    cosines, and an empty column ``false_negative``: write 1 or yes where the negative is right as well, and train with
    ``exclude=FILE`` (system ``pairs``). A model that has learned its training items by heart suspects little; a run of
    few epochs, or a pretrained model that was not trained (``epochs=1 lr=0``), suspects more.

    Args:
        run: a run of a system whose loss is between views, without classes as positives.
        output: the table; a file that is there is not overwritten, since it may be marked.
        rows: pairs in it at most.
        checkpoint: "best" or "last".
        page: an HTML file with the same pairs, their texts, pictures and drawn molecules.

    Raises:
        NearfarError: a system without such a loss, data that has changed, a file that is there.
    """
    if output.suffix.lower() not in TABLE_ENDINGS:
        raise NearfarError(f"{output}: a table is written as {', '.join(TABLE_ENDINGS)}.")
    if output.exists():
        raise NearfarError(
            f"{output} is there already, and may be marked. Name a different file with --output, or remove it."
        )
    path = find_checkpoint(run, prefer=checkpoint)
    system, model = run_of_views(path, say)
    if system.labels() is not None:
        raise NearfarError(
            f"{RunFolder.of(path)}: its labels say which rows are positives; a label that is wrong is found by "
            "nearfar predict, not here."
        )
    vectors, present = _embedded(system, model)
    copies = {view: _copies(system, view) for view in system.views}
    suspects: list[SuspiciousNegative] = []
    for first, second in system.pairs():
        at = np.flatnonzero(present[first] & present[second])
        if len(at) < 2:
            continue
        mined = mine_negatives(
            vectors[first][at],
            vectors[second][at],
            per_query=_EACH,
            rank_range=(0, _EACH),
            query_texts=[f"{first} {i}" for i in copies[first][at]],
            corpus_texts=[f"{second} {i}" for i in copies[second][at]],
        )
        own = np.einsum("nd,nd->n", vectors[first][at], vectors[second][at])
        asked, place = np.nonzero(mined.negatives >= 0)
        same_query = copies[first][at]
        for i, t in zip(asked.tolist(), place.tolist(), strict=True):
            j = int(mined.negatives[i, t])
            if same_query[i] == same_query[j]:  # the same query twice: its negative is masked as a copy
                continue
            suspects.append(
                SuspiciousNegative(
                    (first, second), int(at[i]), int(at[j]), float(mined.scores[i, t]), float(own[i])
                )
            )
    size = list(range(len(system.splits["train"])))
    shown = {view: Shown(system, view, size) for view in system.views}
    chosen = [
        replace(each, text=_line(shown[each.views[0]](each.query), shown[each.views[1]](each.negative)))
        for each in _most_suspicious(suspects, rows)
    ]
    _write(shown, chosen, output, page, RunFolder.of(path).name)
    above = sum(each.excess > 0 for each in suspects)
    say(
        f"{output}: {len(chosen)} pairs to be marked in the column false_negative; {above} of {len(suspects)} near "
        "negatives are nearer than the query's own partner"
    )
    say(f"feed it back: nearfar train experiment={system.name} … exclude={output}")
    return chosen


def _embedded(
    system: ViewSystem, model: ViewModel
) -> tuple[dict[str, Float[np.ndarray, "n d"]], dict[str, np.ndarray]]:
    """Unit vectors of every view of the training items, and which items have it."""
    dataset, size = system.datasets["train"], len(system.splits["train"])
    parts: dict[str, list[np.ndarray]] = {view: [] for view in system.views}
    present: dict[str, list[np.ndarray]] = {view: [] for view in system.views}
    with torch.no_grad():
        for start in range(0, size, _BATCH):
            positions = list(range(start, min(start + _BATCH, size)))
            batch = dataset.__getitems__(positions)
            embeddings = system.contrasted(system.encode(model, batch))
            for view in system.views:
                rows = torch.nn.functional.normalize(embeddings[view].double(), dim=1)
                parts[view].append(rows.float().numpy())
                known = f"{PRESENT}{view}"
                present[view].append(
                    batch.tensor(known).numpy() if known in batch else np.ones(len(positions), bool)
                )
    return (
        {view: np.concatenate(rows) for view, rows in parts.items()},
        {view: np.concatenate(flags) for view, flags in present.items()},
    )


def _copies(system: ViewSystem, view: str) -> np.ndarray:
    """Numbers that are equal where two training items have the same value of a view."""
    size = len(system.splits["train"])
    field = f"{GROUP}{view}"
    batch = system.datasets["train"].__getitems__(list(range(min(1, size))))
    if field not in batch:
        return np.arange(size)
    groups = system.value_groups(view)
    assert groups is not None
    known = np.asarray(groups["train"])
    return np.where(known >= 0, known, known.max(initial=0) + 1 + np.arange(size))


def _most_suspicious(suspects: list[SuspiciousNegative], rows: int) -> list[SuspiciousNegative]:
    """The first so many by how far they exceed the own partner; two items come once."""
    chosen: dict[tuple[int, int], SuspiciousNegative] = {}
    for each in sorted(suspects, key=lambda suspect: (-suspect.excess, suspect.query, suspect.negative)):
        key = (min(each.query, each.negative), max(each.query, each.negative))
        if key not in chosen:
            chosen[key] = each
        if len(chosen) == rows:
            break
    return list(chosen.values())


def _line(query: Json, negative: Json) -> str:
    first, second = (f"{each['id']} {each['text']}"[:60].strip() for each in (query, negative))
    return f"{first} | {second}"


def _write(
    shown: Mapping[str, Shown], chosen: list[SuspiciousNegative], output: Path, page: Path | None, name: str
) -> None:

    def cells() -> Iterator[Json]:
        for each in chosen:
            first, second = each.views
            query, positive, negative = (
                shown[first](each.query),
                shown[second](each.query),
                shown[second](each.negative),
            )
            yield {
                "query_id": query["id"],
                "negative_id": negative["id"],
                "query": query["text"],
                "positive": positive["text"],
                "negative": negative["text"],
                "score": round(each.score, 4),
                "positive_score": round(each.positive_score, 4),
                "false_negative": "",
            }

    write_rows(list(cells()), output)
    if page is not None:
        pairs = [
            {
                "views": f"{each.views[0]} → {each.views[1]}",
                "query": shown[each.views[0]](each.query),
                "positive": shown[each.views[1]](each.query),
                "negative": shown[each.views[1]](each.negative),
                "score": each.score,
                "positive_score": each.positive_score,
            }
            for each in chosen
        ]
        write_page(
            page, "negatives.html", title=f"{name}: suspicious negatives", table=str(output), pairs=pairs
        )
