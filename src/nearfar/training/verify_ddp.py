"""``nearfar verify ddp``: does training on several processes give the gradients of one? Measured with real processes.

Every loss runs under real DistributedDataParallel (gloo, on this machine, float64, an uneven last batch) and once in
one process on the whole batch. Wrong setups run beside them, and must be detected.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nearfar import losses
from nearfar.errors import NearfarError, nearest_name
from nearfar.losses.focal import FocalLoss
from nearfar.losses.wasserstein import WassersteinGapLoss
from nearfar.training.distributed import DistributedLoss, SharingOptions
from nearfar.training.ring import check_ring

__all__ = [
    "CASES",
    "OPTIONS",
    "Batch",
    "Case",
    "DdpRow",
    "DdpVerdict",
    "Encoder",
    "batches",
    "joined",
    "verify_ddp",
]


ROWS, FEATURES = 8, 6


class Encoder(nn.Module):
    """Two views through the same layers, a learnable scale and a learnable bias; no dropout, float64."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FEATURES, 12), nn.Tanh(), nn.Linear(12, 8))
        self.log_scale = nn.Parameter(torch.tensor(2.0))
        self.bias = nn.Parameter(torch.tensor(-3.0))
        self.double()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.layers.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))

    def forward(
        self, x: Float[Tensor, "n f"], y: Float[Tensor, "n f"]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.layers(x), self.layers(y), self.log_scale.exp(), self.bias * 1.0


@dataclass
class Batch:
    """One rank's rows: two views and everything that some loss wants to know of a row."""

    x: Float[Tensor, "n f"]
    y: Float[Tensor, "n f"]
    labels: Int[Tensor, " n"]
    multi_hot: Float[Tensor, "n l"]
    scores: Float[Tensor, " n"]
    neighbors: Int[Tensor, "n k"]
    alpha: Float[Tensor, "n k"]


def batches(processes: int) -> list[Batch]:
    """The batch of each rank; the last is uneven. Neighbours are positions within the rank."""
    generator = torch.Generator().manual_seed(1)
    parts = []
    for rank in range(processes):
        n = ROWS if rank < processes - 1 else ROWS - 3
        x = torch.randn(n, FEATURES, generator=generator, dtype=torch.float64)
        parts.append(
            Batch(
                x=x,
                y=x + 0.5 * torch.randn(x.shape, generator=generator, dtype=torch.float64),
                labels=torch.randint(3, (n,), generator=generator),
                multi_hot=(torch.rand(n, 4, generator=generator) < 0.5).double(),
                scores=torch.rand(n, generator=generator, dtype=torch.float64),
                neighbors=torch.randint(-1, n, (n, 2), generator=generator),
                alpha=torch.rand(n, 2, generator=generator, dtype=torch.float64),
            )
        )
    return parts


def joined(parts: Sequence[Batch]) -> Batch:
    """The batches of all ranks as the one that a single process would see."""
    rows: dict[str, Tensor] = {}
    for name in (field.name for field in fields(Batch)):
        rows[name] = torch.cat([getattr(part, name) for part in parts])
    starts = torch.tensor([sum(len(part.x) for part in parts[:i]) for i in range(len(parts))])
    shift = torch.cat([start.expand(len(part.x)) for start, part in zip(starts, parts, strict=True)])
    rows["neighbors"] = torch.where(rows["neighbors"] >= 0, rows["neighbors"] + shift[:, None], -1)
    return Batch(**rows)


#: the arguments of a loss
Arguments = dict[str, Tensor | tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """A loss, and its arguments for a rank's outputs (a, b, scale, bias) and batch.

    ``shared``: arguments that are the same on all ranks. Which ways of sharing it has, its traits say.
    """

    build: Callable[[], nn.Module]
    arguments: Callable[[Sequence[Tensor], Batch], Arguments]
    shared: tuple[str, ...] = ()


def _pair(out: Sequence[Tensor], batch: Batch) -> Arguments:
    return {"a": out[0], "b": out[1], "scale": out[2]}


def _clip(out: Sequence[Tensor], batch: Batch) -> Arguments:
    return {"image": out[0], "text": out[1], "logit_scale": out[2]}


def _spatial(out: Sequence[Tensor], batch: Batch) -> Arguments:
    return _clip(out, batch) | {"neighbor_index": batch.neighbors, "neighbor_alpha": batch.alpha}


def _siglip(out: Sequence[Tensor], batch: Batch) -> Arguments:
    return {"a": out[0], "b": out[1], "logit_scale": out[2], "logit_bias": out[3]}


def _scored(out: Sequence[Tensor], batch: Batch) -> Arguments:
    return {"z": out[0], "scores": batch.scores}


def _supcon(out: Sequence[Tensor], batch: Batch) -> Arguments:
    return {"z": out[0], "labels": batch.labels}


def _mined(out: Sequence[Tensor], batch: Batch) -> Arguments:
    return _pair(out, batch) | {"negatives": out[1] * 0.5 - out[0]}


def _taught(out: Sequence[Tensor], batch: Batch) -> Arguments:
    return _pair(out, batch) | {"teacher": (batch.scores[:, None] * out[1].detach(), out[1].detach() + 1)}


def _margins(out: Sequence[Tensor], batch: Batch) -> Arguments:
    return {"a": out[0], "b": out[1], "negatives": out[1].flip(1)[:, None], "margins": batch.scores[:, None]}


def _memory(out: Sequence[Tensor], batch: Batch) -> Arguments:
    rows = torch.randn(5, out[1].shape[1], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return _pair(out, batch) | {"negatives": (rows, -rows)}


def _groups(out: Sequence[Tensor], batch: Batch) -> Arguments:
    scores, low = torch.sigmoid(out[0][:, 0]), batch.scores < 0.4
    return {"lower_scores": scores[low], "upper_scores": scores[~low]}


def _classes(out: Sequence[Tensor], batch: Batch) -> Arguments:
    return {"logits": out[0][:, :6].view(-1, 2, 3), "labels": batch.labels[:, None].expand(-1, 2)}


CASES: dict[str, Case] = {
    "InfoNCELoss": Case(losses.InfoNCELoss, _pair),
    "InfoNCELoss, one direction": Case(lambda: losses.InfoNCELoss(symmetric=False), _pair),
    "InfoNCELoss, mined negatives": Case(losses.InfoNCELoss, _mined),
    "InfoNCELoss, memory": Case(losses.InfoNCELoss, _memory, shared=("negatives",)),
    "InfoNCELoss, given negatives only": Case(
        lambda: losses.InfoNCELoss(symmetric=False, in_batch=False), _mined
    ),
    "InfoNCELoss, decoupled": Case(lambda: losses.InfoNCELoss(denominator="negatives"), _pair),
    "InfoNCELoss, debiased and hard-weighted": Case(
        lambda: losses.InfoNCELoss(tau_plus=0.1, beta=1.0), _pair
    ),
    "DistillationLoss": Case(losses.DistillationLoss, _taught),
    "MarginMSELoss": Case(losses.MarginMSELoss, _margins),
    "ClipLoss": Case(losses.ClipLoss, _clip),
    "SupConLoss": Case(losses.SupConLoss, _supcon),
    "SupConLoss, two views": Case(
        losses.SupConLoss, lambda out, batch: _supcon(out, batch) | {"other": out[1]}
    ),
    "SupConLoss, each positive alone": Case(
        lambda: losses.SupConLoss(denominator="own", reduction="sum"), _supcon
    ),
    "MultiLabelSupConLoss": Case(
        losses.MultiLabelSupConLoss, lambda out, batch: {"z": out[0], "labels": batch.multi_hot}
    ),
    "SpatialLoss": Case(losses.SpatialLoss, _spatial),
    "SpatialLoss, no regulariser": Case(lambda: losses.SpatialLoss(temp_reg_weight=0.0), _spatial),
    "SigLipLoss": Case(losses.SigLipLoss, _siglip),
    "AdaptiveScoreContrastiveLoss": Case(losses.AdaptiveScoreContrastiveLoss, _scored),
    "BidirectionalScoreContrastiveLoss": Case(losses.BidirectionalScoreContrastiveLoss, _scored),
    "FocalLoss": Case(lambda: FocalLoss(alpha=[1.0, 4.0, 2.0]), _classes),
    "WassersteinGapLoss": Case(lambda: WassersteinGapLoss(detach_upper=False), _groups),
}


#: largest relative difference of float64 gradients that rounding explains
ROUNDING = 1e-6
#: a wrong setup must differ by more than this
VISIBLE = 1e-3


@dataclass(frozen=True)
class Option:
    """One way to train on several processes, and what it promises: ``exact``, ``by definition`` (a different gradient,
    for the reason given) or ``wrong`` (the check must find it out)."""

    name: str
    promise: str
    reason: str = ""
    local_loss: bool = False
    gather_with_grad: bool = True
    ring: bool = False

    def offered(self, case: Case) -> bool:
        """Whether the loss has it."""
        loss, batch = case.build(), batches(2)[0]
        try:
            self.sharing.check_loss(loss)
            if self.ring:
                check_ring(loss, case.arguments(Encoder()(batch.x, batch.y), batch))
        except NearfarError:
            return False
        return True

    @property
    def sharing(self) -> SharingOptions:
        return SharingOptions(self.local_loss, self.gather_with_grad, self.ring)

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
        results = _run(processes, (processes, folder, work, trained), timeout)
    rows = [_row(name, OPTIONS[k], references[name], results[name, k], processes) for name, k in work]
    return DdpVerdict(processes, tuple(rows))


def _one_process(case: Case, processes: int) -> dict[str, Tensor]:
    """Value and gradients of the whole batch; parameters that the loss does not use are missing."""
    model, batch = Encoder(), joined(batches(processes))
    value = case.build()(**case.arguments(model(batch.x, batch.y), batch))
    value.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"value": value.detach(), **grads}


def start_method() -> str:
    """How a process for a rank starts: from a server that runs beside this process, or where there is none, anew."""
    return "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"


def _run(
    processes: int, arguments: tuple[object, ...], timeout: float
) -> dict[tuple[str, int], dict[str, Tensor]]:
    folder = str(arguments[1])
    context = mp.start_processes(
        _rank, (*arguments, timeout), nprocs=processes, join=False, start_method=start_method()
    )
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
    return torch.load(Path(folder) / "results.pt", weights_only=True)


def _rank(
    rank: int,
    processes: int,
    folder: str,
    work: list[tuple[str, int]],
    trained: dict[str, list[str]],
    timeout: float,
) -> None:
    torch.set_num_threads(1)
    wait = timedelta(seconds=timeout + 30)  # so that the parent is the one to say who waits
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes, timeout=wait
    )
    batch = batches(processes)[rank]
    results = {}
    for name, k in work:
        results[name, k] = _step(CASES[name], OPTIONS[k], batch, trained[name])
    if rank == 0:
        torch.save(results, Path(folder) / "results.pt")
    dist.barrier()
    gc.collect()  # the wrappers go before the group that their reducers hold: see nearfar.training.ranks.leave
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
    reference, gradient = (torch.cat([grads[key].flatten() for key in weights]) for grads in (one, several))
    ratio = (gradient.norm() / reference.norm()).item()
    cosine = (gradient @ reference / (gradient.norm() * reference.norm())).item()
    differences = [(gradient - reference).norm() / reference.norm()]
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
