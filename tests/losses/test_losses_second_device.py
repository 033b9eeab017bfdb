"""Every loss with all tensors on a device that is not the CPU, against float64 on the CPU; no card is needed.

The device (``second_device``) refuses what a GPU refuses, so that a tensor made on the wrong device is an error. It is
registered for a whole process, so one of its own computes all cases.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from gpu_cases import CASES

#: steps that wait for the device once, where their record is read; others look at how many pairs there are
ONE_WAIT = [
    "InfoNCE", "InfoNCE, scale that learns", "InfoNCE, temperature 0.01", "InfoNCE, one direction",
    "InfoNCE, hard weighted", "InfoNCE, Boolean mask", "InfoNCE, same labels left out", "InfoNCE, similar left out",
    "InfoNCE, guided", "InfoNCE, weights of negatives", "InfoNCE, further negatives", "InfoNCE, mined negatives",
    "CLIP", "SigLIP", "SigLIP, mask", "SupCon", "SupCon, sum inside", "SupCon, mask", "SupCon, two views",
    "SupCon, memory", "SupCon, positives by a matrix", "distillation, vectors", "Wasserstein gap",
]  # fmt: skip
#: and those that are called as functions, without a record
NO_WAIT = [
    "InfoNCE, further keys", "InfoNCE, dot products", "InfoNCE, parts of the rows", "SigLIP, numbers", "margin MSE",
    "memory with ids", "target of classes, both directions",
]  # fmt: skip


def compute() -> None:
    """All cases, one line of JSON each: as several tiles in half precision, some also as one tile in single."""
    import gpu_cases
    import torch

    from second_device import card, register

    register()
    warnings.simplefilter("ignore")
    x = gpu_cases.data(21, 9)
    for name in CASES:
        ways = [((12, 16), torch.bfloat16)]
        for tile, dtype in [(None, torch.float32), *ways] if name in (*ONE_WAIT, *NO_WAIT) else ways:
            row: dict[str, Any] = {"name": name, "tiles": tile is not None}
            try:
                true = gpu_cases.truth(name, x, dtype)
                with card() as device:
                    ours = gpu_cases.outcome(name, x, "card", dtype, tile)
                found = gpu_cases.difference(ours, true)
                row |= {"difference": list(found), "close": found.within(name, dtype), "waits": device.waits}
            except Exception as error:
                row |= {"error": f"{type(error).__name__}: {error}"[:500]}
            print(json.dumps(row))


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, bool], dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {(row["name"], row["tiles"]): row for row in found}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_second_device(rows: dict[tuple[str, bool], dict[str, Any]], name: str) -> None:
    for tiled in (False, True):
        row = rows.get((name, tiled))
        assert row is not None or not tiled
        if row is not None:
            assert "error" not in row, row["error"]
            assert row["close"], row["difference"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ONE_WAIT, *NO_WAIT])
def test_a_step_does_not_wait(rows: dict[tuple[str, bool], dict[str, Any]], name: str) -> None:
    """But for value and gradients, which the comparison copies to the CPU."""
    waits = [each for each in rows[name, False]["waits"] if each != "_to_copy"]
    assert waits == (["tolist"] if name in ONE_WAIT else []), waits


@pytest.mark.slow
def test_the_device_refuses_what_a_gpu_refuses() -> None:
    code = (
        "import torch\nfrom second_device import card\n"
        "with card():\n"
        "    x = torch.ones(2, device='card')\n"
        "    for step in (lambda: x + torch.ones(2), lambda: x.numpy(), lambda: torch.ones(2).add_(x)):\n"
        "        try:\n            step()\n"
        "        except Exception:\n            print('refused')\n"
        "    print((x + torch.tensor(1.0)).cpu().tolist(), x.device.type)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["refused"] * 3 + ["[2.0, 2.0] card"]


if __name__ == "__main__":
    compute()
