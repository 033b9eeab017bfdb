"""Plain loops that are watched: what their run folder says, and that watching changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from nearfar.cli import app
from nearfar.doctor import Diagnosis
from nearfar.errors import NearfarError
from nearfar.integrations.pytorch import Monitor, Scores, retrieval_scores
from nearfar.lab.compare import compare_runs
from nearfar.losses import InfoNCELoss

ROWS, BATCH = 256, 32


class Encoder(nn.Module):
    def __init__(self, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 32), norm(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 8))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(ROWS, 8, generator=generator)
    return keys @ torch.randn(8, 12, generator=generator), keys


def train(
    folder: Path | None,
    *,
    seed: int = 0,
    lr: float = 0.01,
    detach: bool = False,
    wrong: bool = False,
    batch: int = BATCH,
    epochs: int = 6,
    norm: type[nn.Module] = nn.LayerNorm,
) -> tuple[Encoder, Diagnosis | None]:
    torch.manual_seed(seed)
    model, (x, y) = Encoder(norm), data()
    held, held_keys = x[-64:], y[-64:]
    loss_of, optimizer = InfoNCELoss(0.1), torch.optim.Adam(model.parameters(), lr)

    def scores() -> Scores:
        return retrieval_scores(model(held), held_keys, bootstrap=100)

    watch = None
    if folder is not None:
        config = {"batch_size": batch, "lr": lr, "temperature": 0.1}
        watch = Monitor(model, held, folder, evaluate=scores, config=config, seed=seed,
                        monitor="MRR", log_every=1)  # fmt: skip
    for _ in range(epochs):
        order = torch.randperm(ROWS - 64)
        for at in order.split(batch):
            if len(at) < 2 and batch > 1:
                continue
            rows = model(x[at]) if len(at) > 1 else model.eval()(x[at])
            if detach:
                rows = rows.detach().requires_grad_(True)
            keys = y[at[torch.randperm(len(at))]] if wrong else y[at]
            loss = loss_of(rows, keys)
            optimizer.zero_grad()
            loss.backward()
            if watch is not None:
                watch.step(loss, record=loss_of.record, lr=lr)
            optimizer.step()
        if watch is not None:
            watch.epoch()
    return model, None if watch is None else watch.finish()


@pytest.mark.slow
def test_a_healthy_loop_is_healthy_and_says_what_training_changed(tmp_path: Path) -> None:
    _, diagnosis = train(tmp_path / "run")
    assert diagnosis is not None
    assert diagnosis.healthy, diagnosis.verdict
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    gain = metrics["gain"]["val"]["MRR"]
    assert gain["verdict"] == "better"
    assert gain["low"] > 0
    start = metrics["before_training"]["val"]["MRR"]
    assert diagnosis.gain is not None
    assert diagnosis.gain.startswith(f"MRR on val was {start['value']:.3f} before training")
    assert diagnosis.lines[1] == f"  {diagnosis.gain}"
    assert start["value"] + gain["value"] == pytest.approx(metrics["splits"]["val"]["MRR"]["value"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "finding"),
    [
        ({"detach": True}, "embeddings-still"),
        ({"detach": True}, "nothing-to-learn"),
        ({"wrong": True, "lr": 0.003, "epochs": 12}, "loss-above-chance"),
        ({"batch": 1, "epochs": 2}, "nothing-to-learn"),
        ({"lr": 0.0}, "embeddings-still"),
    ],
)
def test_faults_are_named(fault: dict[str, object], finding: str, tmp_path: Path) -> None:
    _, diagnosis = train(tmp_path / "run", **fault)  # type: ignore[arg-type]
    assert diagnosis is not None
    assert finding in diagnosis.ids, diagnosis.verdict
    assert not diagnosis.healthy


@pytest.mark.slow
def test_watching_changes_nothing(tmp_path: Path) -> None:
    plain, _ = train(None, norm=nn.BatchNorm1d)
    watched, _ = train(tmp_path / "run", norm=nn.BatchNorm1d)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name


@pytest.mark.slow
def test_runs_are_compared_and_reported(tmp_path: Path) -> None:
    for lr in (0.01, 0.0):
        for seed in (0, 1):
            train(tmp_path / f"lr{lr}-{seed}", seed=seed, lr=lr, epochs=3)
    comparison = compare_runs([tmp_path], baseline="lr=0.0")
    shown = CliRunner().invoke(app, ["compare", str(tmp_path), "--baseline", "lr=0.0"])
    assert shown.exit_code == 0, (shown.output, shown.exception)
    assert "better" in shown.output
    assert len(comparison.arms) == 2
    report = CliRunner().invoke(app, ["report", str(tmp_path / "lr0.01-0")])
    assert report.exit_code == 0, (report.output, report.exception)
    doctor = CliRunner().invoke(app, ["doctor", str(tmp_path / "lr0.0-0")])
    assert "embeddings-still" in doctor.output


@pytest.mark.slow
def test_scores_may_be_plain_numbers_and_handed_over(tmp_path: Path) -> None:
    model, (x, y) = nn.Linear(12, 8), data()
    watch = Monitor(model, lambda m: {"a": m(x[:16]), "b": y[:16]}, tmp_path / "run", log_every=2)
    for _ in range(6):
        watch.step(1.5, gradient_norm=0.5, candidates=32)
    assert watch.epoch({"nDCG@10": 0.3}) == {"nDCG@10": 0.3}
    watch.finish({"nDCG@10": 0.31})
    records = [json.loads(line) for line in (tmp_path / "run" / "train_log.jsonl").read_text().splitlines()]
    assert [r["kind"] for r in records] == ["probe", "step", "step", "step", "step", "probe", "epoch"]
    assert records[1]["candidates"] == 32
    assert {"a/variance", "b/variance", "alignment"} <= records[0].keys()
    assert records[-2]["b/moved"] == pytest.approx(0.0, abs=1e-7)
    assert (
        json.loads((tmp_path / "run" / "metrics.json").read_text())["splits"]["val"]["nDCG@10"]["value"]
        == 0.31
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda path: Monitor(nn.Linear(2, 2), folder=path, config={"loss": nn.Linear(1, 1)}),
            "loss is no plain value",
        ),
        (lambda path: Monitor(nn.Linear(2, 2), folder=path, log_every=0), "at least 1 step"),
        (
            lambda path: Monitor(nn.Linear(2, 2), lambda m: "x", path).start(),
            "gives no embeddings",
        ),
        (lambda path: Monitor(nn.Linear(2, 2), folder=path).step(1.0, record=3), "record is a int"),
        (
            lambda path: Monitor(nn.Linear(2, 2), folder=path, monitor="MRR").epoch({"R@1": 0.1}),
            "no metric has this name",
        ),
        (
            lambda path: Monitor(
                nn.Linear(2, 2), None, path, monitor="mrr", evaluate=lambda: {"MRR": 0.1}
            ).start(),
            "no metric has this name",
        ),
        (
            lambda path: Monitor(nn.Linear(2, 2), None, path, evaluate=lambda: None).start(),  # type: ignore[arg-type,return-value]
            "are a NoneType: evaluate is to return Scores",
        ),
    ],
)
def test_mistakes(make: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    with pytest.raises(NearfarError, match=message):
        make(tmp_path / "run")


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(NearfarError, match=r"not a run of nearfar"):
        Monitor(nn.Linear(2, 2), folder=tmp_path)
