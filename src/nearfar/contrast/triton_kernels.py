"""Triton's part of the fused kernel for CUDA: log-sum-exps of tiles in one pass, and gradients by recomputing them.

A program has some rows of queries and walks over the keys, tile by tile: a product in registers, its largest logit and
sum of exponentials, and in backward the product of its derivatives with the keys. Nothing of the size of a tile, let
alone of all pairs, is written to memory. The keys may be split among several programs, whose results are joined after
them (``nearfar.contrast.fused``), so that few queries fill a card too; sums are in a fixed order, so that results are
the same in every run.

Imported where a card is used: Triton comes with PyTorch's builds for CUDA. Without a card, ``TRITON_INTERPRET=1``
runs these functions in Python.
"""

# mypy: ignore-errors

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["BLOCKS", "INTERPRETED", "Blocks", "Masks", "backward_rows", "forward_sums"]

#: whether the functions run in Python, without a card
INTERPRETED = triton.knobs.runtime.interpret


class Blocks(NamedTuple):
    """Rows, columns and dimensions of a tile of each product, and how a program is run."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


#: what is tried on a card, in this order; the last fits into every card
BLOCKS = (Blocks(128, 128, 32, 8, 3), Blocks(64, 64, 32, 4, 2), Blocks(32, 32, 32, 4, 2))
#: dimensions of the gradient that a program holds in registers
WIDTH = 256


class Masks(NamedTuple):
    """Pairs that are left out: those of equal numbers, and those where a Boolean matrix is true; each None for none."""

    rows: Tensor | None = None
    columns: Tensor | None = None
    matrix: Tensor | None = None

    def transposed(self) -> Masks:
        return Masks(self.columns, self.rows, None if self.matrix is None else self.matrix.T)


@triton.jit
def _logits(
    A, B, rows, columns, n, m, d,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Products of some rows and columns, in single precision."""
    products = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, d, BLOCK_K):
        depth = start + tl.arange(0, BLOCK_K)
        a = tl.load(
            A + rows.to(tl.int64)[:, None] * d + depth[None, :],
            mask=(rows[:, None] < n) & (depth[None, :] < d),
            other=0.0,
        )
        b = tl.load(
            B + columns.to(tl.int64)[:, None] * d + depth[None, :],
            mask=(columns[:, None] < m) & (depth[None, :] < d),
            other=0.0,
        )
        if WIDEN:  # the interpreter has no products in bfloat16
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        products = tl.dot(a, tl.trans(b), products, input_precision=PRECISION)
    return products


@triton.jit
def _counted(
    rows, columns, n, m, shift, LA, LB, MATRIX, across, down,
    HAS_OWN: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_MATRIX: tl.constexpr,
):  # fmt: skip
    """Which pairs are negatives that count, and which is each row's own partner."""
    inside = (rows[:, None] < n) & (columns[None, :] < m)
    own = inside & (rows[:, None] + shift == columns[None, :])
    rest = inside
    if HAS_OWN:
        rest = inside & (rows[:, None] + shift != columns[None, :])
    if HAS_LABELS:
        mine = tl.load(LA + rows, mask=rows < n, other=0)
        theirs = tl.load(LB + columns, mask=columns < m, other=0)
        rest = rest & (mine[:, None] != theirs[None, :])
    if HAS_MATRIX:
        places = MATRIX + rows.to(tl.int64)[:, None] * across + columns.to(tl.int64)[None, :] * down
        rest = rest & (tl.load(places, mask=inside, other=1) == 0)
    return rest, own


@triton.jit
def _forward(
    A, B, FA, FB, LA, LB, MATRIX, TOP, TOTAL, OWN, COUNT,
    n, m, d, shift, across, down, part,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr, HAS_OWN: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_MATRIX: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    first = split * part
    last = tl.minimum(first + part, m)
    by_row = tl.load(FA + rows, mask=rows < n, other=0.0)
    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    partner = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    count = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for start in range(first, last, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        by_column = tl.load(FB + columns, mask=columns < m, other=0.0)
        logits = _logits(A, B, rows, columns, n, m, d, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, WIDEN)
        logits = logits * by_row[:, None] * by_column[None, :]
        rest, own = _counted(
            rows, columns, n, m, shift, LA, LB, MATRIX, across, down, HAS_OWN, HAS_LABELS, HAS_MATRIX
        )
        if HAS_OWN:
            partner = tl.maximum(partner, tl.max(tl.where(own, logits, float("-inf")), 1))
        logits = tl.where(rest, logits, float("-inf"))
        raised = tl.maximum(top, tl.max(logits, 1))
        level = tl.where(raised == float("-inf"), 0.0, raised)
        total = total * tl.exp(top - level) + tl.sum(tl.exp(logits - level[:, None]), 1)
        top = raised
        if HAS_LABELS or HAS_MATRIX:
            count += tl.sum(rest.to(tl.float32), 1)
    places = split.to(tl.int64) * n + rows
    tl.store(TOP + places, top, mask=rows < n)
    tl.store(TOTAL + places, total, mask=rows < n)
    if HAS_OWN:
        tl.store(OWN + places, partner, mask=rows < n)
    if HAS_LABELS or HAS_MATRIX:
        tl.store(COUNT + places, count, mask=rows < n)


@triton.jit
def _backward(
    A, B, FA, FB, LA, LB, MATRIX, REST, GRAD, OWN, BACK_REST, BACK_GRAD, BACK_OWN, OUT,
    n, m, d, shift, across, down, part,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, NARROW: tl.constexpr, BACK: tl.constexpr,
    HAS_OWN: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_MATRIX: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    first = split * part
    last = tl.minimum(first + part, m)
    width = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    by_row = tl.load(FA + rows, mask=rows < n, other=0.0)
    log_sum = tl.load(REST + rows, mask=rows < n, other=float("inf"))
    grad = tl.load(GRAD + rows, mask=rows < n, other=0.0)
    out = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for start in range(first, last, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        by_column = tl.load(FB + columns, mask=columns < m, other=0.0)
        logits = _logits(A, B, rows, columns, n, m, d, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, WIDEN)
        logits = logits * by_row[:, None] * by_column[None, :]
        rest, own = _counted(
            rows, columns, n, m, shift, LA, LB, MATRIX, across, down, HAS_OWN, HAS_LABELS, HAS_MATRIX
        )
        logits = tl.where(rest, logits, float("-inf"))
        slope = tl.exp(logits - log_sum[:, None]) * grad[:, None]
        if BACK:
            back_sum = tl.load(BACK_REST + columns, mask=columns < m, other=float("inf"))
            back_grad = tl.load(BACK_GRAD + columns, mask=columns < m, other=0.0)
            slope += tl.exp(logits - back_sum[None, :]) * back_grad[None, :]
        if HAS_OWN:
            mine = tl.load(OWN + rows, mask=rows < n, other=0.0)[:, None]
            if BACK:
                mine = mine + tl.load(BACK_OWN + columns, mask=columns < m, other=0.0)[None, :]
            slope = tl.where(own, mine + tl.zeros_like(slope), slope)
        slope = slope * by_column[None, :]
        keys = tl.load(
            B + columns.to(tl.int64)[:, None] * d + width[None, :],
            mask=(columns[:, None] < m) & (width[None, :] < d),
            other=0.0,
        )
        if NARROW:
            # In two parts: one number of 8 bits alone would round every derivative to a 250th.
            high = slope.to(tl.bfloat16)
            low = (slope - high.to(tl.float32)).to(tl.bfloat16)
            if WIDEN:
                keys = keys.to(tl.float32)
                out = tl.dot(high.to(tl.float32), keys, out, input_precision=PRECISION)
                out = tl.dot(low.to(tl.float32), keys, out, input_precision=PRECISION)
            else:
                out = tl.dot(high, keys, out)
                out = tl.dot(low, keys, out)
        else:
            out = tl.dot(slope, keys, out, input_precision=PRECISION)
    places = (split.to(tl.int64) * n + rows.to(tl.int64)[:, None]) * d + width[None, :]
    tl.store(OUT + places, out, mask=(rows[:, None] < n) & (width[None, :] < d))


class _Plan(NamedTuple):
    """How the keys are split: by how many programs, and how many columns each has."""

    splits: int
    part: int

    @classmethod
    def of(cls, n: int, m: int, blocks: Blocks, device: torch.device, others: int = 1) -> _Plan:
        """Twice as many programs as the card has processors, unless there are so many tiles at least."""
        processors = 2 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count
        wanted = -(-2 * processors // max(1, triton.cdiv(n, blocks.rows) * others))
        tiles = triton.cdiv(m, blocks.columns)
        part = triton.cdiv(tiles, min(wanted, tiles)) * blocks.columns
        return cls(triton.cdiv(m, part), part)


def _precision(rows: Tensor) -> str:
    """Three products on the tensor cores in place of one of single precision, which is as exact and faster; one where
    the user has allowed it (``torch.set_float32_matmul_precision``)."""
    if INTERPRETED:
        return "ieee"
    if torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "tf32x3" if torch.cuda.get_device_capability(rows.device) >= (8, 0) else "ieee"


def forward_sums(
    a: Tensor, b: Tensor, by_a: Tensor, by_b: Tensor, shift: int | None, masks: Masks, blocks: Blocks
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Of each row i of ``a``, with s_ij = by_a_i by_b_j a_i·b_j: log Σ_j exp(s_ij) over the columns that are neither
    left out nor its own, i + ``shift``; the largest of these; s of its own, -inf where there is none; and how many
    there are, where something is left out. ``shift`` None: no row has a column of its own."""
    n, d = a.shape
    m = len(b)
    plan = _Plan.of(n, m, blocks, a.device)
    masked = masks.rows is not None or masks.matrix is not None
    top, total = (by_a.new_empty(plan.splits, n) for _ in range(2))
    own = None if shift is None else by_a.new_empty(plan.splits, n)
    count = by_a.new_empty(plan.splits, n) if masked else None
    down, across = (0, 0) if masks.matrix is None else (masks.matrix.stride(1), masks.matrix.stride(0))
    _forward[(triton.cdiv(n, blocks.rows), plan.splits)](
        a, b, by_a, by_b, _or(masks.rows, a), _or(masks.columns, a), _bytes(masks.matrix, a),
        top, total, _or(own, a), _or(count, a),
        n, m, d, 0 if shift is None else shift, across, down, plan.part,
        BLOCK_M=blocks.rows, BLOCK_N=blocks.columns, BLOCK_K=blocks.depth, PRECISION=_precision(a),
        WIDEN=INTERPRETED and a.dtype == torch.bfloat16, HAS_OWN=shift is not None,
        HAS_LABELS=masks.rows is not None, HAS_MATRIX=masks.matrix is not None,
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    hardest = top.amax(0)
    level = torch.where(hardest > -torch.inf, hardest, 0.0)
    rest = (total * torch.exp(top - level)).sum(0).log() + level
    return rest, hardest, None if own is None else own.amax(0), None if count is None else count.sum(0)


def backward_rows(
    a: Tensor, b: Tensor, by_a: Tensor, by_b: Tensor, shift: int | None, masks: Masks, blocks: Blocks,
    ours: tuple[Tensor, Tensor, Tensor], theirs: tuple[Tensor, Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    """Σ_j g_ij by_b_j b_j of each row i of ``a``, with g the derivative of a value by s.

    ``ours``: of each row log Σ_j exp(s_ij), the value's derivative by it, and by s of its own; ``theirs``: the same of
    the columns as queries, where they are."""
    n, d = a.shape
    m = len(b)
    width = min(WIDTH, max(16, triton.next_power_of_2(d)))
    # The gradient is held in registers: half the rows where it is wide.
    rows = min(blocks.rows, 64) if width > 128 and not INTERPRETED else blocks.rows
    blocks = blocks._replace(rows=rows, columns=min(blocks.columns, 64))
    chunks = triton.cdiv(d, width)
    plan = _Plan.of(n, m, blocks, a.device, chunks)
    out = by_a.new_empty(plan.splits, n, d)
    back = ours if theirs is None else theirs
    down, across = (0, 0) if masks.matrix is None else (masks.matrix.stride(1), masks.matrix.stride(0))
    _backward[(triton.cdiv(n, rows), plan.splits, chunks)](
        a, b, by_a, by_b, _or(masks.rows, a), _or(masks.columns, a), _bytes(masks.matrix, a), *ours, *back, out,
        n, m, d, 0 if shift is None else shift, across, down, plan.part,
        BLOCK_M=rows, BLOCK_N=blocks.columns, BLOCK_K=blocks.depth, BLOCK_D=width, PRECISION=_precision(a),
        WIDEN=INTERPRETED and a.dtype == torch.bfloat16, NARROW=a.dtype == torch.bfloat16,
        BACK=theirs is not None, HAS_OWN=shift is not None,
        HAS_LABELS=masks.rows is not None, HAS_MATRIX=masks.matrix is not None,
        num_warps=blocks.warps, num_stages=min(blocks.stages, 2),
    )  # fmt: skip
    return out[0] if plan.splits == 1 else out.sum(0)


def _or(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """A place that is never read, where there is nothing to point to."""
    return stand_in if tensor is None else tensor


def _bytes(matrix: Tensor | None, stand_in: Tensor) -> Tensor:
    return stand_in if matrix is None else matrix.view(torch.uint8)
