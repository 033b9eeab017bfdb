"""Logs as they lie about in people's folders: printed without colons, cut off, compressed, of German spreadsheets."""

from __future__ import annotations

import csv
import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from nearfar.cli import app
from nearfar.doctor import Signals, diagnose
from nearfar.doctor.logs import map_names, read_log
from nearfar.errors import NearfarError

RNG = np.random.default_rng(20)
STEPS = 48
#: a loss that guesses among 96, one that learns, and the scores beside them
GUESSES = [round(math.log(96) + 0.01 * float(z), 4) for z in RNG.standard_normal(STEPS)]
LEARNS = [
    round(0.7 + 4 * math.exp(-i / 9) + 0.03 * float(z), 4) for i, z in enumerate(RNG.standard_normal(STEPS))
]
LOW = [round(0.01 + 0.002 * float(z), 4) for z in RNG.standard_normal(STEPS)]
RISES = [round(0.02 + 0.6 * (1 - math.exp(-i / 12)), 4) for i in range(STEPS)]


def columns(path: Path, separator: str = ",", decimal: str = ".", **series: list[float]) -> Path:
    lines = [separator.join(series)]
    for row in zip(*series.values(), strict=True):
        lines.append(separator.join(str(value).replace(".", decimal) for value in row))
    path.write_text("\n".join(lines) + "\n")
    return path


# -- names ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("Loss/train", "loss"), ("Loss/val", "val_loss"), ("loss_train", "loss"), ("Accuracy/test", "val/Accuracy"),
        ("TrainLoss", "loss"), ("ValRecall@1", "val/Recall@1"), ("val_loss_epoch", "val_loss"),
        ("accuracy_cosine", "val/accuracy_cosine"), ("cosine_mcc", "val/cosine_mcc"), ("avg loss", "loss"),
    ],
)  # fmt: skip
def test_names_with_their_split_elsewhere(name: str, field: str) -> None:
    assert map_names([name]).used == {field: name}


def test_training_scores_and_thresholds_are_no_scores_of_validation() -> None:
    names = map_names(["Accuracy/train", "cosine_f1_threshold", "Contrastive_loss", "Loss"])
    assert names.used == {"loss": "Loss"}
    assert names.unknown == ["Accuracy/train"]
    assert names.aside == ["cosine_f1_threshold"]
    assert names.spare == {"Contrastive_loss": "loss"}  # understood, and still not passed over


# -- printed -------------------------------------------------------------------------------------------------
PRINTED = {
    "bars": "step {step} | loss {loss:.3f} | acc {score:.3f}",
    "meter": "Epoch: [{epoch}][ {at}/12]\tTime  0.34 ( 0.5)\tLoss {loss:.4e} ({loss:.4e})\tAcc@1   {score:.3f} (0.1)",
    "SupContrast": "Train: [{epoch}][{at}0/120]\tBT 0.312 (0.402)\tDT 0.001 (0.021)\tloss {loss:.3f} ({loss:.3f})",
    "two losses": "epoch {epoch}: train loss: {loss:.4f}, val loss: 9.5, val R@1: {score:.3f}",
    "percent": "Epoch [{epoch}/4], Step [{step}/480], Loss: {loss:.4f}, Acc: {score:.2%}",
}


@pytest.mark.parametrize("line", PRINTED.values(), ids=PRINTED)
def test_printed_lines_with_and_without_the_fault(line: str, tmp_path: Path) -> None:
    def write(name: str, losses: list[float], scores: list[float]) -> Path:
        rows = zip(losses, scores, strict=True)
        text = [
            line.format(step=10 * i, at=i % 12, epoch=i // 12 + 1, loss=loss, score=score)
            for i, (loss, score) in enumerate(rows)
        ]
        path = tmp_path / name
        path.write_text(
            "\n".join(["Loaded 3 files", "Namespace(batch_size=96, lr=0.001)", *text, "Saved 7"]) + "\n"
        )
        return path

    faulty = write("bad.txt", GUESSES, LOW)
    assert Signals.of(faulty).series("loss").values == pytest.approx(GUESSES, abs=1e-3)
    diagnosis = diagnose(faulty)
    assert "loss-at-chance" in diagnosis.ids, diagnosis.read_as
    assert "known of the run: batch_size 96, lr 0.001" in diagnosis.read_as
    assert not any("files" in text or "Saved" in text for text in diagnosis.read_as)
    assert diagnose(write("good.txt", LEARNS, RISES)).healthy


# -- tables --------------------------------------------------------------------------------------------------
def test_decimal_commas_marks_and_utf_16(tmp_path: Path) -> None:
    german = columns(tmp_path / "log.csv", ";", ",", step=list(range(STEPS)), loss=GUESSES)
    assert Signals.of(german).series("loss").values == pytest.approx(GUESSES)
    assert "decimal commas were read as decimal points" in Signals.of(german).read_as
    assert diagnose(columns(tmp_path / "good.csv", ";", ",", loss=LEARNS, **{"val_R@1": RISES})).healthy
    windows = tmp_path / "windows.log"
    windows.write_text("".join(f"step {i} loss: {x}\n" for i, x in enumerate(GUESSES)), encoding="utf-16")
    assert Signals.of(windows).series("loss").values == pytest.approx(GUESSES)
    blanks = columns(tmp_path / "blanks.txt", " ", step=list(range(STEPS)), loss=GUESSES)
    assert Signals.of(blanks).series("loss").values == pytest.approx(GUESSES)


@pytest.mark.parametrize("name", ["log.csv", "train.log", "log.jsonl"])
def test_compressed_files(name: str, tmp_path: Path) -> None:
    text = {
        "log.csv": "loss\n" + "\n".join(map(str, GUESSES)),
        "train.log": "\n".join(f"it {i}, loss = {x}" for i, x in enumerate(GUESSES)),
        "log.jsonl": "\n".join(json.dumps({"loss": x}) for x in GUESSES),
    }[name]
    path = tmp_path / f"{name}.gz"
    path.write_bytes(gzip.compress(text.encode()))
    assert Signals.of(path).series("loss").values == pytest.approx(GUESSES)
    path.write_bytes(b"no gzip at all")
    with pytest.raises(NearfarError, match="cannot be read"):
        Signals.of(path)


def test_a_last_line_that_was_cut_off_is_no_loss_of_nothing(tmp_path: Path) -> None:
    path = columns(tmp_path / "log.csv", step=list(range(STEPS)), loss=LEARNS, val_acc=RISES)
    path.write_text(path.read_text() + "48,0.")
    assert Signals.of(path).series("loss").values[-1] == LEARNS[-1]
    assert "1 unreadable line of the log left out" in diagnose(path).verdict


def test_numbers_without_names_are_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "loss.csv"
    path.write_text("\n".join(map(str, GUESSES)))
    with pytest.raises(
        NearfarError, match=r"line 1 holds numbers .* put a line such as 'step,loss' before it"
    ):
        diagnose(path)
    path.write_text("step,loss\n" + "\n".join(f"{i},{x}" for i, x in enumerate(GUESSES)))
    assert not diagnose(path).of("error")


def test_json_lists_and_histories(tmp_path: Path) -> None:
    rows, history = tmp_path / "rows.json", tmp_path / "history.json"
    rows.write_text(json.dumps([{"step": i, "loss": x} for i, x in enumerate(GUESSES)]))
    history.write_text(json.dumps({"loss": GUESSES, "val_acc": LOW}))
    for path in (rows, history):
        assert Signals.of(path).series("loss").values == pytest.approx(GUESSES)
    copy = tmp_path / "state_copy.json"
    copy.write_text(json.dumps({"log_history": [{"loss": x, "step": i} for i, x in enumerate(GUESSES)]}))
    assert "trainer_state" in Signals.of(copy).read_as[0]


def test_names_of_exported_runs_may_have_dashes(tmp_path: Path) -> None:
    path = tmp_path / "chart.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file, quoting=csv.QUOTE_ALL)
        table.writerow(
            ["Step", "e5 - lr 1e-5 - train/loss", "e5 - lr 1e-5 - train/loss__MIN", "a - train/loss"]
        )
        table.writerows([i, x, x, ""] for i, x in enumerate(GUESSES))
    signals = Signals.of(path)
    assert signals.series("loss").values == pytest.approx(GUESSES)
    assert any("read is 'e5 - lr 1e-5', and not 'a'" in line for line in signals.read_as)


# -- evaluations ---------------------------------------------------------------------------------------------
def test_all_evaluators_of_a_folder_are_read(tmp_path: Path) -> None:
    for name, scores in (("Information-Retrieval_evaluation_dev", RISES), ("triplet_evaluation_dev", RISES)):
        column = "cosine-NDCG@10" if name[0] == "I" else "accuracy_cosine"
        lines = [f"{i / 4},{100 * i},{x}" for i, x in enumerate(scores[:8])]
        (tmp_path / f"{name}_results.csv").write_text("\n".join([f"epoch,steps,{column}", *lines]) + "\n")
    log = read_log(tmp_path)
    assert len(log.records) == 8
    diagnosis = diagnose(tmp_path)
    assert any(
        "metric that matters: Information-Retrieval_evaluation_dev/cosine-NDCG@10" in x
        for x in diagnosis.read_as
    )
    names = {"monitor": "triplet_evaluation_dev/accuracy_cosine"}
    assert any(
        "metric that matters: triplet_evaluation_dev/accuracy_cosine" in x
        for x in diagnose(tmp_path, names=names).read_as
    )
    with pytest.raises(NearfarError, match="--map monitor=zeta: no metric of the log"):
        diagnose(tmp_path, names={"monitor": "zeta"})


@pytest.mark.parametrize(
    ("name", "chance", "risen"),
    [("triplet_evaluation_dev/accuracy_cosine", 0.5, 0.9), ("sts_spearman_cosine", 0.0, 0.7), ("auc", 0.5, 0.8),
     ("R@1", 1.4, 40.0)],
)  # fmt: skip
def test_a_metric_at_the_chance_that_its_name_has(name: str, chance: float, risen: float) -> None:
    noise = [0.01, -0.012, 0.004, -0.006, 0.011, -0.008, 0.005]
    flat = diagnose({f"val/{name}": [chance + z for z in noise], "epoch": list(range(7))})
    assert "metric-flat" in flat.ids
    way = [chance + (risen - chance) * i / 6 for i in range(7)]
    assert diagnose({f"val/{name}": way, "epoch": list(range(7))}).healthy


# -- losses that stand still ---------------------------------------------------------------------------------
def stands(number: float, seed: int = 0) -> list[float]:
    noise = np.random.default_rng(seed).standard_normal(STEPS)
    return [math.log(number) + 0.004 * float(z) for z in noise]


@pytest.mark.parametrize(("number", "batch"), [(4096, 64), (65_537, 256), (2, 64)])
def test_the_batch_of_a_process_is_not_always_what_is_guessed_among(number: int, batch: int) -> None:
    """Gathered rows, a queue, a question about each pair: the batch alone would mislead."""
    diagnosis = diagnose({"loss": stands(number)}, {"batch_size": batch})
    assert diagnosis.ids == ["loss-at-logarithm"], diagnosis.ids


def test_a_loss_at_no_usual_logarithm() -> None:
    alone = diagnose({"loss": stands(300)})
    assert [(f.id, f.severity) for f in alone] == [("loss-at-logarithm", "note")]
    assert "300 candidates" in alone[0].evidence["text"]
    with_scores = diagnose({"loss": stands(300), "val/MRR": LOW})
    assert "loss-at-logarithm" in [f.id for f in with_scores.of("warning")]
    assert not diagnose({"loss": stands(300), "val/MRR": RISES}).ids
    assert diagnose({"loss": stands(3.3)}).healthy  # where a run that goes on may stand


def test_a_loss_near_guessing_while_the_metric_rises_has_no_room() -> None:
    loss = [math.log(64) - 0.07 * (1 - math.exp(-i / 6)) for i in range(STEPS)]
    diagnosis = diagnose({"loss": loss, "val/R@1": RISES}, {"batch_size": 64, "lr": 1e-3})
    assert diagnosis.ids == ["logits-flat"]
    assert diagnosis[0].severity == "warning"
    assert diagnose({"loss": loss, "val/R@1": LOW}, {"batch_size": 64}).ids[0] == "loss-at-chance"


@pytest.mark.parametrize("schedule", ["cosine", "linear", "steps"])
def test_the_learning_rate_of_a_schedule_that_ended(schedule: str) -> None:
    rates = {
        "cosine": [0.5 * (1 + math.cos(math.pi * i / (STEPS - 1))) for i in range(STEPS)],
        "linear": [min(i / 5, (STEPS - i) / (STEPS - 5)) for i in range(STEPS)],
        "steps": [0.1 ** (i // 12) for i in range(STEPS)],
    }[schedule]
    assert "learning-rate-gone" not in diagnose({"loss": LEARNS, "lr": rates}).ids
    gone = diagnose(
        {"loss": stands(80), "lr": [0.5**i for i in range(STEPS)]}, {"batch_size": 64, "lr": 1e-3}
    )
    assert gone[0].id == "learning-rate-gone"
    assert not any("lr=" in finding.override for finding in gone)  # a lower one would not help


def test_same_batches_are_seen_behind_a_steep_first_epoch() -> None:
    own = np.random.default_rng(3).standard_normal(6)
    loss = [2.5 * math.exp(-i / 3) + 0.5 + 0.05 * own[i % 6] for i in range(48)]
    assert "loss-periodic" in diagnose({"loss": loss, "epoch": [i // 6 + 1 for i in range(48)]}).ids


def test_a_smoothed_loss_does_not_repeat() -> None:
    smooth = [0.7 + 4 * math.exp(-i / 20) for i in range(96)]
    assert not diagnose({"loss": smooth}).ids
    assert not diagnose({"loss": smooth, "epoch": [i // 12 + 1 for i in range(96)]}).ids


# -- the command ---------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_command_says_what_would_be_worth_logging(tmp_path: Path) -> None:
    path = columns(tmp_path / "log.csv", loss=GUESSES)
    shown = CliRunner().invoke(app, ["doctor", str(path)]).output
    assert "worth logging  candidates (loss-at-chance" in shown
    assert "lr (learning-rate-gone)" in shown
    with_batch = columns(tmp_path / "more.csv", loss=GUESSES, batch_size=[96.0] * STEPS)
    assert "loss-at-chance" in diagnose(with_batch).ids  # the advice works
