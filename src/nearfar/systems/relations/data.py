"""The pairs that ``data`` of the relation system describes, read or composed."""

from __future__ import annotations

from pathlib import Path

from nearfar.data.coco_files import given_files
from nearfar.data.files import Json
from nearfar.data.rejections import Rejections
from nearfar.data.scenes.composed import composed_scenes
from nearfar.data.scenes.relation_data import PictureShares, RelationData, read_triples, split_relations
from nearfar.data.scenes.triples import chosen_relations
from nearfar.systems.relations.options import RelationOptions

__all__ = ["load_data"]


def load_data(config: RelationOptions) -> RelationData:
    """The splits that the configuration describes.

    Raises:
        NearfarError: missing or unreadable files, no usable pair, a split without pairs, a photo in two splits.
    """
    data, relations = config.data, chosen_relations(config.relations)
    rejections, notes = Rejections(), Json()
    composed = data.layout == "composed"
    if composed:
        triples, photos = composed_scenes(
            int(data.size), relations, int(data.split_seed), (data.val_fraction, data.test_fraction)
        )
        source = (
            f"{data.size} composed scenes (drawn, not photos; kinds of things in test are in no other split)"
        )
    else:
        images, folder = (None if value is None else Path(str(value)) for value in (data.images, data.dir))
        triples, photos, source = read_triples(
            data.layout, folder, rejections, notes, given=given_files(data), images=images, photos=data.photos
        )
    shares = PictureShares(
        data.val_fraction, data.test_fraction, int(data.split_seed), data.folds, int(data.fold)
    )
    return split_relations(
        triples,
        photos,
        relations,
        source,
        shares,
        synonyms=data.synonyms,
        use=data.photos,
        composed=composed,
        rejections=rejections,
        notes=notes,
    )
