"""Does training on several processes give the gradients of one? Measured here, with real processes.

Every loss runs under real DistributedDataParallel (gloo, on this machine, float64, an uneven last batch) and once in
one process on the whole batch. Wrong setups run beside them, and must be found out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nearfar.errors import NearfarError, nearest_name
from nearfar.training.ddp_cases import CASES, Batch, Case, Encoder, batches, joined
from nearfar.training.distributed import DistributedLoss

__all__ = ["OPTIONS", "DdpRow", "DdpVerdict", "verify_ddp"]

#: largest relative difference of float64 gradients that rounding explains
ROUNDING = 1e-6
#: a wrong setup must differ by more than this
VISIBLE = 1e-3


@dataclass(frozen=True)
class Option:
    """One way to train on several processes, and what it promises: ``exact``, ``by definition`` (another gradient,
    for the reason given) or ``wrong`` (the check must find it out)."""

    name: str
    promise: str
    reason: str = ""
    local_loss: bool = False
    gather_with_grad: bool = True
    ring: bool = False

    def offered(self, case: Case) -> bool:
        """Whether the loss has it."""
        return (case.local or not self.local_loss) and (case.ring or not self.ring)

    def value(self, case: Case, loss: nn.Module, outputs: Sequence[Tensor], batch: Batch) -> Tensor:
        """The loss of one rank, to be called by all."""
        arguments = case.arguments(outputs, batch)
        if self.name == "no gather":
            return loss(**arguments)
        wrapped = DistributedLoss(loss, self.local_loss, self.gather_with_grad, self.ring, case.shared)
        value = wrapped(**arguments)
        return value / dist.get_world_size() if self.name == "no factor W" else value


OPTIONS = (
    Option("gather", "exact"),
    Option("local_loss", "exact", local_loss=True),
    Option("ring", "exact", ring=True),
    Option("gather_with_grad=False", "by definition", "encoder 1/W", gather_with_grad=False),
    Option(
        "local_loss, gather_with_grad=False",
        "by definition",
        "no other ranks' queries",
        local_loss=True,
        gather_with_grad=False,
    ),
    Option("no gather", "wrong", "each rank its own rows"),
    Option("no factor W", "wrong", "parts averaged, not summed", local_loss=True),
)


@dataclass(frozen=True)
class DdpRow:
    """One loss under one option, measured against one process.

    ``ratio``, ``cosine``: of the encoder's gradients; ``scale_ratio``: of the scale's (None: the loss has none).
    ``difference``: the largest difference of all gradients, relative to their length. ``loss_difference``: largest
    over the ranks.
    """

    loss: str
    option: str
    promise: str
    reason: str
    ratio: float
    cosine: float
    scale_ratio: float | None
    difference: float
    loss_difference: float
    passed: bool


@dataclass(frozen=True)
class DdpVerdict:
    """All rows; ``passed`` if every promise is kept and every wrong setup was found out."""

    processes: int
    rows: tuple[DdpRow, ...]

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)


def verify_ddp(processes: int = 2, losses: Sequence[str] | None = None, timeout: float = 300.0) -> DdpVerdict:
    """Compare loss and gradients of ``processes`` gloo processes with those of one, for ``losses`` (all by default).

    ``losses`` are names such as ``"SupConLoss"``, which takes its variants along.

    Takes about two seconds and one for each process. Raises ``NearfarError`` after ``timeout`` seconds, when
    processes wait for each other.
    """
    if processes < 2:
        raise NearfarError(f"processes={processes}: what is compared with one process takes 2 or more")
    names = list(CASES)
    for wanted in losses or ():
        if wanted not in CASES:
            raise NearfarError(f"loss {wanted!r}: no such loss; {nearest_name(wanted, CASES)}")
    if losses is not None:
        names = [name for name in CASES if name.split(",")[0] in losses or name in losses]
    work, references = [], {}
    for name in names:
        references[name] = _one_process(CASES[name], processes)
        work += [(name, k) for k, option in enumerate(OPTIONS) if option.offered(CASES[name])]
    with TemporaryDirectory(prefix="nearfar-ddp-") as folder:
        trained = {name: sorted(reference) for name, reference in references.items()}
        found = _run(processes, (processes, folder, work, trained), timeout)
    rows = [_row(name, OPTIONS[k], references[name], found[name, k], processes) for name, k in work]
    return DdpVerdict(processes, tuple(rows))


def _one_process(case: Case, processes: int) -> dict[str, Tensor]:
    """Value and gradients of the whole batch; parameters that the loss does not use are missing."""
    model, batch = Encoder(), joined(batches(processes))
    value = case.build()(**case.arguments(model(batch.x, batch.y), batch))
    value.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"value": value.detach(), **grads}


def _run(
    processes: int, arguments: tuple[Any, ...], timeout: float
) -> dict[tuple[str, int], dict[str, Tensor]]:
    folder = arguments[1]
    context = mp.spawn(_rank, (*arguments, timeout), nprocs=processes, join=False)
    assert context is not None
    end = time.monotonic() + timeout
    try:
        while not context.join(timeout=1.0):
            if time.monotonic() > end:
                raise NearfarError(
                    f"the {processes} processes were not done after {timeout:.0f} s: they wait for each other"
                )
    finally:
        for process in context.processes:
            process.kill()
    return torch.load(Path(folder) / "found.pt", weights_only=True)


def _rank(
    rank: int,
    processes: int,
    folder: str,
    work: list[tuple[str, int]],
    trained: dict[str, list[str]],
    timeout: float,
) -> None:
    torch.set_num_threads(1)
    wait = timedelta(seconds=timeout)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes, timeout=wait
    )
    batch = batches(processes)[rank]
    found = {}
    for name, k in work:
        found[name, k] = _step(CASES[name], OPTIONS[k], batch, trained[name])
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


def _step(case: Case, option: Option, batch: Batch, trained: list[str]) -> dict[str, Tensor]:
    model = Encoder()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    parallel = DistributedDataParallel(model)
    value = option.value(case, case.build(), parallel(batch.x, batch.y), batch)
    value.backward()
    values = [torch.zeros_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(values, value.detach())
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"value": torch.stack(values), **grads}


def _row(
    name: str, option: Option, one: dict[str, Tensor], several: dict[str, Tensor], processes: int
) -> DdpRow:
    weights = sorted(key for key in one if key.startswith("layers."))
    numbers = sorted(one.keys() - {"value", *weights})
    reference, found = (torch.cat([grads[key].flatten() for key in weights]) for grads in (one, several))
    ratio = (found.norm() / reference.norm()).item()
    cosine = (found @ reference / (found.norm() * reference.norm())).item()
    differences = [(found - reference).norm() / reference.norm()]
    differences += [abs(several[key] - one[key]) / abs(one[key]).clamp(min=1e-9) for key in numbers]
    difference = max(each.item() for each in differences)
    loss_difference = (several["value"] - one["value"]).abs().max().item()
    if option.promise == "exact":
        passed = difference < ROUNDING and loss_difference < ROUNDING * max(1.0, abs(one["value"].item()))
    elif option.promise == "wrong":
        passed = difference > VISIBLE
    else:
        passed = loss_difference < ROUNDING * max(1.0, abs(one["value"].item()))
        if not option.local_loss:
            passed = passed and abs(ratio * processes - 1.0) < ROUNDING and cosine > 1.0 - ROUNDING
    scale = (several["log_scale"] / one["log_scale"]).item() if "log_scale" in one else None
    return DdpRow(
        name,
        option.name,
        option.promise,
        option.reason,
        ratio,
        cosine,
        scale,
        difference,
        loss_difference,
        passed,
    )
