"""An exported folder: weights as safetensors, and what rebuilds the model, with nothing of the machine it is from.

Folders are uploaded to the Hugging Face hub with a token and downloaded from it by name.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, overload

import torch
import yaml
from torch import Tensor, nn

from nearfar.config.compose import path_options, read_config
from nearfar.config.options import option_table, to_dict
from nearfar.config.training import RunOptions
from nearfar.data.cache import cache_dir
from nearfar.data.files import Json, Maybe, read_json, write_json, write_text
from nearfar.errors import NearfarError
from nearfar.systems import build_system
from nearfar.towers.build import tower_folder
from nearfar.training.run_folder import RunFolder
from nearfar.training.state import initial_model
from nearfar.training.system import System

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = [
    "MANIFEST",
    "check_push",
    "copy_results",
    "download",
    "exported_name",
    "is_exported",
    "is_hub_name",
    "places_of",
    "portable_config",
    "push",
    "read_members",
    "remove_places",
    "without_places",
    "write_manifest",
    "write_members",
]


_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
#: what no exported folder holds, and is never downloaded: files that could run code when they are read
_REFUSED = ["*.py", "*.pkl", "*.pickle", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.joblib"]


def is_hub_name(name: str) -> bool:
    """Whether a text has the form of a name on the hub, owner/name.

    >>> is_hub_name("owner/model"), is_hub_name("model"), is_hub_name("../runs/a")
    (True, False, False)
    """
    return _NAME.fullmatch(name) is not None


def check_push(name: str) -> HfApi:
    """The hub's client for uploading to ``name``; ``NearfarError`` for a name of a different form, or without a token.

    Called before anything is computed or uploaded.
    """
    if not is_hub_name(name):
        raise NearfarError(f"--push {name}: a name on the hub has the form OWNER/NAME.")
    hub = _library()
    if not hub.get_token():
        raise NearfarError(
            f"--push {name} needs a token of the Hugging Face hub that may write: make one in the settings of your "
            "account there, then `hf auth login`, or set HF_TOKEN. Nothing was uploaded."
        )
    return hub.HfApi()


def push(folder: Path, name: str, private: bool = False) -> str:
    """Upload an exported folder to the hub under ``name``, made where it does not exist; the address of the upload.

    ``NearfarError`` where there is no token, or the hub refuses or cannot be reached.
    """
    api = check_push(name)
    hub = _library()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=name, folder_path=str(folder), commit_message="Exported by nearfar", run_as_future=False
        )
    except _failures(hub) as error:
        cause = " ".join(str(error).split())[:300]
        raise NearfarError(
            f"--push {name}: the hub did not take it ({cause}). The folder {folder} is complete; push it again with "
            f"`hf upload {name} {folder}{' --private' if private else ''}`."
        ) from None
    return str(done)


def download(name: str, revision: str = "main") -> Path:
    """The folder of a model on the hub, from the cache of this machine where it is there already.

    ``NearfarError`` where the hub cannot be reached or has no such model. Files that could run code are not fetched.
    """
    hub = _library()
    try:
        return Path(hub.snapshot_download(name, revision=revision, ignore_patterns=_REFUSED))
    except _failures(hub) as error:
        cause = " ".join(str(error).split())[:300]
        raise NearfarError(
            f"{name}: there is no such run or folder here, and it cannot be fetched from the Hugging Face hub "
            f"({cause}). Give the path of a run, or try again where there is a network."
        ) from None


def _failures(hub: ModuleType) -> tuple[type[Exception], ...]:
    """What the hub's client raises where it is refused or cannot be reached: by version requests, httpx or httpx2."""
    transports = [sys.modules[name] for name in ("httpx", "httpx2") if name in sys.modules]
    return (OSError, ValueError, hub.errors.HfHubHTTPError, *(each.HTTPError for each in transports))


def _library() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise NearfarError(
            f"the Hugging Face hub needs huggingface_hub ({error}): pip install 'nearfar[export]'."
        ) from None
    return huggingface_hub


MANIFEST, WEIGHTS, CONFIG = "nearfar.json", "model.safetensors", "config.yaml"
FORMAT = 1
#: of a manifest
SHAPE: Json = {
    "format": int,
    "kind": str,
    "system": str,
    "shared": Maybe({str: str}),
    "files": Maybe({str: str}),
    "members": Maybe([str]),
}
#: text files in which a path is a word of a vocabulary
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocabulary.json")

Member = tuple[System, nn.Module]


# -- writing -------------------------------------------------------------------------------------------------
def write_members(members: Sequence[Member], folder: Path) -> Json:
    """Write the models of a run, or of the members of an ensemble, into ``folder``; what its manifest has to say."""
    if len(members) == 1:
        return _write_model(*members[0], folder)
    names = []
    for number, (system, model) in enumerate(members):
        names.append(f"members/{number}")
        own = folder / "members" / str(number)
        write_manifest(own, "safetensors", system.name, _write_model(system, model, own))
    return {"members": names}


def write_manifest(folder: Path, kind: str, system: str, more: Mapping[str, object]) -> None:
    """Write ``nearfar.json``: what the folder is and which version wrote it."""
    from nearfar import __version__

    content = {"format": FORMAT, "kind": kind, "nearfar": __version__, "system": system, **more}
    write_json(folder / MANIFEST, content)


def _write_model(system: System, model: nn.Module, folder: Path) -> Json:
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise NearfarError(f"safetensors is needed ({error}): pip install 'nearfar[export]'.") from None
    if not system.towers:
        _refuse_models_of_this_machine(system.config)
    folder.mkdir(parents=True, exist_ok=True)
    system.save_assets(folder)
    for view, tower in system.towers.items():
        own = folder / "towers" / tower_folder(view)
        if (own / "tower.json").is_file():
            tower.save_networks(own)
    weights, shared = unique_weights(model)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    text = yaml.safe_dump(portable_config(system.config), sort_keys=False, allow_unicode=True)
    write_text(folder / CONFIG, text)
    files = {
        path.relative_to(folder).as_posix(): file_hash(path) for path in sorted(folder.rglob("*.safetensors"))
    }
    return {"shared": shared, "files": files}


def _refuse_models_of_this_machine(config: RunOptions) -> None:
    """``NearfarError`` where a network is built from a folder that does not come along; towers take theirs along."""
    table = option_table(type(config))
    for key, path in path_options(config).items():
        run = path.is_file() or (path / CONFIG).exists()
        if key in table and table[key].place == "model" and not run:
            raise NearfarError(
                f"{key}={path}: the network of this run is built from a folder of this machine, which an export of "
                f"'{config.system}' cannot take with it. Train with a name on the hub, or an encoder of a package."
            )


def unique_weights(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of a model once, on the CPU, and for each further name of a tensor the name that it is kept under.

    >>> layer = nn.Linear(2, 2, bias=False)
    >>> weights, shared = unique_weights(nn.ModuleDict({"a": layer, "b": layer}))
    >>> list(weights), shared
    (['a.weight'], {'b.weight': 'a.weight'})
    """
    first: dict[int, str] = {}
    weights: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        known = first.setdefault(id(tensor), name)
        if known == name:
            # a copy: two tensors that look at one storage would be refused
            weights[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        else:
            shared[name] = known
    return weights, shared


def file_hash(path: Path) -> str:
    """SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- nothing of the machine ----------------------------------------------------------------------------------
def portable_config(config: RunOptions) -> Json:
    """The options of a run as plain values, without the folders of the machine that it was trained on.

    A path keeps its last part, which tells which file it was; overrides, which repeat what the options say, are empty.
    """
    values = to_dict(config)
    table = option_table(type(config))

    def portable(content: object, key: str) -> object:
        if isinstance(content, Mapping):
            return {
                name: portable(value, f"{key}.{name}" if key else str(name))
                for name, value in content.items()
            }
        if isinstance(content, list | tuple):
            return [portable(value, key) for value in content]
        place = table[key].place if key in table else None
        if isinstance(content, str) and place == "path":
            return _last_part(content)
        return without_place(content)

    plain = {name: portable(value, str(name)) for name, value in values.items()}
    return plain | {"overrides": [], "runs_dir": "runs", "resume_from": None, "init_from": None}


def without_place(value: object) -> object:
    """A text that is an absolute path of this machine, or below the home folder, by its last part; anything else as it
    is.

    >>> without_place(str(Path(__file__))), without_place("org/model"), without_place("/a/b")
    ('exported.py', 'org/model', '/a/b')
    """
    if not isinstance(value, str) or not value or "\n" in value:
        return value
    path = Path(os.path.expanduser(value))
    if not path.is_absolute() or len(path.parts) < 3:
        return value
    try:
        local = Path(*path.parts[:2]).exists()
    except (OSError, ValueError):  # a name that no file can have
        return value
    return _last_part(value) if local else value


def _last_part(path: str) -> str:
    return Path(path).name or path


def plain_places(content: object) -> object:
    """Nested plain values with every path of this machine by its last part, see `without_place`."""
    if isinstance(content, Mapping):
        return {key: plain_places(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [plain_places(value) for value in content]
    return without_place(content)


def places_of(config: RunOptions, run: Path) -> list[tuple[str, str]]:
    """Folders of this machine as they may stand in texts about a run, longest first, each with what replaces it."""
    paths = list(path_options(config).values())
    places = {str(path): path.name for path in [*paths, *(path.absolute() for path in paths)]}
    for folder in (run.absolute(), run.absolute().parent, cache_dir().absolute(), Path.cwd(), Path.home()):
        if len(folder.parts) > 1:
            places |= {f"{folder}{os.sep}": "", str(folder): folder.name}
    known = {place: name for place, name in places.items() if os.sep in place}
    return sorted(known.items(), key=lambda item: -len(item[0]))


@overload
def without_places(content: str, places: Sequence[tuple[str, str]]) -> str: ...


@overload
def without_places(content: object, places: Sequence[tuple[str, str]]) -> object: ...


def without_places(content: object, places: Sequence[tuple[str, str]]) -> object:
    """Nested plain values with folders of this machine replaced wherever they occur in a text, see `places_of`.

    >>> without_places({"text": "read from /data/set/a.csv"}, [("/data/set/", "")])
    {'text': 'read from a.csv'}
    """
    if isinstance(content, Mapping):
        return {key: without_places(value, places) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_places(value, places) for value in content]
    if isinstance(content, str):
        for place, name in places:
            content = content.replace(place, name)
    return content


def copy_results(trained_path: Path, folder: Path, config: RunOptions) -> None:
    """What a run measured and found, for the card and ``describe``: without folders of this machine, without ids and
    values of items, and without the members of an ensemble, which the manifest names."""
    run, places = RunFolder(trained_path), places_of(config, trained_path)
    written = RunFolder(folder)
    for name in ("metrics.json", "dataset_layout.json", "doctor.json"):
        if run.has(name):
            content = plain_places(without_places(run.read_json(name), places))
            if name != "doctor.json":
                content = _without(content, ("members", "first"))
            written.write_json(name, content)
    if run.has("environment.json"):
        known = run.read_json("environment.json")
        kept = {key: known[key] for key in ("format", "python", "devices", "packages") if key in known}
        written.write_json("environment.json", kept)


def _without(content: object, names: Sequence[str]) -> object:
    if isinstance(content, Mapping):
        return {key: _without(value, names) for key, value in content.items() if key not in names}
    return [_without(value, names) for value in content] if isinstance(content, list) else content


def remove_places(folder: Path) -> None:
    """Replace paths of this machine in every JSON file below ``folder`` (options of towers, configurations of models)
    by their last part; vocabularies are left as they are."""
    for path in folder.rglob("*.json"):
        if path.name in _VOCABULARIES:
            continue
        content = read_json(path)
        plain = plain_places(content)
        if plain != content:
            write_json(path, plain)


# -- reading -------------------------------------------------------------------------------------------------
def is_exported(place: Path) -> bool:
    """Whether ``nearfar export`` has written this folder."""
    return (place / MANIFEST).is_file()


def exported_name(place: Path) -> str | None:
    """The name of the run that an exported folder is from; None of other folders."""
    return str(read_manifest(place).get("name") or "") or None if is_exported(place) else None


def read_manifest(folder: Path) -> Json:
    """What ``nearfar.json`` says; ``NearfarError`` for a folder in a different format, or a damaged file."""
    manifest: Json = read_json(folder / MANIFEST, SHAPE)
    if manifest["format"] > FORMAT:
        raise NearfarError(
            f"{folder / MANIFEST}: format {manifest['format']}, and this version of nearfar reads formats up to "
            f"{FORMAT}: install the version that it names ({manifest.get('nearfar')}), or a later one."
        )
    if manifest["kind"] != "safetensors":
        raise NearfarError(
            f"{folder} was exported as {manifest['kind']}, for use without nearfar; its README.md says how. nearfar "
            "loads a run, or what was exported with --format safetensors."
        )
    return manifest


def read_members(folder: Path) -> list[Member]:
    """The models of an exported folder, in eval mode on the CPU, each with its system.

    ``NearfarError`` names a file that is missing, damaged or of a different model. Nothing that is read executes code.
    """
    manifest = read_manifest(folder)
    if not manifest.get("members"):
        return [_read_model(folder, manifest)]
    members = []
    for name in manifest["members"]:
        own = folder / name
        if not own.resolve().is_relative_to(folder.resolve()) or own.resolve() == folder.resolve():
            raise NearfarError(f"{folder / MANIFEST}: the member '{name}' does not lie in this folder.")
        members.append(_read_model(own, read_manifest(own)))
    return members


def _read_model(folder: Path, manifest: Json) -> Member:
    saved = RunFolder(folder).config()
    if saved["system"] != manifest["system"]:
        raise NearfarError(
            f"{folder / CONFIG} is of system '{saved['system']}', and {MANIFEST} of '{manifest['system']}': the folder "
            "is not as it was written. Export the run again."
        )
    try:
        config = read_config(saved, saved=True)
    except NearfarError as error:
        raise NearfarError(f"{folder / CONFIG}: {error}") from None
    for name, expected in (manifest.get("files") or {}).items():
        path = folder / name
        if not path.is_file():
            raise NearfarError(
                f"{path}: no such file; it belongs to this exported model. Copy the whole folder."
            )
        if file_hash(path) != expected:
            raise NearfarError(
                f"{path} is not as it was written: its hash differs. Copy or download it again."
            )
    system: System = build_system(config)
    system.load_assets(folder)
    model = initial_model(system, config.seed).eval()
    path = folder / WEIGHTS
    weights = _read_weights(path)
    for name, known in (manifest.get("shared") or {}).items():
        if known not in weights:
            raise NearfarError(f"{path}: there is no tensor '{known}', which {MANIFEST} names.")
        weights[name] = weights[known]
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first = "; ".join(line.strip() for line in str(error).splitlines()[1:4])
        raise NearfarError(
            f"{path}: the weights do not fit the model that {CONFIG} describes ({first})."
        ) from None
    return system, model


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise NearfarError(f"safetensors is needed ({error}): pip install 'nearfar[export]'.") from None
    try:
        weights: dict[str, Tensor] = load_file(path)
    except FileNotFoundError:
        raise NearfarError(
            f"{path}: no such file; it belongs to this exported model. Copy the whole folder."
        ) from None
    except (OSError, SafetensorError) as error:
        raise NearfarError(
            f"{path}: not a readable file of weights ({error}). Copy or download it again."
        ) from None
    return weights
