from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def nearfar(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nearfar.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=300,
    )


def test_help_lists_the_verbs() -> None:
    shown = nearfar("--help")
    assert shown.returncode == 0
    for verb in ("train", "compare", "report", "embed", "search", "verify", "data"):
        assert verb in shown.stdout


def test_list_shows_experiments() -> None:
    assert "molecules_demo" in nearfar("train", "--list").stdout


def test_mistakes_are_messages_and_not_tracebacks(tmp_path: Path) -> None:
    cases = {
        ("train", "experiment=molecules", "hard_rato=1"): "did you mean 'hard_ratio'",
        ("train",): "say which experiment",
        ("compare", "nowhere"): "no such run",
        ("report", "nowhere"): "no such file",
        ("search", "nowhere", "a text"): "no such run",
        ("train", "resume_from=nowhere"): "no such run",
        ("train", "experiment=molecules", "data.train=nowhere.tsv"): "no such file",
    }
    for arguments, message in cases.items():
        done = nearfar(*arguments, cwd=tmp_path)
        assert done.returncode == 2, (arguments, done.stderr)
        assert message in done.stderr.replace("\n", " "), (arguments, done.stderr)
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").rglob("config.yaml"))


def test_cfg_job_prints_the_configuration(tmp_path: Path) -> None:
    shown = nearfar("train", "experiment=molecules", "lr=0.5", "--cfg", "job", cwd=tmp_path)
    assert "lr: 0.5" in shown.stdout


def test_verify_sampler() -> None:
    done = nearfar("verify", "sampler")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
