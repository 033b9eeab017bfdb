"""What text and image encoders need of the Hugging Face hub: is a model to be had, and which one is it?"""

from __future__ import annotations

import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["commit_in_cache", "no_progress_bar", "why_unreachable"]


def commit_in_cache(model: str, revision: str = "main") -> str:
    """The commit under which a hub model lies in the cache of this machine; empty where it does not."""
    from huggingface_hub import try_to_load_from_cache

    try:
        path = try_to_load_from_cache(model, "config.json", revision=revision)
    except ValueError:  # not a name the hub would accept; loading says so
        return ""
    match = re.search(r"[/\\]snapshots[/\\]([0-9a-f]+)[/\\]", path) if isinstance(path, str) else None
    return match.group(1) if match else ""


def why_unreachable(model: str, revision: str = "main") -> str | None:
    """Why ``model`` cannot be loaded, found in seconds and not after retries; None where it may be.

    A folder, a copy in the cache, a proxy or an open connection to the hub are reasons to try.
    """
    if Path(model).is_dir() or commit_in_cache(model, revision) or urllib.request.getproxies():
        return None
    if model.startswith((".", "/", "~")):
        return f"there is no folder {model}"
    from huggingface_hub import constants

    host = urllib.parse.urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((host.hostname or "", host.port or 443), timeout=5).close()
    except OSError as error:
        return f"{host.hostname} cannot be reached ({error})"
    return None


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """A bar over the tensors of a local file says nothing; a download shows its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
