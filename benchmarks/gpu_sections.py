"""The sections of ``benchmarks/gpu.py``: each yields rows, which are written as they come."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

__all__ = ["SECTIONS", "Row", "Setup"]

Row = dict[str, Any]

#: the sizes that say most come first, should the time end
ROWS, SMOKE_ROWS = (4096, 65536, 16384, 1024, 32768, 8192, 2048), (64, 256)
DIMENSIONS, TEMPERATURE = 256, 0.07
PLAIN, OPEN_CLIP, COMPILED = "plain PyTorch", "open_clip's formula", "torch.compile of plain"
OURS, FUSED, NUMBER = "nearfar", "nearfar, fused", "nearfar, fixed temperature"
WAYS = (PLAIN, OPEN_CLIP, COMPILED, OURS, NUMBER, FUSED)


@dataclass(frozen=True)
class Setup:
    """How a section is run: where, whether only to try it out, and when it has to end."""

    device: str
    smoke: bool
    out: Path
    ends: float

    @property
    def on_card(self) -> bool:
        return self.device == "cuda"

    def left(self) -> float:
        """Seconds until the section is cut off."""
        return self.ends - time.monotonic()


def device(setup: Setup) -> Iterator[Row]:
    """The card and the versions of what computes on it."""
    import torch

    row: Row = {"name": platform.processor() or platform.machine(), "torch": torch.__version__}
    row |= {"python": platform.python_version(), "threads": torch.get_num_threads()}
    try:
        import triton

        row["triton"] = triton.__version__
    except ImportError:
        row["triton"] = "not installed"
    if setup.on_card:
        card = torch.cuda.get_device_properties(0)
        row |= {"name": card.name, "memory_gb": round(card.total_memory / 1e9, 1), "cuda": torch.version.cuda}
        row |= {"processors": card.multi_processor_count, "capability": f"{card.major}.{card.minor}"}
        row["matmul_precision"] = torch.get_float32_matmul_precision()
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,power.limit", "--format=csv,noheader"]
        try:
            row["driver"] = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.strip()
        except (OSError, subprocess.TimeoutExpired) as error:
            row["driver"] = f"unknown ({type(error).__name__})"
    yield row


def losses(setup: Setup) -> Iterator[Row]:
    """Every case as one tile and as many, in three dtypes."""
    import gpu_cases
    import torch

    from nearfar.contrast.fused import use_kernel

    use_kernel("torch")
    few = ("InfoNCE", "InfoNCE, Boolean mask", "SupCon", "SigLIP") if setup.smoke else tuple(gpu_cases.CASES)
    # In single precision first: it decides whether the code is right.
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if setup.smoke and dtype == torch.float16:
            continue
        x = gpu_cases.data(21 if setup.smoke else 150, 9 if setup.smoke else 40)
        for name in few:
            true = gpu_cases.truth(name, x, dtype)
            for tile in (None, (8, 16) if setup.smoke else (64, 48)):
                yield _checked(
                    {"case": name, "dtype": str(dtype)[6:], "tiles": tile is not None},
                    partial(_difference, setup, name, x, dtype, tile, true),
                )


def _difference(setup: Setup, name: str, x: Any, dtype: Any, tile: Any, true: Any) -> Row:
    import gpu_cases

    found = gpu_cases.difference(gpu_cases.outcome(name, x, setup.device, dtype, tile), true)
    return {
        "value": found.value, "gradient": found.gradient, "where": found.tensor, "ok": found.within(name, dtype)
    }  # fmt: skip


def _checked(row: Row, check: Callable[[], Row]) -> Row:
    """A row with what a check found; one that raises is a row too."""
    try:
        return row | check()
    except Exception as error:
        return row | {"ok": False, "error": f"{type(error).__name__}: {error}"[:300]}


def fused(setup: Setup) -> Iterator[Row]:
    """The fused kernel's log-sums and gradients, then the losses that are computed by it."""
    import gpu_cases
    import gpu_fused_cases
    import torch

    from nearfar.contrast.fused import has_triton, use_kernel

    if not has_triton():
        yield {"case": "all", "skipped": "Triton is not installed (pip install triton)", "ok": True}
        return
    if not setup.on_card and os.environ.get("TRITON_INTERPRET") != "1":
        yield {"case": "all", "skipped": "no card, and TRITON_INTERPRET=1 is not set", "ok": True}
        return
    cases = dict(gpu_fused_cases.FUSED_CASES)
    if setup.smoke:
        cases = {name: cases[name] for name in ("7 rows", "bfloat16")}
    else:
        for dtype in ("float32", "bfloat16"):
            for shape in ((1000, 1000, 256), (4097, 4097, 129), (2000, 3000, 768)):
                both = shape[0] == shape[1]
                cases[f"{dtype}, {shape}"] = {"shape": shape, "dtype": dtype, "both": both}
    for name, case in cases.items():
        row = _checked({"case": name}, partial(gpu_fused_cases.fused_difference, setup.device, **case))
        yield row | {"ok": row.get("close", False)}
    if setup.on_card:
        yield from _in_all_tiles(setup)
    x = gpu_cases.data(21 if setup.smoke else 150, 9 if setup.smoke else 40)
    names = [name for name in gpu_cases.CASES if name.startswith(("InfoNCE", "CLIP", "memory"))]
    for dtype in (torch.float32, torch.bfloat16):
        for name in names[:2] if setup.smoke else names:
            true = gpu_cases.truth(name, x, dtype)
            use_kernel("fused")
            with gpu_fused_cases.fused_calls() as calls:
                row = _checked(
                    {"case": name, "dtype": str(dtype)[6:]},
                    partial(_difference, setup, name, x, dtype, None, true),
                )
            use_kernel("auto")
            yield row | {"fused_calls": calls.count}


def _in_all_tiles(setup: Setup) -> Iterator[Row]:
    """Every size of tile that a measurement may choose; one that is too large for this card is never chosen."""
    import gpu_fused_cases

    from nearfar.contrast.triton_kernels import BLOCKS

    for blocks in BLOCKS:
        for dtype in ("float32", "bfloat16"):
            row: Row = {"case": f"{dtype}, tiles {tuple(blocks)}"}
            with gpu_fused_cases.blocks_of(blocks):
                row = _checked(
                    row,
                    partial(
                        gpu_fused_cases.fused_difference, setup.device, shape=(700, 700, 256), dtype=dtype
                    ),
                )
            if "OutOfResources" in row.get("error", ""):
                yield {"case": row["case"], "skipped": row["error"], "ok": True}
            else:
                yield row | {"ok": row.get("close", False)}


def speed(setup: Setup) -> Iterator[Row]:
    """Milliseconds and megabytes of a step, size by size, in single precision and under autocast to bfloat16."""
    import torch

    card = torch.cuda.get_device_properties(0).total_memory if setup.on_card else 8e9
    sizes = SMOKE_ROWS if setup.smoke else ROWS
    quick = [way for way in WAYS if way != COMPILED]
    # What has to be compiled anew for every size comes last, for it takes most of the time.
    plan = [(n, half, way) for n in sizes for half in (False, True) for way in quick]
    plan += [(n, half, COMPILED) for n in sizes for half in (False, True)]
    values: dict[tuple[int, bool], float] = {}
    for n, half, way in plan:
        row: Row = {"rows": n, "dimensions": DIMENSIONS, "dtype": "bf16" if half else "fp32", "way": way}
        # Logits, their softmax and its gradient: what plain PyTorch holds at least.
        least = n * n * 4 * 3
        if way in (PLAIN, OPEN_CLIP, COMPILED) and least > card:
            yield row | {"skipped": f"does not fit: at least {least / 1e9:.0f} GB"}
        elif setup.left() < (25 if way in (COMPILED, FUSED) else 8) and not setup.smoke:
            yield row | {"skipped": "no time left"}
        else:
            yield row | _timed(setup, way, n, half, values)


def _timed(setup: Setup, way: str, n: int, half: bool, values: dict[tuple[int, bool], float]) -> Row:
    """A step's time and memory; ``values`` are those of plain PyTorch, which the others are compared with."""
    import torch

    from nearfar.contrast.fused import use_kernel

    if way == COMPILED and not setup.on_card:
        return {"skipped": "measured on a card alone"}
    if way == FUSED and not setup.on_card:
        return {"skipped": "there is no fused kernel for a CPU"}
    try:
        if setup.on_card:
            torch.cuda.empty_cache()
        step, measured = _step(setup, way, n, half)
        if setup.on_card:
            torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated() if setup.on_card else 0
        began = time.perf_counter()
        value = step()
        _wait(setup)
        first = time.perf_counter() - began
        seconds = []
        while len(seconds) < 3 or (sum(seconds) < 0.3 and len(seconds) < 30):
            began = time.perf_counter()
            step()
            _wait(setup)
            seconds.append(time.perf_counter() - began)
        peak = torch.cuda.max_memory_allocated() - base if setup.on_card else math.nan
    except torch.OutOfMemoryError:
        return {"skipped": "does not fit: out of memory"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    finally:
        use_kernel("auto")
        if way == COMPILED:
            torch.compiler.reset()
    if way == PLAIN:
        values[n, half] = value
    known = values.get((n, half), value)
    # Plain under autocast rounds its logits, so that it differs from the exact value by more.
    close = abs(value - known) <= (0.05 if half else 1e-3) * max(1.0, abs(known))
    return {
        "ms": min(seconds) * 1e3, "median_ms": sorted(seconds)[len(seconds) // 2] * 1e3, "first_ms": first * 1e3,
        "mb": peak / 1e6, "value": value, "ok": close,
    } | measured  # fmt: skip


def _wait(setup: Setup) -> None:
    import torch

    if setup.on_card:
        torch.cuda.synchronize()


def _step(setup: Setup, way: str, n: int, half: bool) -> tuple[Callable[[], float], Row]:
    """One step, forward and backward into fresh gradients, whose value is read; and what was found out on the way."""
    import torch
    from torch.nn.functional import cross_entropy, normalize

    from nearfar.contrast.fused import measure_kernels, use_kernel
    from nearfar.losses import InfoNCELoss

    generator = torch.Generator().manual_seed(0)
    a = torch.randn(n, DIMENSIONS, generator=generator)
    b = a + 2 * torch.randn(n, DIMENSIONS, generator=generator)
    dtype = torch.bfloat16 if half else torch.float32
    a, b = (x.to(setup.device, dtype).requires_grad_() for x in (a, b))
    scale = torch.tensor(1 / TEMPERATURE, device=setup.device, requires_grad=True)
    own, loss, measured = torch.arange(n, device=setup.device), InfoNCELoss(TEMPERATURE), Row()

    def plain() -> torch.Tensor:
        logits = normalize(a) @ normalize(b).T * scale
        return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2

    def open_clip() -> torch.Tensor:
        x, y = normalize(a), normalize(b)
        return (cross_entropy(scale * x @ y.T, own) + cross_entropy(scale * y @ x.T, own)) / 2

    call: Callable[[], torch.Tensor] = {
        PLAIN: plain, OPEN_CLIP: open_clip, COMPILED: plain, OURS: lambda: loss(a, b, scale=scale),
        FUSED: lambda: loss(a, b, scale=scale), NUMBER: lambda: loss(a, b),
    }[way]  # fmt: skip
    if way == COMPILED:
        call = torch.compile(plain, dynamic=False)
    use_kernel("torch")
    if way == FUSED:
        (time_of,) = measure_kernels(setup.device, (n,), (DIMENSIONS,), (dtype,), learned_scale=(True,))
        if time_of.reason:
            raise RuntimeError(time_of.reason)
        use_kernel("fused")
        measured = {"blocks": list(time_of.blocks or ()), "chosen": time_of.faster}

    def run() -> float:
        a.grad = b.grad = scale.grad = None
        with torch.autocast(setup.device, torch.bfloat16) if half else nullcontext():
            value = call()
        value.backward()
        return value.item()

    return run, measured


def pairs(setup: Setup) -> Iterator[Row]:
    """A minute of ``experiment=pairs``."""
    yield _trained(setup, "pairs", "batch_size=32" if setup.smoke else "batch_size=256")


def molecules(setup: Setup) -> Iterator[Row]:
    """A minute of ``experiment=molecules``."""
    yield _trained(
        setup, "molecules", "data.embedded_size=400" if setup.smoke else "data.embedded_size=20000"
    )


def _trained(setup: Setup, experiment: str, more: str) -> Row:
    """Run ``nearfar train``, ask it to stop after a minute, and read its log."""
    folder = setup.out / "training" / experiment
    command = [
        sys.executable,
        "-c",
        "from nearfar.cli import main; main()",
        "train",
        f"experiment={experiment}",
        f"runs_dir={folder.parent}",
    ]
    command += [f"name={experiment}", "exists=replace", "trainer.precision=bf16-mixed"]
    command += [f"trainer.accelerator={'cuda' if setup.on_card else 'cpu'}", *filter(None, [more])]
    command += (
        ["trainer.max_steps=10", "bootstrap=0", "trainer.log_every=1", "trainer.evaluate_start=false"]
        if setup.smoke
        else ["epochs=1000", "trainer.log_every=5"]
    )
    shutil.rmtree(folder, ignore_errors=True)  # the log of an earlier run is not this one's
    began, log, stopped = time.monotonic(), setup.out / f"{experiment}.log", False
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        if not _ends(process, folder / "train_log.jsonl", setup):
            stopped = True
            process.send_signal(signal.SIGINT)  # ends after the step, with a checkpoint
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    row = _read_run(folder, time.monotonic() - began)
    if row["steps"] < 2 or (process.returncode and not stopped):
        why = "too few steps in the time" if stopped else f"exit code {process.returncode}"
        row |= {"ok": False, "error": f"{why}: " + " | ".join(log.read_text().splitlines()[-4:])[-300:]}
    return row


def _ends(process: subprocess.Popen[bytes], log: Path, setup: Setup) -> bool:
    """Whether a run ends by itself within a minute of its first step, which may need preparation (features of frozen
    encoders), or before the section's time is over."""
    first = math.inf
    while setup.left() > 12 and time.monotonic() - first < 60:
        if process.poll() is not None:
            return True
        if first == math.inf and log.exists() and '"kind": "step"' in log.read_text():
            first = time.monotonic()
        time.sleep(0.5)
    return False


def _read_run(folder: Path, seconds: float) -> Row:
    """Steps, their time, the loss of the first and the last fifth of them, and the last validation."""
    path = folder / "train_log.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    steps = [line for line in lines if line.get("kind") == "step"]
    row: Row = {"seconds": seconds, "steps": steps[-1]["step"] if steps else 0}
    if not steps:
        return row
    few = max(1, len(steps) // 5)
    losses = [math.nan if line.get("loss") is None else line["loss"] for line in steps]
    row |= {"first_loss": sum(losses[:few]) / few, "last_loss": sum(losses[-few:]) / few}
    row["ok"] = all(map(math.isfinite, losses))
    times = sorted(line["seconds_per_step"] for line in steps if line.get("seconds_per_step"))
    if times:
        row["step_ms"] = times[len(times) // 2] * 1e3
    judged = [line["val"] for line in lines if line.get("kind") == "epoch" and line.get("val")]
    if judged:
        row["epochs"] = len(judged)
        row["val"] = {name: value for name, value in judged[-1].items() if name.endswith("MRR")}
    return row


SECTIONS: dict[str, Callable[[Setup], Iterator[Row]]] = {
    "device": device, "losses": losses, "fused": fused, "pairs": pairs, "molecules": molecules, "speed": speed,
}  # fmt: skip
