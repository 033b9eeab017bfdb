"""Logs of other trainers, written by the trainers themselves where they are installed."""

from __future__ import annotations

import json
import math
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from nearfar.cli import app
from nearfar.doctor import Signals, diagnose
from nearfar.doctor.logs import map_names, read_log
from nearfar.errors import NearfarError

STEPS = 40
#: a loss that stands at guessing among 4,096
STANDS = [8.317 + 0.002 * (-1) ** i for i in range(STEPS)]


def values(path: Path, name: str, names: dict[str, str] | None = None) -> tuple[float, ...]:
    return Signals.of(path, names=names).series(name).values


# -- names ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("loss", "loss"), ("train/loss", "loss"), ("train_loss_step", "loss"), ("Train/Loss", "loss"),
        ("training_loss", "loss"), ("train_loss_epoch", "train_loss"), ("eval_loss", "val_loss"),
        ("val/loss", "val_loss"), ("validation_loss", "val_loss"), ("clip_val_loss", "val_loss"),
        ("learning_rate", "lr"), ("train/learning_rate", "lr"), ("lr-AdamW", "lr"), ("lr-AdamW/pg1", "lr"),
        ("grad_norm", "gradient_norm"), ("train/grad_norm", "gradient_norm"), ("logit_scale", "scale"),
        ("train/logit_scale", "scale"), ("tau", "temperature"), ("global_step", "step"), ("_step", "step"),
        ("trainer/global_step", "step"), ("epoch", "epoch"), ("eval_dev_cosine_ndcg@10", "val/dev_cosine_ndcg@10"),
        ("val/R@1", "val/R@1"), ("cosine-MRR@10", "val/cosine-MRR@10"), ("eval/accuracy", "val/accuracy"),
        ("image_to_text_R@5", "val/image_to_text_R@5"),
        ("imagenet-zeroshot-val-top1", "val/imagenet-zeroshot-val-top1"),
    ],
)  # fmt: skip
def test_names_of_other_trainers(name: str, field: str) -> None:
    assert map_names([name]).used == {field: name}


def test_what_is_aside_and_what_is_not_understood() -> None:
    names = map_names(
        ["loss", "eval_runtime", "train_samples_per_second", "total_flos", "zeta", "eval_steps_per_second"]
    )
    assert names.used == {"loss": "loss"}
    assert names.unknown == ["zeta"]
    assert names.aside == ["eval_runtime", "train_samples_per_second", "total_flos", "eval_steps_per_second"]
    assert any(
        "not understood: zeta (say what one is with --map FIELD=NAME)" in line for line in names.lines()
    )
    given = map_names(["loss", "zeta"], {"loss": "zeta"})
    assert given.used == {"loss": "zeta"}
    assert given.spare == {"loss": "loss"}  # never passed over in silence
    assert "not read: loss (also loss); --map FIELD=NAME takes one instead" in given.lines()
    with pytest.raises(NearfarError, match=r"has no 'zet'; did you mean 'zeta'"):
        map_names(["zeta"], {"loss": "zet"})
    with pytest.raises(NearfarError, match=r"knows no field 'los'; did you mean 'loss'"):
        map_names(["zeta"], {"los": "zeta"})


# -- Hugging Face --------------------------------------------------------------------------------------------
def trainer_state(
    path: Path, losses: list[float], ndcg: list[float] | None = None, eval_loss: list[float] | None = None
) -> Path:
    history: list[dict[str, Any]] = []
    each = len(losses) // 4
    for i, loss in enumerate(losses):
        history.append(
            {
                "epoch": (i + 1) / each,
                "grad_norm": 1.0,
                "learning_rate": 1e-5,
                "loss": loss,
                "step": 10 * (i + 1),
            }
        )
        if ndcg is not None and eval_loss is not None and (i + 1) % each == 0:
            at = (i + 1) // each - 1
            history.append({"epoch": at + 1.0, "eval_loss": eval_loss[at], "eval_dev_cosine_ndcg@10": ndcg[at],
                            "eval_runtime": 3.1, "step": 10 * (i + 1)})  # fmt: skip
    history.append(
        {"epoch": 4.0, "step": 10 * len(losses), "total_flos": 0.0, "train_loss": 3.0, "train_runtime": 9.0}
    )
    path.mkdir(parents=True, exist_ok=True)
    state = {
        "log_history": history,
        "train_batch_size": 64,
        "num_train_epochs": 4,
        "best_metric": None,
        "epoch": 4.0,
    }
    (path / "trainer_state.json").write_text(json.dumps(state))
    return path


def test_trainer_state_of_a_folder_its_newest_checkpoint_and_a_file(tmp_path: Path) -> None:
    losses = [4.0 - 0.05 * i for i in range(STEPS)]
    trainer_state(tmp_path / "checkpoint-90", losses[:8])
    newest = trainer_state(tmp_path / "checkpoint-400", losses)
    for path in (tmp_path, newest, newest / "trainer_state.json"):
        signals = Signals.of(path)
        assert signals.series("loss").values == tuple(losses)
        assert signals.series("loss").last_epoch() == 4
        assert signals.number("batch_size") == 64
        assert "Hugging Face trainer_state.json" in signals.read_as[0]
    assert not Signals.of(tmp_path).series("train_loss")  # the summary of the run is no loss of an epoch


@pytest.mark.slow
def test_a_real_trainer_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 3)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.layer(x)
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    data = [{"x": torch.randn(4), "labels": torch.tensor(i % 3)} for i in range(48)]
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=8, num_train_epochs=2, logging_steps=1, eval_strategy="epoch",
        save_strategy="epoch", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    Trainer(Model(), arguments, train_dataset=data, eval_dataset=data).train()  # type: ignore[arg-type]
    signals = Signals.of(tmp_path)
    assert len(signals.series("loss")) == 12
    assert len(signals.series("val_loss")) >= 1
    assert len(signals.series("gradient_norm")) == 12
    assert signals.number("batch_size") == 8


# -- Lightning, TensorBoard ----------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_csv_logger_of_lightning_and_tensorboard(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger
    from torch.utils.tensorboard import SummaryWriter

    logger = CSVLogger(str(tmp_path / "csv"), name="own")
    logger.log_hyperparams({"batch_size": 32, "temperature": 0.05, "other": "x"})
    writer = SummaryWriter(str(tmp_path / "tb" / "run"))
    for step, loss in enumerate(STANDS):
        logger.log_metrics({"train_loss_step": loss, "epoch": step // 10}, step=step)
        writer.add_scalar("train/loss", loss, step)
        if step % 10 == 9:
            logger.log_metrics({"val_loss": 8.3, "val/R@1": 0.1, "epoch": step // 10}, step=step)
            writer.add_scalar("val/R@1", 0.1, step)
    logger.save()
    writer.close()
    of_csv = Signals.of(tmp_path / "csv" / "own")
    assert of_csv.series("loss").values == pytest.approx(STANDS)
    assert of_csv.number("batch_size") == 32
    assert of_csv.number("temperature") == 0.05
    assert len(of_csv.series("val/R@1")) == 4
    assert of_csv.series("loss").last_epoch() == 4
    for path in (tmp_path / "tb", tmp_path / "tb" / "run", next((tmp_path / "tb" / "run").iterdir())):
        of_events = Signals.of(path)
        assert of_events.series("loss").values == pytest.approx(STANDS, abs=1e-5)
        assert of_events.series("val/R@1").values == pytest.approx([0.1] * 4, abs=1e-6)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "events.out.tfevents.1.x").write_bytes(b"rubbish" * 10)
    with pytest.raises(NearfarError, match=r"no record|cannot be read"):
        Signals.of(tmp_path / "damaged")


# -- sentence-transformers -----------------------------------------------------------------------------------
def test_an_evaluation_of_sentence_transformers(tmp_path: Path) -> None:
    folder = tmp_path / "eval"
    folder.mkdir()
    rows = ["epoch,steps,cosine-Accuracy@1,cosine-MRR@10,cosine-NDCG@10"]
    rows += [f"{epoch},-1,{0.5 - 0.05 * epoch:.3f},0.6,{0.41 - 0.02 * epoch:.3f}" for epoch in range(1, 7)]
    (folder / "Information-Retrieval_evaluation_dev_results.csv").write_text("\n".join(rows) + "\n")
    signals = Signals.of(tmp_path)
    assert signals.series("val/cosine-NDCG@10").values[-1] == pytest.approx(0.29)
    assert signals.last_epoch == 6


# -- trackers ------------------------------------------------------------------------------------------------
def test_a_run_of_mlflow(tmp_path: Path) -> None:
    run = tmp_path / "mlruns" / "0" / "abc"
    (run / "metrics" / "val").mkdir(parents=True)
    (run / "params").mkdir()
    (run / "meta.yaml").write_text("run_name: brave-fox\nrun_id: abc\n")
    (run / "metrics" / "train_loss").write_text(
        "".join(f"17000{i} {loss} {i}\n" for i, loss in enumerate(STANDS))
    )
    (run / "metrics" / "val" / "MRR").write_text("170001 0.3 10\n170002 0.4 20\nbroken\n")
    (run / "params" / "batch_size").write_text("256")
    for path in (tmp_path, tmp_path / "mlruns", run):
        signals = Signals.of(path)
        assert signals.series("loss").values == pytest.approx(STANDS)
        assert signals.series("val/MRR").values == (0.3, 0.4)
        assert signals.number("batch_size") == 256
        assert signals.unread == 1
    assert "run 'brave-fox'" in Signals.of(run).read_as


def test_a_database_of_trackio(tmp_path: Path) -> None:
    path = tmp_path / "project.db"
    connection = sqlite3.connect(path)
    connection.execute(
        "CREATE TABLE metrics (id INTEGER PRIMARY KEY, timestamp TEXT, run_name TEXT, step INTEGER, metrics TEXT)"
    )
    rows = [
        ("old", 0, {"loss": 1.0}),
        *(("new", i, {"train/loss": loss, "note": "x"}) for i, loss in enumerate(STANDS)),
    ]
    connection.executemany(
        "INSERT INTO metrics (timestamp, run_name, step, metrics) VALUES ('', ?, ?, ?)",
        [(run, step, json.dumps(record)) for run, step, record in rows],
    )
    connection.commit()
    connection.close()
    for place in (path, tmp_path):
        signals = Signals.of(place)
        assert signals.series("loss").values == pytest.approx(STANDS)
        assert any("2 runs; read is the newest, 'new'" in line for line in signals.read_as)
    path.write_bytes(b"no database" * 100)
    with pytest.raises(NearfarError, match="no log that is known"):
        read_log(path)


@pytest.mark.slow
def test_an_offline_run_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = wandb.init(dir=str(tmp_path), project="x", config={"batch_size": 128, "temperature": 0.1})
    for step, loss in enumerate(STANDS):
        run.log({"train/loss": loss, "val/MRR": 0.5}, step=step)
    run.finish()
    signals = Signals.of(tmp_path)
    assert signals.series("loss").values == pytest.approx(STANDS)
    assert signals.number("batch_size") == 128


def test_a_table_that_wandb_exported(tmp_path: Path) -> None:
    path = tmp_path / "chart.csv"
    head = '"Step","fox - train/loss","fox - train/loss__MIN","fox - train/loss__MAX","owl - train/loss"'
    path.write_text(
        head + "\n" + "\n".join(f'"{i}","{loss}","{loss}","{loss}","1.0"' for i, loss in enumerate(STANDS))
    )
    signals = Signals.of(path)
    assert signals.series("loss").values == pytest.approx(STANDS)
    assert any("2 runs; read is 'fox'" in line for line in signals.read_as)


# -- open_clip, ms-swift, printed ----------------------------------------------------------------------------
def test_the_log_of_open_clip(tmp_path: Path) -> None:
    (tmp_path / "params.txt").write_text("batch_size: 256\nlr: 0.0005\nsiglip: False\nworld_size: 16\n")
    lines = ["2026-01-01,10:00:00 | INFO | Running with a single process."]
    for i, loss in enumerate(STANDS):
        lines.append(
            f"2026-01-01,10:00:{i:02d} | INFO | Train Epoch: {i // 20} "
            f"[{4096 * (i % 20 + 1):>7}/81920 ({5 * (i % 20 + 1)}%)] "
            f"Data (t): 0.100 Batch (t): 0.400, 1000.0/s, 1000.0/s/gpu LR: 0.000005 Logit Scale: 14.286 "
            f"Contrastive_loss: {loss:.5g} (8.31) Loss: {loss:.5g} (8.31)"
        )
        if i % 20 == 19:
            lines.append(
                f"2026-01-01,10:01:00 | INFO | Eval Epoch: {i // 20 + 1} image_to_text_mean_rank: 20.1\t"
                "image_to_text_R@1: 0.0100\tclip_val_loss: 4.6052\tepoch: 1.0000\tnum_samples: 1000.0000"
            )
    (tmp_path / "out.log").write_text("\n".join(lines) + "\n")
    signals = Signals.of(tmp_path)
    assert signals.series("loss").values == pytest.approx(STANDS, abs=1e-3)
    assert signals.series("scale").values[0] == 14.286
    assert signals.series("val_loss").values == (4.6052, 4.6052)
    assert signals.series("val/image_to_text_R@1").values == (0.01, 0.01)
    assert (signals.number("gallery"), signals.number("batch_size"), signals.text("loss_kind")) == (
        1000,
        256,
        "softmax",
    )
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "out.log").unlink()
    (tmp_path / "checkpoints" / "results.jsonl").write_text(
        "".join(
            json.dumps({"image_to_text_R@1": 0.1 * e, "clip_val_loss": 4.0, "epoch": e, "num_samples": 500})
            + "\n"
            for e in (1, 2, 3)
        )
    )
    signals = Signals.of(tmp_path)
    assert signals.series("val/image_to_text_R@1").values == pytest.approx((0.1, 0.2, 0.3))
    assert signals.number("gallery") == 500


def test_lines_of_ms_swift(tmp_path: Path) -> None:
    lines = [
        {"loss": loss, "grad_norm": 0.5, "learning_rate": 1e-6, "memory(GiB)": 30.1, "train_speed(iter/s)": 0.1,
         "epoch": (i + 1) / 20, "global_step/max_steps": f"{i + 1}/{STEPS}", "percentage": "2%", "elapsed_time": "3s",
         "remaining_time": "9s"}
        for i, loss in enumerate(STANDS)
    ]  # fmt: skip
    (tmp_path / "logging.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    signals = Signals.of(tmp_path)
    assert signals.series("loss").values == pytest.approx(STANDS)
    assert signals.series("loss").points[-1].step == STEPS
    assert signals.last_epoch == 2
    assert not any("not understood" in line for line in signals.read_as)


@pytest.mark.parametrize(
    "line",
    [
        "{{'loss': {loss}, 'learning_rate': 1e-05, 'epoch': {epoch}}}",
        "{{'loss': '{loss}', 'grad_norm': '0.1', 'epoch': '{epoch}'}}",
        "  5%|#    | 3/60 [00:01<00:20]\r[step {step}] loss: {loss} lr: 1.0e-05",
        "2026-01-01 10:00:00 INFO epoch 1 step {step}/400 loss={loss} grad_norm=0.5",
        "Epoch: 1, Iter: {step}, Loss: {loss}, Time: 0.3s",
    ],
)
def test_printed_lines(line: str, tmp_path: Path) -> None:
    path = tmp_path / "train.log"
    text = [line.format(loss=loss, step=i, epoch=0.1 * (i + 1)) for i, loss in enumerate(STANDS)]
    path.write_text("\n".join(["Loading weights …", *text, "Done."]) + "\n")
    assert values(path, "loss") == pytest.approx(STANDS)


# -- the command ---------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_command_shows_what_was_taken_for_what(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("it,contrast,zeta\n" + "\n".join(f"{i},{loss},1" for i, loss in enumerate(STANDS)) + "\n")
    refused = CliRunner().invoke(app, ["doctor", str(path)])
    assert isinstance(refused.exception, NearfarError)
    assert "--map loss=NAME" in str(refused.exception)
    done = CliRunner().invoke(app, ["doctor", str(path), "--map", "loss=contrast", "--map", "step=it"])
    assert done.exit_code == 0, done.output
    assert "read as: step ← it, loss ← contrast" in done.output
    assert "not understood: zeta" in done.output
    assert "nearfar train" not in done.output
    assert not (tmp_path / "doctor.json").exists()
    assert "--what-if" not in done.output


def test_nothing_to_read_says_what_is_read(tmp_path: Path) -> None:
    with pytest.raises(
        NearfarError, match=r"no log that is known. It is empty. What is read: runs of nearfar, Hugging"
    ):
        diagnose(tmp_path)
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(NearfarError, match=r"It holds notes.md"):
        diagnose(tmp_path)
    (tmp_path / "trainer_state.json").write_text('{"log_history": []}')
    with pytest.raises(NearfarError, match="holds no record yet"):
        diagnose(tmp_path)
    (tmp_path / "trainer_state.json").write_text('{"log_history": 3}')
    with pytest.raises(NearfarError, match="log_history"):
        diagnose(tmp_path)


def test_the_signals_of_guessing(tmp_path: Path) -> None:
    assert math.exp(STANDS[0]) == pytest.approx(4096, rel=0.01)
    run = trainer_state(tmp_path, STANDS, ndcg=[0.41, 0.38, 0.34, 0.31], eval_loss=[1.0, 1.1, 1.2, 1.4])
    assert Signals.of(run).series("val/dev_cosine_ndcg@10").values == (0.41, 0.38, 0.34, 0.31)


def lines(path: Path, **series: list[float]) -> Path:
    """JSON lines of numbers, a step each."""
    rows = [dict(zip(series, values, strict=True)) for values in zip(*series.values(), strict=True)]
    path.write_text("".join(json.dumps({"step": 10 * i + 10} | row) + "\n" for i, row in enumerate(rows)))
    return path


@pytest.mark.parametrize(
    ("series", "rule", "words"),
    [
        ({"loss": [8.317765] * 30}, "loss-at-logarithm", "ln 4,096"),
        ({"loss": [11.09, 11.0904, 11.09] * 10}, "loss-at-logarithm", "ln 65,536"),
        ({"loss": [0.69, 0.6931, 0.692] * 10}, "loss-at-logarithm", "ln 2"),
        ({"loss": [0.0] * 30, "grad_norm": [0.0] * 30}, "nothing-to-learn", "gradient norm is 0"),
        ({"loss": [0.0] * 30, "candidates": [1.0] * 30}, "nothing-to-learn", "1 candidate"),
        ({"loss": [3.0 - 0.05 * i for i in range(30)], "mean_cosine": [0.996] * 30}, "collapse", "0.996"),
        (
            {"loss": [-0.5 - 0.015 * i for i in range(30)], "z_std": [0.04 * 0.8**i for i in range(30)]},
            "collapse",
            "Standard deviation of embeddings is 0.0001",
        ),
    ],
)
def test_numbers_of_public_threads_are_named(
    tmp_path: Path, series: dict[str, list[float]], rule: str, words: str
) -> None:
    diagnosis = diagnose(lines(tmp_path / "log.jsonl", **series))
    assert rule in diagnosis.ids, diagnosis.verdict
    assert words in next(finding for finding in diagnosis if finding.id == rule).evidence["text"]


def test_a_metric_that_training_makes_worse_is_named(tmp_path: Path) -> None:
    """nDCG .41 → .31 while eval_loss rises and the training loss falls."""
    falling = [1.2 - 0.03 * i + 0.01 * (-1) ** i for i in range(STEPS)]
    run = trainer_state(tmp_path, falling, ndcg=[0.41, 0.38, 0.34, 0.31], eval_loss=[1.0, 1.1, 1.2, 1.4])
    diagnosis = diagnose(run)
    assert "metric-falling" in diagnosis.ids, diagnosis.verdict
    assert "0.410 at the first evaluation" in diagnosis.of("warning")[0].evidence["text"]


def test_the_same_names_without_the_fault_stay_silent(tmp_path: Path) -> None:
    falling = [2.5 - 0.05 * i + 0.01 * (-1) ** i for i in range(STEPS)]
    run = trainer_state(tmp_path, falling, ndcg=[0.31, 0.34, 0.38, 0.41], eval_loss=[1.4, 1.2, 1.1, 1.0])
    assert diagnose(run).healthy
    healthy = lines(
        tmp_path / "log.jsonl",
        loss=[8.4 * math.exp(-0.1 * i) + 0.02 * (-1) ** i for i in range(30)],
        grad_norm=[2.0 - 0.03 * i for i in range(30)],
        mean_cosine=[0.3] * 30,
        feature_std=[0.008] * 30,  # 16,384 dimensions, as those of a bag of words
    )
    assert diagnose(healthy).healthy
