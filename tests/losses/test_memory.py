"""The cross-batch memory against a list of rows, its state, and its use in a loss."""

from __future__ import annotations

import copy
import os
import signal
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from nearfar.config.compose import compose_config
from nearfar.data.batch import Batch
from nearfar.errors import NearfarError
from nearfar.launch import run_one
from nearfar.losses import InfoNCELoss
from nearfar.losses.memory import CrossBatchMemory
from nearfar.serving import load
from nearfar.systems import build_system
from nearfar.systems.molecules.system import MoleculeSystem
from nearfar.training.checkpoint import Checkpoint
from nearfar.training.run_folder import RunFolder
from processes import run_until_killed
from tiny_molecules import split_files

DIM = 3


def batch(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, DIM, generator=generator), torch.randint(9, (n,), generator=generator)


def filled(pushes: int, size: int = 7) -> CrossBatchMemory:
    memory = CrossBatchMemory(size, DIM, ids=True)
    for step in range(pushes):
        memory.push(*batch(1 + step % 4, step))
    return memory


@pytest.mark.parametrize("size", [1, 2, 5, 8, 64])
@pytest.mark.parametrize("counts", [[1] * 12, [3, 3, 3, 3], [5, 1, 8, 2, 0, 7], [20], [2, 17, 3]], ids=str)
def test_it_is_a_ring_of_single_rows(size: int, counts: list[int]) -> None:
    memory = CrossBatchMemory(size, DIM, ids=True)
    places: list[tuple[torch.Tensor, int, int] | None] = [None] * size
    newest: deque[torch.Tensor] = deque(maxlen=size)
    place = 0
    for step, count in enumerate(counts):
        features, ids = batch(count, step)
        memory.push(features, ids)
        for row, number in zip(features, ids.tolist(), strict=True):
            places[place] = (row, number, step)
            newest.append(row)
            place = (place + 1) % size
        kept = [entry for entry in places if entry is not None]
        assert memory.filled == len(kept) == min(size, sum(counts[: step + 1]))
        assert memory.pointer == place
        assert torch.equal(memory.rows(), torch.stack([entry[0] for entry in kept]))
        assert memory.ids().tolist() == [entry[1] for entry in kept]
        assert memory.age().tolist() == [step + 1 - entry[2] for entry in kept]
    assert sorted(memory.rows().tolist()) == sorted(row.tolist() for row in newest)


def test_nothing_is_handed_out_before_it_was_pushed() -> None:
    memory = CrossBatchMemory(100, DIM, ids=True)
    assert memory.rows().shape == (0, DIM)
    assert memory.ids().shape == memory.age().shape == (0,)
    assert memory.same(torch.arange(4)).shape == (4, 0)
    memory.push(*batch(5, 0))
    assert (memory.rows() != 0).all()
    assert memory.rows().shape == (5, DIM)


@pytest.mark.parametrize("k", [0, 1, 3, 8])
def test_state_goes_round_bit_for_bit(k: int, tmp_path: object) -> None:
    n = 9
    whole, part = filled(n), filled(k)
    torch.save(part.state_dict(), f"{tmp_path}/memory.pt")
    rest = CrossBatchMemory(7, DIM, ids=True)
    rest.push(*batch(6, 99))  # what a load must replace
    rest.load_state_dict(torch.load(f"{tmp_path}/memory.pt", weights_only=True))
    for step in range(k, n):
        rest.push(*batch(1 + step % 4, step))
    one, other = whole.state_dict(), rest.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert torch.equal(whole.rows(), rest.rows())
    assert torch.equal(whole.age(), rest.age())
    assert (whole.pointer, whole.filled) == (rest.pointer, rest.filled)
    assert k == 0 or not torch.equal(filled(n - 1).rows(), whole.rows()), "the comparison can fail"


def test_state_of_another_size_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        CrossBatchMemory(8, DIM, ids=True).load_state_dict(filled(3).state_dict())


def test_a_copy_goes_its_own_way() -> None:
    memory = filled(5)
    other = copy.deepcopy(memory)
    before = memory.rows()
    other.push(*batch(2, 7))
    assert torch.equal(memory.rows(), before)
    assert memory.pointer != other.pointer


def test_no_gradient_and_no_change_of_what_a_loss_saw() -> None:
    memory = CrossBatchMemory(4, DIM)
    z = torch.randn(4, DIM, requires_grad=True)
    memory.push(z)
    negatives = memory.rows()
    assert not negatives.requires_grad
    loss = (z @ negatives.T).exp().sum()
    expected = torch.autograd.grad((z @ negatives.clone().T).exp().sum(), z)[0]
    memory.push(torch.randn(3, DIM))
    loss.backward()
    assert torch.equal(z.grad, expected)  # type: ignore[arg-type]


def test_rows_with_the_id_of_a_query() -> None:
    memory = filled(6)
    ids = torch.tensor([0, 3, 8, 8])
    expected = [[number == own for own in memory.ids().tolist()] for number in ids.tolist()]
    assert memory.same(ids).tolist() == expected
    assert memory.same(ids).any()
    assert not memory.same(ids).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_moves_with_the_module(dtype: torch.dtype) -> None:
    memory = filled(4).to(dtype)
    assert memory.rows().dtype == dtype
    assert memory.ids().dtype == torch.int64
    features, ids = batch(2, 50)
    at = memory.pointer
    memory.push(features, ids)
    assert torch.equal(memory.rows()[at], features[0].to(dtype))
    state = memory.state_dict()
    again = CrossBatchMemory(7, DIM, ids=True).to(dtype)
    again.load_state_dict(state)
    assert torch.equal(again.rows(), memory.rows())


def test_half_precision_embeddings_are_kept_in_the_precision_of_the_memory() -> None:
    memory = CrossBatchMemory(4, DIM)
    features = torch.randn(3, DIM).half()
    memory.push(features)
    assert memory.rows().dtype == torch.float32
    assert torch.equal(memory.rows(), features.float())


def test_the_whole_state_is_in_the_state_of_a_model() -> None:
    model = torch.nn.ModuleDict({"encoder": torch.nn.Linear(2, DIM), "memory": filled(5)})
    assert sum(key.startswith("memory.") for key in model.state_dict()) == 4
    assert not any("memory" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("features", "ids", "message"),
    [
        (torch.zeros(2, 4), torch.arange(2), r"keeps rows \(n, 3\)"),
        (torch.zeros(3), torch.arange(3), r"keeps rows \(n, 3\)"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.arange(2), "floating point"),
        (torch.zeros(2, 3), None, "keeps ids, and none were pushed"),
        (torch.zeros(2, 3), torch.arange(3), "2 rows need one whole number each"),
        (torch.zeros(2, 3), torch.full((2,), 0.5), "whole numbers are needed"),
        (torch.tensor([[0.0] * 3, [torch.nan] * 3]), torch.arange(2), "1 of 2 rows, first in row 1"),
        (torch.tensor([[torch.inf, 0.0, 0.0]]), torch.arange(1), "not finite in 1 of 1"),
    ],
)
def test_what_cannot_be_pushed(features: torch.Tensor, ids: torch.Tensor | None, message: str) -> None:
    memory = filled(3)
    before = memory.state_dict()
    before = {key: value.clone() for key, value in before.items()}
    with pytest.raises(NearfarError, match=message):
        memory.push(features, ids)
    assert all(torch.equal(before[key], value) for key, value in memory.state_dict().items())


def test_misuse() -> None:
    with pytest.raises(NearfarError, match="size is 0"):
        CrossBatchMemory(0, 3)
    plain = CrossBatchMemory(2, DIM)
    with pytest.raises(NearfarError, match="keeps no ids"):
        plain.push(torch.zeros(1, DIM), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(NearfarError, match="keeps no ids"):
        plain.ids()
    with pytest.raises(NearfarError, match="one whole number for each query"):
        filled(1).same(torch.zeros(2, 2, dtype=torch.int64))


def test_in_infonce_a_memory_is_a_larger_set_of_candidates() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, earlier = (torch.randn(n, DIM, generator=generator, dtype=torch.float64) for n in (4, 4, 6))
    memory = CrossBatchMemory(9, DIM, ids=True).double()
    memory.push(earlier, torch.tensor([0, 1, 2, 3, 8, 9]))
    ids = torch.tensor([2, 5, 6, 9])
    loss = InfoNCELoss(0.2, symmetric=False)
    value = loss(a, b, negatives=memory.rows(), negatives_mask=memory.same(ids))
    a, b, earlier = (torch.nn.functional.normalize(x, dim=1) for x in (a, b, earlier))
    expected = 0.0
    for i in range(4):
        scores = [a[i] @ b[j] / 0.2 for j in range(4)]
        scores += [a[i] @ earlier[q] / 0.2 for q, own in enumerate((0, 1, 2, 3, 8, 9)) if own != ids[i]]
        expected += (torch.stack(scores).logsumexp(0) - a[i] @ b[i] / 0.2).item() / 4
    assert value.item() == pytest.approx(expected, rel=1e-12)


# -- the option of the molecule system -----------------------------------------------------------------------

SMALL = [
    "experiment=molecules",
    "epochs=2",
    "batch_size=16",
    "hidden=16",
    "layers=2",
    "heads=2",
    "embedding_dim=16",
    "fingerprint_hidden=32",
    "fingerprint_bits=128",
    "bootstrap=100",
    "text_encoder.dims=32",
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "report=false",
    "memory=40",
]


pytestmark = [pytest.mark.usefixtures("module_cache"), pytest.mark.slow]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return split_files(tmp_path_factory.mktemp("data"))


def composed(*overrides: str) -> tuple[Any, list[str]]:
    every = list({o.split("=")[0]: o for o in (*SMALL, *overrides)}.values())
    return compose_config(every), every


def prepared(*overrides: str) -> Any:
    system: Any = build_system(composed(*overrides)[0])
    system.prepare(lambda _: None)
    return system


def run(folder: Path, *overrides: str) -> RunFolder:
    config, every = composed(f"runs_dir={folder.parent}", f"name={folder.name}", *overrides)
    return run_one(config, every, False, Console(file=open(os.devnull, "w")))


@pytest.mark.parametrize("duplicates", [True, False])
@pytest.mark.parametrize("threshold", [None, 0.5])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_loss_of_a_batch_with_earlier_pairs(
    files: list[str], duplicates: bool, threshold: float | None, symmetric: bool
) -> None:
    text = "null" if threshold is None else str(threshold)
    system = prepared(
        *files,
        f"mask_duplicates={duplicates}",
        f"false_negative_threshold={text}",
        f"loss.symmetric={symmetric}",
    )
    model = system.build_model().eval()
    dataset = system.dataset("train")
    earlier: list[tuple[torch.Tensor, ...]] = []
    left_out = 0
    for step in range(5):
        batch = dataset.__getitems__([(7 * step + 3 * i) % len(dataset) for i in range(16)])
        # Many rows that share one of the two, and some of them both: the row itself.
        structures, words = batch.positions % 23, batch.positions % 31
        batch = batch.replaced(**{"group:molecule": structures, "group:text": words})
        output = system.training_step(model, batch)
        z = {
            name: torch.nn.functional.normalize(x.double(), dim=1)
            for name, x in model_of(system, model, batch)
        }
        rows = [
            (
                m,
                t,
                structures[i],
                words[i],
                torch.nn.functional.normalize(v.double(), dim=0),
            )
            for i, (m, t, v) in enumerate(zip(z["molecule"], z["text"], batch["text"], strict=True))
        ]

        def negative(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> bool:
            structure, words = bool(one[2] == other[2]), bool(one[3] == other[3])
            similar = threshold is not None and bool(one[4] @ other[4] >= threshold - 1e-6)
            return not ((structure or words) if duplicates else (structure and words)) and not similar

        def in_batch(i: int, j: int, rows: Any = rows) -> bool:
            one, other = rows[i], rows[j]
            same = duplicates and bool((one[2] == other[2]) | (one[3] == other[3]))
            similar = threshold is not None and bool(one[4] @ other[4] >= threshold - 1e-6)
            return i == j or not (same or similar)

        total = 0.0
        for own, theirs in ((0, 1), (1, 0))[: 2 if symmetric else 1]:
            for i, row in enumerate(rows):
                keys = [rows[j][theirs] for j in range(16) if in_batch(i, j)]
                further = [kept[theirs] for kept in earlier if negative(row, kept)]
                left_out += len(earlier) - len(further)
                scores = torch.stack(keys + further) @ row[own] / 0.07
                total += (scores.logsumexp(0) - row[0] @ row[1] / 0.07).item()
        assert output.loss.item() == pytest.approx(total / (32 if symmetric else 16), rel=1e-5), step
        earlier = [*earlier, *rows][-40:]
        logs = output.logs()
        assert logs["memory_age"] == pytest.approx([0.0, 1.0, 1.5, 1.8, 1.8][step])
    assert left_out > 0


def model_of(system: Any, model: Any, batch: Any) -> Any:
    with torch.no_grad():
        return system.encode(model, batch).items()


def dies(folder: Path, overrides: list[str], steps: int) -> None:
    score, count = MoleculeSystem.loss_of, 0

    def dying(self: Any, model: Any, embeddings: Any, batch: Any) -> Any:
        nonlocal count
        if count == steps:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        return score(self, model, embeddings, batch)

    MoleculeSystem.loss_of = dying  # type: ignore[method-assign]
    run(folder, *overrides)


def test_a_killed_run_goes_on_with_its_memory(tmp_path: Path, files: list[str]) -> None:
    overrides = [
        *files,
        "trainer.cached_chunk=5",
        "trainer.checkpoint_steps=3",
        "trainer.log_every=1",
        "false_negative_threshold=0.9",
    ]
    whole = run(tmp_path / "whole", *overrides)
    killed = tmp_path / "killed"
    run_until_killed(dies, killed, overrides, 11)
    assert Checkpoint.load(killed).step == 9
    assert Checkpoint.load(killed).model["memory.kept.molecule._extra_state"].tolist() == [9 * 16, 9]
    run(killed, *overrides, "exists=skip")  # an interrupted run is resumed
    one, other = Checkpoint.load(whole.path).model, Checkpoint.load(killed).model
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    losses = [
        [(r["step"], r["loss"], r["memory_age"]) for r in folder.log() if r["kind"] == "step"]
        for folder in (whole, RunFolder(killed))
    ]
    assert losses[0] == losses[1]


def test_weights_without_their_memory(tmp_path: Path, files: list[str]) -> None:
    """A start from other weights begins with an empty memory, and search needs none."""
    kept = run(tmp_path / "kept", *files, "epochs=1")
    for name, size in (("same", 40), ("other", 24), ("none", 0)):
        started = run(
            tmp_path / name,
            *files,
            f"memory={size}",
            f"init_from={kept.path}",
            "epochs=1",
            "trainer.log_every=1",
        )
        steps = [record for record in started.log() if record["kind"] == "step"]
        assert steps[0]["candidates"] == pytest.approx(16, abs=2)
        state = Checkpoint.load(started.path).model
        if size:
            assert steps[0]["memory_age"] == 0.0
            assert steps[1]["candidates"] > steps[0]["candidates"] + 5
            assert state["memory.kept.text._rows"].shape == (size, 16)
        else:
            assert not any(key.startswith("memory.") for key in state)
    assert len(load(kept.path, "cpu").search("an alcohol", k=3)) == 3


@pytest.mark.parametrize("encoder", ["graph", "fingerprint", "both"])
@pytest.mark.parametrize("rows", [1, 5, 16])
def test_a_batch_of_molecules_in_parts(files: list[str], encoder: str, rows: int) -> None:
    system = prepared(*files, f"molecule_encoder={encoder}", "memory=0")
    dataset = system.dataset("train")
    positions = [3 * i for i in range(12)]
    parts = system.split(dataset.__getitems__(positions), rows)
    assert [len(part) for part in parts] == [len(positions[i : i + rows]) for i in range(0, 12, rows)]
    for i, part in enumerate(parts):
        assert same_batch(part, dataset.__getitems__(positions[rows * i : rows * (i + 1)]))


def same_batch(one: Batch, other: Batch) -> bool:
    def tensors(batch: Batch) -> list[torch.Tensor]:
        fields: Any = batch.fields
        molecules = fields["molecule"]
        parts = [batch.positions, *(field for name, field in fields.items() if name != "molecule")]
        if molecules.fingerprint is not None:
            parts.append(molecules.fingerprint)
        if (graph := molecules.graph) is not None:
            parts += [graph.x, graph.edge_index, graph.edge_attr, graph.batch, torch.tensor(graph.num_graphs)]
        return parts

    pairs = list(zip(tensors(one), tensors(other), strict=True))
    return len(pairs) > 5 and all(x.shape == y.shape and torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("encoder", ["graph", "fingerprint"])
def test_cached_step_of_molecules(files: list[str], encoder: str) -> None:
    system = prepared(*files, f"molecule_encoder={encoder}", "memory=0", "learn_temperature=true")
    model = system.build_model().double().eval()
    batch = system.dataset("train").__getitems__(list(range(20)))
    molecules = batch["molecule"]
    if molecules.fingerprint is not None:
        molecules = replace(molecules, fingerprint=molecules.fingerprint.double())
    batch = batch.replaced(molecule=molecules, text=batch["text"].double())
    found = []
    for output in (system.training_step(model, batch), system.step(model, batch, 6)):
        output.loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    assert len(found[0]) == len(found[1]) > 5
    assert all(torch.allclose(x, y, rtol=1e-9, atol=1e-12) for x, y in zip(*found, strict=True))


def test_ids_of_a_memory_are_labels_as_those_of_a_loss_are() -> None:
    """Whole numbers as floats, with NaN where one is missing, are read by ``push`` as by ``same``."""
    memory = CrossBatchMemory(4, 2, ids=True)
    labels = torch.tensor([1.0, float("nan"), 2.0])
    memory.push(torch.ones(3, 2), labels)
    assert memory.ids().tolist() == [1, -1, 2]
    assert memory.same(labels).int().tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 1]]
    with pytest.raises(NearfarError, match=r"ids hold 1\.5"):
        memory.push(torch.ones(3, 2), labels + 0.5)


def test_rows_too_large_for_half_precision_are_refused_when_they_are_pushed() -> None:
    memory = CrossBatchMemory(4, 2).half()
    with pytest.raises(NearfarError, match=r"features reach 1e\+06.*float16"):
        memory.push(torch.full((2, 2), 1e6))
    assert memory.filled == 0
    memory.push(torch.ones(2, 2))
    memory = memory.bfloat16()
    memory.push(torch.full((2, 2), 1e6))
    assert memory.rows().isfinite().all()
