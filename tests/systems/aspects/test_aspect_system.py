"""The aspect system end to end on tiny files: objective, thresholds, resume, ensembles, pretrained, bad input."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console

from nearfar.config.compose import compose_config
from nearfar.data.reviews.labels import LabelScheme
from nearfar.errors import NearfarError
from nearfar.functional import focal_loss, multi_label_supcon
from nearfar.lab.compare import compare_runs
from nearfar.lab.ensemble import write_ensemble
from nearfar.lab.report import write_report
from nearfar.launch import run_one
from nearfar.metrics.aspect_scores import HEADLINE
from nearfar.systems import build_system
from nearfar.systems.aspects.objective import AspectObjective, class_weights
from nearfar.systems.aspects.tower import text_tower
from nearfar.training.checkpoint import Checkpoint
from nearfar.training.run_folder import RunFolder
from tiny_aspects import split_folder

QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115
SMALL = [
    "gamma=2",
    "contrastive=jaccard",
    "epochs=2",
    "batch_size=32",
    "projection_dim=8",
    "bootstrap=100",
    "text_encoder.dims=16",
    "text_encoder.hidden=16",
    "text_encoder.vectors=false",
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "trainer.evaluate_start=false",
    "report=false",
    "trainer.log_every=2",
    "trainer.probe_rows=32",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return split_folder(tmp_path_factory.mktemp("data"), n=200)


def run(place: Path, folder: Path, *overrides: str) -> RunFolder:
    every = [
        "experiment=aspects",
        "data=visfd",
        f"data.dir={folder}",
        *SMALL,
        f"runs_dir={place}",
        *overrides,
    ]
    every = list({o.split("=")[0]: o for o in every}.values())
    return run_one(compose_config(every), every, False, QUIET)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> RunFolder:
    return run(tmp_path_factory.mktemp("runs"), folder, "name=run", "epochs=4", "seed=1")


@pytest.mark.slow
def test_a_run_says_what_it_was_judged_by(finished: RunFolder) -> None:
    metrics = finished.read_json("metrics.json")
    assert metrics["splits"].keys() == {"val", "test"}
    assert metrics["reported"] == "test"
    assert metrics["decision"]["chosen_on"] == "val"
    assert set(metrics["decision"]["thresholds"]) == set(finished.read_json("dataset_layout.json")["aspects"])
    estimates = metrics["splits"]["test"]
    for name in ("aspect/F1_micro", "sentiment/F1_macro", "exact_match", "calibration/ECE", HEADLINE):
        assert 0 <= estimates[name]["low"] <= estimates[name]["value"] <= estimates[name]["high"] <= 1
        assert estimates[name]["n"] == 40
    linear = metrics["baselines"]["test"]
    assert linear["aspect/F1_micro"]["name"] == "TF-IDF + linear SVM"
    assert linear["aspect/F1_micro"]["value"] > estimates["aspect/F1_micro"]["chance"]
    assert "calibration/ECE" not in linear  # a linear SVM has no probabilities


@pytest.mark.slow
def test_the_log_has_every_term_and_its_share_of_the_gradient(finished: RunFolder) -> None:
    steps = [r for r in finished.log() if r["kind"] == "step"]
    assert len(steps) > 3
    for step in steps:
        assert step["focal/share"] + step["contrastive/share"] == pytest.approx(1.0)
        assert step["loss"] == pytest.approx(
            0.7 * step["focal/raw"] + 0.3 * step["contrastive/raw"], rel=1e-5
        )
        assert step["focal/connected"] == step["contrastive/connected"] == 1.0
        assert step["uniform_level"] > step["floor"] > 0  # of the contrast
        assert 0 < step["focal/uniform_level"] < np.log(4)
    probes = [r for r in finished.log() if r["kind"] == "probe"]
    assert probes[-1]["review/effective_rank"] > 1


@pytest.mark.slow
def test_the_doctor_calls_the_baseline_by_its_name(finished: RunFolder) -> None:
    """Four epochs over 120 reviews are no match for a linear model."""
    (finding,) = (
        f for f in finished.read_json("doctor.json")["findings"] if f["id"] == "baseline-not-beaten"
    )
    assert finding["title"] == "TF-IDF + linear SVM does as well."
    assert "simpler model" in finding["advice"]


@pytest.mark.slow
def test_the_report_shows_baseline_confusions_and_the_worst_reviews(finished: RunFolder) -> None:
    titles = [section["title"] for section in finished.read_json("sections.json")]
    assert titles == ["Beside the baselines", "Confusions", "Calibration", "Reviews with the largest loss"]
    confusions = finished.read_json("sections.json")[1]["tables"][0]["rows"]
    assert sum(sum(row[1:]) for row in confusions) == 40 * 7
    losses = [row[1] for row in finished.read_json("sections.json")[3]["tables"][0]["rows"]]
    assert losses == sorted(losses, reverse=True)
    page = write_report(finished).read_text()
    assert "TF-IDF + linear SVM" in page
    assert "truly not mentioned" in page


@pytest.mark.slow
def test_files_go_before_the_generated_reviews(folder: Path) -> None:
    """The experiment's default data are generated ones: ``data.dir=`` alone is enough for one's own."""
    system = build_system(compose_config(["experiment=aspects", f"data.dir={folder}"]))
    lines: list[str] = []
    data = system.load_data(lines.append)
    assert sum(map(len, data.splits.values())) == 200
    assert not lines


@pytest.mark.slow
def test_without_a_test_file_thresholds_come_from_train(tmp_path: Path) -> None:
    data = split_folder(tmp_path / "data", n=150, test=False)
    metrics = run(tmp_path, data, "name=run", "thresholds=aspect").read_json("metrics.json")
    assert metrics["splits"].keys() == {"val"}
    assert (metrics["reported"], metrics["decision"]["chosen_on"]) == ("val", "tune")
    config = compose_config(
        ["experiment=aspects", "data=visfd", f"data.dir={data}", *SMALL, "thresholds=none"]
    )
    system: Any = build_system(config)
    system.prepare(lambda _: None)
    assert "tune" not in system.layout()["splits"]
    messages: list[str] = []
    system.calibrate(lambda split: pytest.fail(f"looked at {split}"), messages.append)
    assert "none chosen" in messages[0]
    assert set(system.decision.thresholds) == {0.5}


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["gamma=0", "contrastive=none"],
        ["contrastive=legacy", "focal_weight=0.3", "contrastive_weight='0 -> 0.7'"],
        ["alpha=counts", "balance=oversample", "oversample_frequency=0.5", "trainer.cached_chunk=8"],
    ],
)
def test_every_kind_of_objective_trains(tmp_path: Path, folder: Path, overrides: list[str]) -> None:
    made = run(tmp_path, folder, "name=run", *overrides)
    steps = [r for r in made.log() if r["kind"] == "step"]
    assert all(r["finite"] for r in steps if "finite" in r)
    assert ("contrastive/raw" in steps[-1]) == ("contrastive=none" not in overrides)
    if "balance=oversample" in overrides:
        plan = next(r for r in made.log() if r["kind"] == "plan")
        assert plan["rows"] > plan["reviews"] == 120
    if "contrastive=legacy" in overrides:
        assert steps[0]["contrastive/weight"] == 0.0
        assert steps[-1]["contrastive/weight"] > 0.0


@pytest.mark.slow
def test_resumed_in_mid_epoch_it_ends_in_the_same_weights(tmp_path: Path, folder: Path) -> None:
    whole = run(tmp_path, folder, "name=whole", "balance=oversample", "oversample_frequency=0.5")
    cut = run(
        tmp_path, folder, "name=cut", "balance=oversample", "oversample_frequency=0.5", "trainer.max_steps=3"
    )
    assert Checkpoint.load(cut.path / "checkpoints" / "last.ckpt").batches == 3
    every = [str(o) for o in cut.config().overrides if not o.startswith(("trainer.max_steps", "name="))]
    every += [f"resume_from={cut.path}", "name=resumed"]
    resumed = run_one(compose_config(every), every, False, QUIET)
    a, b = (Checkpoint.load(f.path / "checkpoints" / "last.ckpt") for f in (whole, resumed))
    assert a.step == b.step > 3
    assert all(torch.equal(a.model[k], b.model[k]) for k in a.model)
    first, second = (f.read_json("metrics.json")["splits"] for f in (whole, resumed))
    assert first == second


@pytest.mark.slow
def test_an_ensemble_is_a_run(tmp_path: Path, folder: Path, finished: RunFolder) -> None:
    other = run(tmp_path, folder, "name=other", "focal_weight=0.3", "contrastive_weight=0.7", "seed=1")
    made = write_ensemble([finished.path, other.path], tmp_path / "both")
    metrics = made.read_json("metrics.json")
    assert metrics["decision"]["chosen_on"] == "val"
    assert len(metrics["members"]) == 2
    assert metrics["splits"]["test"]["aspect/F1_micro"]["n"] == 40
    assert made.config().focal_weight == [0.7, 0.3]
    assert "ensemble of" in (made.path / "report.html").read_text()
    comparison = compare_runs([made.path, finished.path])
    assert comparison.baseline.label == "ensemble=null" or "ensemble=null" in comparison.baseline.parts
    (differences,) = comparison.differences.values()
    assert set(differences) >= {"aspect/F1_micro", "sentiment/F1_macro", "exact_match"}
    with pytest.raises(NearfarError, match="is a run already"):
        write_ensemble([finished.path, other.path], tmp_path / "both")
    with pytest.raises(NearfarError, match="ensemble itself"):
        write_ensemble([finished.path, made.path], tmp_path / "third")
    stranger = RunFolder(Path(shutil.copytree(finished.path, tmp_path / "stranger")))
    layout = stranger.read_json("dataset_layout.json")
    stranger.write_json("dataset_layout.json", layout | {"data_hash": "different"})
    with pytest.raises(NearfarError, match="different data"):
        write_ensemble([finished.path, stranger.path], tmp_path / "third")


@pytest.mark.slow
def test_the_ensemble_of_equal_members_is_that_member(
    tmp_path: Path, folder: Path, finished: RunFolder
) -> None:
    """Averaging is of probabilities: two copies change nothing."""
    shutil.copytree(finished.path, tmp_path / "copy")
    made = write_ensemble([finished.path, tmp_path / "copy"], tmp_path / "both")
    one, two = (f.read_json("metrics.json")["splits"]["test"] for f in (finished, made))
    for name in one:
        assert two[name]["value"] == pytest.approx(one[name]["value"], abs=1e-9), name


@pytest.mark.slow
@pytest.mark.parametrize(("change", "verdict"), [(-0.1, "better"), (0.1, "worse")])
def test_a_lower_calibration_error_is_better(
    tmp_path: Path, finished: RunFolder, change: float, verdict: str
) -> None:
    other = RunFolder(Path(shutil.copytree(finished.path, tmp_path / "other")))
    config = other.config()
    config.gamma = 0
    other.write_text("config.yaml", OmegaConf.to_yaml(config))
    with np.load(other.path / "per_item.npz") as arrays:
        changed = dict(arrays)
    for name in ("test/calibration/ECE", "test/aspect/F1_micro"):
        changed[name] = changed[name] + change
    np.savez(other.path / "per_item.npz", **changed)
    (differences,) = compare_runs([finished.path, other.path], baseline="gamma=2").differences.values()
    assert differences["calibration/ECE"].verdict == verdict
    assert differences["aspect/F1_micro"].verdict != verdict


# -- parts -----------------------------------------------------------------------------------------------------
def labelled(seed: int = 0, n: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, LabelScheme]:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 4, (n, 3), generator=g)
    scheme = LabelScheme.of(["a", "b", "c"], codes.numpy())
    return torch.randn(n, 3, 4, generator=g), torch.randn(n, 6, generator=g), codes, scheme


@pytest.mark.parametrize("kind", ["jaccard", "legacy"])
def test_the_objective_is_the_sum_of_its_losses(kind: str) -> None:
    logits, projection, codes, scheme = labelled()
    alpha = class_weights(codes, 4, "counts")
    objective = AspectObjective(
        scheme, alpha, focal_weight=0.3, contrastive_weight=0.7, gamma=1.5, contrastive=kind, temperature=0.2
    )
    total = objective(logits, projection, codes)
    focal = focal_loss(logits, codes, gamma=1.5, alpha=alpha, ignore_index=-1)
    if kind == "jaccard":
        targets = torch.zeros(len(codes), len(scheme.pairs), dtype=torch.int64)
        for i, row in enumerate(codes.tolist()):
            for k, (aspect, polarity) in enumerate(scheme.pairs):
                targets[i, k] = row[aspect] == polarity
    else:
        targets = torch.tensor([[{1: 1, 3: 2}.get(code, 0) for code in row] for row in codes.tolist()])
    contrast = multi_label_supcon(projection, targets, temperature=0.2, weights=kind)  # type: ignore[arg-type]
    assert total.item() == pytest.approx((0.3 * focal + 0.7 * contrast).item(), rel=1e-6)


def test_class_weights() -> None:
    codes = torch.tensor([[0], [0], [0], [1]])
    assert class_weights(codes, 4, "none") is None
    weights = class_weights(codes, 2, "sqrt")
    assert weights is not None
    torch.testing.assert_close(weights, torch.tensor([[4 / 3, 4.0]]).sqrt())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("gamma=-1", "out of range"),
        ("contrastive=jacard", "did you mean 'jaccard'"),
        ("focal_weight=-0.5", "at least 0"),
        ("contrastive_weight=much", "contrastive_weight=much"),
        ("thresholds=per_aspect", "no such choice"),
        ("balance=undersample", "no such choice"),
        ("bootstrap=10", "at least 100"),
        ("text_encoder=ngram", "no encoder of that kind"),
        ("text_encoder.freeze=true", "words has no option 'freeze'"),
        ("sampler=hard", "no such sampler of aspects"),
        ("text_encoder.hidden=15", "even number"),
        ("data.aspects=Camera", "a list of names"),
        ("data.dir=/nowhere", "no such folder"),
        ("data.dir=null", "give the files"),
        ("batch_size=4000", "larger than the training set"),
    ],
)
def test_bad_options_are_named(tmp_path: Path, folder: Path, override: str, message: str) -> None:
    drop = [o for o in SMALL if not (override == "text_encoder=ngram" and o.startswith("text_encoder"))]
    every = [
        "experiment=aspects",
        "data=visfd",
        f"data.dir={folder}",
        *drop,
        f"runs_dir={tmp_path}",
        override,
    ]
    every = list({o.split("=")[0]: o for o in every}.values())
    with pytest.raises(NearfarError, match=message):
        run_one(compose_config(every), every, False, QUIET)


@pytest.mark.slow
def test_weights_of_an_earlier_run_start_a_new_one(tmp_path: Path, folder: Path, finished: RunFolder) -> None:
    """Before the encoder was a tower's, the names of its weights had one part less."""
    old = RunFolder(Path(shutil.copytree(finished.path, tmp_path / "old")))
    path = old.path / "checkpoints" / "last.ckpt"
    saved = torch.load(path, weights_only=True)
    saved["model"] = {name.replace("encoder.network.", "encoder."): w for name, w in saved["model"].items()}
    assert "encoder.embedding.words.weight" in saved["model"]
    torch.save(saved, path)
    again = run(tmp_path, folder, "name=again", f"init_from={path}", "epochs=1", "seed=1", "lr=0", "warmup=0")
    now, before = (Checkpoint.load(f.path / "checkpoints" / "last.ckpt").model for f in (again, finished))
    assert all(torch.equal(now[name], before[name]) for name in before)


# -- pretrained encoders -----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers with random weights and a vocabulary of letters."""
    transformers = pytest.importorskip("transformers")
    place = tmp_path_factory.mktemp("tiny")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", ".", *letters, *("##" + c for c in letters)]
    (place / "vocab.txt").write_text("\n".join(words) + "\n")
    transformers.BertTokenizer(str(place / "vocab.txt")).save_pretrained(place)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(place)
    return place


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        ({"freeze": True}, 2e-5),
        ({"lr": None}, 0.5),
        ({"lr": 1e-3}, 1e-3),
        ({"train": "lora"}, 2e-4),
        ({}, 2e-5),
    ],
)
def test_the_options_of_a_pretrained_encoder(options: dict[str, Any], rate: float) -> None:
    tower = text_tower("pretrained", run_lr=0.5, model="nowhere", **options)
    assert tower.train == {"freeze": "head", "train": "lora"}.get(next(iter(options), ""), "full")
    assert tower.states
    assert tower.lr == (None if options.get("freeze") else rate)
    assert text_tower("minilm", **options).encoder_kind == "minilm"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": "yes"}, "freeze=yes: true or false"),
        ({"freeze": True, "train": "full"}, "freeze=true and text_encoder.train=full: leave one of them out"),
        ({"train": "half"}, "text_encoder: train='half' is unknown"),
        ({"lr": -1.0}, "text_encoder: lr=-1.0: a learning rate above 0"),
        ({"max_length": 1}, "text_encoder: max_length=1: a whole number of at least 2"),
        ({"modle": "x"}, "text_encoder=pretrained has no option 'modle'; did you mean 'model'"),
        ({"pooling": "cls"}, "has no option 'pooling'"),
    ],
)
def test_wrong_options_of_a_pretrained_encoder(options: dict[str, Any], message: str) -> None:
    with pytest.raises(NearfarError, match=message):
        text_tower("pretrained", **options)


@pytest.mark.slow
@pytest.mark.parametrize("freeze", ["false", "true"])
def test_a_pretrained_model_is_trained_on(
    tmp_path: Path, folder: Path, tiny_model: Path, freeze: str
) -> None:
    words = ("text_encoder.dims", "text_encoder.hidden", "text_encoder.vectors")
    every = [
        "experiment=aspects",
        "data=visfd",
        f"data.dir={folder}",
        *(o for o in SMALL if not o.startswith(words)),
        f"runs_dir={tmp_path}",
        "name=run",
        "epochs=1",
        "text_encoder=phobert",
        f"text_encoder.model={tiny_model}",
        "text_encoder.max_length=48",
        f"text_encoder.freeze={freeze}",
    ]
    made = run_one(compose_config(every), every, False, QUIET)
    weights = Checkpoint.load(made.path).model
    from transformers import AutoModel

    before = AutoModel.from_pretrained(tiny_model).state_dict()
    name = "encoder.layer.0.attention.self.query.weight"
    moved = not torch.equal(weights[f"encoder.network.{name}"], before[name])
    assert moved == (freeze == "false")
    layout = made.read_json("dataset_layout.json")["text_encoder"]
    assert layout["kind"] == "pretrained"
    facts = made.read_json("model.json")
    assert (facts["trained_parameters"] < facts["parameters"]) == (freeze == "true")
