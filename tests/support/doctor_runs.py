"""Synthetic runs for the doctor: healthy ones with the noise of real logs, and one planted fault each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nearfar.training.run_folder import RunFolder

#: rules that the doctor must have
NAMED = {
    "loss-at-chance", "loss-above-chance", "loss-at-floor", "term-saturated", "no-positives", "few-positives",
    "target-inert", "no-anchors", "curriculum-healthy", "curriculum-diverging", "hardness-depleted",
    "hardness-not-above-random", "false-negatives", "duplicates", "temperature-at-clamp", "temperature-drift",
    "numerical-risk", "collapse", "dimensional-collapse", "metric-trivial", "gallery-mismatch", "split-leak",
    "baseline-not-beaten", "common-mode-gain", "gain-in-noise", "batchnorm-small-batch", "gradient-scale",
}  # fmt: skip
EPOCHS, STEPS, EVERY = 10, 40, 4  # steps of an epoch, steps between step records


@dataclass
class Run:
    """Log records and context, as ``diagnose`` takes them."""

    records: list[dict[str, Any]]
    context: dict[str, Any] = field(default_factory=dict)

    def every(self, kind: str, **changes: Any) -> Run:
        """Set fields of all records of a kind; a function is given the record."""
        for record in self.records:
            if record["kind"] == kind:
                for name, value in changes.items():
                    record[name.replace("__", "/")] = value(record) if callable(value) else value
        return self

    def knowing(self, **context: Any) -> Run:
        self.context |= context
        return self


def write_run(run: Run, path: Path, finished: bool = True) -> RunFolder:
    """A run folder with this log."""
    folder = RunFolder(path)
    for record in run.records:
        folder.append(record)
    c = run.context
    config = {name: c[name] for name in ("batch_size", "epochs", "lr", "temperature", "hard_ratio", "hardness_k",
                                         "curriculum_epoch", "mask_duplicates") if name in c}  # fmt: skip
    config |= {"trainer": {"precision": c["precision"], "accumulate": 1}, "sampler": {"name": c["sampler"]},
               "loss": {"name": c["loss"]}, "false_negative_threshold": None}  # fmt: skip
    folder.write_json("config.yaml", config)  # JSON is YAML
    splits = {name: {"rows": part["rows"], "split_hash": part["hash"]} for name, part in c["splits"].items()}
    folder.write_json("dataset_layout.json", {"splits": splits, "leaks": {}})
    folder.write_json("environment.json", {"python": "3.11"})
    if finished:
        folder.write_json("metrics.json", {"monitor": "MRR", "splits": c["metrics"]})
    return folder


def progress(record: dict[str, Any]) -> float:
    """0 at the start of a run, 1 at its end."""
    return record["step"] / (EPOCHS * STEPS)


def estimate(
    metric: str, value: float, gallery: int = 2000, chance: float = 0.004, split: str = "a1"
) -> dict[str, Any]:
    spread = 0.02
    return {"metric": metric, "value": value, "low": value - spread, "high": value + spread, "chance": chance,
            "n": gallery, "trivial": False, "protocol": {"gallery": gallery, "split": split}}  # fmt: skip


def skeleton(rng: np.random.Generator, level: Callable[[float], float], size: int = 64, epochs: int = EPOCHS,
             best: float = 0.6, noise: float = 0.04,
             probed: Callable[[float], float] | None = None) -> Run:  # fmt: skip
    """A run of InfoNCE whose mean loss follows ``level`` from 0 to 1 of the run, and in random batches ``probed``."""
    probed = probed or level
    records: list[dict[str, Any]] = []
    for epoch in range(1, epochs + 1):
        start = (epoch - 1) * STEPS
        records.append({"kind": "plan", "epoch": epoch, "step": start, "sampler": "random",
                        "hardness": [5.2 + 0.2 * rng.normal() for _ in range(4)], "hardness_random": 5.2,
                        "last_to_first": 1 + 0.15 * rng.normal(), "nominal_hard": None, "realised_hard": None,
                        "false_negatives": 1e-4, "anchors_with_false_negative": 0.004,
                        "false_negative_threshold": 0.95})  # fmt: skip
        losses = []
        for step in range(start + EVERY, start + STEPS + 1, EVERY):
            at = step / (epochs * STEPS)
            loss = level(at) * (1 + noise * rng.normal())
            losses.append(loss)
            records.append({"kind": "step", "epoch": epoch, "step": step, "batch": step - start, "lr": 1e-3 * (1 - at),
                            "loss": loss, "candidates": float(size), "positives_per_row": 1.0, "positives_min": 1.0,
                            "rows_without_positives": 0.0, "p_positive": math.exp(-loss), "hardest_share": 0.2,
                            "uniform_level": math.log(size), "floor": 0.0, "scale": 14.2857, "finite": True,
                            "rows": size, "duplicate_keys": 0.002 * rng.random(), "gradient_norm": 1 + rng.random(),
                            "clipped": True, "largest_logit": 14.28, "seconds_per_step": 0.02})  # fmt: skip
        rise = best * (1 - math.exp(-4 * epoch / epochs)) + 0.004 * rng.normal()
        view = {}
        for name, rank in (("queries", 40), ("keys", 52)):
            view |= {f"{name}/effective_rank": rank + rng.normal(), f"{name}/rank_limit": 128.0,
                     f"{name}/dimensions": 128.0, f"{name}/variance": 0.9 + 0.02 * rng.normal(),
                     f"{name}/uniformity": -3.2 + 0.1 * rng.normal(), f"{name}/mean_cosine": 0.1}  # fmt: skip
        records.append({"kind": "probe", "epoch": epoch, "step": start + STEPS, **view, "alignment": 0.6,
                        "modality_gap": 0.3, "hubness": 1.1, "probe_rows": 512, "probe_split": "val",
                        "val_loss": probed(epoch / epochs) + 0.3 + 0.02 * rng.normal(),
                        "val_uniform_level": math.log(size), "val_candidates": float(size),
                        "train_loss_same_composition": probed(epoch / epochs) + 0.02 * rng.normal()})  # fmt: skip
        records.append({"kind": "epoch", "epoch": epoch, "step": start + STEPS, "train_loss": float(np.mean(losses)),
                        "seconds": 1.0, "val": {"MRR": rise, "R@10": min(1.0, 1.3 * rise),
                        "median_rank": 9.0}})  # fmt: skip
    context = {"batch_size": size, "epochs": epochs, "precision": "32-true", "accumulate": 1, "sampler": "random",
               "loss": "infonce", "temperature": 0.07, "lr": 1e-3, "mask_duplicates": True, "monitor": "MRR",
               "hard_ratio": 0.5, "hardness_k": 100, "curriculum_epoch": 0,
               "splits": {"train": {"rows": 2560, "hash": "t0"}, "val": {"rows": 2000, "hash": "v0"},
                          "test": {"rows": 2100, "hash": "x0"}},
               "metrics": {split: {"MRR": estimate("MRR", best - 0.01, size, 0.004, split),
                                   "R@10": estimate("R@10", best + 0.15, size, 10 / size, split)}
                           for split, size in (("val", 2000), ("test", 2100))}}  # fmt: skip
    return Run(records, context)


def falling(start: float, end: float, rate: float = 5.0) -> Callable[[float], float]:
    return lambda at: end + (start - end) * math.exp(-rate * at)


# -- healthy -------------------------------------------------------------------------------------------------
def random_infonce(rng: np.random.Generator) -> Run:
    return skeleton(rng, falling(4.2, 0.7))


def converged(rng: np.random.Generator) -> Run:
    """Everything overfits a little on few rows: the loss ends near .1, the metric stays."""
    return skeleton(rng, falling(4.3, 0.1, 6.0), best=0.78)


def clip(rng: np.random.Generator) -> Run:
    run = skeleton(rng, falling(5.5, 1.5), size=256)
    run.every("step", scale=lambda r: 14.29 + 16 * (1 - math.exp(-4 * progress(r))) + 0.05 * rng.normal(),
              scale_max=100.0, at_clamp=0.0)  # fmt: skip
    run.every("step", largest_logit=lambda r: r["scale"] * 0.98)
    return run.knowing(
        loss="clip", precision="bf16-mixed", learn_temperature=True, world_size=2, gradient_ratio=0.99
    )


def supcon(rng: np.random.Generator) -> Run:
    """64 rows of 8 classes: 7 positives, floor ln 7."""
    run = skeleton(rng, falling(4.15, 2.6))
    run.every("step", candidates=63.0, positives_per_row=lambda r: 7 + 0.3 * rng.normal(), positives_min=3.0,
              uniform_level=math.log(63), floor=math.log(7), p_positive=0.08)  # fmt: skip
    run.every("probe", queries__effective_rank=6.1, keys__effective_rank=6.3)
    return run.knowing(loss="supcon", sampler="balanced", classes=8)


def _hard(run: Run, rng: np.random.Generator, start: int, sampler: str = "hard") -> Run:
    run.every(
        "plan", sampler=sampler, random_phase=lambda r: r["epoch"] < start, hard_ratio=0.6, hardness_k=50
    )
    for r in run.records:
        if r["kind"] == "plan" and r["epoch"] >= start:
            r |= {"hardness": [9 + 0.5 * rng.normal() for _ in range(4)], "nominal_hard": 0.6,
                  "realised_hard": [0.6, 0.6, 0.6, 0.58]}  # fmt: skip
    return run.knowing(sampler=sampler, hard_ratio=0.6, hardness_k=50, curriculum_epoch=start - 1)


def curriculum(rng: np.random.Generator) -> Run:
    def level(at: float) -> float:
        return falling(3.6, 0.9)(at) if at <= 0.5 else 0.9 + 1.0 * math.exp(-3 * (at - 0.5))

    return _hard(skeleton(rng, level, size=32, probed=falling(3.6, 0.9)), rng, 6)


def curriculum_above_chance(rng: np.random.Generator) -> Run:
    """Hard batches cost more than ln 32 at first and then less, while the metric rises."""

    def level(at: float) -> float:
        return falling(3.6, 2.0)(at) if at <= 0.5 else 2.6 + 1.5 * math.exp(-6 * (at - 0.5))

    return _hard(skeleton(rng, level, size=32, probed=falling(3.6, 1.6)), rng, 6)


def just_switched(rng: np.random.Generator) -> Run:
    """Unfinished: its last epoch is the first of hard batches, and lies above ln 32."""
    run = curriculum_above_chance(rng)
    run.records = [r for r in run.records if r["epoch"] <= 6]
    for r in run.records:
        if r["epoch"] == 6 and "loss" in r:
            r["loss"] = 3.9 + 0.1 * rng.normal()
    run.every("epoch", val=lambda r: {"MRR": 0.05 * r["epoch"] + 0.003 * rng.normal()})
    del run.context["metrics"]
    return run


def hard_from_start(rng: np.random.Generator) -> Run:
    return _hard(skeleton(rng, falling(3.0, 1.2), size=128), rng, 1)


def partition(rng: np.random.Generator) -> Run:
    run = _hard(skeleton(rng, falling(4.9, 1.5), size=128), rng, 1, "partition")
    return run.every("plan", nominal_hard=None, realised_hard=None)


def spatial(rng: np.random.Generator) -> Run:
    run = skeleton(rng, falling(3.6, 1.6), size=32)
    run.every("step", rows_with_neighbors=lambda r: 0.8 + 0.05 * rng.normal(), floor=0.9, positives_per_row=2.6,
              scale=lambda r: 20 + 4 * progress(r), scale_max=40.0, at_clamp=0.0)  # fmt: skip
    return run.knowing(loss="spatial", sampler="spatial")


def spatial_in_part(rng: np.random.Generator) -> Run:
    """Half of each batch from neighbourhoods, half at random; the scale ends at 30 of 40."""
    run = skeleton(rng, falling(4.9, 2.1), size=128)
    run.every("step", rows_with_neighbors=lambda r: 0.45 + 0.05 * rng.normal(), floor=0.5, positives_per_row=1.6,
              scale=lambda r: 14.3 + 16 * (1 - math.exp(-5 * progress(r))), scale_max=40.0)  # fmt: skip
    return run.knowing(loss="spatial", sampler="spatial", precision="bf16-mixed")


def focal_objective(rng: np.random.Generator) -> Run:
    """0.7 focal and 0.3 contrastive; the total is far below what guessing the contrast costs."""
    run = skeleton(rng, falling(1.6, 0.75))
    for name in ("candidates", "uniform_level", "floor", "p_positive", "positives_per_row"):
        for r in run.records:
            r.pop(name, None)
    contrast, focal = falling(3.4, 1.5), falling(0.45, 0.02)
    run.every("step", total=lambda r: r["loss"], contrastive__raw=lambda r: contrast(progress(r)) + 0.05 * rng.normal(),
              focal__raw=lambda r: focal(progress(r)) * (1 + 0.1 * rng.normal()),
              contrastive__weight=0.3, focal__weight=0.7, contrastive__share=lambda r: 0.45 + 0.05 * rng.normal(),
              focal__share=lambda r: 0.55, contrastive__cosine__focal=0.1,
              contrastive__uniform_level=3.4, contrastive__floor=0.8, focal__uniform_level=0.45,
              focal__floor=0.0)  # fmt: skip
    return run.knowing(loss="objective", baselines={"MRR": 0.1})


def adversarial(rng: np.random.Generator) -> Run:
    """Batches of 7 by score; few rows, much noise."""
    run = skeleton(rng, falling(0.55, 0.25), size=7, noise=0.25).every(
        "probe", val_uniform_level=math.log(1.5)
    )
    run.every("step", candidates=3.0, positives_per_row=2.0, uniform_level=math.log(1.5), anchors=2.0, positives=2.0,
              middle_share=3 / 7, score_gap=lambda r: 0.2 + 0.03 * rng.normal(),
              group_share__women=lambda r: 0.5 + 0.05 * rng.normal(),
              anchor_share__women=lambda r: 0.68 + 0.08 * rng.normal(),
              group_share__men=lambda r: 0.5 + 0.05 * rng.normal(),
              anchor_share__men=lambda r: 0.32 + 0.08 * rng.normal())  # fmt: skip
    return run.knowing(loss="adaptive score", batchnorm=0, change={"AP": {"women": 0.031, "men": 0.004}},
                       comparison={"AP gap": {"value": -0.027, "low": -0.041, "high": -0.013}})  # fmt: skip


def with_memory(rng: np.random.Generator) -> Run:
    run = skeleton(rng, falling(7.0, 2.5))
    return run.every("step", candidates=1088.0, uniform_level=math.log(1088), memory_age=16.0).knowing(
        memory=1024
    )


def supcon_with_memory(rng: np.random.Generator) -> Run:
    """The memory holds half an epoch."""
    run = supcon(rng).every("step", memory_age=lambda r: min(20.0, r["step"]), candidates=1343.0,
                            uniform_level=math.log(1343), positives_per_row=150.0, floor=math.log(150),
                            loss=lambda r: r["loss"] + math.log(20))  # fmt: skip
    return run.every("probe", val_uniform_level=math.log(1343)).knowing(memory=1280)


def siglip(rng: np.random.Generator) -> Run:
    run = skeleton(rng, falling(5.4, 1.2))
    run.every("probe", val_uniform_level=math.log(64) + 1)
    run.every("step", uniform_level=math.log(64) + 1, scale=lambda r: 10 + 6 * progress(r))
    return run.knowing(loss="siglip")


def short_run(rng: np.random.Generator) -> Run:
    """Three epochs, of which hardly a step is logged."""
    run = skeleton(rng, falling(4.2, 0.8), epochs=3)
    run.records = [r for r in run.records if r["kind"] != "step" or r["step"] % 100 == 0]
    return run


def just_begun(rng: np.random.Generator) -> Run:
    """One epoch in, on its way down from chance."""
    run = skeleton(rng, falling(4.4, 0.8))
    run.records = [r for r in run.records if r["epoch"] == 1]
    del run.context["metrics"]
    return run


def several_processes(rng: np.random.Generator) -> Run:
    return random_infonce(rng).knowing(world_size=4, batch_size=16, gradient_ratio=1.003, batchnorm=6).every(
        "step", rows=16, world_size=4)  # fmt: skip


def own_log(rng: np.random.Generator) -> Run:
    """Somebody's loop: a loss and its batch size."""
    level = falling(4.9, 1.0)
    return Run([{"kind": "step", "loss": level(i / 60) * (1 + 0.05 * rng.normal())} for i in range(60)],
               {"batch_size": 128})  # fmt: skip


# -- logs with little in them --------------------------------------------------------------------------------
def bare(rng: np.random.Generator, steps: int = 80, **series: Callable[[float], float]) -> Run:
    """Steps with a loss and nothing else that says what guessing costs."""
    records = [
        {
            "kind": "step",
            "step": i,
            "epoch": 1 + 4 * i // steps,
            **{n: of(i / steps) for n, of in series.items()},
        }
        for i in range(steps)
    ]
    return Run(records, {})


def bare_healthy(rng: np.random.Generator) -> Run:
    """A loss that passes ln 16 and ln 8 on its way and settles near, but not at, ln 2."""
    run = bare(
        rng, loss=lambda at: 0.75 + 3 * math.exp(-6 * at) + 0.02 * rng.normal(), gradient_norm=lambda at: 0.4
    )
    run.records += [
        {"kind": "probe", "epoch": e, "text/moved": 0.1 * e, "image/moved": 0.0} for e in range(1, 5)
    ]
    return run


def bare_flat(rng: np.random.Generator) -> Run:
    """A fine-tuned model whose loss hardly moves, at the logarithm of no usual number."""
    run = bare(rng, loss=lambda at: 1.71 + 0.03 * rng.normal(), gradient_norm=lambda at: 0.1)
    run.records += [
        {"kind": "epoch", "epoch": e, "val/nDCG": 0.41 + 0.002 * e + 0.001 * rng.normal()}
        for e in range(1, 7)
    ]
    run.records += [{"kind": "probe", "epoch": e, "embeddings/moved": 1e-4 * e} for e in range(1, 5)]
    return run


def bare_shuffled(rng: np.random.Generator) -> Run:
    """The same rows in every epoch, in a new order: the loss of a batch says nothing of that an epoch before."""
    own = 0.3 * rng.normal(size=20)
    order = [rng.permutation(20) for _ in range(5)]
    return bare(rng, 100, loss=lambda at: 2.0 - at + own[order[int(at * 5)][round(at * 100) % 20]])


def at_logarithm(rng: np.random.Generator) -> Run:
    return bare(rng, loss=lambda at: math.log(4096) + 0.004 * rng.normal(), gradient_norm=lambda at: 0.01)


def at_half(rng: np.random.Generator) -> Run:
    return bare(rng, loss=lambda at: 0.6931 + 0.002 * rng.normal())


def one_candidate(rng: np.random.Generator) -> Run:
    return bare(rng, loss=lambda at: 0.0)


def no_gradient(rng: np.random.Generator) -> Run:
    return bare(rng, loss=lambda at: 3.1 + 0.1 * rng.normal(), gradient_norm=lambda at: 0.0)


def same_batches(rng: np.random.Generator) -> Run:
    own = 3.1 + 0.1 * rng.normal(size=20)
    return bare(rng, loss=lambda at: own[round(at * 80) % 20], gradient_norm=lambda at: 0.4)


def same_order(rng: np.random.Generator) -> Run:
    own = 0.3 * rng.normal(size=20)
    return bare(rng, 100, loss=lambda at: 2.0 - at + own[round(at * 100) % 20] + 0.01 * rng.normal())


def forgetting(rng: np.random.Generator) -> Run:
    run = bare(rng, loss=lambda at: 1.2 - at + 0.02 * rng.normal())
    run.records += [
        {"kind": "epoch", "epoch": e, "val/nDCG": 0.43 - 0.02 * e + 0.001 * rng.normal()} for e in range(1, 7)
    ]
    return run


def standing_still(rng: np.random.Generator) -> Run:
    run = bare(rng, loss=lambda at: 3.1 + 0.1 * rng.normal())
    run.records += [{"kind": "probe", "epoch": e, "embeddings/moved": 0.0} for e in range(1, 5)]
    return run


def stale_evaluation(rng: np.random.Generator) -> Run:
    run = bare(rng, loss=lambda at: 3.2 - 2 * at + 0.05 * rng.normal())
    run.records += [{"kind": "epoch", "epoch": e, "val/MRR": 0.3127, "val/R@1": 0.21} for e in range(1, 7)]
    return run


def weighed(rng: np.random.Generator, **summary: float) -> Run:
    """A loop that ``Monitor`` watched: which weights move, the learning rate, the mode of the evaluation."""
    run = bare(rng, loss=lambda at: 0.5 + 3 * np.exp(-4 * at) + 0.05 * rng.normal())
    steps = [record for record in run.records if "loss" in record]
    for i, record in enumerate(steps):
        record |= {"weights_moved": 1.0, "lr": 1e-3 * (1 - i / len(steps))}
    whole = {
        "weights_trained": 12,
        "weights_unmoved": 0,
        "weights_without_gradient": 0,
        "evaluated_in_training": 0,
    }
    run.records += [{"kind": "epoch", "epoch": e} | whole | summary for e in range(1, 4)]
    return run


def all_weights_move(rng: np.random.Generator) -> Run:
    return weighed(rng)


def weights_move_in_part(rng: np.random.Generator) -> Run:
    run = weighed(rng)
    for record in run.records:
        if "weights_moved" in record:
            record["weights_moved"] = 0.25 * int(rng.integers(0, 5))
    run.records[-4] |= {"weights_moved": 1.0}
    return run


def head_left_out(rng: np.random.Generator) -> Run:
    return weighed(rng, weights_unmoved=2)


def tower_detached(rng: np.random.Generator) -> Run:
    return weighed(rng, weights_without_gradient=6)


def evaluated_while_training(rng: np.random.Generator) -> Run:
    return weighed(rng, evaluated_in_training=1)


def steps_skipped(rng: np.random.Generator) -> Run:
    run = weighed(rng)
    steps = [record for record in run.records if "weights_moved" in record]
    for record in steps[len(steps) // 2 :]:
        record["weights_moved"] = 0.0
    return run


def schedule_ended(rng: np.random.Generator) -> Run:
    run = weighed(rng)
    for i, record in enumerate(record for record in run.records if "lr" in record):
        record["lr"] = 1e-3 * 0.3**i
    return run


def trained(rng: np.random.Generator, value: float, low: float, high: float) -> Run:
    now = random_infonce(rng)
    score = now.context["metrics"]["test"]["MRR"]["value"]
    return now.knowing(monitor="MRR", before_training={"test": {"MRR": estimate("MRR", score - value)}},
                       gain={"test": {"MRR": {"value": value, "low": low, "high": high, "verdict": "?"}}})  # fmt: skip


def no_gain(rng: np.random.Generator) -> Run:
    return trained(rng, 0.002, -0.004, 0.008)


def worse_than_before(rng: np.random.Generator) -> Run:
    return trained(rng, -0.05, -0.06, -0.04)


def gained(rng: np.random.Generator) -> Run:
    return trained(rng, 0.2, 0.18, 0.22)


def gained_a_little(rng: np.random.Generator) -> Run:
    return trained(rng, 0.01, 0.002, 0.018)


def growing(rng: np.random.Generator, gain: float) -> Run:
    """Batches grow fourfold after the sixth epoch, and the metric by ``gain``."""
    run = skeleton(rng, falling(4.0, 2.0))
    for record in run.records:
        if record["epoch"] > 6:
            if record["kind"] == "step":
                record |= {
                    "candidates": 256.0,
                    "rows": 256,
                    "uniform_level": math.log(256),
                    "loss": record["loss"] + 1.2,
                }
            if record["kind"] == "probe":
                record |= {"val_uniform_level": math.log(256), "val_candidates": 256.0}
                record["val_loss"] += 1.2
                record["train_loss_same_composition"] += 1.2
            if record["kind"] == "epoch":
                record["train_loss"] += 1.2
                record["val"]["MRR"] += gain
    return run


def grown_batch(rng: np.random.Generator) -> Run:
    return growing(rng, 0.15)


def grown_batch_without_gain(rng: np.random.Generator) -> Run:
    return growing(rng, 0.0)


def scored(run: Run, scores: Callable[[int], float], name: str = "val/R@1", epochs: int = 8) -> Run:
    """With a score of validation after each epoch."""
    run.records += [{"kind": "epoch", "epoch": e, name: scores(e)} for e in range(1, epochs + 1)]
    return run


def low_and_flat(rng: np.random.Generator) -> Run:
    """Pairs that do not belong together: the loss falls as rows are learned by heart."""
    return scored(
        bare(rng, loss=lambda at: 3.9 - at + 0.05 * rng.normal()), lambda e: 0.02 + 0.0005 * rng.normal()
    )


def low_and_rising(rng: np.random.Generator) -> Run:
    return scored(
        bare(rng, loss=lambda at: 3.9 - at + 0.05 * rng.normal()), lambda e: 0.004 * e + 0.0005 * rng.normal()
    )


def turned_sign(rng: np.random.Generator) -> Run:
    run = bare(rng, loss=lambda at: -5.0 - 20 * at + 0.2 * rng.normal())
    return scored(run, lambda e: 0.3 + 0.005 * rng.normal())


def decoupled(rng: np.random.Generator) -> Run:
    """A loss without the positive in its denominator may be negative."""
    run = bare(rng, loss=lambda at: 2.0 - 6 * at + 0.1 * rng.normal())
    return scored(run, lambda e: 0.3 + 0.05 * e + 0.005 * rng.normal())


def huge_logits(rng: np.random.Generator) -> Run:
    return bare(rng, loss=lambda at: 60 * math.exp(-12 * at) + 0.5 + 0.02 * rng.normal())


def sharp_start(rng: np.random.Generator) -> Run:
    """A temperature of .02: the first loss is three times guessing, as an untrained encoder's may be."""
    return bare(rng, loss=lambda at: 13 * math.exp(-8 * at) + 0.5 + 0.02 * rng.normal())


def never_zeroed(rng: np.random.Generator) -> Run:
    return bare(rng, loss=lambda at: 2.8 - 1.5 * at + 0.05 * rng.normal(),
                gradient_norm=lambda at: 9 + 60 * at + rng.normal())  # fmt: skip


def leaves_a_plateau(rng: np.random.Generator) -> Run:
    """Gradients are small at first, as all candidates score alike, then large, then small again."""
    return bare(rng, loss=lambda at: 4.2 - 3 / (1 + math.exp(-20 * (at - 0.3))) + 0.05 * rng.normal(),
                gradient_norm=lambda at: 0.5 + 6 * math.exp(-40 * (at - 0.35) ** 2) + 0.1 * rng.normal())  # fmt: skip


def twice_softmax(rng: np.random.Generator) -> Run:
    run = bare(rng, loss=lambda at: 3.25 + 0.9 * math.exp(-8 * at) + 0.02 * rng.normal())
    return scored(run.knowing(batch_size=64), lambda e: 0.9 + 0.01 * e + 0.002 * rng.normal())


def far_below_guessing(rng: np.random.Generator) -> Run:
    run = bare(rng, loss=lambda at: 0.5 + 3.6 * math.exp(-8 * at) + 0.02 * rng.normal())
    return scored(run.knowing(batch_size=64), lambda e: 0.9 + 0.01 * e + 0.002 * rng.normal())


def cut_off_view(rng: np.random.Generator) -> Run:
    run = bare(rng, loss=lambda at: 3.2 - 2 * at + 0.05 * rng.normal())
    run.records += [{"kind": "probe", "epoch": e, "a/moved": 0.1 * e, "b/moved": 0.0} for e in range(1, 5)]
    return run


def both_views_move(rng: np.random.Generator) -> Run:
    run = bare(rng, loss=lambda at: 3.2 - 2 * at + 0.05 * rng.normal())
    run.records += [
        {"kind": "probe", "epoch": e, "a/moved": 0.1 * e, "b/moved": 0.001 * e} for e in range(1, 5)
    ]
    return run


def few_logged_in_order(rng: np.random.Generator) -> Run:
    """Eight epochs of six logged values, whose batches are the same but for what training changes."""
    own = 0.4 * rng.normal(size=6)
    run = Run([], {})
    for epoch in range(1, 9):
        for i in range(6):
            loss = 3.0 / epoch + own[i] * (0.6 + 0.1 * rng.normal()) + 0.1 * rng.normal()
            run.records.append({"epoch": epoch, "step": 24 * (epoch - 1) + 4 * i + 4, "loss": loss})
    return run


def few_logged_shuffled(rng: np.random.Generator) -> Run:
    run = few_logged_in_order(rng)
    for epoch in range(8):
        part = run.records[6 * epoch : 6 * epoch + 6]
        losses = [part[i]["loss"] for i in rng.permutation(6)]
        for record, loss in zip(part, losses, strict=True):
            record["loss"] = loss
    return run


HEALTHY: dict[str, Callable[[np.random.Generator], Run]] = {
    f.__name__: f
    for f in (random_infonce, converged, clip, supcon, curriculum, curriculum_above_chance, just_switched,
              hard_from_start, partition, spatial, spatial_in_part, focal_objective, adversarial, with_memory,
              supcon_with_memory,
              siglip, short_run,
              just_begun, several_processes, own_log, bare_healthy, bare_flat, bare_shuffled, gained,
              gained_a_little, grown_batch_without_gain, low_and_rising, decoupled, sharp_start, leaves_a_plateau,
              far_below_guessing, both_views_move, few_logged_shuffled, all_weights_move, weights_move_in_part)
}  # fmt: skip
#: notes that healthy runs may have
NOTES: dict[str, set[str]] = {
    "curriculum": {"curriculum-healthy", "composition-differs"},
    "curriculum_above_chance": {"curriculum-healthy", "composition-differs"},
    "just_switched": {"curriculum-healthy", "composition-differs"},
    "with_memory": {"composition-differs"},
    "bare_healthy": {"embeddings-still"},  # the encoder of pictures is frozen
}


# -- one fault each ------------------------------------------------------------------------------------------
def at_chance(rng: np.random.Generator) -> Run:
    run = skeleton(rng, lambda at: math.log(64) + 0.3 * math.exp(-20 * at), noise=0.01)
    run.every("epoch", val=lambda r: {"MRR": 0.004 + 0.0005 * rng.random()})
    return run.knowing(metrics={"test": {"MRR": estimate("MRR", 0.0045)}})


def at_chance_columns(rng: np.random.Generator) -> Run:
    return Run(
        [{"loss": math.log(32) + 0.03 * rng.normal(), "kind": "step"} for _ in range(40)], {"batch_size": 32}
    )


def noisy_at_chance(rng: np.random.Generator) -> Run:
    """Batches of 8, whose loss scatters by a sixth of itself."""
    return Run(
        [{"kind": "step", "loss": math.log(8) + 0.35 * rng.normal(), "candidates": 8} for _ in range(120)]
    )


def above_chance(rng: np.random.Generator) -> Run:
    """Two epochs of a pretrained model at a learning rate of 1e-3: 4.3 to 4.6 at ln 32."""
    return skeleton(rng, falling(4.7, 4.3), size=32, epochs=3)


def hard_above_chance(rng: np.random.Generator) -> Run:
    """Hard batches stay above ln 32 and the metric stands still."""
    run = _hard(skeleton(rng, lambda at: 2.0 if at <= 0.5 else 3.9, size=32, probed=lambda at: 2.0), rng, 6)
    return run.every("epoch", val=lambda r: {"MRR": 0.4 + 0.002 * rng.normal()})


def contrast_at_floor(rng: np.random.Generator) -> Run:
    run = focal_objective(rng)
    return run.every("step", contrastive__raw=lambda r: 0.548 + 0.004 * rng.normal(), contrastive__floor=0.52,
                     contrastive__uniform_level=0.694)  # fmt: skip


def supcon_at_floor(rng: np.random.Generator) -> Run:
    run = supcon(rng)
    return run.every("step", loss=lambda r: math.log(7) + 0.02 + 0.005 * rng.normal())


def infonce_at_floor(rng: np.random.Generator) -> Run:
    run = skeleton(rng, falling(3.0, 0.004, 60.0), best=0.7)
    return run.every("probe", val_loss=0.4)


def term_saturated(rng: np.random.Generator) -> Run:
    return focal_objective(rng).every("step", contrastive__share=lambda r: 0.01 + 0.005 * rng.random(),
                                      focal__share=0.985)  # fmt: skip


def no_positives(rng: np.random.Generator) -> Run:
    return supcon(rng).every("step", rows_without_positives=lambda r: 30.0 + 3 * rng.normal(),
                             positives_per_row=2.1)  # fmt: skip


def few_positives(rng: np.random.Generator) -> Run:
    run = supcon(rng).every("step", positives_per_row=lambda r: 1.1 + 0.05 * rng.normal(), floor=0.1,
                            rows_without_positives=4.0)  # fmt: skip
    return run.every("probe", queries__effective_rank=20.0, keys__effective_rank=20.0).knowing(classes=120)


def too_many_positives(rng: np.random.Generator) -> Run:
    return supcon(rng).every("step", positives_per_row=57.0, floor=math.log(57),
                             loss=lambda r: 4.1 + 0.002 * rng.normal()).knowing(classes=None)  # fmt: skip


def target_inert(rng: np.random.Generator) -> Run:
    return spatial(rng).every("step", rows_with_neighbors=lambda r: float(rng.random() < 0.03) / 32, floor=0.001,
                              positives_per_row=1.001).knowing(sampler="random")  # fmt: skip


def no_anchors(rng: np.random.Generator) -> Run:
    return adversarial(rng).every("step", anchors=0.0, positives=0.0, loss=0.0, uniform_level=0.0, candidates=0.0,
                                  positives_per_row=0.0, rows_without_positives=7.0, score_gap=0.0,
                                  p_positive=0.0)  # fmt: skip


def anchors_ignore_group(rng: np.random.Generator) -> Run:
    return adversarial(rng).every("step", anchor_share__women=lambda r: 0.5 + 0.05 * rng.normal(),
                                  anchor_share__men=lambda r: 0.5 + 0.05 * rng.normal())  # fmt: skip


def diverging(rng: np.random.Generator) -> Run:
    run = curriculum(rng)
    return run.every("epoch", val=lambda r: {"MRR": (0.45 if r["epoch"] < 6 else 0.45 - 0.02 * (r["epoch"] - 5))
                                             + 0.003 * rng.normal()})  # fmt: skip


def depleted(rng: np.random.Generator) -> Run:
    run = curriculum(rng)
    for r in run.records:
        if r["kind"] == "plan" and r["epoch"] >= 6:
            r["realised_hard"] = [0.55, 0.4, 0.3, 0.15]
    return run


def depleted_by_hardness(rng: np.random.Generator) -> Run:
    run = hard_from_start(rng)
    run.every("plan", hardness=lambda r: [12 + 0.3 * rng.normal(), 10, 8, 6], nominal_hard=None, realised_hard=None,
              hard_ratio=None)  # fmt: skip
    return run.knowing(hard_ratio=None)


def misaligned(rng: np.random.Generator) -> Run:
    run = hard_from_start(rng)
    return run.every("plan", hardness=lambda r: [5.2 + 0.2 * rng.normal() for _ in range(4)])


def false_negatives(rng: np.random.Generator) -> Run:
    return random_infonce(rng).every("plan", anchors_with_false_negative=lambda r: 0.3 + 0.02 * rng.normal(),
                                     false_negatives=0.006)  # fmt: skip


def false_negatives_in_steps(rng: np.random.Generator) -> Run:
    return random_infonce(rng).every("step", false_negative_share=lambda r: 0.02 + 0.004 * rng.normal())


def duplicates(rng: np.random.Generator) -> Run:
    return random_infonce(rng).every("step", duplicate_keys=lambda r: 0.2 + 0.03 * rng.normal()).knowing(
        mask_duplicates=False)  # fmt: skip


def stale_queue(rng: np.random.Generator) -> Run:
    return with_memory(rng).every("step", memory_age=256.0).knowing(memory=16384)


def at_clamp(rng: np.random.Generator) -> Run:
    run = clip(rng).every("step", scale=lambda r: min(100.0, 14.29 * math.exp(6 * progress(r))))
    return run.every(
        "step", at_clamp=lambda r: float(r["scale"] >= 100), largest_logit=lambda r: r["scale"] * 0.5
    )


def drifting(rng: np.random.Generator) -> Run:
    run = clip(rng).every("step", scale=lambda r: 14.29 * math.exp(1.4 * progress(r)) + 0.1 * rng.normal())
    return run.every("step", largest_logit=lambda r: r["scale"] * 0.9)


def falling_scale(rng: np.random.Generator) -> Run:
    return clip(rng).every(
        "step", scale=lambda r: 14.29 - 12 * progress(r) + 0.05 * rng.normal(), largest_logit=5.0
    )


def half_precision(rng: np.random.Generator) -> Run:
    return random_infonce(rng).every("step", scale=200.0, largest_logit=lambda r: 190 + 3 * rng.normal()).knowing(
        precision="16-mixed", temperature=0.005)  # fmt: skip


def not_finite(rng: np.random.Generator) -> Run:
    return random_infonce(rng).every("step", loss=lambda r: "NaN" if r["epoch"] > 6 else r["loss"],
                                     finite=lambda r: r["epoch"] <= 6)  # fmt: skip


def collapse(rng: np.random.Generator) -> Run:
    return random_infonce(rng).every("probe", queries__variance=lambda r: 0.01 + 0.003 * rng.random(),
                                     queries__mean_cosine=0.988, queries__uniformity=-0.05,
                                     queries__effective_rank=1.3)  # fmt: skip


def dimensional(rng: np.random.Generator) -> Run:
    return random_infonce(rng).every("probe", keys__effective_rank=lambda r: 4 + 0.3 * rng.normal())


def modality_gap(rng: np.random.Generator) -> Run:
    return random_infonce(rng).every("probe", modality_gap=1.1)


def hubs(rng: np.random.Generator) -> Run:
    return random_infonce(rng).every("probe", hubness=lambda r: 6 + rng.normal() * 0.2)


def overfitting(rng: np.random.Generator) -> Run:
    run = random_infonce(rng)
    run.every("probe", val_loss=lambda r: 1.2 + 2 * abs(progress(r) - 0.3) + 0.02 * rng.normal())
    return run.every(
        "epoch", val=lambda r: {"MRR": 0.5 - 0.25 * abs(progress(r) - 0.3) + 0.003 * rng.normal()}
    )


def composition(rng: np.random.Generator) -> Run:
    return hard_from_start(rng).every(
        "probe", train_loss_same_composition=lambda r: 0.4 + 0.02 * rng.normal()
    )


def trivial(rng: np.random.Generator) -> Run:
    run = random_infonce(rng)
    for split in run.context["metrics"].values():
        for name in split:
            split[name]["protocol"] = {**split[name]["protocol"], "gallery": 10}
        split["R@10"] |= {"trivial": True, "value": 1.0, "low": 1.0, "high": 1.0, "chance": 1.0}
    return run


def trivial_by_name(rng: np.random.Generator) -> Run:
    run = random_infonce(rng).knowing(gallery=8)
    del run.context["metrics"]
    return run


def gallery_mismatch(rng: np.random.Generator) -> Run:
    run = random_infonce(rng)
    for e in run.context["metrics"]["val"].values():
        e["protocol"] = {**e["protocol"], "gallery": 64}
    return run


def leak_by_ids(rng: np.random.Generator) -> Run:
    splits = {
        "train": {"ids": [f"m{i}" for i in range(100)]},
        "test": {"ids": [f"m{i}" for i in range(95, 140)]},
    }
    return random_infonce(rng).knowing(splits=splits)


def test_is_validation(rng: np.random.Generator) -> Run:
    run = random_infonce(rng)
    run.context["splits"]["test"] = {"rows": 2000, "hash": "v0"}
    return run


def leak_of_layout(rng: np.random.Generator) -> Run:
    return random_infonce(rng).knowing(leaks={"train/test": {"structure": {"shared": 12, "rows": 14}}})


def constant_wins(rng: np.random.Generator) -> Run:
    metrics = {"test": {"F1": {"value": 0.80, "low": 0.785, "high": 0.815}}}
    return focal_objective(rng).knowing(metrics=metrics, baselines={"F1": 0.803})


def no_better_than_chance(rng: np.random.Generator) -> Run:
    run = random_infonce(rng)
    run.context["metrics"]["test"]["MRR"] |= {"value": 0.005, "low": 0.003, "high": 0.008}
    return run


def common_mode(rng: np.random.Generator) -> Run:
    return adversarial(rng).knowing(change={"AP": {"men": 0.008, "women": 0.010}})


def in_noise(rng: np.random.Generator) -> Run:
    return random_infonce(rng).knowing(comparison={"MRR": {"value": 0.003, "low": -0.004, "high": 0.010}})


def in_noise_by_seeds(rng: np.random.Generator) -> Run:
    return random_infonce(rng).knowing(
        comparison={"MRR": {"values": [0.61, 0.58, 0.60], "baseline": [0.59, 0.60, 0.585]}})  # fmt: skip


def small_batchnorm(rng: np.random.Generator) -> Run:
    return adversarial(rng).knowing(batchnorm=2)


def gradient_summed(rng: np.random.Generator) -> Run:
    return several_processes(rng).knowing(gradient_ratio=4.0)


#: run, the rule that it must trigger, and what else must come with it
FAULTS: list[tuple[Callable[[np.random.Generator], Run], str, set[str]]] = [
    (not_finite, "non-finite-loss", set()),
    (head_left_out, "weights-unmoved", set()),
    (tower_detached, "weights-without-gradient", set()),
    (steps_skipped, "weights-stopped", set()),
    (schedule_ended, "learning-rate-gone", set()),
    (evaluated_while_training, "evaluated-in-training-mode", set()),
    (at_logarithm, "loss-at-logarithm", set()),
    (at_half, "loss-at-logarithm", set()),
    (one_candidate, "nothing-to-learn", set()),
    (no_gradient, "nothing-to-learn", set()),
    (same_batches, "loss-periodic", set()),
    (same_order, "loss-periodic", set()),
    (forgetting, "metric-falling", set()),
    (stale_evaluation, "metric-constant", set()),
    (standing_still, "embeddings-still", set()),
    (at_chance, "loss-at-chance", {"baseline-not-beaten"}),
    (at_chance_columns, "loss-at-chance", set()),
    (noisy_at_chance, "loss-at-chance", set()),
    (above_chance, "loss-above-chance", set()),
    (hard_above_chance, "loss-above-chance", {"composition-differs"}),
    (contrast_at_floor, "loss-at-floor", set()),
    (supcon_at_floor, "loss-at-floor", set()),
    (infonce_at_floor, "loss-at-floor", set()),
    (term_saturated, "term-saturated", set()),
    (overfitting, "overfitting", set()),
    (no_positives, "no-positives", set()),
    (few_positives, "few-positives", set()),
    (too_many_positives, "too-many-positives", set()),
    (target_inert, "target-inert", set()),
    (no_anchors, "no-anchors", set()),
    (anchors_ignore_group, "anchors-ignore-group", set()),
    (diverging, "curriculum-diverging", {"composition-differs"}),
    (curriculum, "curriculum-healthy", {"composition-differs"}),
    (misaligned, "hardness-not-above-random", set()),
    (depleted, "hardness-depleted", {"curriculum-healthy", "composition-differs"}),
    (depleted_by_hardness, "hardness-depleted", set()),
    (false_negatives, "false-negatives", set()),
    (false_negatives_in_steps, "false-negatives", set()),
    (duplicates, "duplicates", set()),
    (stale_queue, "queue-stale", {"composition-differs"}),
    (composition, "composition-differs", set()),
    (at_clamp, "temperature-at-clamp", set()),
    (drifting, "temperature-drift", set()),
    (falling_scale, "temperature-drift", set()),
    (half_precision, "numerical-risk", set()),
    (collapse, "collapse", set()),
    (dimensional, "dimensional-collapse", set()),
    (modality_gap, "modality-gap", set()),
    (hubs, "hubness", set()),
    (leak_by_ids, "split-leak", set()),
    (test_is_validation, "split-leak", set()),
    (leak_of_layout, "split-leak", set()),
    (trivial, "metric-trivial", set()),
    (trivial_by_name, "metric-trivial", set()),
    (gallery_mismatch, "gallery-mismatch", set()),
    (constant_wins, "baseline-not-beaten", set()),
    (no_better_than_chance, "baseline-not-beaten", set()),
    (common_mode, "common-mode-gain", set()),
    (in_noise, "gain-in-noise", set()),
    (in_noise_by_seeds, "gain-in-noise", set()),
    (low_and_flat, "metric-flat", set()),
    (turned_sign, "negative-loss", set()),
    (huge_logits, "loss-starts-high", set()),
    (never_zeroed, "gradient-grows", set()),
    (twice_softmax, "logits-flat", set()),
    (cut_off_view, "embeddings-still", set()),
    (few_logged_in_order, "loss-periodic", set()),
    (no_gain, "training-no-gain", set()),
    (worse_than_before, "training-no-gain", set()),
    (grown_batch, "batch-explains-gain", set()),
    (gradient_summed, "gradient-scale", set()),
    (small_batchnorm, "batchnorm-small-batch", set()),
]
