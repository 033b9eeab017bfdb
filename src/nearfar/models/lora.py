"""Low-rank adapters in a pretrained network (LoRA, Hu et al. 2022), by the library peft."""

from __future__ import annotations

import copy

from torch import nn

from nearfar.errors import NearfarError

__all__ = ["add_adapters", "merge_adapters"]


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
