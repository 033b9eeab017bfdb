"""Two or more views of the same items, each read by a tower, contrasted with each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import normalize

from nearfar.data.batch import Batch, Inputs, Rows
from nearfar.data.embedded import emoji_items
from nearfar.data.files import Json
from nearfar.data.images import thumbnail
from nearfar.data.items import Items, hold_out, value_groups
from nearfar.data.sources import read_splits, split_sources
from nearfar.errors import NearfarError, nearest_name
from nearfar.losses.matryoshka import term_name
from nearfar.losses.views import ViewContext, ViewLoss
from nearfar.metrics import Estimate, rank_estimates, retrieval_ranks
from nearfar.models.views import HeadKind, build_head
from nearfar.systems.pairs.false_negatives import Guides, column_margins, guide_columns, read_excluded
from nearfar.systems.pairs.options import (
    InfoNCEOptions,
    PairOptions,
    SigLipOptions,
    SupConOptions,
    column_names,
    lengths,
)
from nearfar.systems.view_system import KS, LABEL, NEGATIVES, ViewSystem
from nearfar.towers import Tower, build_tower, encoder_options, guess_tower, tower_names
from nearfar.training.sections import Picture
from nearfar.training.system import Say

__all__ = ["PairSystem", "nearest_rows"]

#: fields of a batch: vectors of a view by the guide, those of its further negatives, and a teacher's margins of these
GUIDE, NEGATIVE_GUIDE, MARGIN = "guide:", "negative_guide:", "margin:"
#: number of the item of each row, and numbers of the items that were marked as no negatives of it
ITEM, EXCLUDED = "item", "excluded"
#: columns that are no views unless they are named
NO_VIEWS = ("id", "ids", "index", "label", "labels", "class", "split", "group")
#: the group of options that holds the encoder of a kind of tower
ENCODER_OPTIONS = {"text": "text_encoder", "image": "image_encoder"}


class PairSystem(ViewSystem):
    """Contrasts the columns that ``views`` names; retrieval between them, in both directions, is the result."""

    name = "pairs"
    config: PairOptions

    def __init__(self, config: PairOptions) -> None:
        super().__init__(config)
        self._views: list[str] = []
        self._labels: dict[str, np.ndarray] = {}

    # -- data ------------------------------------------------------------------------------------------------
    def load_items(self, say: Say) -> dict[str, Items]:
        config, data = self.config, self.config.data
        wanted = column_names("views", config.views)
        if data.train is None and data.dir is None:
            say(
                "data: the embedded emoji, pictures and their names; give data.train= or data.dir= for your own"
            )
            splits = hold_out(emoji_items(), {"val": 0.1, "test": 0.2}, data.split_seed)
        else:
            extra = [name for names in config.negatives.values() for name in column_names("negatives", names)]
            extra += [name for names in config.margins.values() for name in column_names("margins", names)]
            extra += guide_columns(config.guide)
            if config.positives is not None:
                extra.append(config.positives)
            columns = list(dict.fromkeys([*wanted, *extra])) if wanted else None
            sources = split_sources(data.dir, data.train, data.val, data.test)
            splits = read_splits(
                sources,
                columns,
                fractions={"val": data.val_fraction},
                apart=wanted,
                seed=data.split_seed,
                id_column=data.id_column,
                group_column=data.group_column,
                encoding=data.encoding,
                encoding_option="data.encoding",
                naming="views=[NAME,NAME]",
                id_naming="data.id_column=NAME",
                group_naming="data.group_column=NAME",
            )
        train = splits["train"]
        for name in wanted:
            if name not in train:
                raise NearfarError(
                    f"{train.source} has no column '{name}'; {nearest_name(name, list(train.columns))}"
                )
        self._views = wanted or self._choose_views(train, say)
        self.monitor = f"{self._views[0]}_to_{self._views[1]}/MRR"
        if config.anchor is not None and config.anchor in self._views:
            other = next(view for view in self._views if view != config.anchor)
            self.monitor = f"{config.anchor}_to_{other}/MRR"
        return splits

    def _choose_views(self, train: Items, say: Say) -> list[str]:
        config = self.config
        others = {str(config.data.id_column), str(config.data.group_column), str(config.positives)}
        others |= {name for names in config.negatives.values() for name in column_names("negatives", names)}
        others |= {name for names in config.margins.values() for name in column_names("margins", names)}
        others |= set(guide_columns(config.guide))
        chosen = [name for name in train.columns if name.casefold() not in NO_VIEWS and name not in others]
        if len(chosen) < 2:
            raise NearfarError(
                f"{train.source} has the columns {', '.join(train.columns) or 'none'}: two views are needed. Name them "
                "with views=[FIRST,SECOND]."
            )
        if len(chosen) > 2 and config.views is None:
            raise NearfarError(
                f"{train.source} has the columns {', '.join(train.columns)}: say which are contrasted, "
                f"such as views=[{chosen[0]},{chosen[1]}]."
            )
        say(f"views: {' and '.join(chosen)}")
        return chosen

    def build_towers(self, say: Say) -> dict[str, Tower]:
        towers: dict[str, Tower] = {}
        known: dict[str, Tower] = {}
        for view in self._views:
            kind, options = self.tower_options(view)
            key = f"{kind} {sorted((name, str(value)) for name, value in options.items())}"
            if not (self.config.share and key in known):
                known[key] = build_tower(kind, f"the tower of '{view}'", **options)
            towers[view] = known[key]
        if self.config.share and len({id(tower) for tower in towers.values()}) == len(towers):
            raise NearfarError(
                "share=true: no two views have the same kind of tower with the same options, so that none can be "
                "shared. Give them the same, or leave share out."
            )
        for view in self.config.towers:
            if view not in towers:
                raise NearfarError(f"towers.{view}: no view has this name; {nearest_name(view, towers)}")
        return towers

    def tower_options(self, view: str) -> tuple[str, Json]:
        """The kind of a view's tower and its options: those of its kind of encoder, and what ``towers`` says of it."""
        given = self.config.towers.get(view, {})
        if isinstance(given, str):
            given = {"tower": given}
        if not isinstance(given, Mapping):
            raise NearfarError(
                f"towers.{view}={given}: a kind of tower ({', '.join(tower_names())}) or options are needed, such as "
                f"towers.{view}.encoder=NAME."
            )
        own = dict(given)
        kind = str(own.pop("tower", None) or guess_tower(self.splits["train"][view]))
        options: Json = {}
        if kind in ENCODER_OPTIONS and "encoder" not in own:
            options = encoder_options(getattr(self.config, ENCODER_OPTIONS[kind]))
        return kind, options | own

    def further_inputs(self, split: str, items: Items) -> dict[str, Inputs]:
        inputs: dict[str, Inputs] = {}
        if self.config.positives is not None:
            if not self._labels:
                self._labels = value_groups(self.splits, self.config.positives)
            inputs[LABEL] = Rows(self._labels[split])
        if split == "train":
            for view, names in self.config.negatives.items():
                if view not in self.towers:
                    raise NearfarError(
                        f"negatives.{view}: no view has this name; {nearest_name(view, self.towers)}"
                    )
                for i, name in enumerate(column_names(f"negatives.{view}", names)):
                    if not items.present(name).all():
                        missing = int((~items.present(name)).sum())
                        raise NearfarError(
                            f"negatives.{view}={name}: {missing} of {len(items)} training items have no value in this "
                            "column; every one needs its negative."
                        )
                    inputs[f"{NEGATIVES}{view}:{i}"] = self.towers[view].read(items[name])
            inputs |= self._judgements(items)
            if self.config.exclude is not None:
                excluded = read_excluded(Path(str(self.config.exclude)), items.ids, self._say)
                inputs |= {ITEM: Rows(np.arange(len(items))), EXCLUDED: Rows(excluded)}
        return inputs

    def _judgements(self, train: Items) -> dict[str, Inputs]:
        """What a second model says of the training items."""
        config = self.config
        inputs: dict[str, Inputs] = {}
        for name, given in (("guide", config.guide), ("margins", config.margins)):
            for view in given:
                if view not in self.towers:
                    raise NearfarError(
                        f"{name}.{view}: no view has this name; {nearest_name(view, self.towers)}"
                    )
        guides = Guides(config.guide, train)
        for view in config.guide:
            inputs[f"{GUIDE}{view}"] = Rows(guides.vectors(view))
            names = column_names(f"negatives.{view}", config.negatives.get(view))
            judged = guides.negatives(view, names) if names else None
            if judged is not None:
                inputs[f"{NEGATIVE_GUIDE}{view}"] = Rows(judged)
            elif names and config.guide_margin is not None:
                self._say(f"guide.{view}: a column has no vectors of negatives.{view}; these count in full")
        for view, names in config.margins.items():
            inputs[f"{MARGIN}{view}"] = Rows(
                column_margins(train, view, column_names(f"margins.{view}", names))
            )
        return inputs

    def context(self, embeddings: Mapping[str, Tensor], batch: Batch) -> ViewContext:
        config = self.config

        def fields(prefix: str) -> dict[str, Tensor]:
            return {
                name.removeprefix(prefix): batch.tensor(name) for name in batch if name.startswith(prefix)
            }

        return replace(
            super().context(embeddings, batch),
            guides=fields(GUIDE),
            guide_margin=config.guide_margin,
            guide_kind=config.guide_kind,
            guide_softness=config.guide_softness,
            negative_guides=fields(NEGATIVE_GUIDE),
            margins=fields(MARGIN),
            items=batch.tensor(ITEM) if ITEM in batch else None,
            excluded=batch.tensor(EXCLUDED) if EXCLUDED in batch else None,
        )

    def reference_view(self) -> str | None:
        if self.config.neighbors is not None:
            return self.config.neighbors
        every = [view for view in self._views if self.splits["train"].present(view).all()]
        for view in every:
            if self.towers[view].reads_reference:
                return view
        return every[0] if every and self.needs_reference() else None

    def labels(self) -> np.ndarray | None:
        return self._labels.get("train")

    def answers(self, split: str) -> np.ndarray | None:
        return self._labels.get(split)

    def answer_column(self) -> str | None:
        return self.config.positives

    def further_headers(self) -> dict[str, Sequence[str]]:
        positives = self.config.positives
        return {} if positives is None or positives in self.towers else {positives: [positives]}

    def load_assets(self, folder: Path) -> None:
        super().load_assets(folder)
        self._views = list(self.towers)

    # -- model and loss --------------------------------------------------------------------------------------
    def build_loss(self) -> ViewLoss:
        config, loss = self.config, self.config.loss
        if isinstance(loss, SigLipOptions):
            return ViewLoss("siglip", config.temperature, **self._terms())
        if isinstance(loss, SupConOptions):
            return ViewLoss("supcon", config.temperature, sum=loss.sum, **self._terms())
        symmetric = loss.symmetric if isinstance(loss, InfoNCEOptions) else True
        return ViewLoss(
            "infonce", config.temperature, symmetric, tau_plus=loss.tau_plus, beta=loss.beta, **self._terms()
        )

    def _terms(self) -> Json:
        """Which views are contrasted, and the terms beside the contrastive one."""
        config = self.config
        return {
            "anchor": config.anchor,
            "dims": lengths(config.matryoshka) or None,
            "distill": config.distill,
            "teacher_temperature": config.teacher_temperature,
            "margin": config.margin_weight if config.margins else 0.0,
            "margin_scale": config.margin_scale,
        }

    def _head_kind(self, tower: Tower) -> HeadKind:
        return "none" if tower.train == "frozen" else self.config.head

    def shared_dim(self, widths: Mapping[str, int]) -> int:
        """That of a tower without a head, else ``embedding_dim``."""
        dim = self._shared_dim(widths)
        beyond = [length for length in lengths(self.config.matryoshka) if length >= dim]
        if beyond:
            raise NearfarError(
                f"matryoshka={beyond}: embeddings have {dim} numbers, which are trained as a whole anyway; name "
                "shorter lengths."
            )
        return dim

    def _shared_dim(self, widths: Mapping[str, int]) -> int:
        plain = {
            view: width for view, width in widths.items() if self._head_kind(self.towers[view]) == "none"
        }
        if len(set(plain.values())) > 1:
            listed = ", ".join(f"{view} {width}" for view, width in plain.items())
            raise NearfarError(
                f"these towers have no head, and vectors of different lengths: {listed}. Set head=linear, and "
                "train=head instead of train=frozen, for all but one of them."
            )
        return next(iter(plain.values()), self.config.embedding_dim)

    def build_head(self, tower: Tower, view: str, width: int, dim: int) -> nn.Module:
        config = self.config
        return build_head(self._head_kind(tower), width, dim, hidden=config.hidden, dropout=config.dropout)

    def model_options(self, dim: int) -> Json:
        bias = self.config.loss.bias if isinstance(self.config.loss, SigLipOptions) else None
        return super().model_options(dim) | {
            "learn_temperature": self.config.learns_temperature,
            "bias": bias,
        }

    # -- evaluation ------------------------------------------------------------------------------------------
    def retrieval(
        self, outputs: Mapping[str, Tensor], split: str, final: bool
    ) -> tuple[dict[str, Estimate], dict[str, np.ndarray]]:
        """Between views; finally beside the baseline that trains nothing: the value of the nearest training item."""
        estimates, per_item = super().retrieval(outputs, split, final)
        for length in lengths(self.config.matryoshka):
            cut = {view: rows[:, :length] for view, rows in outputs.items()}
            shorter, scores = super().retrieval(cut, split, final)
            estimates |= {f"{term_name(length)}/{name}": estimate for name, estimate in shorter.items()}
            per_item |= {f"{term_name(length)}/{name}": values for name, values in scores.items()}
        if final and split != "train":
            estimates |= self._nearest_training(split)
        return estimates, per_item

    def _nearest_training(self, split: str) -> dict[str, Estimate]:
        """Controls: an item of the gallery is found by what its nearest training item, in frozen vectors, goes with."""
        estimates: dict[str, Estimate] = {}
        labels = self.answers(split)
        relevant = None if labels is None else (labels, labels)
        train, own = self.datasets["train"], self.datasets[split]
        for first, second in self.pairs():
            for query, key in ((first, second), (second, first)):
                if not all(
                    isinstance(part.inputs[view], Rows) for part in (train, own) for view in (query, key)
                ):
                    continue
                if not all(self.towers[view].train in ("frozen", "head") for view in (query, key)):
                    continue
                nearest = nearest_rows(own.tensor(key), train.tensor(key))
                # Twice as long, which no cosine sees: a query equal to its own key bit for bit would be warned of.
                keys = 2.0 * train.tensor(query)[nearest]
                numbers = rank_estimates(
                    retrieval_ranks(own.tensor(query), keys, relevant),
                    KS,
                    bootstrap=self.config.bootstrap,
                    split=self.content_hash(self.splits[split]),
                )
                for name in ("R@1", "R@10", "MRR"):
                    estimates[f"nearest_training/{query}_to_{key}/{name}"] = replace(
                        numbers[name], control=True
                    )
        return estimates

    # -- results ---------------------------------------------------------------------------------------------
    def shown(self, split: str, view: str, position: int) -> Json:
        value = self.splits[split][view][position]
        if self.towers[view].kind == "image":
            picture = Picture(thumbnail(value))
            return {"text": Path(value).name if isinstance(value, str) else "", "image": picture.source}
        if isinstance(value, np.ndarray):
            return {"text": " ".join(f"{each:.3g}" for each in value.reshape(-1)[:8])}
        return super().shown(split, view, position)

    def average(self, outputs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Unit vectors of the models side by side: their cosine is the mean of the models' cosines."""
        return {
            view: torch.cat([normalize(each[view].float(), dim=1) for each in outputs], dim=1)
            for view in self._views
        }


def nearest_rows(
    rows: Float[Tensor, "n d"], of: Float[Tensor, "m d"], chunk: int = 1024
) -> Int[Tensor, " n"]:
    """For each row the position of the most similar one (by cosine) among others.

    >>> nearest_rows(torch.tensor([[1.0, 0.1], [0.0, 2.0]]), torch.tensor([[0.0, 1.0], [3.0, 0.0]])).tolist()
    [1, 0]
    """
    keys = normalize(of.float(), dim=1)
    return torch.cat([(normalize(part.float(), dim=1) @ keys.T).argmax(1) for part in rows.split(chunk)])
