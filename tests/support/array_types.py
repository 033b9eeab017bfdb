"""Arrays in signatures, checked while the tests run: shapes and types of what goes in and comes out.

Only annotations that name an array are looked at, and only of calls that return. So a function is the first to answer
a wrong argument, with its own error, and a call that it accepts has to fit its signature: the results in shape and
type of their elements, the arguments in shape, since lists, tables and whole numbers are often taken and converted.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import numpy as np
from beartype import beartype
from beartype.vale import Is
from jaxtyping import AbstractArray, Shaped, install_import_hook
from torch import Tensor

#: a file that has one of these names arrays in signatures: their library, or a name for arrays of a different module
_NAMED_BY = ("from jaxtyping import", ": Embeddings,")
NoArray = Annotated[object, Is[lambda value: not isinstance(value, (Tensor, np.ndarray))]]


def check_imports(*parts: str) -> None:
    """Check the functions of these folders and files of the package, as soon as a module is imported."""
    spec = find_spec("nearfar")
    assert spec is not None
    assert spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0])
    names = []
    for part in parts:
        start = root / part
        assert start.exists(), start
        for path in [start] if start.is_file() else start.rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            if any(name in text for name in _NAMED_BY):
                names.append(".".join(("nearfar", *path.relative_to(root).with_suffix("").parts)))
    assert names
    install_import_hook(names, "array_types.check_arrays")


def check_arrays(function: Callable[..., Any]) -> Callable[..., Any]:
    """For jaxtyping's hook, which gives each signature twice: before a call, with ``Any`` returned, and after it."""
    hints = function.__annotations__
    if hints.get("return") is Any:
        return function
    arrays = {
        name: _array_of_any_type(hint) if name != "return" else hint
        for name, hint in hints.items()
        if _names_array(hint)
    }
    function.__annotations__ = arrays
    return beartype(function) if arrays else function


def _names_array(hint: Any) -> bool:
    return _is_array(hint) or any(map(_names_array, get_args(hint)))


def _is_array(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, AbstractArray)


def _array_of_any_type(hint: Any) -> Any:
    """Arrays of these shapes, or no array at all."""
    if get_origin(hint) in (Union, UnionType):
        return Union[tuple(map(_array_of_any_type, get_args(hint)))]  # noqa: UP007  (of a list)
    if _is_array(hint):
        return Shaped[Tensor, hint.dim_str] | Shaped[np.ndarray, hint.dim_str] | NoArray
    return hint if _names_array(hint) or hint in (Tensor, np.ndarray) else NoArray
