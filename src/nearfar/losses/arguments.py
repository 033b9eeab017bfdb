"""Arguments that the softmax losses share: embeddings, scale, further negatives, masks of false negatives."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nearfar.arguments import any_number, flag, number, shown, whole_number
from nearfar.contrast import Extra, Mask, checked_mask, computing_dtype, embeddings, unit_rows
from nearfar.errors import NearfarError
from nearfar.labels import apart, whole_labels

__all__ = [
    "Negatives",
    "Ready",
    "any_number",
    "check_denominator",
    "check_flags",
    "check_matrices",
    "check_part",
    "check_reduction",
    "check_sum",
    "check_temperature",
    "check_tensors",
    "check_words",
    "duplicate_mask",
    "extras_of",
    "false_negative_mask",
    "number",
    "ready",
    "renamed",
    "scale_of",
]


#: further negatives: rows for the first direction, or a pair of rows for both
Negatives = Tensor | tuple[Tensor | None, Tensor | None]


class Ready(NamedTuple):
    """Embeddings in the precision of the computation, at unit length if wanted, and the scale beside them."""

    a: Tensor
    b: Tensor
    scale: Tensor


def ready(
    a: Tensor,
    b: Tensor | None,
    scale: float | Tensor,
    normalize: bool | None,
    names: tuple[str, str] = ("a", "b"),
    scale_name: str = "scale",
) -> Ready:
    """Check and prepare embeddings; without ``b`` the first stands for both. ``normalize=None``: the kernel brings
    them to unit length, and looks whether they are finite."""
    check_tensors(**{names[0]: a} if b is None else {names[0]: a, names[1]: b})
    dtype = computing_dtype(a) if b is None else computing_dtype(a, b)
    first = embeddings(a, names[0], normalize, dtype)
    second = first if b is None else embeddings(b, names[1], normalize, dtype)
    if len(first) == 0:
        raise NearfarError(f"{names[0]} has no rows; a loss needs at least one row")
    if first.shape[1] != second.shape[1]:
        raise NearfarError(
            f"{names[0]} is {tuple(a.shape)} and {names[1]} is {tuple(second.shape)}; both need the same dimensions "
            "(columns): end both encoders with a projection to one size"
        )
    return Ready(first, second, scale_of(scale, first, scale_name))


def check_tensors(**values: object) -> None:
    """``NearfarError`` unless all of these are tensors."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            how = f"{name}.to_numpy()" if hasattr(value, "to_numpy") else name
            raise NearfarError(
                f"{name} is a {type(value).__name__}; pass a tensor, such as torch.as_tensor({how})"
            )


def check_matrices(**values: object) -> None:
    """``NearfarError`` unless all of these are tensors (rows, dimensions) of floating point; looks at no value."""
    check_tensors(**values)
    for name, value in values.items():
        assert isinstance(value, Tensor)
        if value.ndim != 2 or not value.is_floating_point():
            raise NearfarError(
                f"{name} is {tuple(value.shape)} {value.dtype}; a loss takes a matrix of floating point (rows, "
                "dimensions)"
            )


def check_part(rows: object, tile: object = None) -> None:
    """``NearfarError`` unless ``rows`` is a slice of whole numbers or None, and ``tile`` two sizes or None."""
    if rows is not None:
        if not isinstance(rows, slice):
            raise NearfarError(f"rows is a {type(rows).__name__}; a slice is needed, such as slice(0, 16)")
        for end in (rows.start, rows.stop, rows.step):
            if end is not None and (isinstance(end, bool) or not hasattr(end, "__index__")):
                raise NearfarError(f"rows is {shown(rows)}; the ends of the slice are whole numbers")
    if tile is not None:
        if not isinstance(tile, (tuple, list)) or len(tile) != 2:
            raise NearfarError(f"tile is {shown(tile)}; two sizes are needed, (rows, columns)")
        for size in tile:
            if not hasattr(size, "__index__"):
                raise NearfarError(f"tile is {shown(tile)}; two whole numbers are needed, (rows, columns)")
            whole_number("tile", size, 1)


def check_words(**values: object) -> None:
    """``NearfarError`` unless all of these are texts; whoever takes them knows which."""
    for name, value in values.items():
        if not isinstance(value, str):
            raise NearfarError(f"{name} is {shown(value)}; a word is needed")


def check_sum(sum: str) -> bool:
    """Whether the sum over positives stands inside the logarithm; ``NearfarError`` for anything but the two places."""
    check_words(sum=sum)
    if sum not in ("outside", "inside"):
        raise NearfarError(f"sum is {sum!r}; it stands 'outside' or 'inside' the logarithm")
    return sum == "inside"


def check_flags(**values: object) -> None:
    """``NearfarError`` unless all of these are True or False."""
    for name, value in values.items():
        if value is not True and value is not False:
            flag(name, value)


def scale_of(scale: float | Tensor, like: Tensor, name: str = "scale") -> Tensor:
    """A scale as a 0-d tensor beside the embeddings; its gradient goes through."""
    if isinstance(scale, Tensor):
        if scale.numel() != 1:
            raise NearfarError(
                f"{name} has shape {tuple(scale.shape)}; one number is needed, 1 / temperature"
            )
        if scale.dtype == torch.bool or scale.is_complex():
            raise NearfarError(f"{name} is a tensor of {scale.dtype}; a number is needed, 1 / temperature")
        value = scale.detach().item() if scale.device.type == "cpu" else 1.0
        scale = scale.reshape(()).to(like)
    else:
        value = any_number(name, scale)
        # On the CPU, wherever the embeddings are: what depends on its size is then known without waiting for a device.
        scale = torch.tensor(value, dtype=like.dtype)
    if not (value > 0 and math.isfinite(value)):
        raise NearfarError(
            f"{name} is {value}, but it must be a finite number above 0: it is 1 / temperature, such as 14.3. Of a "
            "learned log scale, pass the exponential"
        )
    return scale


def check_temperature(temperature: float) -> float:
    """The temperature as a number; ``NearfarError`` unless it is above 0 and no weight that learns."""
    if isinstance(temperature, Tensor) and temperature.requires_grad:
        raise NearfarError(
            "temperature is a tensor that learns, and a loss has no weights: give the model a log scale and pass its "
            "exponential as scale= (InfoNCELoss) or logit_scale (ClipLoss)"
        )
    value = number("temperature", temperature)
    if not value > 0:
        raise NearfarError(f"temperature is {value}, but it must be above 0; 0.05 to 0.1 is usual")
    return value


def extras_of(
    negatives: Negatives | None,
    masks: Mask | Tensor | tuple[Mask | Tensor | None, ...] | None,
    ready: Ready,
    both: bool,
    normalize: bool,
) -> list[Extra | None]:
    """Further negatives of each direction, prepared like the embeddings."""
    if negatives is None:
        if masks is not None:
            raise NearfarError("negatives_mask leaves out further negatives, but negatives were not given")
        return []
    rows = _pair("negatives", negatives)
    check_tensors(negatives=next((part for part in rows if part is not None), torch.empty(0)))
    if masks is not None and not isinstance(masks, (tuple, list)) and all(part is not None for part in rows):
        raise NearfarError(
            "two sets of further negatives were given and one negatives_mask; pass a pair of masks, None for none"
        )
    left_out = _pair("negatives_mask", masks)
    if rows[1] is not None and not both:
        raise NearfarError(
            "two sets of further negatives were given, but symmetric=False has one direction only"
        )
    extras: list[Extra | None] = []
    for keys, mask in zip(rows, left_out, strict=True):
        if keys is None:
            if mask is not None:
                raise NearfarError("negatives_mask has a mask where negatives has None")
            extras.append(None)
            continue
        check_tensors(negatives=keys)
        if keys.ndim not in (2, 3):
            raise NearfarError(
                f"negatives are {tuple(keys.shape)}; a matrix of rows (q, d), or (n, k, d), is needed"
            )
        flat = keys.reshape(-1, keys.shape[-1]) if keys.ndim == 3 else keys
        flat = embeddings(flat, "negatives", normalize, ready.a.dtype)
        if flat.shape[1] != ready.a.shape[1] or (keys.ndim == 3 and len(keys) != len(ready.a)):
            raise NearfarError(
                f"negatives are {tuple(keys.shape)}; (further rows, {ready.a.shape[1]}) or, for each query its own, "
                f"({len(ready.a)}, k, {ready.a.shape[1]}) is needed"
            )
        checked = None if mask is None else checked_mask(mask, len(ready.a), keys.shape[-2], "negatives_mask")
        extras.append(Extra(flat.reshape(keys.shape), checked))
    return extras


def _pair(name: str, value: object) -> tuple[Any, Any]:
    if not isinstance(value, (tuple, list)):
        return value, None
    if len(value) != 2:
        raise NearfarError(f"{name} has {len(value)} parts; one, or a pair for both directions, is needed")
    return value[0], value[1]


Called = TypeVar("Called", bound=Callable[..., object])


def renamed(**names: str) -> Callable[[Called], Called]:
    """A function, or a class, that also takes keyword arguments by their earlier names, and warns.

    >>> @renamed(percent="fraction")
    ... def half(fraction):
    ...     return fraction / 2
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     half(percent=1.0), str(caught[0].message)
    (0.5, "half: 'percent' is now called 'fraction'; the earlier name goes with the next version")
    """

    def accepting(function: Callable[..., object], title: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: object, **kwargs: object) -> Any:
            for old in names.keys() & kwargs.keys():
                new = names[old]
                if new in kwargs:
                    raise NearfarError(
                        f"{title}: {new} is given twice, also as {old}, its earlier name; leave {old} out"
                    )
                warnings.warn(
                    f"{title}: '{old}' is now called '{new}'; the earlier name goes with the next version",
                    DeprecationWarning,
                    stacklevel=2,
                )
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    def decorate(called: Called) -> Called:
        if isinstance(called, type):
            called.__init__ = accepting(called.__init__, called.__name__)  # type: ignore[misc]
            return called
        return accepting(called, called.__name__)  # type: ignore[return-value]

    return decorate


# The cosine of a row with its own copy misses 1 by a few roundings of float32.
_ROUNDING = 1e-6


@torch.no_grad()
def false_negative_mask(text: Float[Tensor, "n d"], threshold: float = 0.95) -> Bool[Tensor, "n n"]:
    """True where two different rows have texts of cosine ``threshold`` or more: likely the same meaning.

    A negative that says the same as the positive teaches the wrong thing. The diagonal is false: a row's own
    partner is always a candidate.

    >>> false_negative_mask(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]), 1.0)
    tensor([[False,  True, False],
            [ True, False, False],
            [False, False, False]])
    """
    check_tensors(text=text)
    if text.ndim != 2 or text.is_complex():
        raise NearfarError(
            f"text embeddings have shape {tuple(text.shape)}; the mask takes numbers (rows, dimensions)"
        )
    if not -1.0 <= number("threshold", threshold) <= 1.0:
        raise NearfarError(f"threshold is {threshold}, but it is a cosine: -1 to 1, usually 0.9 to 0.99")
    with torch.autocast(text.device.type, enabled=False):
        unit = unit_rows(text.to(torch.promote_types(text.dtype, torch.float32)))
        return (unit @ unit.T >= threshold - _ROUNDING).fill_diagonal_(False)


@torch.no_grad()
def duplicate_mask(labels: Int[Tensor, " n"]) -> Bool[Tensor, "n n"]:
    """True where two different rows have the same label, such as the id of their text; a label that is missing (−1,
    NaN) is that of no other row.

    >>> duplicate_mask(torch.tensor([7, 3, 7]))[0]
    tensor([False, False,  True])
    """
    labels = whole_labels(labels)
    if labels.ndim != 1:
        raise NearfarError(f"labels have shape {tuple(labels.shape)}; the mask takes one label for each row")
    labels = apart(labels)
    return (labels[:, None] == labels[None, :]).fill_diagonal_(False)


#: what stands below the fraction of a softmax loss, and how its rows become a number
DENOMINATORS = ("all", "own", "negatives")
REDUCTIONS = ("mean", "sum", "none")


def check_denominator(denominator: str) -> str:
    """``NearfarError`` unless it is known."""
    if denominator not in DENOMINATORS:
        raise NearfarError(
            f"denominator is {denominator!r}; it holds 'all' candidates, the positive's 'own' "
            "negatives and itself, or the 'negatives' alone"
        )
    return denominator


def check_reduction(reduction: str) -> str:
    """``NearfarError`` unless it is known."""
    if reduction not in REDUCTIONS:
        raise NearfarError(f"reduction is {reduction!r}; it is 'mean', 'sum' or 'none'")
    return reduction
