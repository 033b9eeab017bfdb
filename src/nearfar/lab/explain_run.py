"""A batch of a run, explained row by row under the run's weights: ``nearfar doctor RUN --batch N``."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import torch

from nearfar.contrast import DuplicateMask, Mask, SimilarityMask
from nearfar.contrast.masks import as_mask
from nearfar.data.files import Json
from nearfar.errors import NearfarError
from nearfar.lab.report import write_page
from nearfar.losses.explain import BatchExplanation, explain_batch
from nearfar.losses.views import ViewLoss
from nearfar.models.views import ViewModel
from nearfar.serving.shown import as_picture, shown_value
from nearfar.systems import build_system
from nearfar.systems.view_system import ViewSystem
from nearfar.training.batches import LIKELY_FALSE_NEGATIVE
from nearfar.training.checkpoint import Checkpoint, find_checkpoint
from nearfar.training.run_folder import RunFolder
from nearfar.training.state import initial_model, load_weights

__all__ = ["ExplainedBatch", "Shown", "explain_run", "explained_batch", "run_of_views"]


@dataclass
class ExplainedBatch:
    """A batch of a run, explained for each two views; ``pairs`` has the same rows as a page shows them."""

    title: str
    about: str
    batches: int
    explained: dict[str, BatchExplanation] = field(default_factory=dict)
    pairs: list[Json] = field(default_factory=list)


def explain_run(
    run: Path,
    batch: int,
    *,
    rows: int | None = 8,
    k: int = 3,
    checkpoint: str = "last",
    page: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, BatchExplanation]:
    """A batch of the epoch that a run's checkpoint is in, for each two views that are contrasted.

    Args:
        run: a run of a system of views (pairs, labels, augmented, molecules, …).
        batch: its number in the epoch, from 1.
        rows: how many of its first rows are explained; None: all.
        k: positives, negatives and left-out rows that are listed of each.
        checkpoint: "last" or "best".
        page: an HTML file that is written with the same rows, their texts, pictures and drawn molecules; it stands
            alone.

    Raises:
        NearfarError: a system whose loss is not between views, a number beyond the epoch, data that has changed.
    """
    answer = explained_batch(
        run, batch, rows=rows, k=k, checkpoint=checkpoint, pictures=page is not None, say=say
    )
    if page is not None:
        write_page(page, "batch.html", title=answer.title, about=answer.about, pairs=answer.pairs)
        say(f"written: {page}")
    return answer.explained


def explained_batch(
    run: Path,
    batch: int,
    *,
    rows: int | None = 8,
    k: int = 3,
    checkpoint: str = "last",
    pictures: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> ExplainedBatch:
    """As `explain_run`, with what a page shows of it; ``pictures`` False: without texts and pictures."""
    path = find_checkpoint(run, prefer=checkpoint)
    folder, state = RunFolder.of(path), Checkpoint.load(path)
    system, model = run_of_views(path, say)
    sampler = system.build_sampler()
    # At the end of an epoch the state is that of the next, whose batches nobody has trained on yet.
    epoch = max(0, state.epoch - (state.batches == 0))
    system.on_epoch(epoch, sampler, lambda _: None)
    if not 1 <= batch <= len(sampler):
        raise NearfarError(f"batch {batch}: an epoch of this run has the batches 1 to {len(sampler)}.")
    positions = next(islice(iter(sampler), batch - 1, None))
    dataset = system.datasets["train"]
    dataset.set_epoch(epoch)
    say(f"batch {batch} of epoch {epoch + 1}: {len(positions)} rows; weights of {path.name}, without dropout")
    with torch.no_grad():
        fields = dataset.__getitems__(list(positions))
        embeddings = system.encode(model, fields)
        context = system.context(embeddings, fields)
        scale = model.scale()
    temperature = 1 / float(scale) if scale is not None else float(system.config.temperature)
    first_rows = None if rows is None else range(min(rows, len(positions)))
    answer = ExplainedBatch(
        f"{folder.name}, batch {batch} of epoch {epoch + 1}",
        f"{len(positions)} rows under the weights of {path.name}, without dropout.",
        len(sampler),
    )
    views = system.contrasted(embeddings)
    for first, second in system.pairs():
        masks: dict[str, Mask | torch.Tensor] = {}
        if context.mask_duplicates:
            for view in dict.fromkeys((first, second)):
                if view in context.groups:
                    masks[f"same {view}"] = DuplicateMask(context.groups[view])
        suspects: dict[str, Mask | torch.Tensor] = {}
        guide = context.guide(first, second)
        if guide is not None and not guide.soft:
            masks["as near as the own, says the guide"] = guide
        if context.reference is not None:
            if context.threshold is not None:
                masks[f"alike before training (from {context.threshold:g})"] = SimilarityMask(
                    context.reference, context.threshold
                )
            else:
                suspects["alike before training"] = SimilarityMask(context.reference, LIKELY_FALSE_NEGATIVE)
        whole = [context.present[view] for view in (first, second) if view in context.present]
        at = torch.arange(len(positions)) if not whole else torch.stack(whole).all(0).nonzero()[:, 0]
        if len(at) < len(positions):
            masks = {name: _some(mask, at) for name, mask in masks.items()}
            suspects = {name: _some(mask, at) for name, mask in suspects.items()}
        texts = {view: _texts(system, view, [positions[i] for i in at.tolist()]) for view in (first, second)}
        pair = f"{first} → {second}"
        explained = answer.explained[pair] = explain_batch(
            views[first][at],
            views[second][at],
            temperature=temperature,
            labels=None if context.labels is None else context.labels[at],
            masks=masks,
            suspect=suspects,
            shown=texts[first],
            key_shown=texts[second],
            rows=None if first_rows is None else [i for i in first_rows if i < len(at)],
            k=k,
        )
        if pictures:
            known = [positions[i] for i in at.tolist()]
            answer.pairs.append(
                _pair(pair, explained, *(Shown(system, view, known) for view in (first, second)))
            )
    if not answer.explained:
        raise NearfarError(f"{folder}: no two views are contrasted.")
    return answer


def run_of_views(path: Path, say: Callable[[str], None]) -> tuple[ViewSystem, ViewModel]:
    """The system of a checkpoint with its data, and its model in evaluation mode.

    Raises:
        NearfarError: a system whose loss is not between views, data that has changed.
    """
    folder = RunFolder.of(path)
    system = build_system(folder.config(), saved=True)
    if not isinstance(system, ViewSystem) or not isinstance(system.loss, ViewLoss):
        raise NearfarError(
            f"{folder}: the loss of '{system.name}' is not one between views, so that its negatives are not listed. "
            "In Python: nearfar.losses.explain_batch takes any embeddings or similarities."
        )
    state = Checkpoint.load(path)
    system.prepare(say)
    if system.layout()["data_hash"] != state.data_hash:
        raise NearfarError(
            f"{folder}: its data has changed since it was trained; the batch would be a different one."
        )
    model = initial_model(system, system.config.seed)
    load_weights(model, state, system, str(path))
    return system, model.eval()


class Shown:
    """What rows of a batch show in one view: id, text, and the address of a picture that is part of the page."""

    def __init__(self, system: ViewSystem, view: str, positions: Sequence[int]) -> None:
        self.items, self.view, self.positions = system.splits["train"], view, positions
        self.tower = system.towers[view]
        self._known: dict[int, Json] = {}

    def __call__(self, row: int) -> Json:
        if row not in self._known:
            at = self.positions[row]
            value = self.items[self.view][at]
            about = shown_value(value, self.tower, "")
            picture = None
            if "url" in about:
                try:
                    media, content = as_picture(value, self.tower)
                    picture = f"data:{media};base64,{base64.b64encode(content).decode()}"
                except (NearfarError, OSError) as error:
                    about["text"] = f"{about.get('text') or ''} (no picture: {error})"
            self._known[row] = {"id": self.items.ids[at], "text": about.get("text") or "", "picture": picture}
        return self._known[row]


def _pair(name: str, explained: BatchExplanation, query: Shown, key: Shown) -> Json:
    """What the page shows of two views."""
    rows = [
        {
            "position": row.position,
            "candidates": row.candidates,
            "masked": row.masked,
            "p_positive": row.p_positive,
            "shown": query(row.position),
            **{
                kind: [asdict(other) | {"shown": key(other.position)} for other in others]
                for kind, others in (
                    ("positives", row.positives),
                    ("negatives", row.negatives),
                    ("left_out", row.left_out),
                )
            },
        }
        for row in explained
    ]
    about = {"queries": explained.queries, "keys": explained.keys, "temperature": explained.temperature}
    return {
        "name": name,
        "rows": rows,
        "notes": explained.notes,
        "likely_false": explained.likely_false,
    } | about


def _some(mask: Mask | torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    known = as_mask(mask)
    n, m = known.shape
    return known.tile(slice(0, n), slice(0, m))[at][:, at]


def _texts(system: ViewSystem, view: str, positions: list[int]) -> list[str]:
    """What a row shows in one line: its id and text."""
    items = system.splits["train"]
    texts = []
    for position in positions:
        shown = str(system.shown("train", view, position).get("text", ""))
        texts.append(f"{items.ids[position]}: {shown}"[:100])
    return texts
