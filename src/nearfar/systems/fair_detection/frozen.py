"""Which detector is judged, one that was given or one that is trained first; and which group it finds less well."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import torch

from nearfar.config.options import read_options, to_dict
from nearfar.data.cache import cache_dir, content_key
from nearfar.data.coco import CocoSplit
from nearfar.errors import NearfarError, nearest_name
from nearfar.metrics.detection import detection_estimates, detection_evidence
from nearfar.models.detection import Detector
from nearfar.systems.detector.model import load_detector
from nearfar.systems.detector.options import DetectorOptions, DetectorRecipe, PictureData, SceneData
from nearfar.systems.detector.system import true_boxes
from nearfar.systems.fair_detection.evaluation import Looks, detected
from nearfar.systems.fair_detection.options import FairDetectionOptions, FairPictures, SceneRecipe

__all__ = ["frozen_detector", "lower_group", "weights_key"]

Say = Callable[[str], None]
_VERSION = 1
_ROWS = 32


def frozen_detector(config: FairDetectionOptions, splits: dict[str, CocoSplit], say: Say) -> Detector:
    """``config.detector`` by name (see ``load_detector``), or a small one trained on the training pictures.

    What is trained is kept in the cache under pictures and options, so that runs of a sweep judge the same one.
    """
    if config.detector is not None:
        return load_detector(str(config.detector))
    data = config.used_data
    kind = "scenes" if isinstance(data, SceneData) else "photos"
    options = _training_options(config, data)
    # Where pictures lie and how the run is carried out does not count.
    places = ("dir", "train", "val", "test", "images") if kind == "photos" else ()
    plain = to_dict(options)
    plain["data"] = {key: value for key, value in plain["data"].items() if key not in places}
    key = content_key([_VERSION, plain | {"trainer": None}, *(s.content for s in splits.values())])
    folder = cache_dir() / "detectors" / key[:16]
    if not (folder / "metrics.json").exists():
        try:
            _train(options, folder, say)
        except NearfarError as error:
            raise NearfarError(
                f"training a detector first, with the options of detector_training.{kind}: {error}"
            ) from None
    say(f"detector: kept in {folder}")
    return load_detector(folder)


def _training_options(config: FairDetectionOptions, data: PictureData | SceneData) -> DetectorOptions:
    """Options of ``experiment=detector``: those of ``detector_training``, our data, our devices."""
    recipe = (
        config.detector_training.scenes if isinstance(data, SceneData) else config.detector_training.photos
    )
    own = {each.name: getattr(recipe, each.name) for each in fields(DetectorRecipe)}
    if isinstance(recipe, SceneRecipe):  # in a lighter haze than the one it is judged in
        data = read_options(SceneData, to_dict(data) | recipe.data)
    elif isinstance(data, FairPictures):
        data = PictureData(**{each.name: getattr(data, each.name) for each in fields(PictureData)})
    trainer = replace(
        config.trainer,
        gradient_clip=1.0,
        eval_batch_size=32,
        probe_rows=64,
        max_steps=None,
        log_every=20,
        accumulate=1,
        cached_chunk=None,
    )
    # The seed is not the run's: a different seed of the generator is no different detector.
    options = DetectorOptions(**own, data=data, trainer=trainer, seed=0)
    options.check()
    return options


def _train(config: DetectorOptions, folder: Path, say: Say) -> None:
    from nearfar.systems import build_system
    from nearfar.training.fit import fit
    from nearfar.training.run_folder import RunFolder

    say("no detector= is given: one is trained on these pictures first, and kept")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".training-"))
    try:
        system = build_system(config)
        system.prepare(lambda text: say(f"  {text}"))
        fit(system, config, RunFolder(temporary), say=lambda text: say(f"  {text}"))
        try:
            os.replace(temporary, folder)
        except OSError:  # another run of a sweep has trained the same one meanwhile
            if not (folder / "metrics.json").exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def lower_group(config: FairDetectionOptions, looks: Looks, split: CocoSplit, say: Say) -> tuple[str, str]:
    """The group that is found less well (``lower_group``, or by AP on clean validation pictures), and the other."""
    names = split.groups
    if config.lower_group is not None:
        lower = str(config.lower_group)
        if lower not in names:
            raise NearfarError(f"lower_group={lower}: there is no such group; {nearest_name(lower, names)}")
        return lower, next(name for name in names if name != lower)
    pair = (names[0], names[1])
    found = torch.cat([part["found"] for part in _clean(looks, len(split), config)]).cpu()
    evidence = detection_evidence(detected(found, split), true_boxes(split), len(split), pair)
    numbers, _ = detection_estimates(evidence, resamples=0)
    a, b = (numbers[f"AP/{name}"].value for name in pair)
    gap = numbers["AP/gap"]
    say(
        f"clean validation pictures: AP {names[0]} {a:.3f}, {names[1]} {b:.3f}, "
        f"difference {gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"
    )
    return pair if a <= b else (pair[1], pair[0])


def _clean(looks: Looks, n: int, config: FairDetectionOptions) -> list[dict[str, torch.Tensor]]:
    on_gpu = torch.cuda.is_available() and config.trainer.accelerator != "cpu"
    device = torch.device("cuda" if on_gpu else "cpu")
    dataset = looks.datasets["val"]
    rows = [list(range(start, min(start + _ROWS, n))) for start in range(0, n, _ROWS)]
    return [looks.clean(dataset.__getitems__(positions).to(device)) for positions in rows]


def weights_key(detector: Detector) -> str:
    """Names the detector's weights: sixteen hexadecimal digits."""
    state = detector.state_dict()
    return content_key({name: tensor.cpu().numpy() for name, tensor in state.items()})[:16]
