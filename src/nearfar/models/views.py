"""The trained model of any number of views: a tower and a head for each, one scale, and a memory of earlier items."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nearfar.errors import NearfarError
from nearfar.losses.memory import CrossBatchMemory
from nearfar.models.projection import ProjectionHead

__all__ = ["HeadKind", "PassThrough", "Standardize", "ViewMemory", "ViewModel", "build_head", "module_name"]

HeadKind = Literal["none", "linear", "mlp"]


class PassThrough(nn.Module):
    """Vectors of length ``width`` as they are: the module of a tower that trains nothing.

    >>> PassThrough(3)(torch.ones(2, 3)).shape
    torch.Size([2, 3])
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        if x.shape[-1] != self.width:
            raise NearfarError(f"vectors have {x.shape[-1]} numbers; this tower reads {self.width}")
        return x


class Standardize(nn.Module):
    """Columns of mean 0 and variance 1, by the mean and standard deviation of the training rows, kept as buffers.

    >>> Standardize(torch.tensor([[0.0, 5.0], [2.0, 5.0]]))(torch.tensor([[2.0, 6.0]]))
    tensor([[1., 1.]])
    """

    def __init__(self, rows: Float[Tensor, "n d"]) -> None:
        super().__init__()
        mean, sd = rows.double().mean(0), rows.double().std(0, correction=0)
        constant = sd <= 1e-6 * mean.abs().clamp(min=1.0)
        self.width = int(rows.shape[1])
        self.mean: Tensor
        self.sd: Tensor
        self.register_buffer("mean", mean.float())
        self.register_buffer("sd", torch.where(constant, 1.0, sd).float())

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        return (x - self.mean) / self.sd


def build_head(
    kind: HeadKind, width: int, dim: int, *, hidden: int = 512, dropout: float = 0.0, norm: str | None = None
) -> nn.Module:
    """What stands between a tower and the shared space: nothing ("none": ``width`` must be ``dim``), a linear map, or a
    perceptron with one hidden layer.

    >>> build_head("linear", 384, 128)
    Linear(in_features=384, out_features=128, bias=True)
    >>> build_head("none", 384, 128)
    Traceback (most recent call last):
    nearfar.errors.NearfarError: head=none: the tower gives 384 numbers and the shared space has 128; ...
    """
    if kind == "linear":
        return nn.Linear(width, dim)
    if kind == "mlp":
        return ProjectionHead(width, hidden, dim, dropout=dropout, norm=norm, activation="gelu")
    if width != dim:
        raise NearfarError(
            f"head=none: the tower gives {width} numbers and the shared space has {dim}; set embedding_dim={width}, or "
            "head=linear"
        )
    return nn.Identity()


def module_name(view: str) -> str:
    """A view's name as that of a module: it may hold no dot, may not be empty, and not be a name that modules use.

    >>> module_name("meta.title"), module_name("values")
    ('meta_title', 'values_')
    """
    name = view.replace(".", "_") or "_"
    return f"{name}_" if name in _TAKEN else name


_TAKEN = frozenset(dir(nn.ModuleDict()))


class ViewMemory(nn.Module):
    """The last ``size`` items as negatives of later batches: each view's embeddings and the groups of its values.

    ``reference_dim``: also vectors of that length by which likely false negatives are told (None: none are kept).
    """

    def __init__(self, views: Mapping[str, int], size: int, reference_dim: int | None = None) -> None:
        super().__init__()
        self.kept = nn.ModuleDict(
            {module_name(v): CrossBatchMemory(size, dim, ids=True) for v, dim in views.items()}
        )
        self.vectors = None if reference_dim is None else CrossBatchMemory(size, reference_dim)

    def _of(self, view: str) -> CrossBatchMemory:
        return cast(CrossBatchMemory, self.kept[module_name(view)])

    @property
    def filled(self) -> int:
        """The number of items stored so far."""
        return cast(CrossBatchMemory, next(iter(self.kept.values()))).filled

    def keeps(self, view: str) -> bool:
        """Whether a view is stored; one that is not is contrasted within the batch alone."""
        return module_name(view) in self.kept

    def rows(self, view: str) -> Float[Tensor, "q d"]:
        """The stored embeddings of a view."""
        return self._of(view).rows()

    def groups(self, view: str) -> Int[Tensor, " q"]:
        """The groups of the stored values: items with the same value are no negatives."""
        return self._of(view).ids()

    def push(
        self,
        embeddings: Mapping[str, Float[Tensor, "b d"]],
        groups: Mapping[str, Int[Tensor, " b"]],
        vectors: Float[Tensor, "b r"] | None = None,
    ) -> None:
        """Keep the items of a batch after its step."""
        for view, rows in embeddings.items():
            self._of(view).push(rows, groups[view])
        if self.vectors is not None and vectors is not None:
            self.vectors.push(vectors)

    def age(self) -> Float[Tensor, ""]:
        """Mean age of the items in steps; 0 where there is none."""
        first = cast(CrossBatchMemory, next(iter(self.kept.values())))
        return first.age().float().mean() if self.filled else torch.zeros(())


class ViewModel(nn.Module):
    """A tower and a head for each view, into one space of ``dim`` numbers; embeddings are not normalised.

    Args:
        towers: the module of each view, with a ``width``; one module under two names is shared by both views.
        heads: the head of each view, likewise.
        temperature: 1 / temperature is the scale of similarities; with ``learn_temperature`` where learning starts.
        max_scale: the largest scale that is learned (CLIP: 100), where ``scale()`` is clamped; None for no bound.
        bias: SigLIP's bias at the start, which is learned; None for losses without one.
        memory: a `ViewMemory`, or None.

    Weights of a model with a different memory, or that learned no temperature, can be loaded: the memory is then empty,
    the temperature that of the start.

    ``encode(view, field)`` gives (b, dim). ``scale()`` is None where the temperature does not learn: that of the loss
    holds then.

    >>> model = ViewModel({"a": PassThrough(4), "b": PassThrough(6)}, {"a": nn.Linear(4, 2), "b": nn.Linear(6, 2)})
    >>> model.encode("b", torch.ones(3, 6)).shape, model.scale() is None
    (torch.Size([3, 2]), True)
    """

    #: parts of the state that options set where they are not learned: without them the state is no different one
    set_by_options: ClassVar[tuple[str, ...]] = ("log_scale", "bias")

    def __init__(
        self,
        towers: Mapping[str, nn.Module],
        heads: Mapping[str, nn.Module],
        *,
        temperature: float = 0.07,
        learn_temperature: bool = False,
        max_scale: float | None = 100.0,
        bias: float | None = None,
        memory: ViewMemory | None = None,
    ) -> None:
        super().__init__()
        if set(towers) != set(heads):
            raise NearfarError(f"towers are for {sorted(towers)} and heads for {sorted(heads)}")
        if learn_temperature and max_scale is not None and temperature * max_scale < 1:
            raise NearfarError(
                f"temperature={temperature} means a scale of {1 / temperature:.4g}, beyond max_scale={max_scale}: "
                "start warmer, or raise max_scale."
            )
        self.towers = nn.ModuleDict({module_name(view): module for view, module in towers.items()})
        self.heads = nn.ModuleDict({module_name(view): module for view, module in heads.items()})
        self.max_scale = max_scale if learn_temperature else None
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature))) if learn_temperature else None
        self.bias = None if bias is None else nn.Parameter(torch.tensor(float(bias)))
        self.memory = memory
        self.register_load_state_dict_pre_hook(_own_parts)

    def encode(
        self, view: str, field: object, present: Bool[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b d"]:
        """The embeddings of a batch's field; rows that lack this view (``present`` false) are 0."""
        name = module_name(view)
        embedded: Tensor = self.heads[name](self.towers[name](field))
        return embedded if present is None else embedded * present[:, None].to(embedded.dtype)

    def only(self, view: str) -> ViewModel:
        """A model of one view: the same modules of its tower and head, and nothing else."""
        name = module_name(view)
        return ViewModel({view: self.towers[name]}, {view: self.heads[name]})

    def tower(self, view: str) -> nn.Module:
        """The module of a view's tower."""
        return self.towers[module_name(view)]

    def scale(self) -> Float[Tensor, ""] | None:
        """The learned 1 / temperature, at most ``max_scale``; None where it is not learned."""
        if self.log_scale is None:
            return None
        scale = self.log_scale.exp()
        return scale if self.max_scale is None else scale.clamp(max=self.max_scale)


def _own_parts(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Before weights are loaded: fits to this model what a model with other options learned and kept beside encoders.

    A memory of a different size, or none, is replaced by the model's own empty one; scale and bias that are not there
    start where the model says, and those that it does not learn are left out.
    """
    own = model.state_dict()
    for part in ("memory.", *ViewModel.set_by_options):
        mine = {f"{prefix}{key}": value for key, value in own.items() if key.startswith(part)}
        theirs = {key: value for key, value in state.items() if key.startswith(f"{prefix}{part}")}
        if {key: value.shape for key, value in mine.items()} != {
            key: value.shape for key, value in theirs.items()
        }:
            for key in theirs:
                del state[key]
            state.update(mine)
