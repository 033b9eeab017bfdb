"""Calls of the fused kernel against PyTorch's operations in float64, on a card or in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nearfar.contrast import (
    DenseMask,
    DuplicateMask,
    NoPositives,
    OwnPair,
    Target,
    fused,
    log_sums,
    softmax,
)
from nearfar.contrast.fused import use_kernel
from nearfar.contrast.masks import Mask

__all__ = ["FUSED_CASES", "blocks_of", "fused_calls", "fused_difference"]

#: calls of the fused kernel: rows, keys, dimensions, and what else is different
FUSED_CASES: dict[str, dict[str, Any]] = {
    "one row": {"shape": (1, 1, 3)},
    "7 rows": {"shape": (7, 7, 5)},
    "33 rows": {"shape": (33, 33, 40)},
    "130 rows": {"shape": (130, 130, 20)},
    "wide rows": {"shape": (5, 5, 300)},
    "one direction, more keys": {"shape": (20, 57, 17), "both": False},
    "positives off the diagonal": {"shape": (20, 57, 17), "both": False, "offset": 11},
    "the last rows of a rank have no partner": {"shape": (20, 30, 8), "both": False, "offset": 15},
    "bfloat16": {"shape": (33, 33, 20), "dtype": "bfloat16"},
    "bfloat16, rows of extreme size": {"shape": (9, 9, 20), "dtype": "bfloat16", "size": 1e30},
    "dot products": {"shape": (9, 9, 5), "normalize": False, "scale": 0.5},
    "temperature 0.001": {"shape": (33, 33, 9), "scale": 1000.0},
    "a row of zeros": {"shape": (9, 9, 5), "zeros": True},
    "equal numbers left out": {"shape": (33, 33, 9), "mask": "labels"},
    "a matrix left out": {"shape": (20, 40, 9), "both": False, "mask": "matrix"},
    "a matrix left out, of a rank": {"shape": (20, 40, 9), "both": False, "mask": "matrix", "offset": 5},
    "both left out": {"shape": (20, 20, 9), "mask": "both"},
    "all left out": {"shape": (9, 9, 5), "mask": "all"},
    "no positives": {"shape": (20, 12, 9), "both": False, "target": "none"},
}


@contextmanager
def fused_calls() -> Iterator[Calls]:
    """Counts the calls of the fused kernel."""
    before, calls = softmax.fused_results, Calls()

    def counted(*arguments: Any) -> list[tuple[Any, ...]]:
        calls.count += 1
        return before(*arguments)

    softmax.fused_results = counted
    try:
        yield calls
    finally:
        softmax.fused_results = before


@contextmanager
def blocks_of(blocks: Any) -> Iterator[None]:
    """The fused kernel in these tiles, where nothing has been measured."""
    before = fused._default_blocks
    fused._default_blocks = lambda: blocks
    try:
        yield
    finally:
        fused._default_blocks = before


class Calls:
    """How often something was called."""

    count = 0


def fused_difference(
    device: str,
    shape: tuple[int, int, int],
    both: bool = True,
    dtype: str = "float32",
    offset: int = 0,
    normalize: bool = True,
    scale: float = 12.0,
    mask: str = "",
    target: str = "",
    zeros: bool = False,
    size: float = 1.0,
) -> dict[str, Any]:
    """How far the fused kernel's numbers are from those of float64 by PyTorch's operations: of log-sums in units of
    cosines, of gradients (rows, keys, scale) relative to their norm; and whether the fused kernel was taken at all."""
    n, m, d = shape
    generator = torch.Generator().manual_seed(n * m)
    a, b = (torch.randn(rows, d, generator=generator) for rows in (n, m))
    pairs = min(n, m - offset)
    b[offset : offset + pairs] += a[:pairs]
    if zeros:
        a[2] = 0.0
    a, b = (x.to(getattr(torch, dtype)) for x in (a * size, b))
    labels = torch.randint(0, 5, (max(n, m),), generator=generator).to(device)
    matrix = torch.rand(max(n, m) if offset else n, m, generator=generator).to(device) > 0.5
    masks: dict[str, Callable[[], Mask | None]] = {
        "": lambda: None,
        "labels": lambda: DuplicateMask(labels),
        "matrix": lambda: DenseMask(matrix),
        "both": lambda: DuplicateMask(labels) | DenseMask(matrix),
        "all": lambda: DenseMask(torch.ones(n, m, dtype=torch.bool, device=device)),
    }
    who: Target = NoPositives(n, m) if target else OwnPair(max(n, m) if offset else n, m)
    results = []
    for kernel, wide in (("fused", torch.float32), ("torch", torch.float64)):
        use_kernel(kernel)  # type: ignore[arg-type]
        x, y = (each.detach().to(device, wide, copy=True).requires_grad_() for each in (a, b))
        factor = torch.tensor(scale, dtype=wide, device=device, requires_grad=True)
        found = log_sums(
            x, y, factor, who, both=both, mask=masks[mask](), offset=offset, normalize=normalize,
            half=dtype == "bfloat16",
        )  # fmt: skip
        parts = []
        for k, sums in enumerate(found):
            weight = torch.linspace(0.3, 1.7, len(sums.rest), dtype=wide, device=device)
            parts.append(
                (_finite(sums.rest) * weight).sum() + (k + 1) * (_finite(sums.positive) * weight).sum()
            )
        torch.stack(parts).sum().backward()
        numbers = [
            _finite(each) for sums in found for each in (sums.rest, sums.positive, sums.statistics.hardest)
        ]
        counts = [
            torch.as_tensor(count).double().cpu().expand(len(sums.rest))
            for sums in found
            for count in (sums.statistics.candidates, sums.statistics.positives, sums.statistics.left_out)
        ]
        fused = "Fused" in type(found[0].rest.grad_fn).__name__
        results.append((fused, torch.cat(numbers), torch.cat(counts), (x.grad, y.grad, factor.grad)))
    use_kernel("auto")
    ours, true = results
    value = ((ours[1].double() - true[1]).abs().max() / max(scale, true[1].abs().max().item())).item()
    gradients = [
        ((one.double() - two).norm() / two.norm().clamp(min=1e-6)).item()
        for one, two in zip(ours[3], true[3], strict=True)
        if one is not None and two is not None
    ]
    # What a cosine lacks is multiplied by the scale, and stands in an exponent.
    rounding = max(1e-4 if dtype == "bfloat16" else 3e-5, 3e-6 * scale)
    same = bool((ours[2] == true[2]).all())
    close = ours[0] and same and value < 3e-6 and all(each < rounding for each in gradients)
    return {"fused": ours[0], "value": value, "counts": same, "gradients": gradients, "close": close}


def _finite(values: Tensor) -> Tensor:
    return torch.where(values > -1e29, values, 0.0)
