"""Several processes, compared with one: gather, the wrapped loss, the ring, the self-test."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nearfar.cli import app
from nearfar.errors import NearfarError
from nearfar.losses import (
    ClipLoss,
    FocalLoss,
    GuideMask,
    InfoNCELoss,
    SpatialLoss,
    SupConLoss,
    duplicate_mask,
)
from nearfar.losses.base import traits_of
from nearfar.training import ring as ring_module
from nearfar.training import verify_ddp as verify_module
from nearfar.training.distributed import DistributedLoss, SharingOptions
from nearfar.training.gather import gather
from nearfar.training.verify_ddp import OPTIONS, DdpVerdict, verify_ddp
from processes import SECONDS, together

pytestmark = pytest.mark.slow  # real runs

COUNTS = {2: (4, 2), 3: (3, 0, 2)}
DTYPES = (
    torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16, torch.float64, torch.complex64,
)  # fmt: skip


#: scale, both directions, unit length, tiles smaller than a rank's rows
RINGS = [
    (7.0, True, True, False),
    (7.0, True, True, True),
    (1000.0, True, True, True),
    (3.0, False, False, False),
    (300.0, True, False, True),
]


# -- what each rank does; every function returns what the tests look at ----------------------------------------
def rows_of(rank: int, world: int, dim: int = 3, seed: int = 0) -> Tensor:
    return all_rows(world, dim, seed).split(list(COUNTS[world]))[rank].clone()


def all_rows(world: int, dim: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(COUNTS[world]), dim, generator=generator, dtype=torch.float64)


def gathered_values(rank: int, world: int) -> list[Tensor]:
    return [gather((rows_of(rank, world) * 5).to(dtype)) for dtype in DTYPES] + [
        gather(rows_of(rank, world)[:, 0] > 0),
        gather(rows_of(rank, world).T.contiguous().T),
        gather(rows_of(rank, world)[:, :0]),
    ]


def gathered_gradient(rank: int, world: int, with_grad: bool = True) -> Tensor:
    own = rows_of(rank, world).requires_grad_()
    found = gather(own, with_grad)
    # Each rank weighs the rows in its own way, so that the sum over ranks is not a multiple of one of them.
    (found * (rank + 1) * torch.arange(1.0, found.numel() + 1).view_as(found)).sum().backward()
    assert own.grad is not None
    return own.grad


def constants_gradient(rank: int, world: int) -> Tensor:
    return gathered_gradient(rank, world, with_grad=False)


def no_graph(rank: int, world: int) -> bool:
    with torch.no_grad():
        quiet = gather(rows_of(rank, world).requires_grad_())
    return quiet.requires_grad or gather(rows_of(rank, world)).requires_grad


def refused(rank: int, world: int) -> list[str]:
    own = rows_of(rank, world)
    wrong = [own[:, : 3 - rank], own.to([torch.float32, torch.float64, torch.float16][rank])]
    wrong += [own.clone().requires_grad_(rank == 0), torch.tensor(1.0)]
    texts = []
    for tensor in wrong:
        try:
            gather(tensor)
        except NearfarError as error:
            texts.append(str(error))
    gather(own)  # the ranks still understand each other
    return texts


class Toy(nn.Module):
    """Remembers what it was given."""

    positions = ("neighbors",)

    def forward(
        self,
        z: Tensor,
        neighbors: Any = None,
        queue: Any = None,
        negatives: Any = None,
        mask: Any = None,
        scale: Any = 1.0,
    ) -> Tensor:
        self.seen = {
            "neighbors": neighbors,
            "queue": queue,
            "negatives": negatives,
            "mask": mask,
            "scale": scale,
        }
        return (z * scale).sum()


def toy_arguments(rank: int, world: int) -> dict[str, Any]:
    toy = Toy()
    index = torch.tensor([[0, -1], [1, 0]] + [[0, 0]] * 2)[: COUNTS[world][rank]]
    queue, pair = torch.ones(2, 3), (rows_of(rank, world, seed=1), rows_of(rank, world, seed=2))
    wrapped = DistributedLoss(toy, shared=("queue",))
    wrapped(rows_of(rank, world), index, queue, negatives=pair, scale=torch.tensor(2.0))
    return toy.seen


def toy_errors(rank: int, world: int) -> list[str]:
    texts = []
    own = rows_of(rank, world)
    n = len(own)
    for arguments in (
        {"neighbors": torch.full((n, 1), n)},
        {"mask": torch.zeros(n, n, dtype=torch.bool)},
        {"z": torch.tensor(1.0)},
    ):
        try:
            DistributedLoss(Toy())(**{"z": own, **arguments})
        except NearfarError as error:
            texts.append(str(error))
    return texts


def info_nce(rank: int, world: int, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a, b = (rows_of(rank, world, seed=seed).requires_grad_() for seed in (1, 2))
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    mask = duplicate_mask(gather(labels(world).split(list(COUNTS[world]))[rank]))
    value = DistributedLoss(InfoNCELoss(), **options)(a, b, mask=mask, scale=scale)
    value.backward()
    assert a.grad is not None
    assert b.grad is not None
    assert scale.grad is not None
    return value.detach(), a.grad / world, b.grad / world, scale.grad


def guided(rank: int, world: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Masks that differ between the directions, weights of negatives, debiased and hard-weighted sums."""
    results = []
    for softness, options in GUIDED:
        a, b = (rows_of(rank, world, seed=seed).requires_grad_() for seed in (1, 2))
        u, v = (gather(rows_of(rank, world, seed=seed)) for seed in (3, 4))
        scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
        for local in (False, True):
            for leaf in (a, b, scale):
                leaf.grad = None
            loss = DistributedLoss(InfoNCELoss(**options), local_loss=local)
            value = loss(a, b, mask=GuideMask(u, v, 0.1, softness=softness), scale=scale)
            value.backward()
            assert a.grad is not None
            assert b.grad is not None
            assert scale.grad is not None
            results.append((value.detach(), a.grad / world, b.grad / world, scale.grad))
    return results


GUIDED = [(0.0, {}), (0.2, {}), (0.2, {"tau_plus": 0.1, "beta": 0.5})]


def labels(world: int) -> Tensor:
    return torch.arange(sum(COUNTS[world])) % 4


def whole_loss(rank: int, world: int) -> Any:
    return info_nce(rank, world)


def local_loss(rank: int, world: int) -> Any:
    return info_nce(rank, world, local_loss=True)


def half_precision(rank: int, world: int, **options: Any) -> tuple[Tensor, Tensor]:
    own = rows_of(rank, world).to(torch.bfloat16).requires_grad_()
    value = DistributedLoss(InfoNCELoss(), **options)(own, own * 1.5)
    value.backward()
    assert own.grad is not None
    return value.detach(), own.grad


def half_precision_ring(rank: int, world: int) -> Any:
    return half_precision(rank, world, ring=True)


def ring(rank: int, world: int) -> list[Any]:
    """Value, gradients, and the record's means over the own rows; several scales, both or one direction."""
    found = []
    for scale_value, symmetric, normalize, small in RINGS:
        ring_module.TILE = (2, 1) if small else (1024, 1024)
        a, b = (rows_of(rank, world, seed=seed).requires_grad_() for seed in (1, 2))
        scale = torch.tensor(scale_value, dtype=torch.float64, requires_grad=True)
        loss = DistributedLoss(InfoNCELoss(symmetric=symmetric, normalize=normalize), ring=True)
        value = loss(a, b, scale=scale)
        (0.5 * value).backward()  # as accumulation does
        assert a.grad is not None
        assert b.grad is not None
        assert scale.grad is not None
        record = loss.record.numbers() if len(a) else None
        found.append((value.detach(), 2 * a.grad / world, 2 * b.grad / world, 2 * scale.grad, record))
    return found


def two_rings_before_backward(rank: int, world: int) -> tuple[Tensor, Tensor]:
    own = [rows_of(rank, world, seed=seed).requires_grad_() for seed in (1, 2, 3)]
    loss = DistributedLoss(ClipLoss(max_scale=5.0), ring=True)
    (loss(own[0], own[1], 9.0) + loss(own[0], own[2], 2.0)).backward()
    return own[0].grad / world, own[2].grad / world


def ring_errors(rank: int, world: int) -> list[str]:
    own, texts = rows_of(rank, world), []
    for arguments in ({"mask": torch.zeros(2, 2, dtype=torch.bool)}, {"negatives": own}, {"b": own[:1]}):
        try:
            DistributedLoss(InfoNCELoss(), ring=True)(**{"a": own, "b": own, **arguments})
        except NearfarError as error:
            texts.append(str(error))
    return texts


def memories(rank: int, world: int) -> list[str]:
    """A memory of all ranks' rows without and with ``shared``, one of other rows on each rank, an empty one."""
    own, texts = rows_of(rank, world), []
    for rows, shared in (
        (torch.ones(4, 3), ()),
        (torch.ones(4, 3), ("negatives",)),
        (torch.ones(4, 3) * rank, ("negatives",)),
        (torch.ones(0, 3), ()),
    ):
        try:
            DistributedLoss(InfoNCELoss(), shared=shared)(own, -own, negatives=rows)
            texts.append("fine")
        except NearfarError as error:
            texts.append(str(error))
    return texts


def uneven_pairs(rank: int, world: int) -> list[str]:
    own = rows_of(rank, world)
    try:
        DistributedLoss(InfoNCELoss(symmetric=False))(own, torch.cat([own, own]))
    except NearfarError as error:
        return [str(error)]
    return [""]


SCENES: dict[str, Callable[[int, int], Any]] = {
    f.__name__: f
    for f in (
        gathered_values, gathered_gradient, constants_gradient, no_graph, refused, toy_arguments, toy_errors,
        whole_loss, local_loss, half_precision, half_precision_ring, ring, two_rings_before_backward, ring_errors,
        uneven_pairs, memories, guided,
    )
}  # fmt: skip


# -- starting the ranks ----------------------------------------------------------------------------------------
def all_scenes() -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    found = {}
    for name, scene in SCENES.items():
        try:
            found[name] = scene(rank, world)
        except Exception as error:  # the others go on to their scenes and do not wait in this one
            found[name] = "".join(traceback.format_exception(error))
            print(found[name], file=sys.stderr)  # should the others wait in it all the same
    dist.barrier()
    return found


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest) -> Callable[[str], SimpleNamespace]:
    world = request.param
    found = together(all_scenes, world=world)

    def scene(name: str) -> SimpleNamespace:
        results = [rank[name] for rank in found]
        for result in results:
            assert not isinstance(result, str), result
        return SimpleNamespace(world=world, counts=COUNTS[world], results=results)

    return scene


# -- gather ----------------------------------------------------------------------------------------------------
def test_gather_keeps_order_and_dtype(ranks: Any) -> None:
    scene = ranks("gathered_values")
    rows = all_rows(scene.world)
    expected = [(rows * 5).to(dtype) for dtype in DTYPES] + [rows[:, 0] > 0, rows, rows[:, :0]]
    for found in scene.results:
        for value, wanted in zip(found, expected, strict=True):
            assert value.dtype == wanted.dtype
            assert torch.equal(value, wanted)


def test_gather_gradient_is_the_sum_over_ranks(ranks: Any) -> None:
    scene = ranks("gathered_gradient")
    total = sum(scene.counts)
    weights = torch.arange(1.0, total * 3 + 1, dtype=torch.float64).view(total, 3)
    wanted = sum(rank + 1 for rank in range(scene.world)) * weights
    assert torch.equal(torch.cat(scene.results), wanted)


def test_gather_without_grad_keeps_the_own_slice(ranks: Any) -> None:
    scene = ranks("constants_gradient")
    total = sum(scene.counts)
    weights = torch.arange(1.0, total * 3 + 1, dtype=torch.float64).view(total, 3).split(list(scene.counts))
    for rank, found in enumerate(scene.results):
        assert torch.equal(found, (rank + 1) * weights[rank])


def test_gather_builds_no_graph_where_none_is_wanted(ranks: Any) -> None:
    assert ranks("no_graph").results == [False] * ranks("no_graph").world


def test_what_does_not_fit_together_is_refused_on_all_ranks(ranks: Any) -> None:
    for texts in ranks("refused").results:
        assert len(texts) == 4
        assert all("Only the number of rows may differ" in text for text in texts[:3])
        assert "single number" in texts[3]


def test_one_process_gathers_nothing() -> None:
    tensor = torch.ones(3, 2, requires_grad=True)
    assert gather(tensor) is tensor
    assert gather(tensor, with_grad=False) is tensor


def test_torchrun_without_a_group_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(NearfarError, match="torchrun --nproc-per-node=2"):
        gather(torch.ones(2, 2))
    with pytest.raises(NearfarError, match="init_process_group"):
        DistributedLoss(InfoNCELoss())(torch.eye(2), torch.eye(2))


# -- the wrapped loss ------------------------------------------------------------------------------------------
def one_process(
    world: int, same: Tensor, scale_value: float = 7.0, symmetric: bool = True, normalize: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """InfoNCE of the whole batch as loops over pairs."""
    a, b = (all_rows(world, seed=seed).requires_grad_() for seed in (1, 2))
    scale = torch.tensor(scale_value, dtype=torch.float64, requires_grad=True)
    unit_a, unit_b = ((x / x.norm(dim=1, keepdim=True) if normalize else x) for x in (a, b))
    terms = []
    for queries, keys in ((unit_a, unit_b), (unit_b, unit_a))[: 1 + symmetric]:
        for i in range(len(queries)):
            logits = [scale * queries[i] @ keys[j] for j in range(len(keys)) if not same[i, j]]
            terms.append(torch.stack(logits).logsumexp(0) - scale * queries[i] @ keys[i])
    value = torch.stack(terms).mean()
    grads = torch.autograd.grad(value, (a, b, scale))
    return value.detach(), *grads


@pytest.mark.parametrize("name", ["whole_loss", "local_loss"])
def test_gradients_are_those_of_one_process(ranks: Any, name: str) -> None:
    scene = ranks(name)
    check_gradients(scene.results, one_process(scene.world, duplicate_mask(labels(scene.world))))


def check_gradients(results: list[Any], wanted: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    for found in results:
        torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(torch.cat([found[1] for found in results]), wanted[1])
    torch.testing.assert_close(torch.cat([found[2] for found in results]), wanted[2])
    torch.testing.assert_close(torch.stack([found[3] for found in results]).mean(), wanted[3])


@pytest.mark.parametrize("name", ["half_precision", "half_precision_ring"])
def test_half_precision_travels(ranks: Any, name: str) -> None:
    scene = ranks(name)
    own = all_rows(scene.world).to(torch.bfloat16).requires_grad_()
    value = InfoNCELoss()(own, own * 1.5)
    value.backward()
    for found in scene.results:
        assert found[1].dtype == torch.bfloat16
        torch.testing.assert_close(found[0], value.detach())
    torch.testing.assert_close(
        torch.cat([found[1] for found in scene.results]) / scene.world, own.grad, rtol=0.02, atol=1e-3
    )


def test_arguments_arrive_as_the_loss_expects_them(ranks: Any) -> None:
    scene = ranks("toy_arguments")
    parts = [torch.tensor([[0, -1], [1, 0]] + [[0, 0]] * 2)[:count] for count in scene.counts]
    starts = [sum(scene.counts[:rank]) for rank in range(scene.world)]
    wanted = torch.cat([torch.where(p >= 0, p + s, p) for p, s in zip(parts, starts, strict=True)])
    for seen in scene.results:
        assert torch.equal(seen["neighbors"], wanted)
        assert torch.equal(seen["queue"], torch.ones(2, 3))
        assert isinstance(seen["negatives"], tuple)
        assert all(torch.equal(seen["negatives"][i], all_rows(scene.world, seed=i + 1)) for i in (0, 1))
        assert seen["mask"] is None
        assert seen["scale"].item() == 2.0


def test_wrong_arguments_say_what_to_do(ranks: Any) -> None:
    for rank, texts in enumerate(ranks("toy_errors").results):
        if ranks("toy_errors").counts[rank]:
            assert "positions count from 0 within the rank" in texts[0]
        assert "duplicate_mask(gather(labels))" in texts[-2]
        assert "no argument of the loss has rows" in texts[-1]


def test_one_process_is_the_loss_itself_and_says_so_once() -> None:
    wrapped = DistributedLoss(InfoNCELoss(), gather_with_grad=False)
    a = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="one process.*gather_with_grad has no effect"):
        value = wrapped(a, -a)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(wrapped(a, -a), value)
    assert torch.equal(value, InfoNCELoss()(a, -a))
    assert wrapped.record.candidates == 5


def test_losses_that_are_not_sums_over_rows_have_no_local_form() -> None:
    with pytest.raises(NearfarError, match="one value for each row"):
        DistributedLoss(InfoNCELoss(reduction="none"), local_loss=True)
    with pytest.raises(NearfarError, match="Toy cannot be taken apart"):
        DistributedLoss(Toy(), local_loss=True)
    with pytest.raises(NearfarError, match="no such argument"):
        DistributedLoss(Toy(), shared=("memory",))


def test_partners_must_be_the_same_rows_on_every_rank(ranks: Any) -> None:
    assert all("Pass further rows as negatives" in text for (text,) in ranks("uneven_pairs").results)


def test_rows_of_a_memory_are_not_counted_twice(ranks: Any) -> None:
    for texts in ranks("memories").results:
        assert "DistributedLoss(loss, shared=('negatives',))" in texts[0]
        assert "memory.push(gather(features))" in texts[2]
        assert [texts[1], texts[3]] == ["fine", "fine"]


def test_the_traits_of_a_loss_say_how_it_may_be_shared() -> None:
    whole, own, around = SharingOptions(), SharingOptions(local_loss=True), SharingOptions(ring=True)
    for loss in (InfoNCELoss(), SpatialLoss(), FocalLoss(), Toy()):
        whole.check_loss(loss)
    own.check_loss(SpatialLoss(temp_reg_weight=0.0))
    with pytest.raises(NearfarError, match=r"temp_reg_weight=0\.05 has none: its regulariser squares a mean"):
        own.check_loss(SpatialLoss())
    with pytest.raises(NearfarError, match="FocalLoss cannot be taken apart"):
        own.check_loss(FocalLoss(), "trainer.", "true")
    with pytest.raises(NearfarError, match="no ring version of SpatialLoss"):
        around.check_loss(SpatialLoss())


def test_a_loss_without_traits_is_read_by_the_names_of_its_arguments() -> None:
    traits = traits_of(Toy())
    assert traits.rows == ("z", "neighbors", "queue")
    assert (traits.positions, traits.further, traits.pairs) == (("neighbors",), ("negatives",), ("mask",))
    assert (traits.numbers, traits.aligned, traits.local, traits.ring) == (("scale",), False, None, None)


@pytest.mark.parametrize("case", range(2 * len(GUIDED)))
def test_guided_and_debiased_losses_are_those_of_one_process(ranks: Any, case: int) -> None:
    scene = ranks("guided")
    softness, options = GUIDED[case // 2]
    a, b, u, v = (all_rows(scene.world, seed=seed) for seed in (1, 2, 3, 4))
    scale = torch.tensor(7.0, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (a, b, scale)]
    value = InfoNCELoss(**options)(a, b, mask=GuideMask(u, v, 0.1, softness=softness), scale=scale)
    expected = (value.detach(), *torch.autograd.grad(value, leaves))
    check_gradients([found[case] for found in scene.results], expected)


# -- the ring --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", range(len(RINGS)))
def test_the_ring_gives_the_gradients_of_one_process(ranks: Any, case: int) -> None:
    scene = ranks("ring")
    scale, symmetric, normalize, _ = RINGS[case]
    nothing = torch.zeros(sum(scene.counts), sum(scene.counts), dtype=torch.bool)
    results = [found[case] for found in scene.results]
    check_gradients(results, one_process(scene.world, nothing, scale, symmetric, normalize))


def test_the_ring_records_the_own_rows(ranks: Any) -> None:
    scene = ranks("ring")
    whole = InfoNCELoss()
    whole(all_rows(scene.world, seed=1), all_rows(scene.world, seed=2), scale=7.0)
    assert whole.record is not None
    records = [
        (count, found[0][4]) for count, found in zip(scene.counts, scene.results, strict=True) if count
    ]
    for name, wanted in whole.record.numbers().items():
        mean = sum(count * record[name] for count, record in records) / sum(scene.counts)
        assert mean == pytest.approx(float(wanted)), name


def test_two_rings_before_one_backward(ranks: Any) -> None:
    scene = ranks("two_rings_before_backward")
    a, b, c = (all_rows(scene.world, seed=seed).requires_grad_() for seed in (1, 2, 3))
    (ClipLoss(max_scale=5.0)(a, b, 9.0) + ClipLoss()(a, c, 2.0)).backward()
    for i, wanted in enumerate((a.grad, c.grad)):
        torch.testing.assert_close(torch.cat([found[i] for found in scene.results]), wanted)


def test_what_the_ring_cannot_do_it_says(ranks: Any) -> None:
    for texts in ranks("ring_errors").results:
        assert ["mask is not supported" in texts[0], "negatives is not supported" in texts[1]] == [True, True]
        assert "row i of both belong together" in texts[2]
    with pytest.raises(NearfarError, match="no ring version of SupConLoss, only of InfoNCELoss and ClipLoss"):
        DistributedLoss(SupConLoss(), ring=True)
    with pytest.raises(NearfarError, match="leave the other options out"):
        DistributedLoss(ClipLoss(), ring=True, local_loss=True)
    for options in (
        {"in_batch": False},
        {"denominator": "negatives"},
        {"reduction": "none"},
        {"tau_plus": 0.1},
        {"beta": 1.0},
    ):
        with pytest.raises(NearfarError, match="is not supported, only"):
            DistributedLoss(InfoNCELoss(**options), ring=True)


# -- the self-test ---------------------------------------------------------------------------------------------
def test_every_promise_is_kept_and_wrong_setups_are_found() -> None:
    verdict = verify_ddp(2, timeout=SECONDS)
    assert verdict.passed, [row for row in verdict.rows if not row.passed]
    promises = {row.promise for row in verdict.rows}
    assert promises == {"exact", "by definition", "wrong"}


@pytest.mark.parametrize(
    ("option", "change", "passes"),
    [
        ("gather", {}, True),
        ("gather", {"value": 1.001}, False),
        ("gather", {"layers.0.weight": 1.001}, False),
        ("gather", {"log_scale": 0.5}, False),
        ("gather_with_grad=False", {}, False),
        ("gather_with_grad=False", {"layers.0.weight": 0.5}, True),
        ("no gather", {}, False),
        ("no gather", {"layers.0.weight": 1.1}, True),
    ],
)
def test_the_verdict_can_go_either_way(option: str, change: dict[str, float], passes: bool) -> None:
    one = {
        "value": torch.tensor(2.0),
        "layers.0.weight": torch.randn(3, 3, generator=torch.Generator().manual_seed(0)),
        "log_scale": torch.tensor(0.3),
    }
    several = {key: value * change.get(key, 1.0) for key, value in one.items()}
    row = verify_module._row("Toy", next(o for o in OPTIONS if o.name == option), one, several, 2)
    assert row.passed is passes


@pytest.mark.parametrize(("kept", "code"), [(True, 0), (False, 1)])
def test_the_command_says_what_failed(
    kept: bool, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = verify_module.DdpRow("ClipLoss", "ring", "exact", "", 0.5, 1.0, None, 0.5, 0.0, kept)
    monkeypatch.setattr(verify_module, "verify_ddp", lambda processes, losses: DdpVerdict(processes, (row,)))
    with pytest.raises(SystemExit) as ended:
        app(["verify", "ddp", "--processes", "3", "--loss", "ClipLoss"])
    assert ended.value.code == code
    shown = capsys.readouterr().out
    assert f"3 processes: {'passed' if kept else 'FAILED'}" in shown
    assert ("FAILED, exact" in shown) is not kept


def test_processes_that_wait_for_each_other_are_ended() -> None:
    with pytest.raises(NearfarError, match="wait for each other"):
        verify_ddp(2, ["InfoNCELoss"], timeout=0.0)


def test_the_self_test_checks_its_arguments() -> None:
    with pytest.raises(NearfarError, match="2 or more"):
        verify_ddp(1)
    with pytest.raises(NearfarError, match="did you mean 'InfoNCELoss'"):
        verify_ddp(2, ["InfoNceLoss"])
