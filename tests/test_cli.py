from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from nearfar.cli import app
from nearfar.errors import NearfarError
from nearfar.terminal import report_error
from nearfar.training.run_folder import RunFolder
from processes import command

pytestmark = [pytest.mark.usefixtures("module_cache"), pytest.mark.slow]

SMALL = [
    "epochs=1",
    "batch_size=16",
    "embedding_dim=16",
    "fingerprint_hidden=32",
    "fingerprint_bits=128",
    "fingerprints=[morgan]",
    "bootstrap=100",
    "hardness_k=20",
    "text_encoder.dims=32",
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "report=false",
]


def test_help_lists_the_verbs() -> None:
    shown = subprocess.run([sys.executable, "-m", "nearfar.cli", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    for verb in ("train", "new", "compare", "doctor", "report", "embed", "search", "mine", "verify", "data"):
        assert verb in shown.stdout


def test_list_shows_experiments() -> None:
    assert "molecules_demo" in command("train", "--list").stdout


def test_mistakes_are_messages_and_not_tracebacks(tmp_path: Path) -> None:
    cases = {
        ("train", "experiment=molecules", "hard_rato=1"): "did you mean 'hard_ratio'",
        ("train",): "say which experiment",
        ("compare", "nowhere"): "no such run",
        ("tune", "experiment=molecules", "lr=.1,.2", "--trial", "2"): "No such option: --trial",
        ("train", "experiment=molecules", "lr=tag(log,.1"): "Close every bracket",
        ("report", "nowhere"): "no such file",
        ("doctor", "nowhere"): "no such folder",
        ("search", "nowhere", "a text"): "no such run",
        ("train", "resume_from=nowhere"): "no such run",
        ("train", "experiment=molecules", "data.train=nowhere.tsv"): "no such file",
    }
    for arguments, message in cases.items():
        done = command(*arguments, cwd=tmp_path)
        assert done.returncode == 2, (arguments, done.stderr)
        assert message in done.stderr.replace("\n", " "), (arguments, done.stderr)
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").rglob("config.yaml"))


def test_cfg_job_prints_the_configuration(tmp_path: Path) -> None:
    shown = command("train", "experiment=molecules", "lr=0.5", "--cfg", "job", cwd=tmp_path)
    assert "lr: 0.5" in shown.stdout


def test_verify_sampler() -> None:
    done = command("verify", "sampler")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


# -- a trained run -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A tiny run on a file whose columns have names of their own."""
    from rich.console import Console

    from nearfar.config.compose import compose_config
    from nearfar.launch import run_one
    from tiny_molecules import pairs

    folder = tmp_path_factory.mktemp("trained")
    lines = ["Key\tLeft\tRight"] + [f"m{i}\t{s}\t{t}" for i, (s, t) in enumerate(pairs())]
    (folder / "own.tsv").write_text("\n".join(lines) + "\n")
    overrides = ["experiment=molecules", *SMALL, f"data.train={folder / 'own.tsv'}", f"runs_dir={folder}"]
    overrides += ["data.smiles_column=Left", "data.text_column=Right", "data.id_column=Key", "name=run"]
    with open(folder / "log.txt", "w") as log:
        return run_one(compose_config(overrides), overrides, False, Console(file=log))


@pytest.fixture
def copy(run: RunFolder, tmp_path: Path) -> tuple[RunFolder, Path]:
    """The same run on a copy of its data, which a test may spoil."""
    data = tmp_path / "own.tsv"
    shutil.copyfile(run.path.parent / "own.tsv", data)
    shutil.copytree(run.path, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    text = (run.path / "config.yaml").read_text()
    folder.write_text("config.yaml", text.replace(str(run.path.parent / "own.tsv"), str(data)))
    return folder, data


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def answer(*arguments: object) -> str:
    """What a command prints, which must succeed."""
    done = call(*arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def refusal(*arguments: object) -> str:
    """The error of a command, which must be one that the user can mend."""
    done = call(*arguments)
    assert isinstance(done.exception, NearfarError), (done.output, done.exception)
    return str(done.exception)


def test_embed_keeps_a_text_whose_molecule_is_unreadable(run: RunFolder, tmp_path: Path) -> None:
    table, output = tmp_path / "new.csv", tmp_path / "out.npz"
    table.write_text("id,smiles,text\na,CCO,an alcohol\nb,nonsense((,an amine\nc,CCN,\nd,,\n")
    shown = answer("embed", run, table, "-o", output)
    with np.load(output) as arrays:
        assert arrays["ids"].tolist() == ["a", "b", "c"]
        assert np.isfinite(arrays["molecule"]).all(axis=1).tolist() == [True, False, True]
        assert np.isfinite(arrays["text"]).all(axis=1).tolist() == [True, True, False]
        assert arrays["molecule"].shape == arrays["text"].shape == (3, 16)
    for words in ("3 rows (molecule, text)", "unparsable SMILES 1 (first: row 3 'nonsense(('", "no value 1"):
        assert words in shown, words
    table.write_text("id,smiles,text\na,CCO,an alcohol\nb,CCN,an amine\n")
    assert "rejected" not in answer("embed", run, table, "-o", output)
    table.write_text("text\nan alcohol\n")
    answer("embed", run, table, "-o", output)
    with np.load(output) as arrays:
        assert sorted(arrays.files) == ["ids", "rows", "text"]
    table.write_text("smiles\nnonsense((\n")
    assert "no row can be used; 1 row rejected" in refusal("embed", run, table, "-o", output)


def test_columns_of_a_new_table(run: RunFolder, tmp_path: Path) -> None:
    """The run's own headers if they are there, else the usual ones, else what the options say."""
    output = tmp_path / "out.npz"
    table = tmp_path / "new.csv"
    for header in ("Key,Left,Right", "cid,smiles,description"):
        table.write_text(f"{header}\na,CCO,an alcohol\n")
        assert "1 rows (molecule, text)" in answer("embed", run, table, "-o", output)
        with np.load(output) as arrays:
            assert arrays["ids"].tolist() == ["a"]
        assert "an alcohol" in answer("search", run, "an alcohol", "--gallery", table)
    table.write_text("id,smiles,text\na,c1cc[nH]c1,an alcohol [red]\n")
    shown = answer("search", run, "an alcohol", "--gallery", table)
    assert "c1cc[nH]c1" in shown
    assert "an alcohol [red]" in shown
    shown = answer("search", run, "CCO", "--molecule", "--gallery", table)
    assert "CCO · molecule → text" in shown
    table.write_text("who,what,words\na,CCO,an alcohol\n")
    message = refusal("embed", run, table, "-o", output)
    assert "--column molecule=HEADER" in message
    assert "data." not in message
    assert "Name one with --column molecule=HEADER" in refusal("search", run, "x", "--gallery", table)
    for named in (
        ("--smiles-column", "what", "--text-column", "words", "--id-column", "who"),
        ("--column", "molecule=what", "--column", "text=words", "--id-column", "who"),
    ):
        answer("embed", run, table, "-o", output, *named)
        with np.load(output) as arrays:
            assert arrays["ids"].tolist() == ["a"]
        assert "an alcohol" in answer("search", run, "an alcohol", "--gallery", table, *named)
    assert "did you mean 'words'" in refusal("embed", run, table, "-o", output, "--text-column", "wrds")


def test_where_output_cannot_go_is_said_before_the_work(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nearfar.serving import Trained

    monkeypatch.setattr(Trained, "vectors", lambda *_, **__: pytest.fail("it began to work"))
    table = tmp_path / "new.csv"
    table.write_text("smiles\nCCO\n")
    assert "is a folder; name the file" in refusal("embed", run, table, "-o", tmp_path)
    assert "is a folder; name the file" in refusal("search", run, "an alcohol", "--html", tmp_path)
    assert "is a file and not a folder" in refusal("search", run, "an alcohol", "--html", table / "x.html")


def test_a_run_whose_data_changed_or_is_gone_is_not_searched(copy: tuple[RunFolder, Path]) -> None:
    folder, data = copy
    assert "the alcohol of" in answer("search", folder, "the alcohol of benzene", "-k", 30)
    lines = data.read_text().splitlines()
    data.write_text("\n".join([*lines[:-1], "m9999\tCCCCCCCCO\toctanol"]) + "\n")
    message = refusal("search", folder, "the alcohol of benzene")
    assert "data files have changed" in message
    assert "--gallery FILE" in message
    data.unlink()
    message = refusal("search", folder, "the alcohol of benzene")
    assert f"the run's data cannot be read again (data.train={data}: no such file.)" in message
    assert "--gallery FILE" in message


def test_data_only_reads(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nearfar.systems.molecules.system import MoleculeSystem

    monkeypatch.setattr(MoleculeSystem, "prepare", lambda *_: pytest.fail("more than reading"))
    columns = ["data.smiles_column=Left", "data.text_column=Right", "data.id_column=Key"]
    data = run.path.parent / "own.tsv"
    shown = answer("data", "experiment=molecules", f"data.train={data}", *columns)
    layout = json.loads(shown[shown.index("{") :])
    rows = sum(split["rows"] for split in layout["splits"].values())
    assert rows == layout["sources"][0]["rows_used"] > 100
    assert "no test file" in shown


# -- messages ------------------------------------------------------------------------------------------------
def test_messages_are_not_wrapped(tmp_path: Path) -> None:
    path = tmp_path / "/".join(["a folder with a long name"] * 8) / "run"
    done = command("compare", str(path))
    assert f"error {path}: no such run." in done.stderr.splitlines()


def test_a_missing_package_says_what_to_install(capsys: pytest.CaptureFixture[str]) -> None:
    error = ModuleNotFoundError("No module named 'torch_geometric.nn'", name="torch_geometric.nn")
    assert report_error(error) == 2
    assert "pip install 'nearfar[molecules]'" in capsys.readouterr().err
    assert report_error(ModuleNotFoundError("No module named 'wandb'", name="wandb")) == 2
    assert "pip install 'nearfar[loggers]'" in capsys.readouterr().err
    # A module that no extra brings is a mistake of ours, and its traceback is wanted.
    assert report_error(ModuleNotFoundError("No module named 'nearfar.oops'", name="nearfar.oops")) == 1
    assert "ModuleNotFoundError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("installed", "says"),
    [(None, r"pip install 'nearfar\[tune\]'"), ("2.10.1", "Optuna 3 or newer, and 2.10.1 is here")],
)
def test_a_search_needs_a_current_optuna(
    installed: str | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nearfar import tune

    def version(name: str) -> str:
        if installed is None:
            raise tune.importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(tune.importlib.metadata, "version", version)
    with pytest.raises(NearfarError, match=says):
        tune.tune(["experiment=molecules", "sampler=hard,random"])
