"""Exported folders on the Hugging Face hub: uploaded with a token, downloaded by name."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from nearfar.errors import NearfarError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["check_push", "download", "is_hub_name", "push"]

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
    except (OSError, ValueError, hub.errors.HfHubHTTPError) as error:
        cause = " ".join(str(error).split())[:300]
        raise NearfarError(
            f"--push {name}: the hub did not take it ({cause}). The folder {folder} is complete; push it again with "
            f"`hf upload {name} {folder}`."
        ) from None
    return str(done)


def download(name: str, revision: str = "main") -> Path:
    """The folder of a model on the hub, from the cache of this machine where it is there already.

    ``NearfarError`` where the hub cannot be reached or has no such model. Files that could run code are not fetched.
    """
    hub = _library()
    try:
        return Path(hub.snapshot_download(name, revision=revision, ignore_patterns=_REFUSED))
    except (OSError, ValueError, hub.errors.HfHubHTTPError) as error:
        cause = " ".join(str(error).split())[:300]
        raise NearfarError(
            f"{name}: there is no such run or folder here, and it cannot be fetched from the Hugging Face hub "
            f"({cause}). Give the path of a run, or try again where there is a network."
        ) from None


def _library() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise NearfarError(
            f"the Hugging Face hub needs huggingface_hub ({error}): pip install 'nearfar[export]'."
        ) from None
    return huggingface_hub
