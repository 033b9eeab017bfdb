"""What a served run is asked, without HTTP: descriptions, and work on many values at once for the batcher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

from nearfar.data.files import Json
from nearfar.data.items import Column, Items
from nearfar.errors import NearfarError, nearest_name
from nearfar.serving.gallery import Gallery
from nearfar.serving.messages import DecodedPair, Description, ServedView, plain
from nearfar.terminal import metric_words

if TYPE_CHECKING:
    from nearfar.serving.limits import Limits
    from nearfar.serving.trained import Trained

__all__ = ["FORMS", "PAIR", "Asked", "EmbedKey", "PredictKey", "SearchKey", "Service"]

#: how a value of each kind of tower is sent. Of other kinds nobody here knows whether a text would be the name of a
#: file, so that numbers alone are taken.
FORMS = {"text": "text", "molecule": "text", "image": "picture", "crops": "pair"}
#: kinds whose values are parts of two objects in a photo, and the column that asks for these
_PAIR_KINDS, PAIR = ("crops", "boxes", "names"), "pair"
#: columns of predictions that repeat what was asked
_NOT_SHOWN = ("id", "image", "photo", "subject_box", "object_box")


class EmbedKey(NamedTuple):
    """Values of this view are embedded together."""

    view: str


class SearchKey(NamedTuple):
    """Queries of this view that look for the same are answered together."""

    view: str
    target: str
    where: tuple[str, ...]


class PredictKey(NamedTuple):
    """Items with these columns are predicted together."""

    columns: tuple[str, ...]


class Asked(NamedTuple):
    """A value to search with, and how many hits are wanted."""

    value: object
    k: int


class Service:
    """A trained run and a gallery, asked for many things at a time.

    ``work`` is what the batcher runs: an answer, or a reason why there is none, for each value.
    """

    def __init__(self, trained: Trained, gallery: Gallery | None = None) -> None:
        self.trained, self.gallery = trained, gallery
        self.kinds = {view: trained.kind(view) for view in trained.views}
        self.forms = {
            view: FORMS.get(kind, "numbers") for view, kind in self.kinds.items() if kind != "names"
        }
        self.columns = self._columns()

    def _columns(self) -> dict[str, str]:
        """The columns that a prediction is made from, with their forms; none where the run predicts nothing."""
        system = self.trained.system
        if not system.defines("predictions"):
            return {}
        if "crops" in self.kinds.values() or "boxes" in self.kinds.values():
            return {PAIR: "pair"}
        return {name: self.forms.get(name, "picture") for name in system.predicts_from() or ("image",)}

    def complete(self, columns: Mapping[str, Sequence[object]]) -> list[str]:
        """The names of the columns of a request, once it is known that a prediction can be made from them."""
        for name in columns:
            if name not in self.columns:
                raise NearfarError(f"there is no column '{name}'; {nearest_name(name, self.columns)}")
        lengths = {name: len(values) for name, values in columns.items()}
        if len(set(lengths.values())) > 1:
            raise NearfarError(f"the columns differ in their number of values: {lengths}")
        if not next(iter(lengths.values())):
            raise NearfarError("a column has no values")
        return list(columns)

    # -- what there is ---------------------------------------------------------------------------------------
    def view(self, name: str | None, form: str | None = None) -> str:
        """The view that is named, or the only one whose values have this form.

        Raises:
            NearfarError: no such view, or several that could be meant; it names what there is.
        """
        views = list(self.forms)
        if not views:
            raise NearfarError(
                f"a run of '{self.trained.config.system}' embeds nothing; it predicts: /predict"
            )
        if name is not None:
            if name not in views:
                raise NearfarError(f"there is no view '{name}'; {nearest_name(name, views)}")
            return name
        fitting = [view for view in views if form is None or self.forms[view] == form]
        if len(fitting) != 1:
            known = ", ".join(f"'{view}' ({self.forms[view]})" for view in views)
            raise NearfarError(f"say which view is meant, as tower; there are {known}")
        return fitting[0]

    def target(self, name: str | None, view: str) -> str:
        """The view of the gallery that is searched: the one that is named, or the first that is not the query's."""
        if self.gallery is None:
            raise NearfarError("nothing is here to search in: start the server with --gallery DATA")
        targets = self.gallery.targets
        if name is None:
            return next((target for target in targets if target != view), targets[0])
        if name not in targets:
            raise NearfarError(f"the gallery has no view '{name}'; {nearest_name(name, targets)}")
        return name

    def describe(self, limits: Limits) -> Description:
        """What is served, for the page and for programs."""
        trained, gallery = self.trained, self.gallery
        about = trained.describe()
        views = {
            view: ServedView(kind=trained.kind(view), form=form, tower=str(about["views"][view]["tower"]))
            for view, form in self.forms.items()
        }
        targets = gallery.targets if gallery is not None else []
        return Description(
            name=trained.name,
            system=trained.config.system,
            views=views,
            dim=trained.dim if views else None,
            searches=[(view, target) for view in self.forms for target in targets],
            predicts=self.columns,
            gallery=0 if gallery is None else len(gallery),
            gallery_source=None if gallery is None else gallery.source,
            slides=[] if gallery is None else gallery.slides,
            columns=[] if gallery is None else list(gallery.others),
            named_pairs="names" in self.kinds.values(),
            results=_results(about.get("results", {})),
            limits={name: float(value) for name, value in vars(limits).items()},
        )

    # -- work ------------------------------------------------------------------------------------------------
    def work(self, key: EmbedKey | SearchKey | PredictKey, values: list[object]) -> Sequence[object]:
        """An answer for each value, or the exception that says why there is none."""
        if isinstance(key, EmbedKey):
            return self._embedded(key.view, values)
        if isinstance(key, SearchKey):
            return self._searched(key, cast(list[Asked], values))
        return self._predicted(key, cast(list[tuple[object, ...]], values))

    def _embedded(self, view: str, values: Sequence[object]) -> Sequence[np.ndarray | NearfarError]:
        reasons = self.trained.check(values, view)
        good = [value for value, reason in zip(values, reasons, strict=True) if reason is None]
        vectors = iter(self.trained.vectors(good, view) if good else ())
        return [
            next(vectors)
            if reason is None
            else NearfarError(f"this value cannot be read as '{view}': {reason}")
            for reason in reasons
        ]

    def _searched(self, key: SearchKey, queries: Sequence[Asked]) -> list[object]:
        assert self.gallery is not None
        vectors = self._embedded(key.view, [query.value for query in queries])
        good = {i: vector for i, vector in enumerate(vectors) if not isinstance(vector, NearfarError)}
        answers: list[object] = list(vectors)
        if good:
            k = max(queries[i].k for i in good)
            matches = self.gallery.search(np.stack(list(good.values())), k, key.target, key.where)
            for i, each in zip(good, matches, strict=True):
                answers[i] = each[: queries[i].k]
        return answers

    def _predicted(self, key: PredictKey, rows: Sequence[tuple[object, ...]]) -> list[object]:
        if not self.forms:
            return self._boxes([row[0] for row in rows])
        columns = {name: [row[at] for row in rows] for at, name in enumerate(key.columns)}
        if PAIR in columns:
            columns = self._views_of(cast(list[DecodedPair], columns[PAIR]))
        answers: list[object] = [None] * len(rows)
        for name in columns.keys() & self.kinds.keys():
            for i, reason in enumerate(self.trained.check(columns[name], name)):
                if reason is not None and answers[i] is None:
                    answers[i] = NearfarError(f"this value cannot be read as '{name}': {reason}")
        good = [i for i, answer in enumerate(answers) if answer is None]
        if good:
            ids = [str(number) for number in range(len(good))]
            chosen: dict[str, Column] = {name: [values[i] for i in good] for name, values in columns.items()}
            predictions = self.trained.predict(Items(ids, chosen, "the values"))
            if predictions.ids != ids:
                raise NearfarError(f"an item cannot be read; {predictions.rejections.summary()}")
            for i, row in zip(good, predictions, strict=True):
                answers[i] = {name: plain(value) for name, value in row.items() if name not in _NOT_SHOWN}
        return answers

    def _boxes(self, pictures: Sequence[object]) -> list[object]:
        """For each picture the boxes of a detector: left, top, right and bottom in pixels, score and label."""
        every: dict[str, list[Json]] = {str(number): [] for number in range(len(pictures))}
        for row in self.trained.predict(list(pictures)):
            left, top = float(row["left"]), float(row["top"])
            box = [left, top, left + float(row["width"]), top + float(row["height"])]
            every[row["id"]].append(
                {"box": plain(box), "score": plain(row["score"]), "label": plain(row["category"])}
            )
        return [{"boxes": boxes} for boxes in every.values()]

    def _views_of(self, pairs: Sequence[DecodedPair]) -> dict[str, list[object]]:
        """Two objects in a photo as the values of each view that reads a part of them."""
        if "names" in self.kinds.values() and any(pair.names is None for pair in pairs):
            raise NearfarError(
                'this run reads the names of both objects, too: {"names": ["cup", "table"], …}'
            )
        parts: dict[str, Callable[[DecodedPair], object]] = {
            "crops": lambda pair: (pair.pixels, pair.first, pair.second),
            "boxes": lambda pair: [*pair.first, *pair.second, pair.pixels.shape[1], pair.pixels.shape[0]],
            "names": lambda pair: pair.names,
        }
        return {
            view: [parts[kind](pair) for pair in pairs]
            for view, kind in self.kinds.items()
            if kind in _PAIR_KINDS
        }


def _results(metrics: Json) -> Json:
    """The monitored estimate of a run's ``metrics.json``, of test where there is one."""
    splits = metrics.get("splits", {})
    split = next((name for name in ("test", "val") if name in splits), None)
    monitor = metrics.get("monitor")
    if split is None or monitor not in splits[split]:
        return {}
    estimate = splits[split][monitor]
    kept = {name: plain(estimate.get(name)) for name in ("value", "low", "high", "chance", "n", "gallery")}
    return {"split": split, "metric": monitor, "words": metric_words(str(monitor)), **kept}
