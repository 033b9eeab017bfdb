"""Logs as users write them, most of them written without a look at the rules: bare and complete, short and long, in
every form that ``diagnose`` takes. ``PLANTED`` names the one fault in each, ``HEALTHY`` has none.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

Number = float | list[float] | str | bool | None
Course = Number | Callable[[float], Any]
MRR = "text_to_molecule/MRR"
LN = math.log


# -- how values go over a run: functions of progress in [0, 1] ------------------------------------------------
def falls(start: float, end: float, rate: float = 5.0) -> Callable[[float], float]:
    return lambda t: end + (start - end) * math.exp(-rate * t)


def then(at: float, before: Course, after: Course) -> Callable[[float], Any]:
    return lambda t: value(before, t) if t < at else value(after, t)


def value(course: Course, t: float) -> Any:
    return course(t) if callable(course) else course


def every(n: int, steps: int, this: Number, other: Number) -> Callable[[float], Number]:
    return lambda t: this if round(t * steps) % n == 0 else other


# -- logs ----------------------------------------------------------------------------------------------------
def log(steps: int = 200, epoch: int = 50, batch: int = 64, loss: Course = None, noise: float = 0.03,
        full: bool = True, seed: int = 0, step: dict[str, Course] | None = None,
        probe: dict[str, Course] | None = None, plan: dict[str, Course] | None = None,
        val: dict[str, Course] | None = None, scatter: float = 0.004) -> list[dict[str, Any]]:  # fmt: skip
    """Records as ``train_log.jsonl`` has them, of a run whose loss falls to a quarter of ln(batch) unless told."""
    rng = random.Random(seed)
    loss = falls(LN(batch), LN(batch) / 4) if loss is None else loss
    steps_fields: dict[str, Course] = {"rows": batch, "candidates": batch, "uniform_level": LN(batch)}
    probes: dict[str, Course] = {}
    plans: dict[str, Course] = {}
    if full:
        steps_fields |= {"lr": lambda t: 1e-3 * (1 - t), "positives_per_row": 1.0, "rows_without_positives": 0.0,
                         "floor": 0.0, "scale": 14.3, "largest_logit": 14.3, "finite": True, "duplicate_keys": 0.0,
                         "false_negative_share": 0.0, "gradient_norm": falls(5.0, 1.0)}  # fmt: skip
        probes |= {"probe_rows": 200, "molecules/effective_rank": falls(40.0, 120.0), "molecules/rank_limit": 199.0,
                   "molecules/variance": 0.85, "molecules/uniformity": -2.6, "molecules/mean_cosine": 0.15,
                   "texts/effective_rank": 150.0, "texts/rank_limit": 199.0, "texts/variance": 0.9,
                   "modality_gap": 0.4, "hubness": 1.2}  # fmt: skip
        plans |= {"sampler": "random", "hardness": [0.6, 0.61, 0.6, 0.59], "hardness_random": 0.6}
    steps_fields, probes, plans = steps_fields | (step or {}), probes | (probe or {}), plans | (plan or {})
    metrics = {MRR: falls(0.1, 0.6, 3)} if val is None else val
    records: list[dict[str, Any]] = []

    def record(kind: str, e: int, s: int, t: float, fields: dict[str, Course]) -> dict[str, Any]:
        held = {name: value(course, t) for name, course in fields.items()}
        return {"kind": kind, "epoch": e, "step": s} | {k: v for k, v in held.items() if v is not None}

    epochs = max(1, steps // epoch)
    for e in range(1, epochs + 1):
        begin, end = (e - 1) * epoch, e * epoch
        records += [record("plan", e, begin, (e - 1) / epochs, plans)] if plans else []
        losses = []
        for s in range(begin + 1, end + 1):
            losses.append(value(loss, s / steps) * (1 + rng.gauss(0, noise)))
            records.append(record("step", e, s, s / steps, {"loss": losses[-1], **steps_fields}))
        records += [record("probe", e, end, e / epochs, probes)] if probes else []
        scores = {name: float(value(m, e / epochs)) + rng.gauss(0, scatter) for name, m in metrics.items()}
        mean = sum(losses) / len(losses)
        records.append({"kind": "epoch", "epoch": e, "step": end, "train_loss": mean, "val": scores})
    return records


HARD = {"sampler": "hard", "hard_ratio": 0.5, "random_phase": False, "hardness": [6.9, 7.8, 7.2, 7.5],
        "hardness_random": 0.6, "last_to_first": 0.95, "nominal_hard": 0.5,
        "realised_hard": [0.5, 0.5, 0.5, 0.49]}  # fmt: skip


def switch(at: float) -> dict[str, Course]:
    """A plan whose batches are random before ``at`` and hard from then on."""
    easy = {"random_phase": True, "hardness": [0.6] * 4, "nominal_hard": 0.0, "realised_hard": [0.0] * 4}
    return (
        HARD | {name: then(at, before, HARD[name]) for name, before in easy.items()} | {"last_to_first": 1.0}
    )


# -- run folders ---------------------------------------------------------------------------------------------
@dataclass
class Folder:
    """A run on disk; ``write`` puts it there."""

    records: list[dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    layout: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] | None = None

    def write(self, path: Path) -> Path:
        path.mkdir()
        config = {"epochs": 4, "batch_size": 64, "lr": 1e-3, "temperature": 0.07, "learn_temperature": False,
                  "hard_ratio": 0.5, "hardness_k": 100, "curriculum_epoch": 0, "false_negative_threshold": None,
                  "mask_duplicates": True, "trainer": {"precision": "32-true"}, "sampler": {"name": "random"},
                  "loss": {"name": "infonce"}} | self.config  # fmt: skip
        (path / "train_log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in self.records))
        (path / "config.yaml").write_text(json.dumps(config))
        (path / "model.json").write_text(json.dumps({"batchnorm": 0, "world_size": 1} | self.model))
        (path / "dataset_layout.json").write_text(json.dumps(splits() | self.layout))
        if self.metrics is not None:
            (path / "metrics.json").write_text(json.dumps({"monitor": MRR, "splits": self.metrics}))
        return path


def splits(val: int = 200, test: int = 200, hashes: str = "abc", **leaks: Any) -> dict[str, Any]:
    rows = zip(("train", "val", "test"), (1600, val, test), hashes, strict=True)
    return {"splits": {name: {"rows": n, "hash": h} for name, n, h in rows}, "leaks": leaks}


def scores(gallery: int, mrr: float = 0.6, half: float = 0.02) -> dict[str, Any]:
    """Estimates as ``metrics.json`` holds them."""
    values = {"R@1": (mrr - 0.1, 1 / gallery), "R@10": (mrr + 0.2, 10 / gallery), "MRR": (mrr, 6 / gallery)}
    return {
        f"text_to_molecule/{name}": {"metric": name, "value": v, "low": v - half, "high": v + half,
                                     "chance": min(c, 1.0), "trivial": c >= 1, "protocol": {"gallery": gallery}}
        for name, (v, c) in values.items()
    }  # fmt: skip


# -- what is planted -----------------------------------------------------------------------------------------
TEN = list(range(1, 11))
LOSS_UP = [2.9, 2.2, 1.8, 1.5, 1.4, 2.4, 2.45, 2.5, 2.5, 2.5]
UP = [0.2, 0.3, 0.36, 0.39, 0.41, 0.44, 0.46, 0.475, 0.485, 0.49]
DOWN = [0.2, 0.3, 0.36, 0.39, 0.41, 0.38, 0.35, 0.33, 0.32, 0.30]
GOES_ON = {"loss": [3.5, 2.8, 2.4, 2.2, 2.1, 2.05], "candidates": 64}
GREEDY = {"sampler": {"name": "hard", "order": "greedy"}}
HARD_RUN = {"sampler": {"name": "hard", "order": "level"}}


def noisy(n: int, at: float, sd: float) -> list[float]:
    rng = random.Random(n)
    return [at + rng.gauss(0, sd) for _ in range(n)]


def estimate(gallery: int, score: float = 0.5) -> dict[str, Any]:
    return {"value": score, "gallery": gallery}


def two_terms(weight: float, share: Course, name: str = "contrastive") -> dict[str, Course]:
    return {f"{name}/weight": weight, f"{name}/share": share, "focal/weight": 1 - weight, "uniform_level": None,
            "focal/share": lambda t: 1 - value(share, t), "candidates": None}  # fmt: skip


#: (fault, guise, log, context)
PLANTED: list[tuple[str, str, Any, dict[str, Any]]] = [
    ("loss-at-chance", "exactly, five steps", {"loss": [LN(128)] * 5, "candidates": 128}, {}),
    ("loss-at-chance", "5,000 steps of 4,096 rows", log(5000, 500, 4096, LN(4096), 0.003, full=False), {}),
    ("loss-at-chance", "after a collapse", log(1000, 100, 64, then(0.7, falls(4.1, 1.2), LN(64)), 0.005), {}),
    ("loss-at-chance", "by epochs, after a collapse", {"train_loss": [3, 2, 1.7, 1.6, 4.1, 4.16, 4.158, 4.16, 4.159],
     "epoch": TEN[:9]}, {"batch_size": 64}),
    ("loss-at-chance", "from above", Folder(log(300, 60, 256, falls(6.2, LN(256)), 0.004), {"batch_size": 256}), {}),
    ("loss-at-chance", "eight rows, noisy", {"loss": noisy(60, LN(8), 0.12)}, {"batch_size": 8}),
    ("loss-at-chance", "one epoch", log(20, 20, 512, LN(512), 0.002, full=False, val={}), {}),
    ("loss-at-chance", "epochs counted from 0", {"epoch": [0, 1], "train_loss": [LN(64), 4.155]}, {"batch_size": 64}),
    ("loss-at-chance", "parts of epochs", [{"epoch": k / 20, "loss": 4.16 + 0.01 * (-1) ** k} for k in range(1, 61)],
     {"batch_size": 64}),
    ("loss-at-chance", "arrays", {"loss": np.full(40, LN(32)), "candidates": np.full(40, 32)}, {}),
    ("loss-at-chance", "supcon with its floor", log(300, 50, 64, LN(64), 0.004, step={"floor": 1.2}), {}),
    ("loss-above-chance", "two epochs", {"epoch": [1, 2], "train_loss": [4.6, 4.3]}, {"batch_size": 32}),
    ("loss-above-chance", "rising", {"epoch": TEN[:6], "train_loss": [4.1, 4.3, 4.5, 4.6, 4.8, 4.9]},
     {"batch_size": 32}),
    ("loss-above-chance", "diverges", Folder(log(600, 60, 64, then(0.4, falls(4.2, 2.0), 6.0), val={})), {}),
    ("loss-above-chance", "hard batches that teach nothing", Folder(log(600, 100, 32, 1.2 * LN(32), plan=HARD,
     val={MRR: 0.05}), HARD_RUN), {}),
    ("loss-at-floor", "below a floor of its own", {"loss": [0.56, 0.55, *[0.548] * 8], "floor": 0.52}, {}),
    ("loss-at-floor", "learned by heart", log(1000, 100, 64, falls(4.1, 0.003, 12)), {}),
    ("loss-at-floor", "soft targets", log(400, 100, 32, falls(3.4, 1.25, 10), 0.004, step={"floor": 1.23}), {}),
    ("term-saturated", "constants", GOES_ON | {"a/weight": 0.3, "a/share": 0.01, "b/weight": 0.7, "b/share": 0.99}, {}),
    ("term-saturated", "fades", log(400, 50, 64, step=two_terms(0.5, falls(0.5, 0.02, 6))), {}),
    ("term-saturated", "at the edge", log(200, 50, 64, step=two_terms(0.22, 0.047)), {}),
    ("no-positives", "never", {"loss": [0.0] * 20, "rows_without_positives": [32] * 20, "rows": 32}, {}),
    ("no-positives", "a third", log(200, 50, 24, full=False, step={"rows_without_positives": 8.0}), {}),
    ("no-positives", "in the second half", Folder(log(step={"rows_without_positives": then(0.5, 0.0, 30.0)})), {}),
    ("no-positives", "every second batch", log(batch=32, step={"rows_without_positives": every(2, 200, 32, 0)}), {}),
    ("no-positives", "counts alone", {"loss": [3, 2.8, 2.7, 2.6], "rows_without_positives": [20, 22, 19, 21]}, {}),
    ("few-positives", "many classes", log(batch=32, full=False, step={"positives_per_row": 1.15}), {"loss": "supcon"}),
    ("few-positives", "counts alone", GOES_ON | {"positives_per_row": [1.3, 1.1, 1.2, 1.4, 1.0, 1.3]}, {}),
    ("too-many-positives", "two classes", {"loss": [3.3, 3.25, 3.2], "positives_per_row": 29, "candidates": 32}, {}),
    ("target-inert", ".001", {"loss": [3.4, 3.2, 3, 2.9, 2.8], "rows_with_neighbors": [0, 0.03, 0, 0, 0]}, {}),
    ("target-inert", "never", Folder(log(400, 100, 32, step={"rows_with_neighbors": 0.0})), {}),
    ("no-anchors", "never", {"loss": [0.0] * 10, "anchors": [0] * 10, "positives": [7] * 10}, {}),
    ("no-anchors", "half of the steps", {"loss": [0, 0.5] * 20, "anchors": [0, 2] * 20}, {}),
    ("no-anchors", "late", log(200, 20, 16, full=False, step={"anchors": then(0.5, 3, 0), "uniform_level": None}), {}),
    ("curriculum-healthy", "by epochs", {"train_loss": LOSS_UP, "val/MRR": UP, "epoch": TEN}, {"curriculum_epoch": 5}),
    ("curriculum-healthy", "epochs from 0", {"train_loss": LOSS_UP, "val/MRR": UP, "epoch": list(range(10))},
     {"curriculum_epoch": 5}),
    ("curriculum-healthy", "ratio from 0", {"train_loss": LOSS_UP, "val/MRR": UP, "hard_ratio": [0] * 5 + [0.5] * 5},
     {}),
    ("curriculum-healthy", "folder", Folder(log(1000, 100, loss=then(0.5, falls(4.1, 1.2), falls(2.6, 1.9)),
     plan=switch(0.5), val={MRR: then(0.5, falls(0.1, 0.45), lambda t: 0.35 + 0.2 * t)}), HARD_RUN), {}),
    ("curriculum-diverging", "by epochs", {"train_loss": LOSS_UP, "val/MRR": DOWN, "epoch": TEN},
     {"curriculum_epoch": 5, "hard_ratio": 0.6, "hardness_k": 50}),
    ("curriculum-diverging", "two epochs of it", {"train_loss": [2.9, 2.2, 1.9, 2.7, 2.8], "epoch": TEN[:5],
     "val/MRR": [0.2, 0.3, 0.36, 0.31, 0.27]}, {"curriculum_epoch": 3}),
    ("curriculum-diverging", "a rank that rises", {"train_loss": LOSS_UP, "epoch": TEN,
     "val/median_rank": [90, 50, 30, 22, 18, 25, 32, 40, 47, 52]}, {"curriculum_epoch": 5}),
    ("curriculum-diverging", "another sampler", {"train_loss": LOSS_UP, "val/MRR": DOWN, "epoch": TEN,
     "sampler": ["random"] * 5 + ["hard"] * 5}, {}),
    ("curriculum-diverging", "folder", Folder(log(1200, 100, loss=then(0.5, falls(4.1, 1.2), 2.5), plan=switch(0.5),
     val={MRR: then(0.5, falls(0.1, 0.45), lambda t: 0.55 - 0.25 * t)}), HARD_RUN), {}),
    ("hardness-depleted", "folder", Folder(log(plan=HARD | {"realised_hard": [0.5, 0.5, 0.5, 0.2]}), GREEDY), {}),
    ("hardness-depleted", "quarters of hardness", {"hardness": [[9, 7, 4, 1.5]] * 3, "hardness_random": 0.6}, {}),
    ("hardness-depleted", "one epoch's quarters", {"hardness": [9, 7, 4, 1.5], "hardness_random": 0.6}, {}),
    ("hardness-depleted", "means", {"nominal_hard": 0.5, "realised_hard": [0.19, 0.18, 0.2, 0.19]}, {}),
    ("hardness-depleted", "ends", {"epoch": TEN[:3], "last_to_first": [0.3, 0.28, 0.31]}, {"sampler": "hard"}),
    ("hardness-depleted", "of each batch", [{"epoch": e, "loss": 3.0, "hardness": 8 - 7 * (s / 50) ** 2,
     "hardness_random": 0.6} for e in (1, 2, 3) for s in range(50)], {"sampler": "hard"}),
    ("hardness-not-above-random", "folder", Folder(log(plan=HARD | {"hardness": [0.6] * 4}), HARD_RUN), {}),
    ("hardness-not-above-random", "means", {"hardness": [3.9, 3.97], "hardness_random": 3.94}, {"sampler": "hard"}),
    ("hardness-not-above-random", "after the switch", log(600, 100, plan=switch(0.5) | {"hardness": [0.6] * 4}), {}),
    ("false-negatives", "share", GOES_ON | {"false_negative_share": 0.02}, {}),
    ("false-negatives", "plan", Folder(log(plan=HARD | {"anchors_with_false_negative": 0.35},
     step={"false_negative_share": None}), HARD_RUN), {}),
    ("false-negatives", "large batch", log(batch=512, full=False, step={"false_negative_share": 0.005}), {}),
    ("duplicates", "oversampled", log(batch=32, full=False, step={"duplicate_keys": 0.45}), {}),
    ("duplicates", "a few", Folder(log(step={"duplicate_keys": 0.03}), {"mask_duplicates": False}), {}),
    ("temperature-at-clamp", "late", Folder(log(500, 50, step={"scale": then(0.6, falls(14.3, 100.0, 9), 100.0),
     "scale_max": 100.0, "largest_logit": 60.0}), {"learn_temperature": True}), {}),
    ("temperature-at-clamp", "of 40", GOES_ON | {"scale": 40.0, "scale_max": 40.0}, {"learn_temperature": True}),
    ("temperature-at-clamp", "as a temperature", {"temperature": [0.03, 0.02, *[0.01] * 6]}, {"scale_max": 100}),
    ("temperature-drift", "to .005", log(500, 50, step={"scale": lambda t: 14.3 * 14**t, "largest_logit": 60.0}), {}),
    ("temperature-drift", "falls", {"scale": [14.3 * math.exp(-k / 20) for k in range(40)]}, {}),
    ("temperature-drift", "as a temperature", log(300, 30, full=False, step={"temperature": lambda t: 0.07 / 13**t}),
     {}),
    ("numerical-risk", "bf16", GOES_ON | {"largest_logit": 99.0}, {"precision": "bf16-mixed"}),
    ("numerical-risk", "fp16", GOES_ON | {"scale": 100.0}, {"precision": "float16"}),
    ("numerical-risk", ".001", GOES_ON, {"temperature": 0.001}),
    ("collapse", "variance", {"molecules/variance": [0.3, 0.01, 0.002], "texts/variance": [0.3, 0.02, 0.01]}, {}),
    ("collapse", "one view", Folder(log(probe={"texts/variance": 0.003, "texts/mean_cosine": 0.996})), {}),
    ("collapse", "uniformity of a single view", {"uniformity": [-0.1, -0.02, -0.01]}, {}),
    ("dimensional-collapse", "one view", Folder(log(probe={"molecules/effective_rank": 4.0})), {}),
    ("dimensional-collapse", "falls", {"effective_rank": [80, 20, 9, 6], "rank_limit": 255}, {}),
    ("dimensional-collapse", "no limit logged", {"z/effective_rank": [4.0, 4.1], "z/dimensions": 256}, {}),
    ("metric-trivial", "R@10 of 10", {"val/R@10": [1.0, 1.0], "val/R@1": [0.4, 0.5]}, {"gallery": 10}),
    ("metric-trivial", "recall_at_10 of 10", {"val/recall_at_10": [1.0, 1.0]}, {"gallery": 10}),
    ("metric-trivial", "top5_acc of 4", {"metrics": {"test": {"top5_acc": estimate(4, 1.0)}}}, {}),
    ("metric-trivial", "folder", Folder(log(), metrics={"val": scores(8), "test": scores(8)}), {}),
    ("gallery-mismatch", "folder", Folder(log(), metrics={"val": scores(195), "test": scores(1211)}), {}),
    ("gallery-mismatch", "in batch", {"metrics": {"val": {"MRR": estimate(32)}, "test": {"MRR": estimate(3300)}}}, {}),
    ("split-leak", "ids", GOES_ON, {"splits": {"train": {"ids": [1, 2, 5]}, "test": {"ids": [9, 5]}}}),
    ("split-leak", "test is val", Folder(log(), layout=splits(hashes="abb")), {}),
    ("split-leak", "counted", Folder(log(), layout=splits(**{"train/test": {"structure": {"shared": 4}}})), {}),
    ("baseline-not-beaten", "majority", {"val/accuracy": [0.40, 0.43, 0.443]}, {"baselines": {"accuracy": 0.488}}),
    ("baseline-not-beaten", "within its interval", {"metrics": {"test": {"F1": {"value": 0.805, "low": 0.79,
     "high": 0.82}}}, "baselines": {"F1": 0.803}}, {}),
    ("baseline-not-beaten", "chance", Folder(log(), metrics={"val": scores(200, 0.03), "test": scores(200, 0.03)}), {}),
    ("common-mode-gain", "detection", GOES_ON, {"change": {"AP": {"male": 0.008, "female": 0.0094}}}),
    ("common-mode-gain", "three groups", {"change": {"AR": {"a": 0.02, "b": 0.021, "c": 0.0195}}}, {}),
    ("gain-in-noise", "interval", {}, {"comparison": {"MRR": {"value": 0.004, "low": -0.003, "high": 0.011}}}),
    ("gain-in-noise", "seeds", [], {"comparison": {"MRR": {"values": [0.831, 0.829, 0.835],
     "baseline": [0.830, 0.832, 0.828]}}}),
    ("gain-in-noise", "scatter of epochs", GOES_ON, {"comparison": {"AP gap": {"value": -0.0014, "sd": 0.0031}}}),
    ("batchnorm-small-batch", "seven rows", {"loss": [1.9, 1.6, 1.5], "batchnorm": 1, "batch_size": 7}, {}),
    ("batchnorm-small-batch", "folder", Folder(log(60, 20, 7, full=False), {"batch_size": 7}, {"batchnorm": 2}), {}),
    ("gradient-scale", "a quarter", GOES_ON | {"gradient_ratio": 0.25}, {"world_size": 4}),
    ("gradient-scale", "the world", log(step={"gradient_ratio": 4.0, "world_size": 4}), {}),
    ("non-finite-loss", "from the middle", {"loss": [3, 2.5, math.nan, math.nan], "candidates": 64}, {}),
]  # fmt: skip


# -- what is well --------------------------------------------------------------------------------------------
@cache
def healthy(seed: int) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Logs and contexts without a fault, by kind, with noise of a seed."""
    rng = random.Random(seed)

    def run(*args: Any, **options: Any) -> list[dict[str, Any]]:
        return log(*args, seed=seed, **options)

    def falling(n: int, start: float, end: float, sd: float, rate: float = 5.0) -> list[float]:
        return [falls(start, end, rate)(k / n) + rng.gauss(0, sd) for k in range(n)]

    metric_up = {MRR: then(0.5, falls(0.1, 0.42), lambda t: 0.32 + 0.2 * t)}
    rising = [0.2, 0.3, 0.35, 0.38, 0.41, 0.43, 0.45, 0.46, 0.47, 0.48]
    return {
        "five steps": ({"loss": [4.1, 3.5, 3.0, 2.6, 2.4], "candidates": 64}, {}),
        "one step": ({"loss": [4.2], "candidates": 64}, {}),
        "folder": (Folder(run(400, 100), metrics={"val": scores(200), "test": scores(215)}), {}),
        "4,096 rows": (run(2000, 200, 4096, falls(LN(4096), 1.8, 8)), {}),
        "eight rows": (run(200, 50, 8, falls(LN(8), 0.9), 0.2), {}),
        "four rows, losses alone": ({"loss": falling(100, 1.4, 0.5, 0.2)}, {"batch_size": 4}),
        "supcon": (run(300, 50, loss=falls(4.1, 1.6), step={"floor": 1.1, "positives_per_row": 4.0}),
                   {"loss": "supcon"}),
        "supcon, no floor logged": ({"loss": [4.1, 3.7, 3.4, 3.2, 3.05, 2.95, 2.9], "positives_per_row": 8.0,
                                     "candidates": 64}, {"loss": "supcon", "classes": 8}),
        "late": (run(1000, 10, loss=falls(4.1, 0.02, 8)), {}),
        "hard, above ln B": (Folder(run(1000, 100, 32, then(0.5, falls(LN(32), 1.5), lambda t: 4.7 - 1.6 * t),
                                        plan=switch(0.5), val=metric_up), HARD_RUN | {"batch_size": 32}), {}),
        "hard, above ln B, one epoch ago": ({"epoch": TEN[:6], "train_loss": [3.2, 2.6, 2.2, 2.0, 1.9, 3.8],
                                             "val/MRR": rising[:6]}, {"batch_size": 32, "curriculum_epoch": 5}),
        "hard, level": (Folder(run(600, 100, loss=falls(4.3, 2.3), plan=HARD), HARD_RUN), {}),
        "hardness of each batch": ([{"epoch": e, "loss": 3.4 - 0.4 * e, "hardness": 7 + rng.gauss(0, 1),
                                     "hardness_random": 0.6} for e in (1, 2, 3) for _ in range(50)],
                                   {"sampler": "hard"}),
        "hardness that follows its schedule": ({"nominal_hard": [0.8, 0.8, 0.4, 0.4], "sampler": "hard",
                                                "realised_hard": [0.8, 0.79, 0.4, 0.39]}, {}),
        "progressive": (run(900, 100, loss=lambda t: falls(4.1, 1.5)(t) + 0.5 * (t > 1 / 3) + 0.4 * (t > 2 / 3),
                            plan=HARD | {"hard_ratio": lambda t: 0.3 + 0.25 * (t > 0.33) + 0.25 * (t > 0.66)}), {}),
        "a dip of one epoch": ({"epoch": TEN, "train_loss": LOSS_UP, "val/MRR": [*rising[:5], 0.395, *rising[5:9]]},
                               {"batch_size": 64, "curriculum_epoch": 5}),
        "a metric that wavers": ({"epoch": TEN, "train_loss": LOSS_UP, "val/MRR": [0.2, 0.3, 0.36, 0.4, *falling(
                                  6, 0.405, 0.405, 0.004)]}, {"batch_size": 64, "curriculum_epoch": 5}),
        "back to random batches": ({"epoch": TEN, "train_loss": [3 - 0.2 * k for k in range(10)], "val/MRR": rising,
                                    "sampler": ["hard"] * 5 + ["random"] * 5, "hardness": [7.0] * 5 + [0.6] * 5,
                                    "hardness_random": 0.6}, {"batch_size": 64}),
        "random, with options it ignores": (run(plan={"hard_ratio": 0.5}), {"sampler": "random", "hard_ratio": 0.5}),
        "warm-up": (run(300, 100, 128, then(0.25, LN(128), lambda t: 1.5 + 3.35 * math.exp(-6 * (t - 0.25)))), {}),
        "first epoch of twenty": ({"loss": falling(12, 4.16, 3.9, 0.02), "epoch": [1] * 12, "candidates": 64},
                                  {"epochs": 20}),
        "far above at first": ({"loss": falling(100, 9.0, 1.5, 0.1), "candidates": 64}, {}),
        "warm start": (run(loss=falls(1.0, 0.8), val={MRR: 0.6}), {}),
        "hard task": ({"loss": falling(300, LN(1024), 0.88 * LN(1024), 0.03, 20), "candidates": 1024}, {}),
        "spikes": (run(500, loss=lambda t: falls(4.1, 1.2)(t) * every(61, 500, 2.2, 1)(t)), {}),
        "gaps": ({"loss": [4.1, None, 3.5, None, 3.0, None, 2.7, 2.5], "candidates": 64}, {}),
        "epochs from 0": ({"epoch": list(range(10)), "train_loss": LOSS_UP, "val/MRR": rising},
                          {"batch_size": 32, "curriculum_epoch": 5}),
        "scale 14 to 40": (run(1000, 50, 256, step={"scale": falls(14.3, 40.0, 3), "scale_max": 100.0}), {}),
        "temperature .07 to .03": ({"temperature": falling(60, 0.07, 0.03, 0.0002, 8)}, {}),
        "fixed .01": (Folder(run(step={"scale": 100.0, "largest_logit": 100.0}), {"temperature": 0.01}), {}),
        "bf16 at 14": (run(), {"precision": "bf16-mixed"}),
        "focal and contrastive": (run(400, 50, 32, falls(2.0, 0.7), step=two_terms(0.3, 0.22)), {}),
        "a term without weight": (run(step=two_terms(0.1, 0.03)), {}),
        "sum of terms above ln B": (run(300, 50, 32, falls(7.5, 5.0), full=False, step=two_terms(0.5, 0.4)),
                                    {"batch_size": 32}),
        "siglip": ({"loss": falling(50, 9.9, 4.7, 0.05)}, {"batch_size": 64, "loss": "siglip"}),
        "vicreg": ({"loss": falling(50, 25.0, 15.0, 0.2)}, {"batch_size": 64, "loss": "vicreg"}),
        "memory": ({"loss": falling(60, 8.3, 4.5, 0.05)}, {"batch_size": 64, "memory": 4096}),
        "gathered": ({"loss": falling(60, 4.85, 3.8, 0.05)}, {"batch_size": 32, "world_size": 4}),
        "a few rows without": (run(loss=falls(4.1, 1.6), step={"floor": 0.9, "positives_per_row": 3.5,
                               "rows_without_positives": every(3, 200, 1.0, 0.0)}), {"loss": "supcon"}),
        "false negatives masked": (Folder(run(plan=HARD | {"anchors_with_false_negative": 0.3}),
                                          HARD_RUN | {"false_negative_threshold": 0.95}), {}),
        "spatial": (run(300, 50, 32, falls(LN(32), 1.5), step={"rows_with_neighbors": 0.9, "floor": 1.0}), {}),
        "anchors": (run(300, 30, 7, falls(1.8, 1.0), 0.1, full=False, step={"anchors": every(25, 300, 0, 2),
                    "uniform_level": None, "group_share/f": 0.45, "anchor_share/f": 0.6}), {}),
        "ten classes": (run(loss=falls(4.1, 2.3), step={"positives_per_row": 6.0, "floor": 1.8}, probe={
                        "molecules/effective_rank": 8.5, "texts/effective_rank": 8.6}),
                        {"loss": "supcon", "classes": 10}),
        "small space": ({"z/effective_rank": [5.0, 5.5, 6.0], "z/rank_limit": 7}, {}),
        "BatchNorm, a small last batch": (run(step={"rows": every(20, 200, 5, 64)}), {"batchnorm": 2}),
        "gains that are ones": (GOES_ON, {"comparison": {"MRR": {"values": [0.5, 0.51, 0.505], "baseline":
                                [0.45, 0.462, 0.455]}}, "change": {"AP": {"male": 0.001, "female": 0.03}}}),
        "baseline beaten": ({"val/accuracy": [0.5, 0.58, 0.61]}, {"baselines": {"accuracy": 0.488}}),
        "a rank that falls": ({"val/median_rank": [90, 45, 30, 20]}, {"baselines": {"median_rank": 100.5}}),
        "nDCG@10 of ten": ({"val/nDCG@10": [0.3, 0.4, 0.5]}, {"gallery": 10}),
        "R@10 of 32": ({"val/R@10": [0.7, 0.8, 0.85]}, {"gallery": 32}),
        "processes agree": (run(step={"gradient_ratio": 1.01, "world_size": 4}), {}),
        "no leak": (Folder(run(), layout=splits(**{"train/test": 0})), {}),
        "fields of others": (run(step={"gpu_mem": 3.2, "grad/layer1": 0.1, "eta": "3h"}), {}),
    }  # fmt: skip
