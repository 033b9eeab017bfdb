"""Counterfactuals on frozen batches: exact where nothing changes, equal to explicit loops where something does."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console

from nearfar.config.compose import override_config
from nearfar.config.options import read_options, to_dict
from nearfar.config.registry import _REGISTERED, Registration
from nearfar.errors import NearfarError
from nearfar.lab.batch_evaluation import cosine
from nearfar.lab.counterfactuals import Counterfactual, Effect, Refused, standard
from nearfar.lab.table import describe_what_if, what_if_table
from nearfar.lab.what_if import WhatIf, what_if
from nearfar.training.checkpoint import Checkpoint
from nearfar.training.run_folder import RunFolder
from run_files import hashes
from toy_system import N
from what_if_toy import OptionsToy, ToyOptions, explicit_loss, options, trained

pytestmark = pytest.mark.slow  # real runs

NOTHING = Counterfactual("nothing")


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_REGISTERED, "toy", Registration("what_if_toy:OptionsToy", "what_if_toy:ToyOptions"))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return trained(tmp_path_factory.mktemp("runs") / "run", epochs=2, batch_size=16)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Its batch is the whole training set, so that what was planted is in it."""
    return trained(tmp_path_factory.mktemp("runs") / "whole", epochs=3, batch_size=N)


def only(result: WhatIf) -> Effect:
    assert not result.refused, result.refused
    (effect,) = result.effects
    return effect


def frozen(run: RunFolder, rows: int) -> tuple[Any, Any, Any]:
    """The model in float64 and evaluation mode, and the first ``rows`` rows of the epoch the checkpoint stands at."""
    config, state = run.config(), Checkpoint.load(run.path)
    system = OptionsToy(config)
    system.prepare(print)
    epoch = config.epochs - 1
    sampler = system.build_sampler()
    sampler.set_epoch(epoch)
    order = [position for batch in sampler for position in batch][:rows]
    system.datasets["train"].set_epoch(epoch)
    model = system.build_model()
    model.load_state_dict(state.model)
    x, y = system.datasets["train"].__getitems__(order)
    return model.double().eval(), x.double(), y.double()


# -- nothing ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batchnorm", [True, False])
def test_no_change_is_no_difference_to_the_last_bit(tmp_path: Path, training: bool, batchnorm: bool) -> None:
    run = trained(tmp_path / "run", epochs=1, batch_size=16, batchnorm=batchnorm)
    effect = only(what_if(run.path, counterfactuals=[NOTHING], batches=3, training=training))
    for change in (effect.change, effect.above_guessing_change):
        assert change is not None
        assert change.value == change.low == change.high == 0.0
    for row in effect.per_batch:
        assert row["gradient_cosine"] == row["gradient_ratio"] == row["embedding_cosine"] == 1.0
    assert effect.inert


def test_dropout_and_other_rows_can_be_seen(run: RunFolder) -> None:
    # Guards the test above: a difference would show.
    with_dropout = what_if(run.path, counterfactuals=[NOTHING], write=False)
    without = what_if(run.path, counterfactuals=[NOTHING], training=False, write=False)
    assert with_dropout.baseline.per_batch[0]["loss"] != without.baseline.per_batch[0]["loss"]
    other = only(what_if(run.path, counterfactuals=[Counterfactual("o", ("seed=9",), "own")], write=False))
    assert not other.inert
    assert other.embedding_cosine is None, "other rows have no embeddings in common"
    assert all(abs(row["gradient_cosine"] or 1.0) < 1 for row in other.per_batch)


def test_the_same_question_has_the_same_answer_and_moves_no_generator(run: RunFolder) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = what_if(run.path, write=False)
    assert torch.equal(before, torch.get_rng_state())
    assert what_if(run.path, write=False) == first


# -- against explicit loops ------------------------------------------------------------------------------------
def test_a_planted_false_negative_is_worth_what_the_loop_says(whole: RunFolder) -> None:
    threshold = 0.9995
    effect = only(
        what_if(
            whole.path,
            counterfactuals=[Counterfactual("f", (f"false_negative_threshold={threshold}",))],
            training=False,
            write=False,
        )
    )
    model, x, y = frozen(whole, N)
    unit = y / y.norm(dim=1, keepdim=True)
    close = (unit @ unit.T >= threshold).fill_diagonal_(False)
    assert close.sum() == 4, "the two planted pairs, in both orders"
    nothing = torch.zeros_like(close)
    before, after = (explicit_loss(model.a(x), model.b(y), 0.2, mask).item() for mask in (nothing, close))
    (row,) = effect.per_batch
    assert row["loss"] == pytest.approx(after, abs=1e-5)
    assert after < before - 1e-3
    whole_loss = what_if(whole.path, counterfactuals=[], training=False, write=False).baseline.loss
    assert whole_loss is not None
    assert row["loss"] - whole_loss.value == pytest.approx(after - before, abs=2e-6)
    assert effect.change is None, "guessing became cheaper too, so the losses are not subtracted"
    assert "guessing costs" in effect.not_comparable
    cheaper = 4 * (math.log(N - 1) - math.log(N)) / N
    assert effect.above_guessing_change is not None
    assert effect.above_guessing_change.value == pytest.approx(after - before - cheaper, abs=2e-6)


@pytest.mark.parametrize(
    ("override", "temperature", "symmetric"),
    [("temperature=0.1", 0.1, True), ("temperature=0.4", 0.4, True), ("loss.symmetric=false", 0.2, False)],
)
def test_loss_and_gradients_equal_a_direct_evaluation(
    whole: RunFolder, override: str, temperature: float, symmetric: bool
) -> None:
    tried = [Counterfactual("t", (override,))]
    effect = only(what_if(whole.path, counterfactuals=tried, training=False, write=False))
    model, x, y = frozen(whole, N)
    nothing = torch.zeros(N, N, dtype=torch.bool)
    a, b = model.a(x), model.b(y)
    learning = [*model.parameters(), a, b]
    losses = [explicit_loss(a, b, 0.2, nothing), explicit_loss(a, b, temperature, nothing, symmetric)]
    gradients = [torch.autograd.grad(loss, learning, retain_graph=True) for loss in losses]
    weights = [torch.cat([g.flatten() for g in part[:-2]]) for part in gradients]
    embeddings = [torch.cat([g.flatten() for g in part[-2:]]) for part in gradients]
    (row,) = effect.per_batch
    assert row["loss"] == pytest.approx(losses[1].item(), abs=1e-5)
    for name, (before, after) in {"gradient_cosine": weights, "embedding_cosine": embeddings}.items():
        assert row[name] == pytest.approx(torch.cosine_similarity(before, after, dim=0).item(), abs=1e-5)
    assert row["gradient_ratio"] == pytest.approx((weights[1].norm() / weights[0].norm()).item(), rel=1e-4)
    assert effect.change is not None
    assert effect.change.value == pytest.approx((losses[1] - losses[0]).item(), abs=2e-6)
    assert effect.not_comparable == ""


def test_a_double_batch_is_the_batch_and_the_next(run: RunFolder) -> None:
    tried = [Counterfactual("d", ("batch_size=32",), "double")]
    result = what_if(run.path, counterfactuals=tried, training=False, batches=99, write=False)
    effect = only(result)
    assert result.batches == 4, "70 rows: four full batches of 16"
    model, x, y = frozen(run, 32)
    loss = explicit_loss(model.a(x), model.b(y), 0.2, torch.zeros(32, 32, dtype=torch.bool)).item()
    # The noise of the toy's rows comes with their batch, and the first batch is the double batch's beginning.
    assert effect.per_batch[0]["loss"] == pytest.approx(loss, abs=0.02)
    assert effect.uniform_level is not None
    assert effect.uniform_level.value == pytest.approx(math.log(32), abs=1e-5)
    assert effect.change is None
    assert "guessing costs +0.69 nats" in effect.not_comparable


def test_the_first_rows_of_a_double_batch_keep_their_dropout(run: RunFolder) -> None:
    same = Counterfactual("loss of the first half alone", ("batch_size=32",), "double")

    class FirstHalf(OptionsToy):
        def loss_of(self, model: Any, embeddings: Any, batch: Any) -> Any:
            half = {name: rows[:16] for name, rows in embeddings.items()}
            return super().loss_of(model, half, (batch[0][:16], batch[1][:16]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("what_if_toy.OptionsToy", FirstHalf)
        patch.setattr("toy_system.ToyDataset.__getitems__", lambda self, p: (self.x[p], self.y[p]))
        effect = only(what_if(run.path, counterfactuals=[same], write=False))
    assert effect.change is not None
    assert effect.change.value == pytest.approx(0.0, abs=1e-6)
    assert all(row["gradient_cosine"] == pytest.approx(1.0, abs=1e-6) for row in effect.per_batch)


def test_a_batch_encoded_in_chunks_is_the_same_batch(tmp_path: Path) -> None:
    tried = [Counterfactual("c", ("trainer.cached_chunk=5",)), Counterfactual("t", ("temperature=0.1",))]
    run = trained(tmp_path / "run", epochs=1, batch_size=16)
    whole, sharper = what_if(run.path, counterfactuals=tried, training=False, write=False).effects
    for row in whole.per_batch:
        assert row["gradient_cosine"] == pytest.approx(1.0, abs=1e-6)
        assert row["embedding_cosine"] == pytest.approx(1.0, abs=1e-6)
    assert whole.change is not None
    assert whole.change.value == pytest.approx(0.0, abs=1e-6)
    chunked = trained(tmp_path / "chunked", epochs=1, batch_size=16, trainer__cached_chunk=5)
    state = Checkpoint.load(run.path)
    state.save(chunked.checkpoints / "last.ckpt")
    again = what_if(chunked.path, counterfactuals=tried[1:], training=False, write=False).effects[0]
    assert again.gradient_cosine is not None
    assert sharper.gradient_cosine is not None
    assert again.gradient_cosine.value == pytest.approx(sharper.gradient_cosine.value, abs=1e-6)


def test_schedules_of_the_loss_stand_at_the_epoch_of_the_checkpoint(run: RunFolder) -> None:
    def scheduled(self: OptionsToy, epoch: int, sampler: Any, say: Any) -> dict[str, Any]:
        self.loss.temperature = 0.2 + 0.1 * epoch
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("what_if_toy.OptionsToy.on_epoch", scheduled)
        result = what_if(run.path, counterfactuals=[NOTHING], write=False)
    assert result.temperature == pytest.approx(0.3), "the second epoch"
    assert only(result).inert


# -- what is evaluated and what is refused -------------------------------------------------------------------------
def test_every_standard_question_is_answered_or_refused_with_its_reason(run: RunFolder) -> None:
    result = what_if(run.path, overrides=[["hard_ratio=0.9", "sampler=hard"], ["lrr=1"]], write=False)
    names = [effect.counterfactual.name for effect in result.effects]
    assert names == [
        "other rows",
        "false negatives removed",
        "duplicates masked",
        "temperature halved",
        "temperature doubled",
        "hard batches",
        "partition batches",
        "batch doubled",
        "one direction",
        "hard_ratio=0.9 sampler=hard",
    ]
    (refused,) = result.refused
    assert refused.name == "lrr=1"
    assert "did you mean 'lr'" in refused.reason
    assert result.temperature == pytest.approx(0.2)


def test_refusals_give_reasons(tmp_path: Path) -> None:
    run = trained(
        tmp_path / "run",
        epochs=1,
        batch_size=N,
        false_negative_threshold=0.9,
        mask_duplicates=True,
        hardness_k=N + 30,
    )
    reasons = {each.name: each.reason for each in what_if(run.path, write=False).refused}
    assert "already so: false_negative_threshold=0.9" in reasons["false negatives removed"]
    assert "already so: mask_duplicates=true" in reasons["duplicates masked"]
    assert f"batch_size={2 * N} is larger than the training set of {N} items" in reasons["batch doubled"]
    assert f"hardness_k={N + 30}" in reasons["hard batches"]
    assert f"hardness_k={N + 30}" in reasons["partition batches"]
    assert len(reasons) == 5


def test_a_system_without_the_options_is_asked_what_it_can_be() -> None:
    result = standard(OmegaConf.create({"batch_size": 4, "seed": 1}))
    assert [each.name for each in result if isinstance(each, Counterfactual)] == [
        "other rows",
        "batch doubled",
    ]
    assert all("no option" in e.reason or "no choice" in e.reason for e in result if isinstance(e, Refused))


def test_a_learned_temperature_is_asked_where_it_stands() -> None:
    config = OmegaConf.create({"temperature": 0.07, "learn_temperature": True})
    overrides = [
        e.overrides for e in standard(config, 0.02) if isinstance(e, Counterfactual) and "temp" in e.name
    ]
    assert overrides == [
        ("temperature=0.01", "learn_temperature=false"),
        ("temperature=0.04", "learn_temperature=false"),
    ]


def test_hard_batches_are_drawn_although_the_run_is_in_its_random_phase(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", epochs=2, batch_size=10, sampler__name="hard", curriculum_epoch=1)
    names = {
        e.counterfactual.name: e.counterfactual.overrides for e in what_if(run.path, write=False).effects
    }
    assert names["partition batches"] == ("sampler=partition", "curriculum_epoch=0")
    assert "random batches" in names


def test_wrong_arguments_and_changed_data_are_errors(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(NearfarError, match="batches=0"):
        what_if(run.path, batches=0)
    with pytest.raises(NearfarError, match="last or best"):
        what_if(run.path, checkpoint="first")
    with pytest.raises(NearfarError, match="no such run"):
        what_if(tmp_path / "nothing")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("toy_system.ToySystem.layout", lambda self: {"data_hash": "other"})
        with pytest.raises(NearfarError, match="data differ from those the run was trained on"):
            what_if(run.path)


# -- what is left behind ---------------------------------------------------------------------------------------
def test_what_if_json_is_all_that_is_written(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", epochs=1, batch_size=16)
    before = hashes(tmp_path)
    result = what_if(run.path, checkpoint="best", batches=2)
    after = hashes(tmp_path)
    assert after.keys() - before.keys() == {"run/what_if.json"}
    assert {name: after[name] for name in before} == before
    content = json.loads((run.path / "what_if.json").read_text())
    assert content["checkpoint"] == "best.ckpt"
    assert content["batches"] == 2
    assert len(content["effects"]) == len(result.effects) == 9
    assert {"loss", "uniform_level", "floor", "p_positive", "hardest_share"} <= content["effects"][0][
        "per_batch"
    ][0].keys()


def test_prescriptions_are_asked_too(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", epochs=1, batch_size=16)
    findings = [
        {"id": "a", "severity": "note", "override": "hard_ratio='0.3 -> 0.6' sampler=hard"},
        {"id": "b", "severity": "error", "override": "temperature=0.1"},
        {"id": "c", "severity": "error", "override": ""},
    ]
    run.write_json("doctor.json", {"findings": findings})
    result = what_if(run.path, write=False)
    names = [effect.counterfactual.name for effect in result.effects]
    assert names[-2:] == ["prescribed: b", "prescribed: a"]
    assert result.effects[-1].counterfactual.overrides == ("hard_ratio=0.3 -> 0.6", "sampler=hard")


def test_the_table_fits_and_the_words_name_what_is_not_comparable(run: RunFolder) -> None:
    result = what_if(run.path, overrides=[["nonsense"]], write=False)
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(what_if_table(result))
    text = console.export_text()
    assert "…" not in text
    assert "batch_size=32" in text
    words = "\n".join(describe_what_if(result))
    assert "batch doubled: guessing costs +0.69 nats" in words
    assert "Not evaluated, nonsense: 'nonsense' is not of the form key=value." in words


# -- altered configurations ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("temperatur=1", "did you mean 'temperature'"),
        ("sampler=hrad", "did you mean 'hard'"),
        ("samplr=hard", "did you mean 'sampler'"),
        ("temperature", "not of the form"),
        ("name=x", "no part of what a run computes"),
        ("temperature=[1", "cannot be read"),
    ],
)
def test_what_cannot_be_altered(override: str, message: str) -> None:
    with pytest.raises(NearfarError, match=message):
        override_config(options(), [override])


def test_altered_copies_and_keeps_the_record_of_overrides() -> None:
    config = options(overrides=["experiment=toy", "lr=1"])
    result = override_config(config, ["lr=2", "hard_ratio=0.3 -> 0.6", "sampler=hard"])
    assert result.overrides == ["experiment=toy", "lr=2", "hard_ratio=0.3 -> 0.6", "sampler=hard"]
    assert (result.lr, result.hard_ratio, result.sampler) == (
        2,
        "0.3 -> 0.6",
        {"name": "hard", "order": "level", "neighbors": None},
    )
    assert config.lr == 0.01
    old = to_dict(config)
    del old["trainer"]["max_steps"]
    assert read_options(ToyOptions, old, saved=True).trainer.max_steps is None, "it came after the run"
    with pytest.raises(NearfarError, match=r"the option trainer\.max_steps is missing"):
        read_options(ToyOptions, old)


def test_gradients_are_compared_by_name_over_the_rows_of_both() -> None:
    """A batch may lack an embedding that the other has, such as a view of some items alone."""
    a = {"['x']": torch.tensor([[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]]), "['moved']": torch.ones(3, 2)}
    b = {"['x']": torch.tensor([[1.0, 0.0], [0.0, 0.0]])}
    assert cosine(a, b) == pytest.approx(1 / 5**0.5)
    assert math.isnan(cosine(a, {"['y']": torch.ones(1)}))
