"""The results of ``benchmarks/gpu.py`` as Markdown: one table of speed and memory, and what was found wrong."""

from __future__ import annotations

from typing import Any

__all__ = ["markdown"]

Row = dict[str, Any]
#: mistakes that are listed; the JSON has all of them
LISTED = 20


def markdown(content: dict[str, Any]) -> str:
    """A page of all sections; one that has not been reached is named as such."""
    sections: dict[str, list[Row]] = content["sections"]
    known = sections["device"][0] if sections["device"] else {}
    lines = [f"# {known.get('name', 'card not known')}", ""]
    if content["smoke"]:
        lines += [
            "**Tried out with small sizes (`--smoke`); no number here says anything about a card.**",
            "",
        ]
    lines += [", ".join(f"{key} {value}" for key, value in known.items() if key != "name"), ""]
    lines += ["| section | state |", "|---|---|"]
    lines += [f"| {name} | {state} |" for name, state in content["states"].items()]
    lines += ["", *_speed(sections["speed"]), *_checks(sections), *_training(sections)]
    return "\n".join(lines).rstrip() + "\n"


def _speed(rows: list[Row]) -> list[str]:
    """Sizes and precisions down, ways across; milliseconds (the least of the repeats), megabytes, and × plain."""
    if not rows:
        return []
    ways = list(dict.fromkeys(row["way"] for row in rows))
    by_place = {(row["rows"], row["dtype"], row["way"]): row for row in rows}
    lines = [
        f"## InfoNCE in both directions, forward and backward, {rows[0]['dimensions']} dimensions",
        "",
        "Milliseconds; megabytes beyond the inputs (gradients included); in brackets × as fast as plain PyTorch.",
        "",
        "| rows | " + " | ".join(["precision", *ways]) + " |",
        "|---" * (len(ways) + 2) + "|",
    ]
    for n, dtype in sorted(
        {(row["rows"], row["dtype"]) for row in rows}, key=lambda each: (each[1], each[0])
    ):
        plain = by_place.get((n, dtype, ways[0]), {}).get("ms")
        cells = [_cell(by_place.get((n, dtype, way)), plain) for way in ways]
        lines.append(f"| {n:,} | {dtype} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _cell(row: Row | None, plain: float | None) -> str:
    if row is None:
        return "not reached"
    if "ms" not in row:
        return str(row.get("skipped") or row.get("error"))[:80].replace("|", "/")
    times = f" (× {plain / row['ms']:.2f})" if plain else ""
    memory = f", {row['mb']:,.0f} MB" if row["mb"] == row["mb"] else ""
    wrong = " **value wrong**" if not row["ok"] else ""
    return f"{row['ms']:.2f} ms{memory}{times}{wrong}"


def _checks(sections: dict[str, list[Row]]) -> list[str]:
    lines: list[str] = []
    for name in ("losses", "fused"):
        rows = sections[name]
        if not rows:
            continue
        bad = [row for row in rows if not row["ok"]]
        skipped = [row["skipped"] for row in rows if "skipped" in row]
        lines += [f"## {name}: {len(rows) - len(bad)} of {len(rows)} checks against float64 right", ""]
        lines += [f"Left out: {each}." for each in skipped]
        for dtype in dict.fromkeys(row["dtype"] for row in rows if "dtype" in row):
            of = [row for row in rows if row.get("dtype") == dtype and "error" not in row]
            if of:
                value, gradient = max(row["value"] for row in of), max(row["gradient"] for row in of)
                lines.append(
                    f"- {dtype}: largest difference of a value {value:.1e}, of a gradient {gradient:.1e}"
                )
        for row in bad[:LISTED]:
            what = row.get("error") or ", ".join(
                f"{key} {row[key]}" for key in ("value", "gradient", "gradients", "where") if key in row
            )
            lines.append(f"- **wrong**: {row['case']}, {row.get('dtype', '')}: {what}")
        lines += [f"- and {len(bad) - LISTED} more in gpu.json"] * (len(bad) > LISTED) + [""]
    return lines


def _training(sections: dict[str, list[Row]]) -> list[str]:
    rows = [(name, row) for name in ("pairs", "molecules") for row in sections[name]]
    if not rows:
        return []
    lines = ["## Training with `trainer.precision=bf16-mixed`", ""]
    lines += [
        "| experiment | steps | seconds, start included | ms per step | loss, first fifth | last fifth | validation |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows:
        if "error" in row:
            lines.append(
                f"| {name} | {row['steps']} | {row['seconds']:.0f} | failed: {row['error'][-200:]} | | | |"
            )
            continue
        step = f"{row['step_ms']:.1f}" if "step_ms" in row else ""
        lines.append(
            f"| {name} | {row['steps']} | {row['seconds']:.0f} | {step} | {row['first_loss']:.3f} | "
            f"{row['last_loss']:.3f} | "
            + ", ".join(f"{metric} {value:.3f}" for metric, value in row.get("val", {}).items())
            + " |"
        )
    return [*lines, ""]
