"""nearfar in sentence-transformers' trainer: its losses' values, batches, resuming, evaluation, a watched run."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from typer.testing import CliRunner

import losses_of_others
from lazily import Lazily
from nearfar import verify
from nearfar.cli import app
from nearfar.errors import NearfarError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

library = Lazily("sentence_transformers")
theirs = Lazily("sentence_transformers.sentence_transformer.losses")
ours = Lazily("nearfar.integrations.sentence_transformers")

WORDS = [
    a + b
    for a in ("ba", "ke", "li", "mo", "tu", "ra", "so", "ni")
    for b in ("ma", "to", "le", "ri", "su", "po")
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with weights drawn at random and a word for each token."""
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    torch.manual_seed(0)
    size = {"vocab_size": len(vocabulary), "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 32, "max_position_embeddings": 16}  # fmt: skip
    BertModel(BertConfig(**size)).save_pretrained(folder / "hf")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "hf")
    network = Transformer(str(folder / "hf"))
    model = library.SentenceTransformer(modules=[network, Pooling(32)], device="cpu")
    model.save(str(folder / "st"))
    return folder / "st"


@pytest.fixture
def model(files: Path) -> SentenceTransformer:
    return loaded(files)


def loaded(files: Path) -> SentenceTransformer:
    """The model, without the card that it writes with every checkpoint: half of a short run's time."""
    model = library.SentenceTransformer(str(files), device="cpu")
    model._create_model_card = lambda *_, **__: None
    return model


def pairs(n: int, seed: int = 0) -> dict[str, list[str]]:
    """An anchor of three words, and as its positive their translations, in a different order."""
    rng = np.random.default_rng(seed)
    rows: dict[str, list[str]] = {"anchor": [], "positive": []}
    for _ in range(n):
        words = rng.choice(24, 3, replace=False)
        rows["anchor"].append(" ".join(WORDS[i] for i in words))
        rows["positive"].append(" ".join(WORDS[i + 24] for i in rng.permutation(words)))
    return rows


def columns(model: SentenceTransformer, *texts: list[str]) -> list[dict[str, Any]]:
    return [model.preprocess(each) for each in texts]


def value_and_gradients(
    loss: nn.Module, model: SentenceTransformer, features: list[dict[str, Any]], labels: Tensor | None = None
) -> tuple[float, list[Tensor]]:
    model.zero_grad()
    value = loss([dict(each) for each in features], labels)
    value.backward()
    return float(value), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_same(one: tuple[float, list[Tensor]], other: tuple[float, list[Tensor]]) -> None:
    assert one[0] == pytest.approx(other[0], abs=1e-5)
    assert len(one[1]) == len(other[1]) > 0
    for a, b in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


SYMMETRIC = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}


@pytest.mark.slow
@pytest.mark.parametrize("negatives", [0, 1, 3])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("cached", [None, 5])
def test_info_nce_is_their_loss(
    model: SentenceTransformer, negatives: int, symmetric: bool, cached: int | None
) -> None:
    model.eval()  # no dropout, so that both see the same embeddings
    rows = pairs(16)
    extra = [pairs(16, seed=9 + i)["positive"] for i in range(negatives)]
    features = columns(model, rows["anchor"], rows["positive"], *extra)
    options: dict[str, Any] = SYMMETRIC if symmetric else {}
    if cached is None:
        host: nn.Module = theirs.MultipleNegativesRankingLoss(model, scale=20.0, **options)
    else:
        host = theirs.CachedMultipleNegativesRankingLoss(model, scale=20.0, mini_batch_size=cached, **options)
    loss = ours.InfoNCELoss(model, temperature=1 / 20, symmetric=symmetric, mini_batch_size=cached)
    assert_same(value_and_gradients(loss, model, features), value_and_gradients(host, model, features))
    assert loss.record.candidates > 0


@pytest.mark.slow
def test_the_symmetric_loss_is_their_symmetric_class(model: SentenceTransformer) -> None:
    model.eval()
    rows = pairs(12)
    features = columns(model, rows["anchor"], rows["positive"])
    host = theirs.MultipleNegativesSymmetricRankingLoss(model, scale=20.0)
    loss = ours.InfoNCELoss(model, temperature=1 / 20, symmetric=True)
    assert_same(value_and_gradients(loss, model, features), value_and_gradients(host, model, features))


@pytest.mark.slow
def test_mini_batches_with_dropout_are_the_whole_batch(model: SentenceTransformer) -> None:
    """In training, the second pass draws the dropout masks of the first: the loss goes down a true gradient."""
    model.train()
    rows = pairs(16)
    features = columns(model, rows["anchor"], rows["positive"])
    loss = ours.InfoNCELoss(model, mini_batch_size=4)
    torch.manual_seed(3)
    value, gradients = value_and_gradients(loss, model, features)
    torch.manual_seed(3)
    embeddings = []
    for column in features:  # the same chunks, by hand
        parts = [
            {name: each[i : i + 4] for name, each in column.items() if isinstance(each, Tensor)}
            for i in range(0, 16, 4)
        ]
        embeddings.append(torch.cat([model(part)["sentence_embedding"] for part in parts]))
    model.zero_grad()
    plain = loss.compute_loss_from_embeddings(embeddings)
    plain.backward()
    assert_same(
        (value, gradients), (float(plain), [p.grad for p in model.parameters() if p.grad is not None])
    )


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [False, True])
def test_masked_duplicates_are_an_explicit_loop(model: SentenceTransformer, symmetric: bool) -> None:
    model.eval()
    anchors = [WORDS[0], WORDS[1], WORDS[0], WORDS[3], WORDS[4]]
    positives = [WORDS[10], WORDS[11], WORDS[12], WORDS[11], WORDS[0]]
    negatives = [WORDS[20], WORDS[10], WORDS[21], WORDS[22], WORDS[23]]
    loss = ours.InfoNCELoss(model, temperature=0.1, symmetric=symmetric, mask_duplicates=True)
    features = columns(model, anchors, positives, negatives)
    value = float(loss(features))
    a, p, n = (model.encode(t, convert_to_tensor=True).double() for t in (anchors, positives, negatives))
    a, p, n = (nn.functional.normalize(each, dim=1) for each in (a, p, n))
    forward, back = [], []
    for i in range(5):
        candidates = [p[i]]
        queries = [a[i]]
        for j in range(5):
            no_negative = (
                positives[j] == positives[i] or positives[j] == anchors[i] or anchors[j] == anchors[i]
            )
            other_way = positives[i] == anchors[j]
            if j != i and not no_negative and not (symmetric and other_way):
                candidates.append(p[j])
                queries.append(a[j])
            if negatives[j] not in (positives[i], anchors[i]):
                candidates.append(n[j])
        forward.append(torch.logsumexp(torch.stack(candidates) @ a[i] / 0.1, 0) - a[i] @ p[i] / 0.1)
        back.append(torch.logsumexp(torch.stack(queries) @ p[i] / 0.1, 0) - a[i] @ p[i] / 0.1)
    expected = torch.stack(forward).mean()
    if symmetric:
        expected = (expected + torch.stack(back).mean()) / 2
    assert value == pytest.approx(float(expected), abs=1e-5)
    assert value < float(ours.InfoNCELoss(model, temperature=0.1, symmetric=symmetric)(features))


@pytest.mark.slow
@pytest.mark.parametrize("cached", [None, 3])
def test_siglip_and_supcon_are_their_formulas(model: SentenceTransformer, cached: int | None) -> None:
    model.eval()
    rows = pairs(8)
    features = columns(model, rows["anchor"], rows["positive"])
    a, b = (
        nn.functional.normalize(model.encode(t, convert_to_tensor=True).double(), dim=1)
        for t in rows.values()
    )
    siglip = ours.SigLipLoss(model, scale=12.0, bias=-8.0, mini_batch_size=cached)
    sign = 2 * torch.eye(8) - 1
    expected = -nn.functional.logsigmoid(sign * (12 * a @ b.T - 8)).sum() / 8
    value = siglip(features)
    assert float(value) == pytest.approx(float(expected), abs=1e-5)
    value.backward()
    assert siglip.bias.grad is not None
    assert siglip.log_scale.grad is not None

    labels = torch.tensor([0, 0, 1, 1, 2, 2, 2, 3])
    supcon = ours.SupConLoss(model, temperature=0.2, mini_batch_size=cached)
    losses = []
    for i in range(8):
        others = [j for j in range(8) if j != i]
        same = [j for j in others if labels[j] == labels[i]]
        if same:
            z = torch.logsumexp(torch.stack([a[i] @ a[j] / 0.2 for j in others]), 0)
            losses.append(torch.stack([z - a[i] @ a[j] / 0.2 for j in same]).mean())
    assert float(supcon(features[:1], labels)) == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)


@pytest.mark.slow
def test_bad_input_is_refused(model: SentenceTransformer) -> None:
    rows = pairs(4)
    one = columns(model, rows["anchor"])
    three = columns(model, rows["anchor"], rows["positive"], rows["anchor"])
    with pytest.raises(NearfarError, match="anchor and positive"):
        ours.InfoNCELoss(model)(one)
    with pytest.raises(NearfarError, match="takes two"):
        ours.SigLipLoss(model)(three)
    with pytest.raises(NearfarError, match="label for each row"):
        ours.SupConLoss(model)(one, None)
    with pytest.raises(NearfarError, match="at least 1"):
        ours.InfoNCELoss(model, mini_batch_size=0)
    with pytest.raises(NearfarError, match="flattened inputs"):
        ours.InfoNCELoss(model, mini_batch_size=2)([{"offsets": torch.arange(2)}] * 2)
    with pytest.raises(NearfarError, match=r"4 queries and 3 documents.*relevant="):
        ours.RetrievalEvaluator(rows["anchor"], rows["positive"][:3])
    ours.RetrievalEvaluator(rows["anchor"], rows["positive"][:3], [0, 1, 2, 2])
    with pytest.raises(NearfarError, match="0 queries and 0 documents"):
        ours.RetrievalEvaluator([], [])
    shortened = theirs.MatryoshkaLoss(model, ours.InfoNCELoss(model, mini_batch_size=2), [8, 4])
    with pytest.raises(NearfarError, match=r"mini_batch_size=2 does not go with .* MatryoshkaLoss"):
        shortened(columns(model, rows["anchor"], rows["positive"]), None)
    batches = ours.HardBatches(np.eye(20, dtype=np.float32), k=5)
    with pytest.raises(NearfarError, match="20 rows and the data set 19"):
        batches(range(19), 4, False)
    with pytest.raises(NearfarError, match="no batches were made"):
        batches.hardness()
    batches(range(20), 4, False)
    read = pickle.loads(pickle.dumps(batches))  # what the trainer writes beside a checkpoint: no embeddings
    with pytest.raises(NearfarError, match="make it again"):
        read(range(20), 4, False)


def test_unique_batches_use_each_row_once_without_a_text_twice() -> None:
    rng = np.random.default_rng(0)
    rows = {"anchor": [f"a{i}" for i in rng.integers(0, 60, 200)], "positive": [f"p{i}" for i in range(200)]}
    sampler = ours.UniqueBatches()(rows, batch_size=16, drop_last=False, seed=3)
    first = list(sampler)
    assert sorted(i for batch in first for i in batch) == list(range(200))
    assert all(len({rows["anchor"][i] for i in batch}) == len(batch) for batch in first)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    common = {"anchor": ["a"] * 8 + list("bcdefghi")}
    with pytest.warns(UserWarning, match="have one of their texts|has one of their texts"):
        list(ours.UniqueBatches()(common, batch_size=8, drop_last=False))


# -- the trainer -------------------------------------------------------------------------------------------------


class Kept:
    """A batch sampler that keeps what it drew."""

    def __init__(self, made: Callable[..., Any]) -> None:
        self.made, self.drawn = made, []

    def __call__(self, dataset: Any, **arguments: Any) -> Any:
        sampler = self.made(dataset, **arguments)
        plain = type(sampler).__iter__
        drawn = self.drawn

        class Noted(type(sampler)):  # type: ignore[misc]
            def __iter__(self) -> Any:
                for batch in plain(self):
                    drawn.append((self.epoch, tuple(batch)))
                    yield batch

        sampler.__class__ = Noted
        return sampler

    def __getstate__(self) -> dict[str, Any]:
        return {}


def trainer_of(
    model: SentenceTransformer, folder: Path, loss: nn.Module, rows: dict[str, list[Any]], **options: Any
) -> Any:
    datasets = pytest.importorskip("datasets")
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    callbacks, evaluator = options.pop("callbacks", []), options.pop("evaluator", None)
    arguments = {"num_train_epochs": 2, "per_device_train_batch_size": 16, "learning_rate": 3e-3, "logging_steps": 2,
                 "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "seed": 1,
                 "dataloader_pin_memory": False, "warmup_steps": 0}  # fmt: skip
    return SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(output_dir=str(folder), **arguments | options),
        train_dataset=datasets.Dataset.from_dict(rows),
        loss=loss,
        evaluator=evaluator,
        callbacks=callbacks,
    )


@pytest.mark.slow
def test_a_watched_run_with_hard_batches(
    model: SentenceTransformer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, held_out = pairs(160), pairs(48, seed=5)
    batches = ours.HardBatches(model.encode(rows["anchor"]), k=16, hard_ratio=0.5)
    evaluator = ours.RetrievalEvaluator(held_out["anchor"], held_out["positive"], bootstrap=100)
    loss = ours.InfoNCELoss(model, temperature=0.1, learn_temperature=True, mini_batch_size=8)
    watch = ours.Watch(tmp_path / "run", evaluator=evaluator, loss=loss, batches=batches)
    trainer = trainer_of(
        model, tmp_path / "out", loss, rows, batch_sampler=batches, callbacks=[watch], evaluator=evaluator,
        eval_strategy="epoch", num_train_epochs=3,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] > 0
    assert loss.temperature != pytest.approx(0.1, abs=1e-6)
    assert batches.hardness().hard_share == pytest.approx(0.5, abs=0.05)
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    now, before = written["splits"]["val"]["MRR"], written["before_training"]["val"]["MRR"]
    assert now["value"] > before["value"]
    assert now["low"] <= now["value"] <= now["high"]
    assert 0 < now["chance"] < 0.2
    assert written["gain"]["val"]["MRR"]["low"] > 0
    log = [json.loads(line) for line in (tmp_path / "run" / "train_log.jsonl").read_text().splitlines()]
    steps = [each for each in log if each["kind"] == "step"]
    assert steps[0]["candidates"] == 16
    assert {"loss", "lr", "gradient_norm", "p_positive"} <= set(steps[0])
    assert sum(each["kind"] == "epoch" for each in log) == 3
    assert any(each.get("embeddings/moved", 0) > 0 for each in log if each["kind"] == "probe")
    assert trainer.evaluate()["eval_MRR"] == pytest.approx(evaluator.scores.values["MRR"])
    assert watch.diagnosis is not None
    assert watch.diagnosis.verdict in capsys.readouterr().out
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert yaml.safe_load(config)["sampler"]["hard_ratio"] == 0.5
    again = yaml.safe_load(config) | {"seed": 2}
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    (tmp_path / "again" / "config.yaml").write_text(yaml.safe_dump(again))
    compared = CliRunner().invoke(app, ["compare", str(tmp_path / "run"), str(tmp_path / "again")])
    assert compared.exit_code == 0, compared.output
    plans = [each for each in log if each["kind"] == "plan"]
    assert [each["epoch"] for each in plans] == [1, 2, 3]
    assert min(plans[0]["hardness"]) > 1.5 * plans[0]["hardness_random"]
    lines = (tmp_path / "out" / "eval" / "retrieval_estimates.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["estimates"]["R@1"]["chance"] == pytest.approx(1 / 48)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hard", "partition", "unique"])
def test_a_resumed_run_goes_on_with_the_batches_that_were_left(
    files: Path, tmp_path: Path, kind: str
) -> None:
    rows = pairs(96)
    points = np.random.default_rng(0).standard_normal((96, 8)).astype(np.float32)
    made: dict[str, Callable[[], Any]] = {
        "hard": lambda: ours.HardBatches(points, k=10),
        "partition": lambda: ours.PartitionBatches(points, k=10),
        "unique": lambda: ours.UniqueBatches(),
    }

    def run(name: str, resume: bool | str = False) -> tuple[Kept, SentenceTransformer, Any]:
        model = loaded(files)
        loss = ours.InfoNCELoss(model, temperature=0.1, learn_temperature=True)
        kept = Kept(made[kind]())
        watch = ours.Watch(tmp_path / f"{name} watched", loss=loss, quiet=True)
        trainer = trainer_of(
            model, tmp_path / name, loss, rows, batch_sampler=kept, callbacks=[watch], save_strategy="steps",
            save_steps=4, num_train_epochs=2,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return kept, model, loss

    whole, model, loss = run("whole")
    assert len(whole.drawn) == 12
    assert {epoch for epoch, _ in whole.drawn} == {0, 1}
    for step, skipped in ((4, 0), (8, 6)):  # in the middle of the first epoch, and of the second
        parts, again, loss_again = run("whole", str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert parts.drawn == whole.drawn[skipped:]
        assert loss_again.temperature == pytest.approx(loss.temperature, abs=1e-7)
        for a, b in zip(model.parameters(), again.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    log = [json.loads(x) for x in (tmp_path / "whole watched" / "train_log.jsonl").read_text().splitlines()]
    steps = [each["step"] for each in log if each["kind"] == "step"]
    assert steps == sorted(set(steps)) == list(range(2, 13, 2))


@pytest.mark.slow
def test_supcon_trains_on_labels(model: SentenceTransformer, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 48).tolist()
    texts = [" ".join(rng.choice(WORDS[12 * each : 12 * each + 12], 3)) for each in labels]
    loss = ours.SupConLoss(model)
    trainer = trainer_of(model, tmp_path, loss, {"text": texts, "label": labels}, num_train_epochs=3)
    trainer.train()
    losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.slow
def test_the_evaluator_agrees_with_theirs(model: SentenceTransformer) -> None:
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    rows = pairs(40)
    evaluator = ours.RetrievalEvaluator(rows["anchor"], rows["positive"], bootstrap=100, name="held_out")
    values = evaluator(model)
    assert evaluator.primary_metric == "held_out_MRR"
    ids = [str(i) for i in range(40)]
    host = InformationRetrievalEvaluator(
        dict(zip(ids, rows["anchor"], strict=True)), dict(zip(ids, rows["positive"], strict=True)),
        {i: {i} for i in ids}, mrr_at_k=[40], accuracy_at_k=[1, 5], show_progress_bar=False,
    )  # fmt: skip
    expected = host(model)
    assert values["held_out_MRR"] == pytest.approx(expected["cosine_mrr@40"], abs=1e-6)
    assert values["held_out_R@5"] == pytest.approx(expected["cosine_accuracy@5"], abs=1e-6)
    assert evaluator.scores is not None
    assert evaluator.scores.per_item["MRR"].shape == (40,)


@pytest.mark.slow
def test_gathered_rows_of_two_processes_have_the_gradient_of_one() -> None:
    verdict = verify.loss(losses_of_others.sentence_pairs)
    assert verdict.passed, str(verdict)
    assert verdict.values == pytest.approx([verdict.value] * 2)


def test_gathering_does_not_go_with_masks_of_texts() -> None:
    with pytest.raises(NearfarError, match="compared within a process"):
        ours.InfoNCELoss(nn.Identity(), gather_across_devices=True, mask_duplicates=True)
