"""A frozen detector by name: a run of experiment=detector, a transformers folder, or a name on the hub."""

from __future__ import annotations

from pathlib import Path

from nearfar.errors import NearfarError
from nearfar.models.detection import Detector
from nearfar.systems.detector.model import build_detector
from nearfar.training.checkpoint import Checkpoint, find_checkpoint
from nearfar.training.run_folder import RunFolder

__all__ = ["detector_of_run", "load_detector"]


def load_detector(name: str | Path) -> Detector:
    """The detector called ``name``, frozen.

    A folder with ``config.yaml`` or a ``.ckpt`` file is a run of ``experiment=detector`` and loads its best checkpoint;
    anything else is a DETR of the transformers library, by folder or hub name (``facebook/detr-resnet-50``).
    """
    path = Path(name)
    if path.suffix == ".ckpt" or (path / "config.yaml").exists():
        return detector_of_run(path)
    from nearfar.models.detection.hub import TransformersDetector

    return TransformersDetector(str(name)).freeze()


def detector_of_run(run: str | Path) -> Detector:
    """The detector that a run of ``experiment=detector`` has trained (its best checkpoint), frozen."""
    path = find_checkpoint(run, prefer="best")
    folder = RunFolder.of(path)
    state = Checkpoint.load(path)
    if state.system != "detector":
        raise NearfarError(f"{run}: a run of system '{state.system}', not of 'detector'.")
    if not (folder.path / "detector.json").exists():
        raise NearfarError(f"{folder.path}: detector.json is missing; was the folder copied without it?")
    about = folder.read_json("detector.json")
    detector = build_detector(folder.config(), about["classes"], trained=False)
    detector.load_state_dict(state.model)
    detector.description = about["description"]
    detector.freeze()
    return detector
