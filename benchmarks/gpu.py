"""Everything that only a GPU can tell, in one command: is it right, how fast, how much memory, does training run?

    make gpu                                      # the same as: python benchmarks/gpu.py
    python benchmarks/gpu.py --only losses fused  # some sections
    python benchmarks/gpu.py --device cpu --smoke # without a card: small sizes, to try the script out

Under eight minutes on one card. Each section is a process of its own, so that one that fails, or whose kernel breaks
the card's context, takes no other with it; sections print their lines as they come, and ``runs/gpu/gpu.md`` and
``gpu.json`` are written anew with every one, so that what was measured is kept if the command is cut off. The exit
code is 1 if a section failed, was cut off or found a wrong number; the last lines name it.

Sections: *device* (card, versions); *losses* (every loss, direction, mask and dtype by PyTorch's operations, against
float64 on the CPU); *fused* (the kernel in Triton, against float64, and the losses that it computes); *pairs* and
*molecules* (a minute of training each with ``trainer.precision=bf16-mixed``); *speed* (forward and backward of InfoNCE
in both directions beside plain PyTorch, open_clip's formula and ``torch.compile`` of plain).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from gpu_report import markdown
from gpu_sections import SECTIONS, Row, Setup

#: seconds that each section may take on a card, in their order; the last has what is left of eight minutes
LIMITS = {"device": 30, "losses": 70, "fused": 90, "pairs": 95, "molecules": 95, "speed": 300}
#: seconds beyond its time after which a section is ended, and the least that it is worth starting with
GRACE, LEAST = 10.0, 5.0
#: exit codes of a section
WRONG, NO_TIME = 3, 4
ENDS = {0: "ok", WRONG: "a wrong number, or a case that failed", NO_TIME: "no time left for all of it"}


# -- one section in its process, and all of them ---------------------------------------------------------------------
def run_section(name: str, setup: Setup, path: Path) -> int:
    """Write its rows one by one, as lines of JSON; one of ``ENDS``."""
    end = 0
    with path.open("w") as file:
        for row in SECTIONS[name](setup):
            bad = row.get("ok") is False or "error" in row
            end = WRONG if bad else end
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(f"  {'WRONG ' if bad else ''}{shown(row)}", flush=True)
            if setup.left() < 0:
                return end or NO_TIME
    return end


def shown(row: Row) -> str:
    """A row in one line."""
    parts = []
    for key, value in row.items():
        if key not in ("ok", "close"):
            parts.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
    return ", ".join(parts)


def start_section(name: str, arguments: argparse.Namespace, seconds: float) -> str:
    """Run a section as a process; how it ended: "ok", or what went wrong."""
    lines = arguments.out / f"{name}.jsonl"
    lines.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--section", name, "--out", str(arguments.out)]
    command += ["--device", arguments.device, "--seconds", str(seconds), *["--smoke"] * arguments.smoke]
    process = subprocess.Popen(command, start_new_session=True)
    began, written = time.monotonic(), -1
    try:
        while process.poll() is None:
            if time.monotonic() - began > seconds + GRACE:
                _end(process)
                return f"cut off after {seconds:.0f} s"
            size = lines.stat().st_size if lines.exists() else 0
            if size != written:
                written = size
                write_report(arguments, {name: "running"})
            time.sleep(0.5)
    finally:
        if process.poll() is None:
            _end(process)
    return ENDS.get(process.returncode, f"failed with exit code {process.returncode}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """The section and what it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(5)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


def write_report(arguments: argparse.Namespace, states: dict[str, str]) -> None:
    """``gpu.md`` and ``gpu.json`` of what there is, each replaced in one go."""
    known = arguments.states | states
    found: dict[str, list[Row]] = {}
    for name in SECTIONS:
        path = arguments.out / f"{name}.jsonl"
        complete = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
        found[name] = [json.loads(line) for line in complete]
    content = {"states": known, "smoke": arguments.smoke, "sections": found}
    for name, text in (("gpu.json", json.dumps(content, indent=1)), ("gpu.md", markdown(content))):
        part = arguments.out / f"{name}.part"
        part.write_text(text)
        part.replace(arguments.out / name)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Parse the command line, run the sections, and say what went wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="small sizes, to try the script out")
    parser.add_argument("--only", nargs="+", choices=tuple(SECTIONS), metavar="NAME", help="some sections")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results")
    parser.add_argument("--minutes", type=float, default=7.8, help="all sections together")
    parser.add_argument("--section", choices=tuple(SECTIONS), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.section:
        setup = Setup(
            arguments.device, arguments.smoke, arguments.out, time.monotonic() + arguments.seconds
        )  # fmt: skip
        raise SystemExit(run_section(arguments.section, setup, arguments.out / f"{arguments.section}.jsonl"))
    if arguments.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise SystemExit(
                "PyTorch sees no CUDA card here; --device cpu --smoke tries the script without one"
            )
    names = arguments.only or list(SECTIONS)
    arguments.states = dict.fromkeys(names, "not run")
    for name in set(SECTIONS) - set(names):
        (arguments.out / f"{name}.jsonl").unlink(missing_ok=True)
    before = signal.signal(signal.SIGTERM, _interrupt)
    ends = time.monotonic() + arguments.minutes * 60
    try:
        for name in names:
            left = ends - time.monotonic()
            seconds = min(LIMITS[name], left - 10)
            if seconds < LEAST:
                arguments.states[name] = "no time left"
                continue
            print(f"{name} (at most {seconds:.0f} s)", flush=True)
            arguments.states[name] = "cut off"
            arguments.states[name] = start_section(name, arguments, seconds)
            write_report(arguments, {})
    except KeyboardInterrupt:
        print("cut off; what was measured until now is kept", flush=True)
    finally:
        signal.signal(signal.SIGTERM, before)
        write_report(arguments, {})
    bad = {name: state for name, state in arguments.states.items() if state != "ok"}
    print(
        f"{arguments.out / 'gpu.md'}: " + ("all sections are right" if not bad else f"{len(bad)} not right")
    )
    for name, state in bad.items():
        print(f"  {name}: {state}")
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
