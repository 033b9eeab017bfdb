"""Damaged, forged and foreign files in a run: every verb names the file, and none ends in a traceback."""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nearfar.data.files import read_arrays, read_json, read_yaml, remove_left_over
from nearfar.doctor import diagnose
from nearfar.errors import NearfarError
from nearfar.lab import report
from nearfar.lab.compare import compare_runs
from nearfar.lab.doctor_command import print_diagnosis
from nearfar.lab.ensemble import write_ensemble
from nearfar.lab.report import write_comparison, write_report
from nearfar.lab.table import comparison_tables, metrics_tables
from nearfar.launch import check_name, choose_folder
from nearfar.terminal import console
from nearfar.training.checkpoint import Checkpoint, Resume
from nearfar.training.fit import fit
from nearfar.training.run_folder import RunFolder
from toy_system import ToySystem, toy_config

pytestmark = pytest.mark.slow  # real runs


def train(path: Path, **changes: Any) -> RunFolder:
    system = ToySystem(toy_config(epochs=1, **changes))
    system.prepare(print)
    return fit(system, system.config, RunFolder(path), say=lambda _: None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "a", lr=1e-2)
    train(folder / "b", lr=1e-3)
    write_report(RunFolder(folder / "a"))
    return folder


@pytest.fixture(scope="module", autouse=True)
def drawn_once() -> Iterator[None]:
    """Most damages change no chart: one of the same values is drawn once, since drawing is half of these tests."""
    drawings: dict[str, str] = {}

    def kept(draw: Callable[..., str]) -> Callable[..., str]:
        def chart(*values: Any) -> str:
            key = f"{draw.__name__} {values!r}"
            if key not in drawings:
                drawings[key] = draw(*values)
            return drawings[key]

        return chart

    with pytest.MonkeyPatch.context() as patch:
        for name in ("curves_chart", "line_chart", "map_chart", "intervals_chart"):
            patch.setattr(report, name, kept(getattr(report, name)))
        yield


@pytest.fixture
def copy(runs: Path, tmp_path: Path) -> Path:
    shutil.copytree(runs, tmp_path / "runs")
    return tmp_path / "runs"


# -- what may lie in the place of a file -----------------------------------------------------------------------
def text(content: str | bytes) -> Callable[[Path], None]:
    data = content.encode() if isinstance(content, str) else content
    return lambda path: path.write_bytes(data) and None


def folder(path: Path) -> None:
    path.mkdir()


def pipe(path: Path) -> None:
    os.mkfifo(path)


def broken_link(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]\n" for k in range(1, 12)
)
DAMAGES: dict[str, Callable[[Path], None]] = {
    "empty": text(""),
    "other bytes": text(b"\xff\xfe\x00\x81" * 40),
    "half": text('{"splits": {"val": {"MRR"'),
    "null": text("null"),
    "number": text("17"),
    "text": text('"text"'),
    "list": text("[1, 2]"),
    "list of null": text("[null]"),
    "other fields": text('{"a": 1}'),
    "deep": text("[" * 5_000),
    "deep mapping": text('{"a":' * 5_000),
    "huge number": text('{"epochs": 1e999, "splits": 1' + "0" * 6000 + "}"),
    "code": text("!!python/object/apply:os.system ['touch owned']"),
    "aliases": text(LAUGHS),
    "zip": text(b"PK\x03\x04" + b"\x00" * 60),
    "folder": folder,
    "pipe": pipe,
    "broken link": broken_link,
    "device": device,
}
EVERY = ("doctor", "report", "tables", "compare", "resume")
#: the files of a run, and the verbs that read them
FILES = {
    "metrics.json": EVERY,
    "config.yaml": EVERY,
    "dataset_layout.json": ("doctor", "report"),
    "environment.json": ("report",),
    "model.json": ("doctor",),
    "doctor.json": ("report",),
    "examples.json": ("report",),
    "sections.json": ("report",),
    "resumed.json": ("report",),
    "train_log.jsonl": ("doctor", "report", "compare"),
    "per_item.npz": ("compare",),
    "map.npz": ("report",),
}


def verbs(runs: Path) -> dict[str, Callable[[], object]]:
    def compare() -> None:
        comparison = compare_runs([runs / "a", runs / "b"])
        comparison_tables(comparison)
        write_comparison(comparison, runs / "comparison" / "report.html")

    def resume() -> None:
        Resume.find(str(runs / "a"), toy_config(epochs=1))

    return {
        "doctor": lambda: print_diagnosis(diagnose(runs / "a"), runs / "a", console()),
        "report": lambda: write_report(RunFolder(runs / "a")),
        "tables": lambda: metrics_tables(RunFolder(runs / "a")),
        "compare": compare,
        "resume": resume,
    }


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(copy: Path, name: str, damage: str) -> None:
    path = copy / "a" / name
    path.unlink(missing_ok=True)
    DAMAGES[damage](path)
    refusals = []
    every = verbs(copy)
    for verb in FILES[name]:
        try:
            every[verb]()
        except NearfarError as error:
            refusals.append(str(error))
    assert not (copy / "a" / "owned").exists()
    assert not Path("owned").exists()
    if name in ("metrics.json", "config.yaml") or (
        name == "dataset_layout.json" and damage != "other fields"
    ):
        assert refusals, "no verb noticed"
    for refusal in refusals:
        assert name in refusal or "not finished" in refusal or "is not a run" in refusal, refusal


@pytest.mark.parametrize(
    "place",
    ["splits", "splits.val", "splits.val.MRR", "splits.val.MRR.value", "splits.val.MRR.protocol", "monitor"],
)
@pytest.mark.parametrize("value", [None, 3, "text", [1], {"a": 1}, [[]], "NaN", True])
def test_a_forged_field_is_named(copy: Path, place: str, value: Any) -> None:
    content = json.loads((copy / "a" / "metrics.json").read_text())
    parts = place.split(".")
    inner = content
    for part in parts[:-1]:
        inner = inner[part]
    inner[parts[-1]] = value
    (copy / "a" / "metrics.json").write_text(json.dumps(content))
    for verb in verbs(copy).values():
        try:
            verb()
        except NearfarError as error:
            refusal = str(error)
        else:
            continue
        assert "metrics.json" in refusal or place.split(".")[-1] in refusal, refusal


@pytest.mark.parametrize(
    "value", ["${oc.env:HOME}", "${oc.decode:${oc.env:HOME}}", "${lr}", "x ${oc.env:PATH}"]
)
def test_a_configuration_refers_to_nothing(copy: Path, value: str) -> None:
    path = copy / "a" / "config.yaml"
    path.write_text(path.read_text() + f'secret: "{value}"\n')
    for name, verb in verbs(copy).items():
        if name in ("compare", "resume"):
            with pytest.raises(NearfarError, match=r"config.yaml: .*refers to something else"):
                verb()


# -- arrays and checkpoints ------------------------------------------------------------------------------------
def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode("latin1") + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def pickled() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([{"a": 1}, None], dtype=object), allow_pickle=True)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pickled(), "could run code"),
        (
            npy("{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000,), }"),
            "declares 80,000,000,000 bytes",
        ),
        (npy("{'descr': '<f8', 'fortran_order': False, 'shape': (-3,), }"), "declares"),
        (
            npy("{'descr': '<f8', 'fortran_order': False, 'shape': __import__('os').getpid(), }"),
            "not a readable",
        ),
        (npy("{'descr': '<f8', 'fortran_order': False, 'shape': (4,), }", b"\0" * 8), "ends after 8"),
        (b"no array", "not a readable"),
        (b"", "not a readable"),
    ],
)
def test_forged_arrays_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(NearfarError, match=message) as refused:
        read_arrays(archive(tmp_path / "x.npz", {"a.npy": data}))
    assert "x.npz" in str(refused.value)


def test_arrays_come_back_as_numpy_reads_them(tmp_path: Path) -> None:
    arrays = {
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "text": np.array(["a", "bcd"]),
        "none": np.empty((0, 3), np.int16),
        "scalar": np.array(2.5),
        "flags": np.array([True, False]),
    }
    np.savez_compressed(tmp_path / "x.npz", **arrays)
    for name, array in read_arrays(tmp_path / "x.npz").items():
        assert array.dtype == arrays[name].dtype
        assert np.array_equal(array, arrays[name])
        assert array.shape == arrays[name].shape


def test_a_bomb_takes_no_memory(tmp_path: Path) -> None:
    path = archive(tmp_path / "bomb.npz", {f"{k}.npy": b"\0" * (8 << 20) for k in range(4)})
    assert path.stat().st_size < 1 << 20
    with pytest.raises(NearfarError, match="its arrays take"):
        read_arrays(path, limit=16 << 20)


class Owned:
    def __reduce__(self) -> Any:
        return os.mkdir, ("owned",)


@pytest.mark.parametrize(
    "content", [{"format": 1, "system": "toy", "x": Owned()}, [1], {"format": 1, "system": "toy"}]
)
def test_a_forged_checkpoint_runs_nothing(copy: Path, tmp_path: Path, content: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    path = copy / "a" / "checkpoints" / "last.ckpt"
    torch.save(content, path)
    with pytest.raises(NearfarError, match=r"last.ckpt"):
        Checkpoint.load(path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epoch", "three"),
        ("model", [1]),
        ("meters", {"total": "x"}),
        ("best", 3),
        ("optimizer", "sgd"),
        ("step", None),
    ],
)
def test_a_checkpoint_of_other_types_is_refused(copy: Path, name: str, value: Any) -> None:
    path = copy / "a" / "checkpoints" / "last.ckpt"
    torch.save(torch.load(path, weights_only=True) | {name: value}, path)
    with pytest.raises(NearfarError, match=f"last.ckpt: {name}"):
        Checkpoint.load(path)


def _moment(name: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["optimizer"]["state"][0].update({name: value})


def _field(*path: str, value: Any) -> Callable[[dict[str, Any]], object]:
    def forge(content: dict[str, Any]) -> None:
        for part in path[:-1]:
            content = content[part]
        content[path[-1]] = value

    return forge


FORGERIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "moments smaller than their weight": _moment("exp_avg", torch.zeros(1)),
    "moments that are text": _moment("exp_avg", "x"),
    "sparse moments": _moment("exp_avg_sq", torch.zeros(16, 6).to_sparse()),
    "a step that is NaN": _moment("step", torch.tensor(float("nan"))),
    "no step": _moment("step", None),
    "a further moment": _moment("momentum", torch.zeros(16, 6)),
    "no optimiser": _field("optimizer", value={}),
    "optimiser state of the wrong kind": _field("optimizer", "state", value=[1]),
    "groups of the wrong kind": _field("optimizer", "param_groups", value=[1, 2]),
    "a generator that is text": _field("generators", "cpu", value="x"),
    "a generator of zeros": _field("generators", "cpu", value=torch.zeros(5056, dtype=torch.uint8)),
    "names of weights that are numbers": _field("model", value={1: torch.zeros(2)}),
    "a best value that is text": _field("best", "value", value="x"),
    "a best epoch that is text": _field("best", "epoch", value="x"),
    "a negative number of batches": _field("batches", value=-1),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_state_is_refused_by_name(copy: Path, forgery: str) -> None:
    """The compiled step of AdamW writes beyond moments that are too small, and the interpreter dies."""
    run, config = RunFolder(copy / "a"), toy_config(epochs=2)
    path = run.checkpoints / "last.ckpt"
    content = torch.load(path, weights_only=True)
    FORGERIES[forgery](content)
    path.unlink()  # best.ckpt is the same file
    torch.save(content, path)
    system = ToySystem(config)
    system.prepare(print)
    with pytest.raises(NearfarError, match=r"last\.ckpt"):
        fit(system, config, run, Resume.find(str(run), config), say=lambda _: None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scheduler", {"step": 1, "optimizer": None, "lr_lambdas": 5}),
        ("scheduler", None),
        ("best", {}),
        ("meters", None),
        ("other_generators", None),
    ],
)
def test_what_follows_from_the_rest_is_not_taken_from_a_checkpoint(copy: Path, name: str, value: Any) -> None:
    run, config = RunFolder(copy / "a"), toy_config(epochs=2)
    path = run.checkpoints / "last.ckpt"
    content = torch.load(path, weights_only=True)
    content["optimizer"]["param_groups"][0] |= {"betas": None, "maximize": True}
    path.unlink()
    torch.save(content | {name: value}, path)
    system = ToySystem(config)
    system.prepare(print)
    fit(system, config, run, Resume.find(str(run), config), say=lambda _: None)
    group = torch.load(path, weights_only=True)["optimizer"]["param_groups"][0]
    assert group["betas"] == (0.9, 0.999)
    assert group["maximize"] is False


def test_readers_name_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": NaN}')
    assert read_json(path)["a"] != 0
    with pytest.raises(NearfarError, match="no such file"):
        read_yaml(tmp_path / "none.yaml")


# -- names and places ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name",
    [
        "../project",
        "/tmp/x",
        "a/../../b",
        "a\0b",
        "x" * 300,
        ".",
        "a//b",
        " ",
        "",
        "a\x1b[31mb",
        "a\nb",
        "..",
        "é" * 150,
    ],
)
def test_names_that_are_no_folder_below_runs_dir(name: str) -> None:
    with pytest.raises(NearfarError, match="name="):
        check_name(name)


@pytest.mark.parametrize("exists", ["number", "skip", "replace"])
def test_a_foreign_folder_is_left_alone(tmp_path: Path, exists: str) -> None:
    place = tmp_path / "runs" / "project"
    (place / "checkpoints").mkdir(parents=True)
    for name in ("metrics.json", "config.yaml", "checkpoints/model.pt"):
        (place / name).write_text("mine")
    config = toy_config(name="project", runs_dir=str(tmp_path / "runs"), exists=exists)
    with pytest.raises(NearfarError, match="is not a run of nearfar"):
        choose_folder(config, ["experiment=toy"], sweep=False)
    with pytest.raises(NearfarError, match="is not a run of nearfar"):
        train(place)
    assert (place / "metrics.json").read_text() == (place / "checkpoints/model.pt").read_text() == "mine"


@pytest.mark.parametrize("name", ["checkpoints", "trials"])
def test_a_link_inside_a_run_is_not_followed(copy: Path, tmp_path: Path, name: str) -> None:
    run, outside = RunFolder(copy / "a"), tmp_path / "outside"
    if name == "checkpoints":
        shutil.copytree(run.checkpoints, outside)
        shutil.rmtree(run.checkpoints)
    else:
        outside.mkdir()
    (outside / ".last.ckpt.999999999.tmp").write_text("mine")
    before = {path.name: path.read_bytes() for path in outside.iterdir()}
    (run.path / name).symlink_to(outside)
    with pytest.raises(NearfarError, match="link to a different folder"):
        train(run.path)
    config = toy_config(epochs=2)
    system = ToySystem(config)
    system.prepare(print)
    with pytest.raises(NearfarError, match="link to a different folder"):
        fit(system, config, run, Resume.find(str(run), config), say=lambda _: None)
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == before


def test_a_place_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NearfarError, match="cannot be made: Not a directory"):
        train(tmp_path / "file" / "x")
    with pytest.raises(NearfarError, match="cannot be made"):
        RunFolder(tmp_path / "file").write_json("claims.json", {})


def test_an_ensemble_is_not_written_into_a_foreign_folder(copy: Path, tmp_path: Path) -> None:
    place = tmp_path / "notes"
    place.mkdir()
    (place / "examples.json").write_text("mine")
    with pytest.raises(NearfarError, match="is not a run of nearfar"):
        write_ensemble([copy / "a", copy / "b"], place)


def test_what_a_kill_left_is_removed_at_the_next_start(copy: Path) -> None:
    run = RunFolder(copy / "a")
    gone = run.checkpoints / ".last.ckpt.999999999.abc.tmp"
    alive = run.checkpoints / f".last.ckpt.{os.getppid()}.abc.tmp"
    mine = run.path / f".metrics.json.{os.getpid()}.x1.tmp"
    for path in (gone, alive, mine):
        path.write_bytes(b"half")
    remove_left_over(run.checkpoints)
    assert [path.name for path in run.checkpoints.glob(".*")] == [alive.name]
    alive.unlink()
    config = toy_config(epochs=2)
    system = ToySystem(config)
    system.prepare(print)
    gone.write_bytes(b"half")
    fit(system, config, run, Resume.find(str(run), config), say=lambda _: None)
    assert not [*run.path.glob(".*.tmp"), *run.checkpoints.glob(".*.tmp")]
    assert run.read_json("metrics.json")["epochs"] == 2


def test_a_page_of_somebody_else_is_left_alone(copy: Path) -> None:
    page = copy / "report.html"
    page.write_text("<title>my thesis</title>")
    comparison = compare_runs([copy / "a", copy / "b"])
    with pytest.raises(NearfarError, match="not a page of nearfar"):
        write_comparison(comparison)
    page.unlink()
    write_comparison(comparison)
    write_comparison(comparison)
    assert "Content-Security-Policy" in page.read_text()


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>[red]\x1b[31m"


def test_text_of_a_run_is_escaped(copy: Path) -> None:
    run = copy / "a"
    metrics = json.loads((run / "metrics.json").read_text())
    estimates = metrics["splits"]["val"]
    estimates[HOSTILE] = estimates["MRR"] | {"metric": HOSTILE}
    metrics["members"] = [HOSTILE]
    (run / "metrics.json").write_text(json.dumps(metrics))
    (run / "sections.json").write_text(
        json.dumps(
            [
                {
                    "title": HOSTILE,
                    "lead": HOSTILE,
                    "tables": [],
                    "pictures": [{"source": HOSTILE, "caption": HOSTILE}],
                }
            ]
        )
    )
    (run / "resumed.json").write_text(json.dumps([{"from": HOSTILE}]))
    log = (run / "train_log.jsonl").read_text().replace('"MRR"', json.dumps(HOSTILE))
    (run / "train_log.jsonl").write_text(log)
    page = write_report(RunFolder(run)).read_text()
    assert "<script" not in page
    assert "onerror=alert(1)>" not in page.replace("&gt;", "")
    assert "script-src" not in page
    assert "default-src 'none'" in page
    assert "\x1b" not in page
