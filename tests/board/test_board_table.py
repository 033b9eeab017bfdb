"""Which folders are runs, and what the table says of each: against what was written, without a browser or a model."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from board_runs import HOSTILE_NAME, lightning, mixed, trainer_state
from doctor_runs import at_chance, converged, write_run
from nearfar.board import table as table_module
from nearfar.board.discover import find_places, key_of
from nearfar.board.run import curves_of, picture_address, run_content
from nearfar.board.table import Runs, signals_of, tail, varying
from nearfar.doctor import diagnose
from nearfar.errors import NearfarError
from nearfar.training.run_folder import RunFolder


def judged(runs: Runs) -> dict[str, Any]:
    """The table once the doctor has looked at every run."""
    for _ in range(400):
        answer = runs.table()
        if not answer["judging"] and all(row["findings"] is not None for row in answer["rows"]):
            return answer
        time.sleep(0.02)
    raise AssertionError("the doctor is not done")


def rows_of(answer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in answer["rows"]}


@pytest.mark.slow
def test_every_kind_of_run_is_seen_once(tmp_path: Path) -> None:
    places = {place.name: place.kind for place in find_places(mixed(tmp_path))}
    assert places == {
        HOSTILE_NAME: "nearfar", "broken": "nearfar", "sweep/good": "nearfar",
        "hf": "Hugging Face trainer_state.json", "light/version_0": "Lightning metrics.csv",
        "notes/people.csv": "table", "notes/loop.csv": "table",
    }  # fmt: skip


def test_what_lies_inside_a_run_is_no_run(tmp_path: Path) -> None:
    run = write_run(converged(np.random.default_rng(0)), tmp_path / "outer").path
    write_run(converged(np.random.default_rng(0)), run / "trials" / "inner")
    lightning(run / "logger")
    assert [place.name for place in find_places(tmp_path)] == ["outer"]
    assert [place.name for place in find_places(run)] == ["outer"]


def test_a_folder_named_as_a_link_and_a_single_log_are_shown(tmp_path: Path) -> None:
    trainer_state(tmp_path / "real" / "hf")
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    assert [place.name for place in find_places(tmp_path / "link")] == ["hf"]
    log = tmp_path / "loop.csv"
    log.write_text("step,loss\n" + "".join(f"{i},{4 - i / 20}\n" for i in range(20)))
    assert [place.kind for place in find_places(log)] == ["table"]


def test_trackers_are_seen_by_run(tmp_path: Path) -> None:
    run = tmp_path / "mlruns" / "0" / "abc"
    (run / "metrics").mkdir(parents=True)
    (run / "meta.yaml").write_text("run_name: first\n")
    (run / "metrics" / "loss").write_text("".join(f"{i} {4 - i / 20} {i}\n" for i in range(20)))
    (tmp_path / "mlruns" / "0" / "meta.yaml").write_text("name: Default\n")
    (tmp_path / "wandb" / "offline-run-1").mkdir(parents=True)
    (tmp_path / "wandb" / "offline-run-1" / "run-1.wandb").write_bytes(b"")
    kinds = {place.name: place.kind for place in find_places(tmp_path)}
    assert kinds == {"mlruns/0/abc": "MLflow run", "wandb/offline-run-1": "Weights & Biases offline run"}
    row = rows_of(judged(Runs(tmp_path)))["mlruns/0/abc"]
    assert row["loss"] == pytest.approx(3.05)


@pytest.mark.slow
def test_rows_say_what_the_files_say(tmp_path: Path) -> None:
    runs = Runs(mixed(tmp_path))
    answer = judged(runs)
    rows = rows_of(answer)
    good = rows["sweep/good"]
    estimate = RunFolder(tmp_path / "sweep" / "good").read_json("metrics.json")["splits"]["test"]["MRR"]
    assert good["status"] == "finished"
    assert {key: good["result"][key] for key in ("value", "low", "high", "chance")} == {
        key: estimate[key] for key in ("value", "low", "high", "chance")
    }
    assert [id for _, id in good["findings"]] == diagnose(tmp_path / "sweep" / "good").ids
    running = rows[HOSTILE_NAME]
    assert (running["status"], running["epoch"], running["step"]) == ("training", 10, 400)
    assert ["error", "loss-at-chance"] in running["findings"]
    assert running["newest"]["MRR"] == tail(tmp_path / HOSTILE_NAME / "train_log.jsonl")[-1]["val"]["MRR"]
    assert rows["broken"]["status"] == "broken"
    assert "metrics.json: not valid JSON" in rows["broken"]["problem"]
    foreign = rows["hf"]
    assert foreign["loss"] == pytest.approx(4.0 * np.exp(-400 / 300))
    assert (foreign["result"]["words"], foreign["result"]["value"]) == ("ndcg@10", 0.4)
    assert [each["name"] for each in answer["skipped"]] == ["notes/people.csv"]
    assert "none of its names is one that the doctor knows" in answer["skipped"][0]["problem"]
    runs.close()


def test_a_stopped_run_is_told_from_one_that_trains(tmp_path: Path) -> None:
    run = write_run(converged(np.random.default_rng(0)), tmp_path / "old", finished=False)
    for path in run.path.iterdir():
        os.utime(path, (1e9, 1e9))
    assert rows_of(Runs(tmp_path).table())["old"]["status"] == "stopped"


@pytest.mark.slow
def test_files_are_read_again_only_when_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        write_run(converged(np.random.default_rng(0)), tmp_path / name)
    read: list[str] = []
    original = table_module.row_of
    monkeypatch.setattr(table_module, "row_of", lambda place: (read.append(place.name), original(place))[1])
    monkeypatch.setattr(table_module, "SCAN_SECONDS", 0.0)
    runs = Runs(tmp_path)
    judged(runs)
    assert sorted(read) == ["a", "b", "c"]
    RunFolder(tmp_path / "b").append({"kind": "step", "step": 500, "loss": 1.5})
    assert rows_of(judged(runs))["b"]["loss"] == 1.5
    assert sorted(read) == ["a", "b", "b", "c"]
    shutil.rmtree(tmp_path / "a")
    assert rows_of(runs.table()).keys() == {"b", "c"}
    with pytest.raises(NearfarError, match="removed or renamed"):
        runs.place(key_of("a"))


def test_options_that_differ_are_columns_and_follow_from_names(tmp_path: Path) -> None:
    def row(sampler: str, system: str = "pairs", **options: Any) -> dict[str, Any]:
        return {"system": system, "options": {"sampler.name": sampler, "seed": 0, **options}}

    hard = {"sampler.order": "level"}
    assert varying([row("hard", **hard), row("random")]) == ["sampler.name"]
    both = [row("hard", **hard), row("hard", **{"sampler.order": "greedy"}), row("random")]
    assert varying(both) == ["sampler.name", "sampler.order"]
    assert varying([row("hard", lr=0.1), row("hard", lr=0.2)]) == ["lr"]
    assert varying([row("hard", lr=0.1), row("hard", "labels", lr=0.2)]) == []
    assert varying([row("hard", name="a", seed=1), row("hard", name="b", seed=2)]) == []
    assert varying([]) == []


def test_the_end_of_a_log_is_read_without_its_cut_lines(tmp_path: Path) -> None:
    log = tmp_path / "train_log.jsonl"
    lines = [
        json.dumps({"kind": "step", "step": step, "loss": 1.0, "filler": "x" * 100}) for step in range(2000)
    ]
    log.write_text("\n".join(lines) + '\n{"kind": "step", "st')
    records = tail(log)
    assert 300 < len(records) < 1000
    assert [record["step"] for record in records] == list(range(2000 - len(records), 2000))
    assert tail(tmp_path / "none") == []


@pytest.mark.slow
def test_curves_hold_what_guessing_costs_in_any_log(tmp_path: Path) -> None:
    root = mixed(tmp_path)
    places = {place.name: place for place in find_places(root)}
    own = run_content(places[HOSTILE_NAME])
    assert own["curves"][0]["levels"] == {
        "guessing (ln of the candidates)": np.log(64),
        "floor of the loss": 0.0,
    }
    assert own["row"]["status"] == "training"
    assert {each["title"] for each in own["more"]} >= {"Learning rate", "Gradient norm before clipping"}
    foreign = run_content(places["hf"])
    first = foreign["curves"][0]
    assert first["levels"] == pytest.approx(
        {"guessing (ln(batch_size))": np.log(64), "floor of the loss": 0.0}
    )
    x, y = first["series"]["training"]
    assert (x[0], y[0], len(x)) == (10, pytest.approx(4.0 * np.exp(-1 / 30)), 40)
    assert foreign["curves"][1]["series"]["ndcg@10"][1] == [0.1, 0.2, 0.3, 0.4]
    with pytest.raises(NearfarError, match=r"metrics\.json: not valid JSON"):
        run_content(places["broken"])


def test_chance_is_known_while_a_run_trains(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    start = {"kind": "start", "step": 0, "monitor": "MRR", "val": {"MRR": 0.01}, "chance": {"MRR": 0.004}}
    for record in (start, {"kind": "epoch", "epoch": 1, "step": 10, "val": {"MRR": 0.2}}):
        folder.append(record)
    (place,) = find_places(tmp_path)
    (validation,), _ = curves_of(place, signals_of(place))
    assert validation.levels == {"chance, MRR": 0.004}
    assert validation.series["MRR"] == ([0, 1], [0.01, 0.2])


@pytest.mark.slow
def test_long_lines_are_thinned_and_keep_their_ends(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    text = "".join(json.dumps({"kind": "step", "step": i, "loss": 1 / (i + 1)}) + "\n" for i in range(25_001))
    folder.write_text("train_log.jsonl", text)
    (place,) = find_places(tmp_path)
    x, y = run_content(place)["curves"][0]["series"]["training"]
    assert len(x) <= 1001
    assert (x[0], x[-1], y[-1]) == (0, 25_000, 1 / 25_001)


def test_pictures_of_files_are_addresses_that_run_nothing() -> None:
    assert picture_address("<svg><script>hurt()</script></svg>").startswith(
        "data:image/svg+xml,%3Csvg%20xmlns"
    )
    assert picture_address("data:image/png;base64,AAAA") == "data:image/png;base64,AAAA"
    for wrong in ("javascript:hurt()", "https://example.org/a.png", "data:text/html,<script>", "", "x"):
        assert picture_address(wrong) is None


def test_a_run_that_has_just_begun_and_an_empty_folder(tmp_path: Path) -> None:
    assert Runs(tmp_path).table()["rows"] == []
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.yaml").write_text("system: pairs\nseed: 3\ntrainer: {}\nepochs: 5\n")
    runs = Runs(tmp_path)
    row = rows_of(judged(runs))["new"]
    assert (row["status"], row["seed"], row["epochs"], row["system"]) == ("training", 3, 5, "pairs")
    (place,) = runs.places().values()
    assert run_content(place)["curves"] == []
    with pytest.raises(NearfarError, match="no such folder"):
        Runs(tmp_path / "nothing")


@pytest.mark.slow
def test_findings_of_a_run_in_progress_follow_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_module, "SCAN_SECONDS", 0.0)
    run = at_chance(np.random.default_rng(0))
    folder = RunFolder(tmp_path / "run")
    for record in run.records[:3]:
        folder.append(record)
    runs = Runs(tmp_path)
    assert rows_of(judged(runs))["run"]["findings"] == []
    for record in run.records[3:]:
        folder.append(record)
    runs.table()
    assert ["error", "loss-at-chance"] in rows_of(judged(runs))["run"]["findings"]


def test_a_doctor_that_fails_is_no_healthy_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(place: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(table_module, "judged", fails)
    folder = RunFolder(tmp_path / "run")
    for record in at_chance(np.random.default_rng(0)).records:
        folder.append(record)
    assert rows_of(judged(Runs(tmp_path)))["run"]["findings"] == [["error", "the doctor failed"]]
