"""``make gpu`` as far as it goes without a card: small checks on the CPU, sections that fail or hang, the report."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu
import gpu_sections
from gpu_report import markdown
from gpu_sections import Setup


def setup(out: Path, seconds: float = 60.0) -> Setup:
    return Setup("cpu", True, out, time.monotonic() + seconds)


@pytest.mark.slow
def test_sections_on_the_cpu(tmp_path: Path) -> None:
    for name in ("device", "losses", "fused", "speed"):
        assert gpu.run_section(name, setup(tmp_path), tmp_path / f"{name}.jsonl") == 0
    arguments = argparse.Namespace(out=tmp_path, smoke=True, states={"losses": "ok", "pairs": "not run"})
    gpu.write_report(arguments, {})
    page = (tmp_path / "gpu.md").read_text()
    assert "no number here says anything about a card" in page
    assert "16 of 16 checks against float64 right" in page
    assert "| 256 | fp32 |" in page
    assert "| pairs | not run |" in page
    found = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    ways = {row["way"]: row for row in found["speed"] if row["rows"] == 256 and row["dtype"] == "fp32"}
    assert list(ways) == [
        *(way for way in gpu_sections.WAYS if way != gpu_sections.COMPILED),
        gpu_sections.COMPILED,
    ]
    assert ways["nearfar"]["value"] == pytest.approx(ways["plain PyTorch"]["value"], rel=1e-4)
    assert "ms" in ways["nearfar"]
    assert ways["nearfar, fused"]["skipped"] == "there is no fused kernel for a CPU"


def test_a_wrong_number_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(setup: Setup) -> Iterator[dict[str, Any]]:
        yield {"case": "first", "dtype": "float32", "value": 0.5, "gradient": 0.1, "ok": False}
        yield gpu_sections._checked({"case": "second", "dtype": "float32"}, lambda: {}["missing"])
        yield {"case": "third", "dtype": "float32", "value": 0.0, "gradient": 0.0, "ok": True}

    monkeypatch.setitem(gpu.SECTIONS, "losses", wrong)
    assert gpu.run_section("losses", setup(tmp_path), tmp_path / "losses.jsonl") == gpu.WRONG
    gpu.write_report(argparse.Namespace(out=tmp_path, smoke=False, states={"losses": "wrong"}), {})
    page = (tmp_path / "gpu.md").read_text()
    assert "1 of 3 checks against float64 right" in page
    assert "**wrong**: first" in page
    assert "KeyError: 'missing'" in page


def test_no_time_left(tmp_path: Path) -> None:
    assert gpu.run_section("device", setup(tmp_path, -1.0), tmp_path / "device.jsonl") == gpu.NO_TIME


SCRIPT = """
    import json, pathlib, sys, time
    name = sys.argv[sys.argv.index("--section") + 1]
    out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
    row = {"case": name, "dtype": "float32", "value": 0.0, "gradient": 0.0, "ok": True, "name": "a card"}
    with (out / f"{name}.jsonl").open("w") as file:
        file.write(json.dumps(row) + "\\n")
        file.flush()
        if name == "fused":
            raise SystemExit(9)
        if name == "losses":
            file.write('{"case": "half a li')
            file.flush()
            time.sleep(60)
"""


@pytest.mark.slow
def test_a_section_that_fails_or_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "section.py"
    script.write_text(textwrap.dedent(SCRIPT))
    monkeypatch.setattr(gpu, "__file__", str(script))
    monkeypatch.setattr(gpu, "GRACE", 0.0)
    monkeypatch.setattr(gpu, "LIMITS", dict.fromkeys(gpu.LIMITS, 30) | {"losses": 1.0})
    monkeypatch.setattr(gpu, "LEAST", 0.5)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--smoke", "--out", str(tmp_path),
                                      "--only", "device", "losses", "fused"])  # fmt: skip
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert signal.getsignal(signal.SIGTERM) is before
    assert end.value.code == 1
    printed = capsys.readouterr().out
    assert "losses: cut off after 1 s" in printed
    assert "fused: failed with exit code 9" in printed
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert content["states"] == {
        "device": "ok", "losses": "cut off after 1 s", "fused": "failed with exit code 9",
    }  # fmt: skip
    assert [row["case"] for row in content["sections"]["losses"]] == [
        "losses"
    ]  # the half line is not lost on us
    assert (tmp_path / "gpu.md").read_text().startswith("# a card")


def test_without_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="PyTorch sees no CUDA card here; --device cpu --smoke"):
        gpu.main()


def test_training_is_read_from_its_log(tmp_path: Path) -> None:
    log = [
        {"kind": "start", "step": 0}, {"kind": "step", "step": 5, "loss": 4.0, "seconds_per_step": 0.02},
        {"kind": "step", "step": 10, "loss": 3.0, "seconds_per_step": 0.01},
        {"kind": "epoch", "step": 10, "val": {"a/MRR": 0.5, "a/R@1": 0.4}},
    ]  # fmt: skip
    (tmp_path / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    row = gpu_sections._read_run(tmp_path, 12.0)
    assert row == {
        "seconds": 12.0, "steps": 10, "first_loss": 4.0, "last_loss": 3.0, "ok": True, "step_ms": 20.0, "epochs": 1,
        "val": {"a/MRR": 0.5},
    }  # fmt: skip
    page = markdown(
        {"sections": {key: [] for key in gpu.SECTIONS} | {"pairs": [row]}, "smoke": False, "states": {}}
    )
    assert "| pairs | 10 | 12 | 20.0 | 4.000 | 3.000 | a/MRR 0.500 |" in page
