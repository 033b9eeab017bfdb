"""The fused kernel against float64, without a card: Triton's interpreter runs its programs in Python.

The interpreter is chosen when Triton is imported, so a process of its own computes all cases. What is measured on a
card, and how the kernel is chosen there, is tested with measurements that are made up.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nearfar.contrast import (
    DuplicateMask,
    GuideMask,
    OwnPair,
    SameClass,
    SimilarityMask,
    fused,
)
from nearfar.contrast.fused import KernelTime, fused_blocks, measure_kernels, reason_against, use_kernel
from nearfar.contrast.tiles import Setting
from nearfar.errors import NearfarError

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu_cases
from gpu_fused_cases import FUSED_CASES, fused_calls, fused_difference

#: losses that reach the kernel without a matrix of all logits before it
LOSSES = (
    "InfoNCE, debiased", "InfoNCE, hard weighted", "InfoNCE, further negatives", "InfoNCE, parts of the rows",
    "InfoNCE, decoupled", "InfoNCE, each row", "InfoNCE, softly guided",
)  # fmt: skip


def compute() -> None:
    """All cases, one line of JSON each."""
    for name, case in FUSED_CASES.items():
        print(json.dumps({"name": name} | fused_difference("cpu", **case)))
    use_kernel("fused")
    x = gpu_cases.data(21, 9)
    for name in LOSSES:
        with fused_calls() as calls:
            ours = gpu_cases.outcome(name, x, "cpu", torch.float32)
        use_kernel("torch")
        found = gpu_cases.difference(ours, gpu_cases.truth(name, x, torch.float32))
        use_kernel("fused")
        print(
            json.dumps(
                {
                    "name": name,
                    "difference": list(found),
                    "close": found.within(name, torch.float32),
                    "fused": calls.count,
                }
            )
        )


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, check=False, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.slow
@pytest.mark.parametrize("name", FUSED_CASES)
def test_fused_is_float64(rows: dict[str, dict[str, Any]], name: str) -> None:
    row = rows[name]
    assert row["fused"]
    assert row["counts"]
    assert len(row["gradients"]) == 3
    assert row["close"], row


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_losses_by_the_fused_kernel(rows: dict[str, dict[str, Any]], name: str) -> None:
    row = rows[name]
    assert row["close"], row["difference"]
    assert (row["fused"] > 0) == (name != "InfoNCE, softly guided")


def setting(**changes: Any) -> Setting:
    plain = {
        "target": OwnPair(4), "mask": None, "offset": 0, "without_self": False, "normalize": True, "both": True,
        "twin": False, "inside": False, "expected": False, "bounded": False, "size": (4, 4), "keep": True,
    }  # fmt: skip
    return Setting(**plain | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": SameClass(torch.tensor([0, 0, 1, 1]))}, "SameClass has positives other"),
        ({"expected": True}, "mean logit"),
        ({"without_self": True}, "their own keys"),
        ({"mask": SimilarityMask(torch.eye(4))}, "SimilarityMask is neither"),
        ({"mask": GuideMask(torch.eye(4), softness=0.1)}, "GuideMask is neither"),
        ({"mask": DuplicateMask(torch.arange(4)) | DuplicateMask(torch.arange(4))}, "_Joined is neither"),
    ],
)
def test_what_falls_back_says_why(changes: dict[str, Any], words: str) -> None:
    reason = reason_against(setting(**changes), torch.ones(4, 2), torch.ones(4, 2))
    assert reason is not None
    assert words in reason


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nearfar.contrast.fused.has_triton", lambda: False)
    assert "pip install triton" in str(reason_against(setting(), torch.ones(4, 2), torch.ones(4, 2)))


class OnCard:
    """What a choice looks at, of rows on a card that is not there."""

    def __init__(self, n: int, d: int, dtype: torch.dtype = torch.float32) -> None:
        self.n, self.shape, self.dtype, self.device = n, (n, d), dtype, torch.device("cuda")

    def __len__(self) -> int:
        return self.n


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A card on which the fused kernel is faster from 4,096 rows on; the sizes that were measured."""
    seen: list[int] = []
    tiles = chosen_blocks()

    def measure(n: int, m: int, d: int, half: bool, like: Setting, device: torch.device) -> KernelTime:
        seen.append(n)
        fused = 0.5 if n >= 4096 else 2.0
        return KernelTime("a card", n, d, "float32", like.both, not like.bounded, 1.0, fused, tiles)

    monkeypatch.setattr(fused, "_measure", measure)
    monkeypatch.setattr(fused, "_card", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    fused.forget_measurements()
    yield seen
    fused.forget_measurements()
    use_kernel("auto")


def chosen_blocks() -> Any:
    pytest.importorskip("triton")
    from nearfar.contrast.triton_kernels import BLOCKS

    return BLOCKS[0]


def chosen(n: int, **changes: Any) -> bool:
    a: Any = OnCard(n, 256)
    return fused_blocks(setting(target=OwnPair(n), **changes), a, a, half=False) is not None


def test_nothing_is_chosen_unmeasured(measurements: list[int]) -> None:
    assert use_kernel() == "auto"
    assert not chosen(8192)
    assert not measurements


def test_only_what_is_faster_is_chosen(measurements: list[int]) -> None:
    found = measure_kernels("cuda", rows=(1024, 8192), dtypes=(torch.float32,), learned_scale=(True,))
    assert [each.faster for each in found] == [False, True]
    assert chosen(8192)
    assert chosen(8000)  # about the same size
    assert not chosen(1024)
    assert not chosen(65536)  # not measured
    assert not chosen(8192, bounded=True)
    assert not chosen(8192, expected=True)
    use_kernel("torch")
    assert not chosen(8192)
    use_kernel("fused")
    assert chosen(1024)


def test_measuring_by_itself_once(measurements: list[int]) -> None:
    use_kernel("measure")
    assert chosen(8192)
    assert chosen(8192)
    assert not chosen(512)
    assert measurements == [8192, 512]


def test_the_cpu_has_one_kernel(measurements: list[int]) -> None:
    use_kernel("fused")
    rows = torch.ones(4, 2)
    assert fused_blocks(setting(), rows, rows, half=False) is None
    use_kernel("measure")
    assert fused_blocks(setting(), rows, rows, half=False) is None


def test_wrong_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NearfarError, match="kernel is 'quick'"):
        use_kernel("quick")  # type: ignore[arg-type]
    monkeypatch.setattr(fused, "_wanted", [])
    monkeypatch.setenv("NEARFAR_KERNEL", "quick")
    with pytest.raises(NearfarError, match="NEARFAR_KERNEL is 'quick'"):
        use_kernel()
    with pytest.raises(NearfarError, match="PyTorch sees none"):
        measure_kernels("cpu")


def test_times_compare() -> None:
    time = KernelTime("a card", 1, 1, "float32", True, True, 1.0, math.inf, None, "no memory")
    assert not time.faster


COMPILED = """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from nearfar.contrast import triton_kernels as kernels

    blocks = kernels.BLOCKS[-1]
    fixed = {
        "BLOCK_M": blocks.rows, "BLOCK_N": blocks.columns, "BLOCK_K": blocks.depth, "BLOCK_D": 32, "WIDEN": False,
        "HAS_OWN": True, "HAS_LABELS": True, "HAS_MATRIX": True, "BACK": True,
    }
    types = {"LA": "*i64", "LB": "*i64", "MATRIX": "*u8"} | dict.fromkeys(
        ("n", "m", "d", "shift", "across", "down", "part"), "i32"
    )
    for program, rows in ((kernels._forward, "fp32"), (kernels._backward, "bf16")):
        known = fixed | {"NARROW": rows == "bf16", "PRECISION": "tf32x3"}
        known = {name: value for name, value in known.items() if name in program.arg_names}
        given = {"A": f"*{rows}", "B": f"*{rows}"} | types | dict.fromkeys(known, "constexpr")
        source = ASTSource(
            fn=program, signature={name: given.get(name, "*fp32") for name in program.arg_names},
            constexprs={(program.arg_names.index(name),): value for name, value in known.items()},
        )
        options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
        made = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options)
        print(len(made.asm["cubin"]) > 1000, made.metadata.shared < 48 * 1024)
"""


@pytest.mark.slow
def test_the_kernel_compiles_for_a_card_that_is_not_here(tmp_path: Path) -> None:
    """Both programs, with all masks, down to the machine code of an A100: in the shared memory that every card has."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    code = textwrap.dedent(COMPILED)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["True"] * 4


if __name__ == "__main__":
    compute()
