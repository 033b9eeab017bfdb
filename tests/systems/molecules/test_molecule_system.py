"""The molecule system end to end on a tiny input: every encoder and sampler, resume, search, bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from nearfar.config.compose import compose_config, merge_overrides
from nearfar.data.chunks import NewData
from nearfar.errors import NearfarError
from nearfar.lab.report import write_report
from nearfar.launch import run_one
from nearfar.serving import load
from nearfar.serving.fill import file_source, open_gallery
from nearfar.systems import build_system
from nearfar.training.checkpoint import Checkpoint
from nearfar.training.run_folder import RunFolder
from processes import command, started_command
from tiny_molecules import pairs, split_files, write

QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115
SMALL = [
    "epochs=2",
    "batch_size=16",
    "hidden=16",
    "layers=2",
    "heads=2",
    "embedding_dim=16",
    "fingerprint_hidden=32",
    "fingerprint_bits=128",
    "hardness_k=20",
    "bootstrap=100",
    "text_encoder.dims=32",
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "report=false",
    "trainer.evaluate_start=false",
]


pytestmark = [pytest.mark.usefixtures("module_cache"), pytest.mark.slow]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return split_files(tmp_path_factory.mktemp("data"))


def run(tmp_path: Path, *overrides: str) -> RunFolder:
    every = ["experiment=molecules", *SMALL, f"runs_dir={tmp_path}", *overrides]
    # Later overrides win, as on the command line.
    every = list({o.split("=")[0]: o for o in every}.values())
    return run_one(compose_config(every), every, False, QUIET)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, files: list[str]) -> RunFolder:
    """A run of one epoch, to be read."""
    return run(tmp_path_factory.mktemp("plain"), *files, "name=run", "epochs=1")


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory, files: list[str]) -> RunFolder:
    """A run that has learned something, to be read."""
    options = ["epochs=12", "lr=0.003", "input_dropout=0.1"]
    return run(tmp_path_factory.mktemp("learned"), *files, "name=run", *options)


# Neighbours are those of the texts: what a sampler does with them does not depend on the encoder of the molecules.
@pytest.mark.parametrize(
    ("encoder", "sampler"),
    [("graph", "random"), ("fingerprint", "hard"), ("both", "partition"), ("graph", "balanced")],
)
def test_every_encoder_and_every_sampler(
    tmp_path: Path, files: list[str], encoder: str, sampler: str
) -> None:
    folder = run(
        tmp_path, *files, f"molecule_encoder={encoder}", f"sampler={sampler}", "name=run", "group_size=8"
    )
    metrics = folder.read_json("metrics.json")
    assert metrics["splits"].keys() == {"val", "test"}
    mrr = metrics["splits"]["test"]["text_to_molecule/MRR"]
    assert mrr["protocol"]["gallery"] == mrr["n"] == 60
    assert 0 < mrr["low"] < mrr["value"] < mrr["high"] < 1
    plans = [r for r in folder.log() if r["kind"] == "plan"]
    assert len(plans) == 2
    assert len(plans[0]["hardness"]) == 4
    if sampler in ("hard", "partition"):
        assert np.mean(plans[0]["hardness"]) > 1.2 * plans[0]["hardness_random"]
    layout = folder.read_json("dataset_layout.json")
    assert layout["text_encoder"]["kind"] == "ngram"
    assert layout["neighbors"]["exact"]
    if sampler == "hard":
        assert write_report(folder).read_text().count("<svg") > 5


def test_it_learns(learned: RunFolder) -> None:
    metrics = learned.read_json("metrics.json")["splits"]["test"]
    assert metrics["text_to_molecule/MRR"]["low"] > 5 * metrics["text_to_molecule/MRR"]["chance"]


def test_curriculum_switches_once(tmp_path: Path, files: list[str]) -> None:
    folder = run(tmp_path, *files, "name=run", "sampler=hard", "curriculum_epoch=2", "epochs=4")
    plans = [r for r in folder.log() if r["kind"] == "plan"]
    assert [p["random_phase"] for p in plans] == [True, True, False, False]
    assert np.mean(plans[3]["hardness"]) > np.mean(plans[0]["hardness"])


def test_schedules_are_applied_epoch_by_epoch(tmp_path: Path, files: list[str]) -> None:
    folder = run(
        tmp_path,
        *files,
        "name=run",
        "sampler=hard",
        "epochs=3",
        "hard_ratio='0.3 -> 0.6 -> 0.8'",
        "hardness_k='20 -> 15 -> 10'",
    )
    plans = [r for r in folder.log() if r["kind"] == "plan"]
    assert [p["hard_ratio"] for p in plans] == [0.3, 0.6, 0.8]
    assert [p["hardness_k"] for p in plans] == [20, 15, 10]


def test_masks_leave_duplicates_out(tmp_path: Path, files: list[str]) -> None:
    config = compose_config(
        ["experiment=molecules", *SMALL, *files, "false_negative_threshold=0.6", "mask_duplicates=false"]
    )
    system: Any = build_system(config)
    system.prepare(lambda _: None)
    batch = system.dataset("train").__getitems__(list(range(40)))
    mask = (
        system.context({}, batch)
        .mask("molecule", "text")
        .tile(slice(0, 40), slice(0, 40))
        .fill_diagonal_(False)
    )
    unit = torch.nn.functional.normalize(batch["text"], dim=1)
    expected = (unit @ unit.T >= 0.6 - 1e-6) & ~torch.eye(40, dtype=torch.bool)
    assert torch.equal(mask, expected)
    assert mask.any()


def test_killed_run_resumes_bit_for_bit(tmp_path: Path, files: list[str]) -> None:
    """The command itself, killed while it trains with dropout, augmentation, schedules and loader workers."""
    overrides = [
        "experiment=molecules",
        *SMALL,
        *files,
        f"runs_dir={tmp_path}",
        "molecule_encoder=both",
        "sampler=hard",
        "hard_ratio='0.3 -> 0.8'",
        "augment_atoms=0.1",
        "augment_bonds=0.1",
        "epochs=3",
        "trainer.checkpoint_steps=2",
        "trainer.workers=1",
    ]
    overrides = list({o.split("=")[0]: o for o in overrides}.values())
    whole = tmp_path / "whole"
    assert command("train", *overrides, "name=whole").returncode == 0
    steps = Checkpoint.load(whole).step
    killed = tmp_path / "killed"
    output = tmp_path / "output.txt"
    process = started_command("train", *overrides, "name=killed", stdout=output, stderr=output)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.is_alive():
        if (killed / "checkpoints" / "last.ckpt").exists() and Checkpoint.load(killed).step >= 4:
            break
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the run ended before it was killed"
    assert Checkpoint.load(killed).step < steps
    done = command("train", f"resume_from={killed}")
    assert done.returncode == 0, done.stderr
    a, b = Checkpoint.load(whole), Checkpoint.load(killed)
    assert a.step == b.step
    assert all(torch.equal(a.model[k], b.model[k]) for k in a.model)
    assert torch.equal(a.generators["cpu"], b.generators["cpu"])
    first, second = ((folder / "metrics.json").read_text() for folder in (whole, killed))
    assert json.loads(first)["splits"] == json.loads(second)["splits"]


def test_search_and_embed(learned: RunFolder) -> None:
    model = load(learned.path, "cpu")
    hits = model.search("the alcohol of benzene", k=5)
    assert [h.rank for h in hits] == [1, 2, 3, 4, 5]
    assert all(a.score >= b.score for a, b in pairwise(hits))
    assert hits._repr_html_().count("<svg") == 5
    texts = model.search("c1ccccc1O", k=3)
    assert (texts.view, texts.target, len(texts)) == ("molecule", "text", 3)
    assert "<svg" in texts._repr_html_()  # that of the query
    vectors = model.embed([h["molecule"] for h in hits], "molecule")
    query = model.embed(["the alcohol of benzene"], "text")[0]
    np.testing.assert_allclose(vectors @ query, [h.score for h in hits], atol=1e-5)
    with pytest.raises(NearfarError, match=r"cannot be read as 'molecule'.*--tower text"):
        model.search("not a smiles", tower="molecule")
    with pytest.raises(NearfarError, match="query is empty"):
        model.search("  ")


def test_files_of_structures_are_galleries(tmp_path: Path, plain: RunFolder) -> None:
    """Lists of SMILES and SDF are read as training reads them."""
    from rdkit import Chem

    model = load(plain.path, "cpu")
    names = {
        "CCO": "ethanol",
        "c1ccccc1": "benzene",
        "CCN": "ethylamine",
        "CC": "ethane",
        "CCC": "propane",
        "C": "methane",
    }
    listed = tmp_path / "list.smi"
    listed.write_text("".join(f"{smiles} {name}\n" for smiles, name in names.items()) + "nonsense(( x\n")
    with open_gallery(model, file_source(model, NewData(listed)), "molecule") as store:
        assert len(store) == 6
    assert {hit["molecule"] for hit in model.search("an alcohol", listed)} == set(names)
    structures = tmp_path / "records.sdf"
    writer = Chem.SDWriter(str(structures))
    for smiles, name in names.items():
        molecule = Chem.MolFromSmiles(smiles)
        molecule.SetProp("description", name)
        writer.write(molecule)
    writer.close()
    hits = model.search("an alcohol", structures)
    assert {hit["molecule"]: hit["text"] for hit in hits} == names


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sampler=hard", "hardness_k=5000"], "hardness_k=5000, but the training set has"),
        (["batch_size=5000"], "batch_size=5000 is larger"),
        (["batch_size=1"], "batch_size=1 is out of range"),
        (["sampler=hard", "hard_ratio=1.5"], "hard_ratio=1.5"),
        (["sampler=hard", "hard_ratio=half"], "half"),
        (["molecule_encoder=grpah"], "did you mean 'graph'"),
        (["hidden=15", "heads=4", "molecule_encoder=graph"], "multiple of heads"),
        (["epochs=ten"], "a whole number is needed"),
        (["augment_atoms=0.1"], "act on graphs"),
        (["lr_schedule=cosin"], "did you mean 'cosine'"),
        (["text_encoder.kind=ngrm"], "did you mean 'ngram'"),
        (["logger=tensorbord"], "did you mean 'tensorboard'"),
        (["data.smiles_column=structure_x"], "structure_x"),
        (["false_negative_threshold=3"], "a cosine"),
        (["init_from=nowhere"], "no such run"),
    ],
)
def test_bad_options_say_what_to_do(
    tmp_path: Path, files: list[str], overrides: list[str], message: str
) -> None:
    with pytest.raises(NearfarError, match=message):
        run(tmp_path, *files, "name=run", *overrides)


def test_rejected_rows_are_listed(tmp_path: Path, files: list[str]) -> None:
    train = Path(files[0].split("=")[1])
    spoilt = tmp_path / "spoilt.tsv"
    rows = (
        train.read_text()
        + "900\tC1CC\tring not closed\n901\tCCO\t\n902\t\tno structure\n"
        + train.read_text().splitlines()[1]
    )
    spoilt.write_text(rows + "\n")
    folder = run(tmp_path, *files, f"data.train={spoilt}", "name=run")
    source = folder.read_json("dataset_layout.json")["sources"][0]
    assert source["rejections"]["total"] == 4
    text = json.dumps(source)
    assert "C1CC" in text
    assert "empty text" in text


def test_two_rows_are_too_few_but_say_so(tmp_path: Path) -> None:
    path = write(tmp_path / "two.tsv", [("CCO", "an alcohol"), ("CCN", "an amine")])
    with pytest.raises(NearfarError):
        run(tmp_path, f"data.train={path}", "name=run")


def test_resume_of_other_data_is_refused(tmp_path: Path, files: list[str], plain: RunFolder) -> None:
    other = write(
        tmp_path / "other.tsv",
        pairs()[::2],
    )
    with pytest.raises(NearfarError, match="other data"):
        run(tmp_path, *files, f"data.train={other}", "epochs=1", f"resume_from={plain.path}")


def test_init_from_needs_the_same_model(tmp_path: Path, files: list[str], plain: RunFolder) -> None:
    run(tmp_path, *files, "name=second", "epochs=1", f"init_from={plain.path}")
    with pytest.raises(NearfarError, match="weights do not fit"):
        run(tmp_path, *files, "name=third", "epochs=1", f"init_from={plain.path}", "embedding_dim=8")


def test_a_run_of_an_earlier_version_is_read(tmp_path: Path, files: list[str]) -> None:
    """Names of weights and the place of the text encoder as they were before towers."""
    options = [
        "molecule_encoder=both",
        "learn_temperature=true",
        "memory=24",
        "false_negative_threshold=0.9",
        "epochs=1",
    ]
    new = run(tmp_path, *files, "name=new", *options)
    names = {
        "towers.molecule.graph.": "graph.",
        "towers.molecule.fingerprint.": "fingerprint.",
        "heads.text.": "text.",
        "memory.kept.molecule.": "memory.molecules.",
        "memory.kept.text.": "memory.texts.",
    }

    def earlier(key: str) -> str:
        return next((old + key.removeprefix(now) for now, old in names.items() if key.startswith(now)), key)

    old = RunFolder(shutil.copytree(new.path, tmp_path / "old"))
    for path in (old.path / "checkpoints").glob("*.ckpt"):
        checkpoint = Checkpoint.load(path)
        checkpoint.model = {earlier(key): value for key, value in checkpoint.model.items()}
        assert not any(key.startswith("towers.") for key in checkpoint.model)
        checkpoint.save(path)
    shutil.copytree(old.path / "towers" / "text" / "encoder", old.path / "text_encoder")
    shutil.rmtree(old.path / "towers")
    first, second = (load(each.path, "cpu").search("the alcohol of benzene") for each in (old, new))
    assert list(first) == list(second)
    for origin in (new, old):
        run(tmp_path, *files, f"name=from_{origin.path.name}", *options, f"init_from={origin.path}")
    first, second = (Checkpoint.load(tmp_path / f"from_{name}").model for name in ("new", "old"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("head", ["none", "linear", "mlp"])
def test_text_heads(tmp_path: Path, files: list[str], head: str) -> None:
    """Without a head the molecules come to the texts: a space of as many dimensions as a text vector has."""
    folder = run(tmp_path, *files, "name=run", f"text_head={head}", "epochs=1")
    dims = 32 if head == "none" else 16
    assert folder.read_json("model.json")["views"] == {"molecule": dims, "text": dims}
    model = load(folder.path, "cpu")
    assert model.embed(["CCO"], "molecule").shape == model.embed(["an alcohol"], "text").shape == (1, dims)


@pytest.mark.data
def test_real_descriptions(tmp_path: Path) -> None:
    data = os.environ.get("NEARFAR_DATA")
    if not data or not (Path(data) / "chebi20").exists():
        pytest.skip("NEARFAR_DATA is not set")
    lines = (Path(data) / "chebi20" / "validation.txt").read_text().splitlines()
    for name, part in (("train", lines[1:401]), ("test", lines[401:601])):
        (tmp_path / f"{name}.txt").write_text("\n".join([lines[0], *part]) + "\n")
    small = [
        "epochs=6",
        "batch_size=64",
        "embedding_dim=128",
        "fingerprint_hidden=256",
        "text_encoder.dims=256",
    ]
    folder = run(tmp_path, f"data.dir={tmp_path}", "name=run", *small, "fingerprint_bits=1024")
    estimate = folder.read_json("metrics.json")["splits"]["test"]["text_to_molecule/MRR"]
    assert estimate["low"] > 0.1, estimate
    assert estimate["protocol"]["gallery"] == 200


def test_a_failing_run_does_not_end_the_sweep(tmp_path: Path, files: list[str]) -> None:
    common = ["experiment=molecules", *SMALL, *files, f"runs_dir={tmp_path}", "name=grid"]

    def sweep(*overrides: str) -> subprocess.CompletedProcess[str]:
        return command("train", "-m", *merge_overrides(common, overrides))

    done = sweep("batch_size=5000,16")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "1 run(s) of the sweep failed" in done.stderr
    assert "batch_size=5000 is larger than the training set" in done.stderr
    assert RunFolder(tmp_path / "grid" / "batch_size=16").finished
    # Again with exists=skip: what is finished is kept, and not trained a second time.
    again = sweep("batch_size=16,32", "exists=skip")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "finished before, kept" in again.stdout
    assert RunFolder(tmp_path / "grid" / "batch_size=32").finished
