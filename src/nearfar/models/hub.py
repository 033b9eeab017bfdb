"""Pretrained networks: which one the Hugging Face hub gives, if at hand; low-rank adapters (LoRA, Hu et al. 2022)."""

from __future__ import annotations

import copy
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from nearfar.errors import NearfarError

__all__ = ["add_adapters", "commit_in_cache", "merge_adapters", "no_progress_bar", "why_unreachable"]


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


def add_adapters(network: nn.Module, rank: int, name: str = "this network") -> nn.Module:
    """``network`` with an adapter of this rank in every linear layer (scaled by 2); nothing else of it is trained.

    The adapters start at 0, so that the network first computes what it did before. ``name`` is what messages call it.

    Raises ``NearfarError`` where peft is not installed, or the network has no layer that takes an adapter.

    >>> adapted = add_adapters(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), rank=2)
    >>> sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    28
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise NearfarError(f"train=lora needs peft ({error}): pip install 'nearfar[lora]'.") from None
    if rank < 1:
        raise NearfarError(f"lora_rank={rank}: at least 1 is needed (4 to 64 is usual).")
    layers = sorted(
        {path for path, module in network.named_modules() if isinstance(module, nn.Linear) and path}
    )
    if not layers:
        raise NearfarError(f"train=lora: {name} has no linear layer that an adapter could be added to.")
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=layers)
    adapted: nn.Module = inject_adapter_in_model(config, network)
    for path, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" in path)
    return adapted


def merge_adapters(network: nn.Module) -> nn.Module:
    """A copy of ``network`` in which every adapter is added to the weights of its layer: the same function of the input
    within rounding, by the layers that were there before. Of a network without adapters a plain copy.

    >>> network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> [type(layer).__name__ for layer in merge_adapters(add_adapters(network, rank=2))]
    ['Linear', 'ReLU', 'Linear']
    """
    merged = copy.deepcopy(network)
    for path, module in list(merged.named_modules()):
        if path and hasattr(module, "lora_A") and hasattr(module, "get_base_layer"):
            module.merge()
            parent, _, name = path.rpartition(".")
            setattr(merged.get_submodule(parent), name, module.get_base_layer())
    return merged
