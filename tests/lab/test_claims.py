"""The ledger of claims: what it refuses, how verdicts fall, and that every experiment can come out otherwise."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from claims import hard_batches
from claims.experiments import (
    class_shares,
    curriculum_switch,
    fixed_threshold,
    focal_share,
    hard_gain,
    mrr_bounds,
    near_duplicates,
    positives_per_anchor,
    small_k,
    spatial_batches,
    supcon_metric,
    wasserstein_bias,
)
from claims.pairs import COPIES, clustered_pairs
from claims.training import encoder, probe
from nearfar.batching import HardNegativeSampler, Neighbors, check_harder_than_random, nearest_neighbors
from nearfar.cli import app
from nearfar.errors import NearfarError
from nearfar.lab.claims import Claim, Condition, choose, combine, read_ledger
from nearfar.lab.claims.ledger import Share, load, names
from nearfar.lab.claims.run import Outcome, run_claim, run_claims
from nearfar.metrics import few_runs, wilson

pytestmark = pytest.mark.slow  # real runs

ENTRY: dict[str, Any] = {
    "id": "one",
    "statement": "Guessing is easy.",
    "source": "nobody",
    "check": {"verdict": "OK", "found": "seen"},
    "experiment": "loss_ceiling",
    "options": {"loss": 3.0, "batch_size": 32},
    "criterion": {"above": {"less_than": 0}},
    "prediction": {"words": "It is.", "criterion": {"above": {"less_than": 0}}},
}
LEDGER = {claim.id: claim for claim in read_ledger()}
TESTED = [claim for claim in LEDGER.values() if claim.experiment and not claim.waits_for]


def ledger(tmp_path: Path, *entries: Any) -> Path:
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(list(entries)))
    return file


# -- the ledger ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experiment": "los_ceiling"}, r"own.yaml, claim 'one': .*did you mean 'loss_ceiling'"),
        ({"statement": None}, "has no 'statement'"),
        ({"criterion": {}}, "has no 'criterion'"),
        ({"prediction": None}, "has no 'prediction'"),
        ({"check": {"verdict": "FINE", "found": "x"}}, "one of OK, WRONG"),
        ({"check": "OK"}, "verdict .* and found"),
        ({"prediction": {"words": "x"}}, "takes words and criterion"),
        ({"sedes": 3}, "did you mean 'seeds'"),
        ({"seeds": 1}, "at least 2"),
        ({"seeds": "many"}, "number of seeds"),
        ({"options": [1]}, "name: value"),
        ({"criterion": {"above": "> 0"}}, r"on 'above' is '> 0'; write one condition"),
        ({"criterion": {"above": {"more_than": 0}}}, "no condition 'more_than'"),
        ({"criterion": {"above": {"between": 0}}}, "takes two numbers"),
        ({"criterion": {"above": {"between": [2, 1]}}}, "holds nothing"),
        ({"criterion": {"above": {"less_than": math.inf}}}, "takes one number"),
        ({"criterion": {False: {"less_than": 0}}}, "put it in quotes"),
        ({"waits_for": "a system", "seeds": 3}, "leave one of the two out"),
    ],
)
def test_a_faulty_entry_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(NearfarError, match=message):
        read_ledger([ledger(tmp_path, ENTRY | change)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": {"loss": 3.0, "batchsize": 32}}, "did you mean 'batch_size'"),
        ({"criterion": {"abov": {"less_than": 0}}}, "did you mean 'above'"),
        ({"seeds": 3}, "is a computation; leave seeds out"),
        ({"experiment": "small_k", "options": {}, "criterion": {"greedy": {"less_than": 0}},
          "prediction": {"words": "x", "criterion": {"level": {"less_than": 0}}}}, "at least 2"),
    ],
)  # fmt: skip
def test_what_an_experiment_does_not_have_is_found_before_any_runs(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    begun: list[Claim] = []
    claims = read_ledger([ledger(tmp_path, ENTRY | {"id": "first"}, ENTRY | change)])
    with pytest.raises(NearfarError, match=message):
        run_claims(claims, before=begun.append)
    assert not begun


def test_files_that_are_no_ledger(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    for text, message in (
        ("a: [", "not valid YAML"),
        ("a: 1", "no list"),
        ("[]", "no list"),
        ("[5]", "is 5"),
    ):
        file.write_text(text)
        with pytest.raises(NearfarError, match=message):
            read_ledger([file])
    with pytest.raises(NearfarError, match="no such file"):
        read_ledger([tmp_path / "none.yaml"])
    with pytest.raises(NearfarError, match="two claims 'one'"):
        read_ledger([ledger(tmp_path, ENTRY, ENTRY)])


def test_choose_by_id_row_and_group() -> None:
    claims = list(LEDGER.values())
    row = ["supcon-lacks-positives", "few-positives-fail"]
    row += ["supcon-fails-on-relations", "too-few-positives-on-relations"]
    assert [c.id for c in choose(claims, ["S0-5"])] == row
    assert {c.group for c in choose(claims, ["computed"])} == {"computed"}
    assert len(choose(claims, [])) == len(claims)
    with pytest.raises(NearfarError, match="did you mean 'small-k-is-harder'"):
        choose(claims, ["small-k-harder"])


# -- verdicts ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "limits", "low", "high", "verdict"),
    [
        ("greater_than", [0], 0.1, 0.2, "supported"),
        ("greater_than", [0], 0.0, 0.2, "not distinguishable"),
        ("greater_than", [0], -0.2, 0.0, "refuted"),
        ("greater_than", [0], 0.0, 0.0, "refuted"),
        ("less_than", [0], -0.2, -0.1, "supported"),
        ("less_than", [0], -0.2, 0.1, "not distinguishable"),
        ("less_than", [0], 0.0, 0.1, "refuted"),
        ("between", [0.11, 0.18], 0.11, 0.18, "supported"),
        ("between", [0.11, 0.18], 0.10, 0.12, "not distinguishable"),
        ("between", [0.11, 0.18], 0.05, 0.30, "not distinguishable"),
        ("between", [0.11, 0.18], 0.19, 0.30, "refuted"),
        ("between", [0.11, 0.18], 0.00, 0.10, "refuted"),
        ("outside", [-0.1, 0.1], 0.2, 0.3, "supported"),
        ("outside", [-0.1, 0.1], -0.3, -0.2, "supported"),
        ("outside", [-0.1, 0.1], -0.1, 0.1, "refuted"),
        ("outside", [-0.1, 0.1], -0.3, 0.3, "not distinguishable"),
        ("greater_than", [0], -math.inf, math.inf, "not distinguishable"),
        ("between", [0, 1], math.nan, math.nan, "not distinguishable"),
    ],
)
def test_condition(kind: str, limits: list[float], low: float, high: float, verdict: str) -> None:
    assert Condition.read({kind: limits}, "here").judge(low, high) == verdict


def test_combined_verdicts() -> None:
    yes, no, open_ = "supported", "refuted", "not distinguishable"
    assert combine([yes, yes]) == yes
    assert combine([yes, no, open_]) == no
    assert combine([yes, open_]) == open_


def test_claim_and_prediction_are_two_answers(tmp_path: Path) -> None:
    wrong = {"words": "x", "criterion": {"candidates": {"greater_than": 1000}}}
    outcome = run_claim(read_ledger([ledger(tmp_path, ENTRY | {"prediction": wrong})])[0])
    assert (outcome.verdict, outcome.prediction_held) == ("supported", "no")
    wrong_claim = {"criterion": {"above": {"greater_than": 0}}}
    outcome = run_claim(read_ledger([ledger(tmp_path, ENTRY | wrong_claim)])[0])
    assert (outcome.verdict, outcome.prediction_held) == ("refuted", "yes")


# -- all experiments, in small -------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    before = torch.random.get_rng_state()
    results = {outcome.claim.id: outcome for outcome in run_claims(TESTED, quick=True)}
    assert torch.equal(torch.random.get_rng_state(), before)  # nobody draws from the global generator
    return results


def test_every_claim_runs_quickly(outcomes: dict[str, Outcome]) -> None:
    assert len(TESTED) == len(outcomes) > 50
    for name, outcome in outcomes.items():
        for each in outcome.estimates.values():
            assert math.isfinite(each.value), name
            assert not each.low > each.value > each.high, name


#: one claim of each experiment and its options: claims that ask the same share what it gave
DIFFERENT = {repr((c.experiment, sorted({**c.options, **c.quick}.items()))): c for c in TESTED}


@pytest.mark.parametrize("claim", DIFFERENT.values(), ids=lambda c: c.id)
def test_every_experiment_repeats(claim: Claim, outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[claim.id]
    again = load(claim.experiment)
    last = again.run(**({"seed": 1} if again.seeded else {}), **claim.options | claim.quick)  # type: ignore[operator]
    assert {name: values[-1] for name, values in outcome.per_seed.items()} == {
        name: value.hits / value.n if isinstance(value, Share) else value for name, value in last.items()
    }


def test_every_experiment_is_used() -> None:
    assert {claim.experiment for claim in LEDGER.values() if claim.experiment} == set(names())


def test_intervals_are_those_of_the_metrics(outcomes: dict[str, Outcome]) -> None:
    floor = outcomes["contrastive-has-room"]
    estimate = floor.estimates["floor"]
    assert (estimate.low, estimate.high) == few_runs(floor.per_seed["floor"])
    share = outcomes["fixed-threshold-has-no-anchors"].estimates["empty_fixed"]
    assert share.n == 40
    assert (share.low, share.high) == wilson(share.value, 40)
    computed = outcomes["class-ratio"].estimates["computed"]
    assert computed.low == computed.value == computed.high == 13071 / 1680


def test_one_seed_decides_nothing() -> None:
    outcome = run_claim(LEDGER["contrastive-has-room"], seeds=1, quick=True)
    assert outcome.verdict == outcome.prediction_held == "not distinguishable"


# -- the mechanism of each experiment: broken, it must show --------------------------------------------------
def test_small_k_needs_the_right_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"items": 1200, "clusters": 12, "large_k": 100}
    assert small_k.run(0, **options)["level"] > 0.01
    # Nearest and further neighbours exchanged: the "small" list is then the far one.
    turned = lambda rows, k: Neighbors(nearest_neighbors(rows, k).indices[:, ::-1].copy())  # noqa: E731
    monkeypatch.setattr(small_k, "nearest_neighbors", turned)
    assert small_k.run(0, **options)["level"] < 0


def test_a_misaligned_list_is_no_harder_than_random() -> None:
    pairs, _ = clustered_pairs(0, 600, 10, clusters=20, spread=0.3, noise=0.2)
    near = nearest_neighbors(pairs.text, 20)
    for neighbors, harder in ((near, True), (hard_gain.misaligned(near, 0), False)):
        sampler = HardNegativeSampler(neighbors, 32, 0.5, 20)
        assert check_harder_than_random(sampler, pairs.text, raises=False).harder is harder


def test_loss_rises_for_the_hardness_and_not_for_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {
        "items": 320,
        "test": 50,
        "clusters": 10,
        "switch": 3,
        "further": 1,
        "hardness_k": 20,
    }
    assert curriculum_switch.run(0, curriculum_switch.Settings(**options))["loss_rise"] > 0.3
    other = lambda rows, k: hard_gain.misaligned(nearest_neighbors(rows, k), 0)  # noqa: E731
    monkeypatch.setattr(hard_batches, "nearest_neighbors", other)
    assert curriculum_switch.run(0, curriculum_switch.Settings(**options))["loss_rise"] < 0.1


def test_near_duplicates_are_near_and_nothing_else_is() -> None:
    pairs, unseen = clustered_pairs(3, 400, 100, clusters=10, spread=0.3, noise=0.2, duplicates=0.5)
    cosine = (pairs.text @ pairs.text.T).fill_diagonal_(-1)
    assert ((cosine >= 0.97).sum(1) == COPIES - 1).sum() == 200
    assert (cosine >= 0.97).sum() == 200 * (COPIES - 1)
    assert ((unseen.text @ pairs.text.T) >= 0.97).double().mean() < 1e-3
    small: dict[str, Any] = {"items": 400, "test": 50, "clusters": 10, "epochs": 1, "hardness_k": 20}
    hit = {
        many: near_duplicates.run(0, near_duplicates.Settings(**small, many=many))["anchors_hit"]
        for many in (0.0, 0.6)
    }
    assert hit[0.0] == 0.0
    assert hit[0.6] > 0.1


def test_class_only_retrieves_what_the_class_sizes_allow() -> None:
    counts = [round(10_000 * share) for share in supcon_metric.CLASSES]
    expected = class_shares.run(counts=counts, batch_size=24)["class_only"]
    computed = supcon_metric.run(0, items=240, test=2400, epochs=1)
    assert computed["pair_class_only"] == pytest.approx(expected, abs=0.02)
    # An encoder trained on the pair retrieves it; one trained without it does not.
    assert computed["pair_infonce"] > computed["pair_supcon"]


def test_positives_are_those_asked_for() -> None:
    small: dict[str, Any] = {"classes": 20, "per_class": 18, "test": 100, "batch_size": 30}
    computed = positives_per_anchor.run(0, **small, positives=[1, 5], epochs=4)
    assert computed["realised_fewest"] == pytest.approx(1, abs=0.05)
    assert computed["realised_most"] == pytest.approx(5, abs=0.05)
    assert computed["accuracy_fewest"] > computed["untrained"]  # it is the training that is measured


def test_compact_batches_bring_neighbours_and_shuffled_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = spatial_batches.run(0, side=16, epochs=1)
    assert computed["reached_compact"] > 0.99
    assert computed["reached_random"] < 0.8
    whole = spatial_batches.grid_neighbors(16)
    shuffled = whole[torch.randperm(256, generator=torch.Generator().manual_seed(0))]
    monkeypatch.setattr(spatial_batches, "grid_neighbors", lambda side: shuffled)
    broken = spatial_batches.run(0, side=16, epochs=1)
    assert broken["reached_compact"] < 0.8


def test_grid_neighbours_against_a_loop() -> None:
    computed = spatial_batches.grid_neighbors(5)
    for row in range(5):
        for column in range(5):
            steps = ((0, 1), (1, 0), (0, -1), (-1, 0))
            places = [(row + r, column + c) for r, c in steps]
            wanted = [5 * r + c if 0 <= r < 5 and 0 <= c < 5 else -1 for r, c in places]
            assert computed[5 * row + column].tolist() == wanted


def test_a_threshold_among_the_scores_has_anchors() -> None:
    low, high = (fixed_threshold.run(0, batches=20, threshold=t) for t in (0.5, 0.95))
    assert low["empty_fixed"] == Share(20, 20)
    assert high["empty_fixed"].hits < 8  # type: ignore[union-attr]
    # Without noise in the measurement the ranking is the same again.
    assert fixed_threshold.run(0, batches=20, measurement=0.0)["stable_anchors"] == 1.0


def test_without_focus_focal_is_cross_entropy() -> None:
    computed = focal_share.run(0, labels=500, gamma=0.0)
    assert computed["focal_minus_ce"] == computed["focal_alpha_minus_ce"] == 0.0
    assert computed["gradient_ratio"] == pytest.approx(1.0)
    assert focal_share.run(0, labels=500)["focal_minus_ce"] < 0


def test_gap_of_small_groups_against_sorted_scores() -> None:
    computed = wasserstein_bias.run(0, small=[3, 3], draws=200, queue_size=64)
    rng = np.random.default_rng(0)
    # equal sizes: sorted scores face each other
    lower, upper = (np.sort(0.1 * rng.standard_normal((20_000, 3))) for _ in range(2))
    assert computed["small"] == pytest.approx(np.maximum(0, upper - lower).mean(), rel=0.15)
    assert computed["queued"] < computed["small"] / 2
    assert computed["large"] < computed["small"] / 2


def test_mrr_bounds_hold_and_are_reached() -> None:
    rng = np.random.default_rng(0)
    gallery = 40
    for _ in range(50):
        ranks = rng.integers(1, gallery + 1, size=30)
        hits = {"hits_1": float((ranks == 1).mean()), "hits_k": float((ranks <= 5).mean()), "k": 5}
        computed = mrr_bounds.run(mrr=float((1 / ranks).mean()), gallery=gallery, **hits)  # type: ignore[arg-type]
        assert computed["from_lowest"] >= -1e-12
        assert computed["to_highest"] >= -1e-12
        worst = np.where(ranks == 1, 1, np.where(ranks <= 5, 5, gallery))
        best = np.where(ranks == 1, 1, np.where(ranks <= 5, 2, 6))
        assert (1 / worst).mean() == pytest.approx(computed["lowest"])
        assert (1 / best).mean() == pytest.approx(computed["highest"])


def test_class_shares_against_simulation() -> None:
    counts = [60, 30, 10]
    computed = class_shares.run(counts=counts, batch_size=12)
    rng = np.random.default_rng(0)
    batches = rng.choice(3, p=np.array(counts) / 100, size=(20_000, 12))
    present = np.mean([len(set(batch)) for batch in batches.tolist()])
    assert computed["class_only"] == pytest.approx(present / 12, abs=0.003)
    same = (batches[:, 1:] == batches[:, :1]).mean()
    assert computed["same_class"] == pytest.approx(same, abs=0.005)


def test_probe_is_ridge_regression() -> None:
    rng = np.random.default_rng(0)
    x, label = rng.standard_normal((200, 6)), rng.integers(3, size=200)
    x[:, 0] += label
    rows = np.c_[x, np.ones(200)]
    # The penalty as further rows of a plain least-squares problem.
    top, wanted = (
        np.r_[rows[:150], np.sqrt(0.2 * 150) * np.eye(7)],
        np.r_[np.eye(3)[label[:150]], np.zeros((7, 3))],
    )
    weights = np.linalg.lstsq(top, wanted, rcond=None)[0]
    right = ((rows[150:] @ weights).argmax(1) == label[150:]).mean()
    assert 0.4 < right < 0.9
    x_, label_ = torch.tensor(x), torch.tensor(label)
    assert probe(x_[:150], label_[:150], x_[150:], label_[150:], ridge=0.2) == pytest.approx(right)


def test_encoders_of_one_seed_are_the_same() -> None:
    one, same, other = (encoder(seed, 4, 3).layers[0].weight for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


# -- the terminal --------------------------------------------------------------------------------------------
def test_terminal_runs_judges_and_writes(tmp_path: Path) -> None:
    arguments = ["claims", "S4-3", "S4-10", "S1-4", "--quick", "--output", str(tmp_path / "out")]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    for part in ("sixty-four", "refuted", "waits for", "no results"):
        assert part in shown.output
    record = json.loads((tmp_path / "out" / "claims.json").read_text())
    assert [c["id"] for c in record["claims"]] == ["contrastive-has-room", "sixty-four-times"]
    assert [c["id"] for c in record["waiting"]] == ["gap-decreased"]
    second, first = record["claims"]
    assert first["quantities"]["loss_ratio"]["value"] == pytest.approx(637.37, abs=0.01)
    assert second["quick"]
    assert second["options"]["batch_size"] == 32  # defaults too
    assert len(second["quantities"]["floor"]["per_seed"]) == second["seeds"] == 2
    assert second["prediction"]["held"] in ("yes", "no", "not distinguishable")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["claims.json"]


def test_terminal_takes_a_ledger_of_ones_own(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["claims", "--ledger", str(ledger(tmp_path, ENTRY))])
    assert "supported" in shown.output
    refused = CliRunner().invoke(app, ["claims", "smal-k-is-harder"])
    assert isinstance(refused.exception, NearfarError)
    assert "did you mean 'small-k-is-harder'" in str(refused.exception)
    assert isinstance(CliRunner().invoke(app, ["claims", "S4-10", "--seeds", "0"]).exception, NearfarError)


def test_the_ledger_in_the_documentation_runs(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "claims.md").read_text()
    file = tmp_path / "own.yaml"
    file.write_text(page.split("```yaml\n")[1].split("```")[0])
    outcome = run_claim(read_ledger([file])[0], seeds=2)
    assert outcome.estimates["level"].value > 0


def test_list_is_light_and_whole() -> None:
    code = (
        "import sys; sys.argv = ['nearfar', 'claims', '--list']\nfrom nearfar.cli import app\n"
        "try:\n    app()\nexcept SystemExit: pass\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("False False")
    assert f"{len(LEDGER)} claims" in done.stdout


def test_claims_on_real_data_wait_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = ledger(tmp_path, {**ENTRY, "needs": "boxes"})
    monkeypatch.delenv("NEARFAR_DATA", raising=False)
    (claim,) = read_ledger([file])
    assert "the folder boxes below NEARFAR_DATA" in claim.waits_for
    assert run_claims([claim]) == []
    (tmp_path / "boxes").mkdir()
    monkeypatch.setenv("NEARFAR_DATA", str(tmp_path))
    (claim,) = read_ledger([file])
    assert not claim.waits_for
    assert len(run_claims([claim])) == 1
    with pytest.raises(NearfarError, match="needs is 3"):
        read_ledger([ledger(tmp_path, {**ENTRY, "needs": 3})])


def test_without_a_clone_the_command_tells_where_the_ledger_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nearfar.__file__", str(tmp_path / "lib" / "python" / "nearfar" / "__init__.py"))
    with pytest.raises(NearfarError, match=r"not part of the installed package.*Clone it"):
        read_ledger()


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe\x00", b"[" * 100_000, b"- &a [*a]\n", b"!!python/object/apply:os.getpid []", b"17", b""],
)
def test_a_hostile_ledger_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "own.yaml"
    file.write_bytes(content)
    with pytest.raises(NearfarError, match=r"own\.yaml"):
        read_ledger([file])
