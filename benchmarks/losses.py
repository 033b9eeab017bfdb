"""Time and memory of a loss and its gradients beside other libraries, and the share of the bare matrix products.

    python benchmarks/losses.py                            # all but the largest, half an hour on two cores
    python benchmarks/losses.py --only both-8192x256       # one case; --list has the names
    python benchmarks/losses.py --large                    # 65,536 rows too, some minutes more

Peers that are not installed are left out: pytorch-metric-learning, info-nce-pytorch, sentence-transformers.
open_clip's loss is written out here, since that package needs torchvision.

Each step is forward and backward, float32, embeddings to gradients, normalisation included. Repeats alternate between
the ways, so that a disturbance meets all of them; each begins with a step that does not count, since a way finds the
memory that the one before has left; and what was measured while other processes were busy is measured again (Linux).
*Least* and *median* are over the repeats. A ratio is the median over repeats of the quotient within each: the speed of
a shared machine moves by half within an hour, and the least of two ways need not be of the same minute. *MB* is the
peak of what PyTorch's allocator held during two steps beyond the inputs, gradients included, as ``torch.profiler``
counts it for all ways alike (on a GPU: ``torch.cuda.max_memory_allocated``).

Bare products are the matrix products alone: one for the logits, one to compute them again and two for the gradients
(the second is not needed where the batch is one tile). *of tiles*: in the tiles that nearfar uses, over the way;
*of full*: the same products full size, whose result takes n² numbers.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch: its profiler announces every start

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from nearfar.contrast.tiles import tile_size
from nearfar.losses import InfoNCELoss, MultiLabelSupConLoss, SigLipLoss, SpatialLoss, SupConLoss

TEMPERATURE = 0.07
PLAIN, OPEN_CLIP, PML, NCE = "plain PyTorch", "open_clip", "pytorch-metric-learning", "info-nce-pytorch"
ST, ST_CACHED = "sentence-transformers", "sentence-transformers, cached"
OURS, OURS_RECORD, TILES, FULL = (
    "nearfar",
    "nearfar, record read",
    "bare products, tiles",
    "bare products, full",
)
INFO_NCE, SIXTEENTH = "nearfar InfoNCE, both directions", "plain, a sixteenth of the rows"

Step = Callable[[], object]
Ways = dict[str, Step]


class Row(NamedTuple):
    seconds: list[float]
    megabytes: float

    def over(self, other: Row) -> float:
        """How many times as long as the other, repeat by repeat."""
        return statistics.median(x / y for x, y in zip(self.seconds, other.seconds, strict=True))


class Case(NamedTuple):
    title: str
    n: int
    d: int
    ways: Callable[[int, int, str], Ways]
    bars: tuple[Callable[[dict[str, Row]], str], ...] = ()
    large: bool = False


# -- ways ----------------------------------------------------------------------------------------------------------
def views(n: int, d: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(n, d, generator=generator)
    b = torch.randn(n, d, generator=generator).mul_(2).add_(a)
    return a.to(device).requires_grad_(), b.to(device).requires_grad_()


def step(loss: Callable[..., Tensor], *leaves: Tensor, after: Step | None = None) -> Step:
    """Forward and backward into fresh gradients."""

    def run() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        value = loss(*leaves)
        if value.requires_grad:
            value.backward()
        if after is not None:
            after()
        return value.detach()

    return run


def ours(loss: torch.nn.Module, leaves: tuple[Tensor, ...], *arguments: object) -> Ways:
    """With and without its record. The second is what a run does that logs every step."""
    return {
        OURS: step(lambda *given: loss(*given, *arguments), *leaves),
        OURS_RECORD: step(
            lambda *given: loss(*given, *arguments), *leaves, after=lambda: loss.record.to_dict()
        ),
    }


def both(n: int, d: int, device: str, temperature: float = TEMPERATURE) -> Ways:
    a, b = views(n, d, device)
    own = torch.arange(n, device=device)
    scale = torch.tensor(1 / temperature, device=device, requires_grad=True)

    def plain(a: Tensor, b: Tensor) -> Tensor:
        logits = normalize(a) @ normalize(b).T / temperature
        return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2

    def open_clip(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        a, b = normalize(a), normalize(b)
        return (cross_entropy(scale * a @ b.T, own) + cross_entropy(scale * b @ a.T, own)) / 2

    ways = {PLAIN: step(plain, a, b), OPEN_CLIP: step(open_clip, a, b, scale)}
    ways |= sentence_transformers(a, b, temperature)
    return ways | ours(InfoNCELoss(temperature), (a, b)) | bare(n, d, device)


def sharp(n: int, d: int, device: str) -> Ways:
    return both(n, d, device, temperature=0.01)


def small(n: int, d: int, device: str) -> Ways:
    ways = both(n, d, device)
    for name in (ST_CACHED, FULL):  # one chunk, one tile: nothing of their own to show
        ways.pop(name, None)
    return ways


def one(n: int, d: int, device: str) -> Ways:
    a, b = views(n, d, device)
    own = torch.arange(n, device=device)
    ways: Ways = {
        PLAIN: step(lambda a, b: cross_entropy(normalize(a) @ normalize(b).T / TEMPERATURE, own), a, b)
    }
    try:
        from info_nce import info_nce

        ways[NCE] = step(lambda a, b: info_nce(a, b, temperature=TEMPERATURE), a, b)
    except ImportError as error:
        missing(NCE, str(error))
    try:
        from pytorch_metric_learning.losses import NTXentLoss

        if n <= 256:  # it holds n negatives for each of n² pairs
            loss = NTXentLoss(TEMPERATURE)
            ways[PML] = step(lambda a, b: loss(a, own, ref_emb=b, ref_labels=own.clone()), a, b)
    except ImportError as error:
        missing(PML, str(error))
    return ways | ours(InfoNCELoss(TEMPERATURE, symmetric=False), (a, b)) | bare(n, d, device)


def sentence_transformers(a: Tensor, b: Tensor, temperature: float) -> Ways:
    """Its loss of embeddings, without a model; the cached form takes a chunk of rows at a time, here 1,024."""
    try:
        from sentence_transformers.sentence_transformer.losses import (
            CachedMultipleNegativesRankingLoss,
            MultipleNegativesRankingLoss,
        )

        options = {"scale": 1 / temperature, "partition_mode": "per_direction"}
        options["directions"] = ("query_to_doc", "doc_to_query")
        whole = MultipleNegativesRankingLoss(None, **options)
        model = torch.nn.Sequential(torch.nn.Identity())  # it looks at the first part of its model
        cached = CachedMultipleNegativesRankingLoss(model, mini_batch_size=1024, **options)
    except (ImportError, TypeError) as error:
        missing(ST, str(error))
        return {}
    return {
        ST: step(lambda a, b: whole.compute_loss_from_embeddings([a, b], None), a, b),
        ST_CACHED: step(lambda a, b: cached.calculate_loss([[a], [b]], with_backward=True), a, b),
    }


def supcon(n: int, d: int, device: str, classes: int = 0) -> Ways:
    """Classes of 32 rows, or a number of classes."""
    z, _ = views(n, d, device)
    classes = classes or max(2, n // 32)
    labels = torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(1)).to(device)

    def plain(z: Tensor) -> Tensor:
        z = normalize(z)
        itself = torch.eye(n, dtype=torch.bool, device=device)
        positive = (labels[:, None] == labels) & ~itself
        log_p = (z @ z.T / 0.1).masked_fill(itself, -torch.inf).log_softmax(1)
        count = positive.sum(1)
        return (-log_p.masked_fill(~positive, 0.0).sum(1) / count.clamp(min=1))[count > 0].mean()

    ways: Ways = {PLAIN: step(plain, z)}
    try:
        from pytorch_metric_learning.losses import SupConLoss as Peer

        peer = Peer(0.1)
        ways[PML] = step(lambda z: peer(z, labels), z)
    except ImportError as error:
        missing(PML, str(error))
    return ways | ours(SupConLoss(0.1), (z,), labels) | bare(n, d, device, twin=True)


def ten_classes(n: int, d: int, device: str) -> Ways:
    return supcon(n, d, device, classes=10)


def spatial(n: int, d: int, device: str) -> Ways:
    """Six neighbours in the batch for each row, which share a third of the target."""
    a, b = views(n, d, device)
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(0, n, (n, 6), generator=generator).to(device)
    alpha = torch.full((n, 6), 1 / 6, device=device)

    def plain(a: Tensor, b: Tensor) -> Tensor:
        target = torch.eye(n, device=device).scatter_add_(1, index, 0.5 * alpha)
        target = target / target.sum(1, keepdim=True)
        logits = normalize(a) @ normalize(b).T / TEMPERATURE
        return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2

    arguments = (1 / TEMPERATURE, index, alpha)
    regularised, nce = SpatialLoss(), InfoNCELoss(TEMPERATURE)
    ways = {PLAIN: step(plain, a, b), INFO_NCE: step(nce, a, b)}
    ways |= ours(SpatialLoss(temp_reg_weight=0.0), (a, b), *arguments)
    ways["nearfar, regularised"] = step(lambda a, b: regularised(a, b, *arguments), a, b)
    return ways | bare(n, d, device)


def overlap(n: int, d: int, device: str) -> Ways:
    """Twenty labels, three for each row on average."""
    a, b = views(n, d, device)
    generator = torch.Generator().manual_seed(1)
    labels = (torch.rand(n, 20, generator=generator) < 0.15).to(device, torch.float32)

    def plain(z: Tensor) -> Tensor:
        z, itself = normalize(z), torch.eye(n, dtype=torch.bool, device=device)
        shared = labels @ labels.T
        weight = shared / (labels.sum(1)[:, None] + labels.sum(1) - shared).clamp(min=1)
        weight = weight.masked_fill(itself, 0.0)
        mass = weight.sum(1)
        log_p = (z @ z.T / 0.1).masked_fill(itself, -torch.inf).log_softmax(1)
        return (-(weight * log_p.masked_fill(itself, 0.0)).sum(1) / mass.clamp(min=1e-9))[mass > 0].mean()

    nce = InfoNCELoss(TEMPERATURE)
    ways = {PLAIN: step(plain, a), INFO_NCE: step(nce, a, b)}
    return ways | ours(MultiLabelSupConLoss(0.1), (a,), labels) | bare(n, d, device, twin=True)


def siglip(n: int, d: int, device: str) -> Ways:
    a, b = views(n, d, device)
    scale, bias = (torch.tensor(x, device=device, requires_grad=True) for x in (10.0, -10.0))

    def plain(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        truth = 2 * torch.eye(n, device=device) - 1
        return -logsigmoid(truth * (normalize(a) @ normalize(b).T * scale + bias)).sum() / n

    return (
        {PLAIN: step(plain, a, b, scale, bias)} | ours(SigLipLoss(), (a, b, scale, bias)) | bare(n, d, device)
    )


def alone(n: int, d: int, device: str) -> Ways:
    loss, few = InfoNCELoss(TEMPERATURE), n // 16
    ways = {SIXTEENTH: both(few, d, device)[PLAIN]}
    return ways | {OURS_RECORD: step(loss, *views(n, d, device), after=lambda: loss.record.to_dict())}


def bare(n: int, d: int, device: str, twin: bool = False) -> Ways:
    """The products alone, into buffers that stay. Of twins (queries that are the keys) one triangle of tiles."""
    a, b = (x.detach() for x in views(n, d, device))
    size = tile_size(n, n, torch.device(device), twin)
    by_a, by_b, times = torch.zeros_like(a), torch.zeros_like(b), 1 if size == (n, n) else 2

    def tiles() -> None:
        buffer = torch.empty(size[0] * size[1], device=device)
        for _ in range(times):
            for i, (rows, into) in enumerate(zip(a.split(size[0]), by_a.split(size[0]), strict=True)):
                for j, (keys, back) in enumerate(zip(b.split(size[1]), by_b.split(size[1]), strict=True)):
                    if twin and j < i:
                        continue
                    tile = buffer[: len(rows) * len(keys)].view(len(rows), len(keys))
                    torch.mm(rows, keys.T, out=tile)
                    if _ == times - 1:
                        into.addmm_(tile, keys)
                        back.addmm_(tile.T, rows)

    def full() -> None:
        logits = torch.empty(n, n, device=device)
        for _ in range(times):
            torch.mm(a, b.T, out=logits)
        torch.mm(logits, b, out=by_a)
        torch.mm(logits.T, a, out=by_b)

    return {TILES: tiles, FULL: full}


@functools.cache
def missing(name: str, error: str) -> None:
    print(f"\n  {name}: left out ({error})", end="")


# -- bars ----------------------------------------------------------------------------------------------------------
def bar(wanted: str, found: float, met: bool) -> str:
    return f"bar: {wanted}: {found:.3f}, {'met' if met else 'NOT MET'}"


def faster(factor: float, than: str = PLAIN) -> Callable[[dict[str, Row]], str]:
    def check(rows: dict[str, Row]) -> str:
        if than not in rows:
            return f"bar: {factor} x as fast as {than}: not measured"
        found = rows[than].over(rows[OURS])
        return bar(f"at least {factor} x as fast as {than}", found, found >= factor)

    return check


def within(factor: float, of: str) -> Callable[[dict[str, Row]], str]:
    def check(rows: dict[str, Row]) -> str:
        found = rows[OURS].over(rows[of])
        return bar(f"at most {factor} x the time of {of}", found, found <= factor)

    return check


def under(megabytes: float) -> Callable[[dict[str, Row]], str]:
    def check(rows: dict[str, Row]) -> str:
        found = rows[OURS_RECORD].megabytes
        return bar(f"at most {megabytes:g} MB, record read", found, found <= megabytes)

    return check


def share(least: float) -> Callable[[dict[str, Row]], str]:
    def check(rows: dict[str, Row]) -> str:
        found = rows[TILES].over(rows[OURS_RECORD])
        return bar(f"at least {least} of the bare products in tiles, record read", found, found >= least)

    return check


def smaller(factor: float, than: str) -> Callable[[dict[str, Row]], str]:
    def check(rows: dict[str, Row]) -> str:
        if than not in rows:
            return f"bar: 1/{factor:g} of the memory of {than}: not measured"
        found = rows[than].megabytes / rows[OURS_RECORD].megabytes
        return bar(f"memory of {than} at least {factor:g} x", found, found >= factor)

    return check


SMALL = {
    one: "InfoNCE, one direction", supcon: "SupCon, classes of 32 rows", spatial: "soft neighbours",
    overlap: "label overlap (Jaccard)", siglip: "SigLIP",
}  # fmt: skip
CASES = {
    "both-4096x256": Case("InfoNCE, both directions", 4096, 256, both, (faster(1.9),)),
    "both-8192x256": Case("InfoNCE, both directions", 8192, 256, both, (faster(1.9), under(64), share(0.85))),
    "both-8192x128": Case("InfoNCE, both directions", 8192, 128, both, (faster(2.8),)),
    "both-8192x512": Case("InfoNCE, both directions", 8192, 512, both, (faster(1.35),)),
    "sharp-8192x256": Case("InfoNCE, both directions, temperature 0.01", 8192, 256, sharp),
    "one-8192x256": Case("InfoNCE, one direction", 8192, 256, one, (faster(1.5, NCE),)),
    "supcon-8192x256": Case(
        "SupCon, classes of 32 rows", 8192, 256, supcon, (faster(5, PML), smaller(25, PML))
    ),
    "supcon10-8192x256": Case(
        "SupCon, 10 classes", 8192, 256, ten_classes, (faster(5, PML), smaller(25, PML))
    ),
    "spatial-4096x256": Case("soft neighbours", 4096, 256, spatial, (within(1.2, INFO_NCE),)),
    "overlap-4096x256": Case("label overlap (Jaccard)", 4096, 256, overlap, (within(1.2, INFO_NCE),)),
    "siglip-8192x256": Case("SigLIP", 8192, 256, siglip),
    **{
        f"small-{n}x256": Case("InfoNCE, both directions", n, 256, small, (faster(1.0),))
        for n in (32, 64, 128, 256, 512, 1024)
    },
    **{
        f"small-{ways.__name__}-{n}x256": Case(title, n, 256, ways, (faster(1.0),))
        for ways, title in SMALL.items()
        for n in (128, 1024)
    },
    "large-65536x128": Case(
        "InfoNCE, both directions", 65536, 128, alone, (under(250), smaller(1.0, SIXTEENTH)), large=True
    ),
}  # fmt: skip


#: the bars above are for a CPU
GPU_BARS = {"both-4096x256": (faster(1.0),), "large-65536x128": (smaller(1.0, SIXTEENTH),)}


# -- measuring -----------------------------------------------------------------------------------------------------
def timed(ways: Ways, repeats: int, device: str) -> tuple[dict[str, list[float]], int]:
    """Seconds of each way, repeat by repeat, each time beginning with another way.

    A measurement during which other processes took more than a twentieth of a core is made again, up to twenty times;
    how many were is the second result.
    """

    def run(work: Step, calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            work()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / calls

    calls = {}
    for name, work in ways.items():
        once = run(work, 1)
        calls[name] = 1 if once > 0.2 else max(1, round(0.05 / run(work, 1)))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names, disturbed = list(ways), 0
    for repeat in range(repeats):
        at = repeat % len(names)
        for name in names[at:] + names[:at]:
            for _ in range(20):
                ways[name]()
                began, others = time.perf_counter(), cpu_of_others()
                found = run(ways[name], calls[name])
                # The clock of /proc/stat has steps of a hundredth of a second.
                if cpu_of_others() - others < 0.03 + 0.05 * (time.perf_counter() - began):
                    break
                disturbed += 1
                time.sleep(1.0)
            seconds[name].append(found)
    return seconds, disturbed


def cpu_of_others() -> float:
    """Processor seconds that other processes (and other guests of the machine) have taken; 0 where nobody says."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, interrupts, soft, steal = map(int, stat.read_text().split()[1:9])
    busy = (user + nice + system + interrupts + soft + steal) / os.sysconf("SC_CLK_TCK")
    return busy - time.process_time()


def peak_memory(work: Step, device: str) -> float:
    """MB at the peak of two steps over what was there before, the gradients of the first included."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work(), work()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    kind = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind], profile_memory=True, acc_events=True) as found:
        work(), work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        found.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    events = [event for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak / 2**20


def check_values(ways: Ways) -> None:
    """All ways of a case must compute the same loss."""
    values = {name: float(value) for name, work in ways.items() if isinstance(value := work(), Tensor)}
    mine = values[OURS]
    for name, value in values.items():
        if name not in (INFO_NCE, "nearfar, regularised") and abs(value - mine) > 1e-5 + 1e-4 * abs(mine):
            raise SystemExit(f"{name} gives {value}, {OURS} {mine}: these are not the same loss")


def number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def measure(name: str, case: Case, repeats: int, device: str, shrink: int) -> list[str]:
    """Print the table of a case; what its bars say."""
    n = max(16, case.n // shrink)
    print(f"\n{name}: {case.title}, {n} x {case.d}", end="", flush=True)
    ways = case.ways(n, case.d, device)
    if OURS in ways:
        check_values(ways)
    seconds, disturbed = timed(ways, 1 if case.large else repeats, device)
    print(f"; {disturbed} disturbed measurements made again" if disturbed else "")
    del ways  # what its gradients hold is no input
    rows = {}
    for way, found in seconds.items():
        memory = math.nan if way in (TILES, FULL) else peak_memory(case.ways(n, case.d, device)[way], device)
        rows[way] = Row(found, memory)
    print(
        f"  {'':32} {'least ms':>9} {'median ms':>9} {'x plain':>8} {'MB':>8} {'of tiles':>9} {'of full':>8}"
    )
    for way, row in rows.items():
        ratios = ["-" if x not in rows else number(rows[x].over(row), 2) for x in (PLAIN, TILES, FULL)]
        least, median = min(row.seconds), statistics.median(row.seconds)
        print(f"  {way:32} {least * 1e3:9.2f} {median * 1e3:9.2f} {ratios[0]:>8} "
              f"{number(row.megabytes, 1):>8} {ratios[1]:>9} {ratios[2]:>8}", flush=True)  # fmt: skip
    said = [check(rows) for check in (case.bars if device == "cpu" else GPU_BARS.get(name, ()))]
    for line in said:
        print(f"  {line}", flush=True)
    return [line for line in said if "NOT MET" in line]


def main() -> None:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases whose name begins so")
    parser.add_argument("--list", action="store_true", help="names of the cases")
    parser.add_argument("--large", action="store_true", help="also the cases of 65,536 rows")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--shrink", type=int, default=1, help="divide the rows, to try it out; bars mean nothing then"
    )
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    chosen = {
        name: case
        for name, case in CASES.items()
        if (not arguments.only and (arguments.large or not case.large))
        or any(name.startswith(begin) for begin in arguments.only or ())
    }
    if arguments.list or not chosen:
        raise SystemExit("\n".join(CASES))
    threads = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else threads
    print(f"torch {torch.__version__}, {where}, float32, forward + backward, {arguments.repeat} repeats")
    failed = []
    for name, case in chosen.items():
        failed += [
            f"{name}: {line}"
            for line in measure(name, case, arguments.repeat, arguments.device, arguments.shrink)
        ]
    print(f"\n{len(failed)} bars not met" + "".join(f"\n  {line}" for line in failed))


if __name__ == "__main__":
    main()
