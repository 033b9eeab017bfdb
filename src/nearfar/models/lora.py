"""Low-rank adapters in a pretrained network (LoRA, Hu et al. 2022), by the library peft."""

from __future__ import annotations

from torch import nn

from nearfar.errors import NearfarError

__all__ = ["add_adapters"]


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
