"""Learning from a teacher's scores: the distribution over candidates (KL), or the margins between them (squared error).

Both are terms beside a contrastive loss (``Objective``), or losses of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nearfar.contrast import (
    Direction,
    Rectangle,
    Statistics,
    Step,
    Target,
    Weights,
    computing_dtype,
    unit_rows,
)
from nearfar.contrast.numerics import full_precision
from nearfar.contrast.positives import Patch, Workspace
from nearfar.errors import NearfarError
from nearfar.losses.arguments import (
    any_number,
    check_flags,
    check_matrices,
    check_part,
    check_temperature,
    check_tensors,
    number,
    ready,
)
from nearfar.losses.base import ContrastiveLoss, LossTraits
from nearfar.losses.target import target_loss

__all__ = ["DistillationLoss", "MarginMSELoss", "TeacherSoftmax", "distillation", "margin_mse"]

#: rows of the teacher's scores that are looked at together
_ROWS = 1024

#: a teacher: scores (n, m) of all pairs, or its vectors of queries and keys, whose cosines are the scores
Teacher = Tensor | tuple[Tensor, Tensor]


class TeacherSoftmax(Target):
    """Every key is a positive, and weighs what a teacher's softmax over the keys gives it: exp(scale · cos(u_i, v_j))
    over their sum. Weights are computed tile by tile; no matrix of all pairs is stored.

    >>> target = TeacherSoftmax(torch.eye(2), torch.eye(2), 1.0)
    >>> target.patches(slice(0, 1), slice(0, 2))[0].weight
    tensor([[0.7311, 0.2689]])
    """

    every_row_has_positive = True

    def __init__(self, queries: Float[Tensor, "n g"], keys: Float[Tensor, "m g"], scale: float) -> None:
        self.shape = (len(queries), len(keys))
        self._queries, self._keys, self._scale = unit_rows(queries.detach()), unit_rows(keys.detach()), scale
        with full_precision(queries.device):
            parts = [self._logits(part, self._keys).logsumexp(1) for part in self._queries.split(_ROWS)]
        self._log_sum = torch.cat(parts) if parts else self._queries.new_zeros(0)

    def _logits(self, queries: Tensor, keys: Tensor) -> Float[Tensor, "r c"]:
        return (queries @ keys.T) * self._scale

    def patches(self, rows: slice, columns: slice, space: Workspace | None = None) -> Sequence[Patch]:
        with full_precision(self._queries.device):
            logits = self._logits(self._queries[rows], self._keys[columns])
        weight = (logits - self._log_sum[rows].unsqueeze(1)).exp_()
        return (Rectangle(slice(0, weight.shape[0]), slice(0, weight.shape[1]), weight),)

    def transposed(self) -> TeacherSoftmax:
        return TeacherSoftmax(self._keys, self._queries, self._scale)

    def has_positives(self, without_self: bool) -> Bool[Tensor, " n"]:
        return torch.ones(self.shape[0], dtype=torch.bool, device=self._queries.device)


def distillation(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "m d"] | Float[Tensor, "n k d"],
    teacher: Teacher,
    *,
    temperature: float = 0.07,
    teacher_temperature: float | None = None,
    scale: float | Float[Tensor, ""] | None = None,
    symmetric: bool = True,
    normalize: bool = True,
    rows: slice | None = None,
) -> Float[Tensor, ""]:
    """The mean over rows of KL(teacher ‖ student): Σ_j Q_ij (log Q_ij − log P_ij) over the candidates of each row
    (Hinton, Vinyals and Dean 2015, arXiv:1503.02531).

    P is the softmax of cos(a_i, b_j) / temperature over the keys ``b`` (m, d), Q that of the teacher's scores over
    ``teacher_temperature`` (None: ``temperature``). ``teacher`` holds the scores (n, m), or the teacher's vectors of
    rows and keys, (n, g) and (m, g), whose cosines are the scores: then no matrix of all pairs is stored. With keys
    (n, k, d) each row has candidates of its own, and the teacher's scores (n, k).

    ``symmetric`` averages both directions, as far as keys are shared and as many as rows; ``scale`` replaces 1 /
    temperature and may be a tensor that learns; ``normalize=False`` takes dot products. ``rows`` makes only those rows
    queries, and such parts add up. Range: 0 (the student's distribution is the teacher's) to infinity. Gradients do
    not reach the teacher.

    >>> import torch
    >>> distillation(torch.eye(3), torch.eye(3), torch.eye(3), temperature=1.0).abs().item() < 1e-6
    True
    >>> distillation(torch.eye(3), torch.eye(3), (-torch.eye(3), torch.eye(3)), temperature=1.0).item() > 0.3
    True
    """
    return _distillation_step(
        a, b, teacher, temperature, teacher_temperature, scale, symmetric, normalize, rows
    )[0]


def _distillation_step(
    a: Tensor,
    b: Tensor,
    teacher: Teacher,
    temperature: float,
    teacher_temperature: float | None,
    scale: float | Tensor | None,
    symmetric: bool,
    normalize: bool,
    rows: slice | None,
) -> tuple[Float[Tensor, ""], Step]:
    temperature = check_temperature(temperature)
    theirs = temperature
    if teacher_temperature is not None:
        theirs = number("teacher_temperature", teacher_temperature, above=0)
    factor: float | Tensor = 1.0 / temperature
    if scale is not None:
        factor = scale if isinstance(scale, Tensor) else any_number("scale", scale)
    check_flags(symmetric=symmetric, normalize=normalize)
    check_part(rows)
    check_tensors(b=b)
    check_matrices(a=a) if b.ndim == 3 else check_matrices(a=a, b=b)
    if b.ndim == 3:
        return _listed_step(a, b, teacher, factor, theirs, normalize, rows)
    pair = isinstance(teacher, (tuple, list))
    parts = _teacher_parts(a, b, teacher)
    directions = [(a, b, parts)]
    if symmetric:
        if len(a) != len(b):
            raise NearfarError(
                f"a has {len(a)} rows and b {len(b)}: symmetric=True has both directions, for as many keys as "
                "rows; set symmetric=False"
            )
        directions.append((b, a, parts[::-1] if pair else [parts[0].T]))
    values, steps = [], []
    for queries, keys, scores in directions:
        target = _target(scores, theirs, computing_dtype(a, b))
        value, step = target_loss(
            queries,
            keys,
            target,
            scale=factor,
            both=False,
            without_self=False,
            normalize=normalize,
            rows=rows,
        )
        floors = [direction.statistics.floor for direction in step.directions()]
        values.append(value - torch.as_tensor(floors[0]).to(value).sum() / len(queries))
        steps.append(step)
    mean = torch.stack(values).mean()
    together = [direction for step in steps for direction in step.directions()]
    return mean, Step(mean.detach(), partial(list, together), steps[0].scale)


def _teacher_parts(a: Tensor, b: Tensor, teacher: Teacher) -> list[Tensor]:
    """The scores, or the vectors of both sides."""
    if isinstance(teacher, (tuple, list)):
        if len(teacher) != 2:
            raise NearfarError(
                f"teacher has {len(teacher)} parts; its vectors of queries and of keys are needed"
            )
        for name, vectors, own in (("queries", teacher[0], a), ("keys", teacher[1], b)):
            check_tensors(teacher=vectors)
            if vectors.ndim != 2 or len(vectors) != len(own) or vectors.shape[1] != teacher[0].shape[1]:
                raise NearfarError(
                    f"teacher's vectors of {name} are {tuple(vectors.shape)}; ({len(own)}, dimensions) is needed, the "
                    "dimensions of both the same"
                )
        return list(teacher)
    check_tensors(teacher=teacher)
    if tuple(teacher.shape) != (len(a), len(b)):
        raise NearfarError(
            f"a has {len(a)} rows, b {len(b)}, and teacher is {tuple(teacher.shape)}; scores of all rows and keys are "
            "needed, or a pair of its vectors"
        )
    return [teacher]


def _target(scores: Sequence[Tensor], temperature: float, dtype: torch.dtype) -> Target:
    scores = [each.detach().to(dtype) for each in scores]
    if len(scores) == 2:
        return TeacherSoftmax(scores[0], scores[1], 1.0 / temperature)
    return Weights(_softmax(scores[0], temperature).exp())


def _softmax(scores: Tensor, temperature: float) -> Tensor:
    """Logarithms of the teacher's probabilities."""
    if scores.device.type == "cpu" and bool((scores.isnan() | (scores == torch.inf)).any()):
        raise NearfarError(
            "teacher holds scores that are not a number or infinite; -inf alone stands for no candidate"
        )
    if scores.device.type == "cpu" and bool((scores == -torch.inf).all(1).any()):
        raise NearfarError("teacher gives a row no candidate: all its scores are -inf")
    return torch.log_softmax(scores / temperature, 1)


def _listed_step(
    a: Tensor,
    b: Tensor,
    teacher: Teacher,
    scale: float | Tensor,
    temperature: float,
    normalize: bool,
    rows: slice | None,
) -> tuple[Float[Tensor, ""], Step]:
    """Each row has candidates of its own."""
    if not isinstance(teacher, Tensor) or teacher.shape != b.shape[:2] or len(a) != len(b):
        shape = tuple(teacher.shape) if isinstance(teacher, Tensor) else f"a {type(teacher).__name__}"
        raise NearfarError(
            f"a has {len(a)} rows, b is {tuple(b.shape)} and teacher {shape}; with candidates (n, k, d) its scores are "
            "(n, k)"
        )
    given = ready(a, b.reshape(-1, b.shape[-1]), scale, normalize)
    part = slice(None) if rows is None else rows
    queries, keys = given.a[part], given.b.reshape(b.shape)[part]
    with full_precision(queries.device):
        logits = torch.einsum("nd,nkd->nk", queries, keys) * given.scale
    log_q = _softmax(teacher.detach().to(logits)[part], temperature)
    q = log_q.exp()
    cross = -(q * torch.log_softmax(logits, 1)).sum(1)
    entropy = torch.special.entr(q).sum(1)
    value = (cross - entropy).sum() / len(a)
    positives = (q > 0).sum(1).to(q)
    nothing = torch.full_like(entropy, -torch.inf)
    statistics = Statistics(nothing, float(b.shape[1]), positives, 1.0, entropy)
    step = Step(
        value.detach(), partial(list, [Direction(cross.detach(), nothing, statistics)]), given.scale.detach()
    )
    return value, step


@dataclass(eq=False, repr=False)
class DistillationLoss(ContrastiveLoss):
    """KL from a teacher's distribution over candidates to the student's (Hinton, Vinyals and Dean 2015).

    ``temperature`` divides the student's cosines, ``teacher_temperature`` (None: the same) the teacher's scores;
    ``symmetric`` averages both directions; ``normalize=False`` takes dot products. Called with rows (n, d), keys (m, d)
    or (n, k, d), and the teacher: scores (n, m) or (n, k), or its vectors of both; ``nearfar.functional.distillation``
    describes them.

    0 to infinity, 0 where the student's distribution is the teacher's. The ``record`` is that of the cross-entropy:
    its ``floor`` is the teacher's entropy.

    sentence-transformers' DistillKLDivLoss is ``normalize=False`` over candidates (n, k, d), times temperature squared.

    >>> import torch
    >>> loss = DistillationLoss(temperature=0.5, teacher_temperature=0.1)
    >>> value = loss(torch.eye(4), torch.eye(4), torch.eye(4))
    >>> value.item() > 0, loss.record.candidates
    (True, 4.0)
    """

    temperature: float = 0.07
    teacher_temperature: float | None = None
    symmetric: bool = True
    normalize: bool = True

    traits: ClassVar[LossTraits] = LossTraits(
        "softmax", "weights", rows=("a", "b", "teacher"), numbers=("scale",), local=()
    )

    def __post_init__(self) -> None:
        check_flags(symmetric=self.symmetric, normalize=self.normalize)
        self.temperature = check_temperature(self.temperature)
        if self.teacher_temperature is not None:
            self.teacher_temperature = number("teacher_temperature", self.teacher_temperature, above=0)

    def forward(
        self,
        a: Float[Tensor, "n d"],
        b: Float[Tensor, "m d"] | Float[Tensor, "n k d"],
        teacher: Teacher,
        scale: float | Float[Tensor, ""] | None = None,
        rows: slice | None = None,
    ) -> Float[Tensor, ""]:
        options = self.temperature, self.teacher_temperature, scale, self.symmetric, self.normalize
        return self.keep(*_distillation_step(a, b, teacher, *options, rows))


def margin_mse(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "n d"],
    negatives: Float[Tensor, "n k d"],
    margins: Float[Tensor, "n k"],
    *,
    scale: float = 1.0,
    normalize: bool = True,
    rows: slice | None = None,
) -> Float[Tensor, ""]:
    """The mean squared error of the margins between the own positive and each negative (Hofstätter et al. 2020,
    arXiv:2010.02666): (scale · (cos(a_i, b_i) − cos(a_i, n_ik)) − margins_ik)².

    ``margins`` are the teacher's: its score of the positive less that of the negative. ``scale`` brings cosines to the
    teacher's unit; ``normalize=False`` takes dot products. A margin that is NaN is left out of the mean. ``rows`` makes
    only those rows queries, and such parts add up. Range: 0 to infinity.

    >>> import torch
    >>> margin_mse(torch.eye(2), torch.eye(2), torch.eye(2).flip(0).unsqueeze(1), torch.tensor([[1.0], [0.5]])).item()
    0.125
    """
    check_flags(normalize=normalize)
    check_part(rows)
    check_matrices(a=a, b=b)
    check_tensors(negatives=negatives, margins=margins)
    if negatives.ndim != 3 or len(negatives) != len(a) or tuple(margins.shape) != tuple(negatives.shape[:2]):
        raise NearfarError(
            f"a has {len(a)} rows, negatives are {tuple(negatives.shape)} and margins {tuple(margins.shape)}; "
            "(n, k, d) and (n, k) are needed"
        )
    if a.shape != b.shape:
        raise NearfarError(
            f"a is {tuple(a.shape)} and b {tuple(b.shape)}; row i of both is a pair, (rows, dimensions)"
        )
    first, second, factor = ready(a, b, number("scale", scale, above=0), normalize)
    third = ready(a, negatives.reshape(-1, negatives.shape[-1]), 1.0, normalize, ("a", "negatives")).b
    part = slice(None) if rows is None else rows
    queries, keys = first[part], third.reshape(negatives.shape)[part]
    with full_precision(queries.device):
        own = torch.linalg.vecdot(queries, second[part]).unsqueeze(1)
        gaps = (own - torch.einsum("nd,nkd->nk", queries, keys)) * factor
    wanted = margins.detach().to(gaps)
    known = ~wanted.isnan()
    errors = torch.where(known[part], gaps - torch.where(known, wanted, 0.0)[part], 0.0)
    return errors.square().sum() / known.sum().clamp(min=1)


@dataclass(eq=False, repr=False)
class MarginMSELoss(ContrastiveLoss):
    """Squared error of margins against those of a teacher (Hofstätter et al. 2020); ``nearfar.functional.margin_mse``.

    sentence-transformers' MarginMSELoss is ``normalize=False``. It has no record: it is no softmax.

    >>> import torch
    >>> loss = MarginMSELoss()
    >>> loss(torch.eye(2), torch.eye(2), torch.eye(2).flip(0).unsqueeze(1), torch.ones(2, 1)).item()
    0.0
    """

    scale: float = 1.0
    normalize: bool = True

    traits: ClassVar[LossTraits] = LossTraits("other", rows=("a", "b", "negatives", "margins"), local=())

    def __post_init__(self) -> None:
        check_flags(normalize=self.normalize)
        self.scale = number("scale", self.scale, above=0)

    def forward(
        self,
        a: Float[Tensor, "n d"],
        b: Float[Tensor, "n d"],
        negatives: Float[Tensor, "n k d"],
        margins: Float[Tensor, "n k"],
        rows: slice | None = None,
    ) -> Float[Tensor, ""]:
        return margin_mse(a, b, negatives, margins, scale=self.scale, normalize=self.normalize, rows=rows)
