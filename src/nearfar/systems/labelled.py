"""Items with one view, judged by labels: leave-one-out retrieval, the vote of neighbours, and a linear probe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.config.views import LabelledOptions
from nearfar.data.batch import Batch, ItemDataset
from nearfar.data.cache import content_key
from nearfar.data.classes import Classes, Labels, class_codes, item_labels
from nearfar.data.embedded import digit_items
from nearfar.data.files import Json
from nearfar.data.items import Items, hold_out
from nearfar.data.sources import read_splits, split_sources
from nearfar.errors import NearfarError, nearest_name
from nearfar.metrics import Estimate, paired_difference
from nearfar.models.known_classes import ClassNames, KnownClasses, LabelledGallery
from nearfar.models.probes import LinearProbe
from nearfar.models.views import HeadKind, ViewModel, build_head
from nearfar.systems.class_scores import Scores, answer_scores, raw_values, retrieval_scores
from nearfar.systems.view_system import ViewSystem
from nearfar.towers import Tower, build_tower, guess_tower
from nearfar.training.evaluation import consecutive
from nearfar.training.sections import Section, Table
from nearfar.training.system import Comparison, Evaluation, Say, collect

__all__ = ["LabelledSystem"]

#: whose embedded training rows are kept
TRAINED = "trained"
#: columns that hold labels unless label= names one, and those that are no view
LABEL_NAMES = ("label", "labels", "class", "classes", "target")
NO_VIEWS = (*LABEL_NAMES, "id", "ids", "index", "split", "group")
#: the group of options that holds the encoder of a kind of tower
ENCODER_OPTIONS = {"text": "text_encoder", "image": "image_encoder"}


class LabelledSystem(ViewSystem):
    """One view of each item. Embeddings are judged by labels: R@1 and MAP@R with each item left out of its gallery;
    finally also the vote of the nearest training items and logistic regression on the training embeddings, beside the
    raw values (pixels, TF-IDF, numbers)."""

    config: LabelledOptions
    monitor = "R@1"
    #: whether items without a label are of no use
    needs_labels = True
    #: whether an item may have several labels
    several = False

    def __init__(self, config: LabelledOptions) -> None:
        super().__init__(config)
        self.view = ""
        self.label: str | None = None
        self.classes: Classes | None = None
        self._plain_train: ItemDataset | None = None
        self._train_rows: dict[str, Tensor] = {}
        self._embedded_by = ""  # hash of the weights that the training rows were embedded with
        self._probes: dict[str, LinearProbe] = {}
        self._raw: tuple[str, dict[str, Tensor]] | None = None
        self._raw_scores: dict[str, Scores] = {}
        self._columns: dict[str, dict[str, dict[str, Estimate]]] = {}
        self._hashes: dict[str, str] = {}
        #: of a run that was loaded: its classes, and the embedded training items that say the class of new ones
        self._names: ClassNames | None = None
        self._known: KnownClasses | None = None

    # -- data ------------------------------------------------------------------------------------------------
    def load_items(self, say: Say) -> dict[str, Items]:
        config, data = self.config, self.config.data
        if data.train is None and data.dir is None:
            say("data: the embedded digits; give data.dir= or data.train= for your own")
            splits = hold_out(digit_items(), {"val": 0.1, "test": 0.2}, data.split_seed)
        else:
            sources = split_sources(data.dir, data.train, data.val, data.test)
            judged = "val" in sources or "test" in sources
            splits = read_splits(
                sources,
                [config.view, config.label] if config.view and config.label else None,
                fractions={"val": data.val_fraction, "test": 0.0 if judged else data.test_fraction},
                seed=data.split_seed,
                id_column=data.id_column,
                group_column=data.group_column,
                encoding=data.encoding,
                encoding_option="data.encoding",
                naming="view=NAME and label=NAME",
            )
        if data.limit is not None and data.limit < len(splits["train"]):
            drawn = np.random.default_rng([data.split_seed, 1]).permutation(len(splits["train"]))
            say(f"train: {data.limit:,} of {len(splits['train']):,} items (data.limit)")
            splits["train"] = _kept(splits["train"], np.sort(drawn[: data.limit]))
        self._choose_columns(splits["train"], say)
        if self.label is None:
            return splits
        labels = {name: self._labels_of(items) for name, items in splits.items()}
        if self.needs_labels:
            for name, items in splits.items():
                reasons = [None if each else f"{self.label}: missing" for each in labels[name]]
                splits[name] = items.rejecting(self.label, reasons)
                if not len(splits[name]):
                    raise NearfarError(
                        f"{items.source}: no item of {name} has a label in the column '{self.label}'."
                    )
        return self.divide(splits, say)

    def divide(self, splits: dict[str, Items], say: Say) -> dict[str, Items]:
        """The splits as they are used, once every item has its label."""
        return splits

    def _labels_of(self, items: Items) -> list[Labels]:
        assert self.label is not None
        return item_labels(items[self.label], self.label, self.config.data.separator)

    def _choose_columns(self, train: Items, say: Say) -> None:
        config, names = self.config, list(train.columns)
        for option, name in (("view", config.view), ("label", config.label)):
            if name is not None and name not in train:
                raise NearfarError(
                    f"{option}={name}: {train.source} has no such column; {nearest_name(name, names)}"
                )
        usual = [name for name in names if name.casefold() in LABEL_NAMES and name != config.view]
        self.label = config.label or (usual[0] if len(usual) == 1 else None)
        if self.label is None and self.needs_labels:
            raise NearfarError(
                f"{train.source} has the columns {', '.join(names) or 'none'}: say which holds the labels, label=NAME."
            )
        others = {str(config.data.id_column), str(config.data.group_column), self.label}
        views = [name for name in names if name.casefold() not in NO_VIEWS and name not in others]
        if config.view is None and len(views) != 1:
            raise NearfarError(
                f"{train.source} has the columns {', '.join(names) or 'none'}: say which is embedded, view=NAME."
            )
        self.view = config.view or views[0]
        say(f"view: {self.view}" + (f"; labels: {self.label}" if self.label else "; no labels"))

    def build_towers(self, say: Say) -> dict[str, Tower]:
        own = dict(self.config.tower)
        kind = str(own.pop("tower", None) or guess_tower(self.splits["train"][self.view]))
        options: Json = {}
        if kind in ENCODER_OPTIONS and "encoder" not in own:
            options = dict(getattr(self.config, ENCODER_OPTIONS[kind]))
            options["encoder"] = options.pop("kind")
            if "name" in options:  # as the options of other systems call it
                options["model"] = options.pop("name")
        return {self.view: build_tower(kind, f"the tower of '{self.view}'", **(options | own))}

    def fit_towers(self) -> None:
        super().fit_towers()
        if self.label is None:
            return
        labels = {name: self._labels_of(items) for name, items in self.splits.items()}
        self.classes = class_codes(labels, self.several)
        self.check_classes(self.classes)

    def check_classes(self, classes: Classes) -> None:
        """Classes that nothing can be learned from are an error."""

    def prepare(self, say: Say) -> None:
        super().prepare(say)
        train = self.datasets["train"]
        self._plain_train = ItemDataset(train.inputs) if train.augment is not None else train
        if self.classes is None:
            return
        counts = self.classes.counts
        say(
            f"{self.classes.known} classes of {int(counts.min()) if len(counts) else 0} to "
            f"{int(counts.max()) if len(counts) else 0} training items"
        )
        for name in self.splits:
            lacking = self.classes.lacking(name)
            if lacking and self.votes(name):
                say(f"{name}: {lacking} items of classes that training lacks; their class is never predicted")

    def layout(self) -> Json:
        classes = self.classes
        about = None if classes is None else {
            "classes": classes.known,
            "smallest": int(classes.counts.min()),
            "largest": int(classes.counts.max()),
        }  # fmt: skip
        return super().layout() | {"label": self.label, "classes": about}

    # -- model -----------------------------------------------------------------------------------------------
    def reference_view(self) -> str | None:
        return self.view if self.needs_reference() else None

    def _head_kind(self) -> HeadKind:
        return "none" if self.towers[self.view].train == "frozen" else self.config.head

    def shared_dim(self, widths: Mapping[str, int]) -> int:
        return widths[self.view] if self._head_kind() == "none" else self.config.embedding_dim

    def build_head(self, tower: Tower, view: str, width: int, dim: int) -> nn.Module:
        config = self.config
        head = build_head(self._head_kind(), width, dim, hidden=config.hidden, dropout=config.dropout)
        return nn.Sequential(nn.Dropout(config.dropout), head) if config.dropout else head

    def judged_rows(self, model: ViewModel, field: object) -> Float[Tensor, "b d"]:
        """What is judged of a batch: embeddings, or what the tower gives."""
        if self.config.judged == "features":
            rows: Tensor = model.tower(self.view)(field)
            return rows
        return model.encode(self.view, field)

    def embed(self, model: ViewModel, batch: Batch) -> dict[str, Tensor]:
        return {self.view: self.judged_rows(model, batch[self.view])}

    def _contrast_record(self) -> dict[str, float]:
        """What the loss of the last step recorded."""
        record: dict[str, float] = self.loss.record.to_dict()  # type: ignore[operator, union-attr]
        if "scale" in record:
            record["largest_logit"] = record["scale"]  # embeddings have unit length
        return record

    # -- evaluation ------------------------------------------------------------------------------------------
    def votes(self, split: str) -> bool:
        """Whether training items have the classes of this split, so that they can vote."""
        return self.classes is not None and not self.classes.several

    def before_evaluation(self, model: ViewModel, split: str, final: bool) -> None:
        """In the final evaluation the training rows are embedded, too."""
        super().before_evaluation(model, split, final)
        if not final or self.classes is None:
            return
        weights = content_key(
            [
                [name, part.detach().float().cpu().numpy()]
                for name, part in model.state_dict().items()
                if isinstance(part, Tensor)
            ]
        )
        if weights != self._embedded_by:
            self._embedded_by = weights
            self._train_rows[TRAINED] = self._embed_train(model)
            self._probes.pop(TRAINED, None)

    def _embed_train(self, model: ViewModel) -> Float[Tensor, "n d"]:
        data = self._plain_train
        assert data is not None
        device, size = next(model.parameters()).device, self.config.trainer.eval_batch_size
        parts = [
            {"rows": self.judged_rows(model, data.__getitems__(at).to(device)[self.view]).float()}
            for at in consecutive(len(data), size)
        ]
        return collect(parts)["rows"]

    def beside_outputs(self) -> dict[str, Tensor]:
        """The embedded training items, which vote."""
        rows = self._train_rows.get(TRAINED)
        return {} if rows is None else {self.view: rows}

    def average_beside(self, every: Sequence[Mapping[str, Tensor]]) -> None:
        if all(every):
            self._train_rows[TRAINED] = self.average(every)[self.view]
            self._probes.pop(TRAINED, None)

    def evaluate(self, outputs: Mapping[str, Tensor], split: str, final: bool) -> Evaluation:
        estimates, per_item = self.judge(
            outputs[self.view],
            split,
            final,
            self._train_rows.get(TRAINED) if final and self.votes(split) else None,
        )
        facts: Json = {}
        if final and self.classes is not None:
            facts = self._beside(outputs, split, estimates, per_item)
        return Evaluation(split, estimates, self.splits[split].ids, per_item, facts)

    def _beside(
        self,
        outputs: Mapping[str, Tensor],
        split: str,
        estimates: dict[str, Estimate],
        per_item: Mapping[str, np.ndarray],
    ) -> Json:
        """The same of the raw values: controls among the estimates, and differences."""
        columns = {TRAINED: dict(estimates)}
        facts: Json = {"comparison": {}}
        raw = self.raw_rows()
        if raw is not None:
            name, rows = raw
            if split not in self._raw_scores:
                train = rows["train"] if self.votes(split) else None
                self._raw_scores[split] = self.judge(rows[split], split, True, train, name)
            numbers, scores = self._raw_scores[split]
            columns[name] = numbers
            facts["baselines"] = {
                split: {m: e.to_dict() | {"name": f"raw values ({name})"} for m, e in numbers.items()}
            }
            for metric, estimate in numbers.items():
                estimates[f"{name}/{metric}"] = replace(estimate, metric=f"{name}/{metric}", control=True)
                if metric in scores and metric in per_item and len(scores[metric]) > 1:
                    gain = paired_difference(per_item[metric], scores[metric], metric=metric)
                    facts["comparison"][f"{metric} against {name}"] = {
                        "value": gain.value, "low": gain.low, "high": gain.high, "verdict": gain.verdict,
                    }  # fmt: skip
        self._columns[split] = columns
        return facts

    @torch.inference_mode(False)
    def judge(
        self,
        rows: Float[Tensor, "n d"],
        split: str,
        final: bool,
        train: Float[Tensor, "m d"] | None = None,
        of: str = TRAINED,
    ) -> Scores:
        """Estimates of embeddings by the labels of their split, and the score of every item under each; with ``train``,
        the embeddings of the training items, also by their vote and by a probe. ``of`` says whose embeddings they are.
        """
        classes = self.classes
        if classes is None:
            return {}, {}
        codes = torch.from_numpy(classes.codes[split])
        rows, content = rows.float().clone(), self._content(split)
        bootstrap = self.config.bootstrap if final else 0
        estimates, per_item = retrieval_scores(rows, codes, purity=final, bootstrap=bootstrap, split=content)
        if train is None:
            return estimates, per_item
        at = torch.from_numpy(np.flatnonzero(classes.codes["train"] >= 0))
        known, train = torch.from_numpy(classes.codes["train"])[at], train.clone()[at]
        if of not in self._probes:
            self._probes[of] = LinearProbe(train, known)
        answers = answer_scores(
            rows,
            codes,
            train,
            known,
            self._probes[of],
            k=self.config.knn,
            metric="euclidean" if of in ("pixels", "numbers") else "cosine",
            split=content,
        )
        return estimates | answers[0], per_item | answers[1]

    def _content(self, split: str) -> str:
        """A hash of the items of a split: estimates are comparable only where it is the same."""
        if split not in self._hashes:
            self._hashes[split] = self.content_hash(self.splits[split])
        return self._hashes[split]

    def raw_rows(self) -> tuple[str, dict[str, Float[Tensor, "n d"]]] | None:
        """What the values themselves are as vectors, by split: see `raw_values`."""
        if self._raw is None:
            values = {name: items[self.view] for name, items in self.splits.items()}
            self._raw = raw_values(self.towers[self.view].kind, values)
        return self._raw

    # -- results ---------------------------------------------------------------------------------------------
    def report_sections(self, outputs: Mapping[str, Tensor], split: str) -> Sequence[Section]:
        """Every metric beside that of the raw values."""
        columns = self._columns.get(split)
        if columns is None:
            return ()
        rows = [
            [metric, *(f"{each[metric]:.3f}" if metric in each else None for each in columns.values())]
            for metric in columns[TRAINED]
        ]
        lead = f"{split}: the trained model, and the raw values as they are."
        return [Section("Beside the baselines", lead, [Table(["metric", *columns], rows)])]

    def save_results(self, folder: Path) -> None:
        """The embedded training items with their labels, and the probe: they say the class of new items."""
        known = self._known_classes()
        if known is not None:
            known.save(folder)

    # -- use of a trained run --------------------------------------------------------------------------------
    def class_names(self) -> ClassNames:
        """The classes of training, also of a run that was loaded."""
        if self._names is not None:
            return self._names
        classes = self.classes
        if classes is None:
            return ClassNames(self.view, self.label)
        unseen = tuple(self.unseen_classes())
        return ClassNames(
            self.view, self.label, tuple(classes.names[: classes.known]), classes.several, unseen
        )

    def unseen_classes(self) -> Sequence[str]:
        """Classes that were kept out of training."""
        return ()

    def _known_classes(self) -> KnownClasses | None:
        """Of the run that was just evaluated, or of one that was loaded."""
        rows, classes = self._train_rows.get(TRAINED), self.classes
        if rows is None or classes is None:
            return self._known
        codes = torch.from_numpy(classes.codes["train"])
        ids = self.splits["train"].ids
        known = KnownClasses.of(classes.names[: classes.known], ids, rows, codes, self.config.knn)
        if classes.several:
            return known
        if TRAINED not in self._probes:  # no split was judged by it: all classes there are unseen
            self._probes[TRAINED] = LinearProbe(known.rows, known.codes)
        return replace(known, probe=self._probes[TRAINED])

    def save_assets(self, folder: Path) -> None:
        """Towers and names of the classes; of a run that was loaded also what says the class of new items."""
        super().save_assets(folder)
        self.class_names().save(folder)
        if self._known is not None:
            self._known.save(folder)
        else:  # what an earlier end of this run embedded says nothing of the weights that follow
            KnownClasses.remove(folder)

    def load_assets(self, folder: Path) -> None:
        super().load_assets(folder)
        self._names, self._known = ClassNames.load(folder), KnownClasses.load(folder)
        self.view, self.label, self.several = self._names.view, self._names.label, self._names.several

    def embed_view(self, model: ViewModel, view: str, field: object) -> Float[Tensor, "b d"]:
        """What is judged: the embedding, or with ``judged=features`` what the tower gives beneath the head."""
        return self.judged_rows(model, field)

    def view_dim(self, model: ViewModel, view: str) -> int:
        width = int(cast(int, model.tower(view).width))
        return width if self.config.judged == "features" else self.shared_dim({view: width})

    def predictions(self, outputs: Mapping[str, Tensor], items: Items) -> Mapping[str, Sequence[object]]:
        """The class of each item by the nearest training items and by the linear probe: `KnownClasses.columns`."""
        known = self._known_classes()
        if known is None:
            raise NearfarError(self._no_classes())
        return known.columns(outputs[self.view].float())

    def further_headers(self) -> dict[str, Sequence[str]]:
        label = self.label or "label"  # a run without labels may be asked with a gallery that has some
        return {} if label == self.view else {label: [label]}

    def load_results(self, folder: Path) -> None:
        self._known = KnownClasses.load(folder)

    def comparison(self, gallery: bool, k: int | None = None) -> Comparison | None:
        """With a gallery of labelled items: their vote, and a probe fitted on them."""
        if not gallery:
            return None
        label, separator = self.label or "label", self.config.data.separator
        return LabelledGallery(self.view, label, separator, self.several, self.config.knn if k is None else k)

    def _no_classes(self) -> str:
        names = self.class_names()
        others = "nearfar embed and nearfar search work without classes"
        if names.label is None:
            return (
                f"this run has no classes: its data had no column of labels. {others}; for classes train it with "
                "label=NAME, or give labelled items with --gallery FILE."
            )
        return (
            "this run was not evaluated to its end, so that it keeps no training items to say a class by; "
            f"{others}. Finish it with resume_from=RUN, or give labelled items with --gallery FILE."
        )


def _kept(items: Items, at: np.ndarray) -> Items:
    """Some items, with the rejections of the whole."""
    return replace(items.take(at), rejections=items.rejections)
