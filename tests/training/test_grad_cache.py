"""Cached batches against the plain batch: values, gradients, generators, hooks, processes, and the training option."""

from __future__ import annotations

import gc
import os
import signal
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from nearfar.errors import NearfarError
from nearfar.losses import InfoNCELoss
from nearfar.systems import check_config
from nearfar.training import ranks
from nearfar.training.checkpoint import Checkpoint, Resume
from nearfar.training.fit import fit
from nearfar.training.grad_cache import cached_embeddings, cached_loss
from nearfar.training.run_folder import RunFolder
from nearfar.training.system import StepOutput, System
from processes import run_until_killed, together
from run_files import records, states_equal
from toy_system import ToySystem, toy, toy_config

pytestmark = pytest.mark.slow  # real runs

Loss = Callable[[Any], Tensor]


class Towers(nn.Module):
    """Two encoders, a scale, and dropout where it is asked for."""

    a: Any
    b: Any

    def __init__(self, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 4))
        self.b = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 4))
        self.log_scale = nn.Parameter(torch.tensor(1.5))
        self.to(dtype)
        with torch.no_grad():
            for p in (p for p in self.parameters() if p.ndim):
                p.copy_(0.4 * torch.randn(p.shape, generator=generator, dtype=dtype))

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.a(pair[0]), self.b(pair[1])

    def loss(self, z: tuple[Tensor, ...]) -> Tensor:
        return InfoNCELoss()(z[0], z[1], scale=self.log_scale.exp())


def pairs(n: int = 11, seed: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, 6, generator=generator, dtype=dtype),
        torch.randn(n, 5, generator=generator, dtype=dtype),
    )


def split(batch: tuple[Tensor, Tensor], rows: int | list[int]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(batch[0].split(rows), batch[1].split(rows), strict=True))


def chunked(model: Any, chunks: list[Any]) -> tuple[Tensor, ...]:
    """The plain batch, encoded in the same chunks: all their graphs at once."""
    parts = [model(chunk) for chunk in chunks]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def gradients(model: nn.Module) -> list[Tensor | None]:
    found = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def close(one: Sequence[Tensor | None], other: Sequence[Tensor | None], tolerance: float = 1e-12) -> bool:
    if any((x is None) != (y is None) for x, y in zip(one, other, strict=True)):
        return False
    both = [(x, y) for x, y in zip(one, other, strict=True) if x is not None and y is not None]
    return all(bool((x - y).norm() <= tolerance * (1 + y.norm())) for x, y in both)


# -- equal to the plain batch --------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [11, 4, 1, [1, 7, 3]], ids=str)
def test_value_and_gradient_are_those_of_the_plain_batch(rows: Any) -> None:
    model, batch = Towers(), pairs()
    plain = model.loss(model(batch))
    plain.backward()
    expected = gradients(model)
    value = cached_loss(model, split(batch, rows), model.loss)
    assert value.ndim == 0
    value.backward()
    assert torch.allclose(value, plain, rtol=1e-14)
    assert close(gradients(model), expected)
    assert all(g is not None and g.norm() > 1e-4 for g in expected), "the scale's too"


@pytest.mark.parametrize("rows", [11, 4, [1, 7, 3]], ids=str)
def test_dropout_is_replayed_and_the_generator_ends_where_it_should(rows: Any) -> None:
    model, chunks = Towers(dropout=0.5), split(pairs(), rows)
    torch.manual_seed(5)
    plain = model.loss(chunked(model, chunks))
    plain.backward()
    end = torch.get_rng_state()
    expected = gradients(model)
    torch.manual_seed(5)
    value = cached_loss(model, chunks, model.loss)
    value.backward()
    assert torch.equal(torch.get_rng_state(), end)
    assert torch.equal(value, plain)
    assert close(gradients(model), expected)
    cached_loss(model, chunks, model.loss).backward()
    assert not close(gradients(model), expected, 0.01), "other masks are another gradient"


def test_the_form_of_the_output_is_kept() -> None:
    model, batch = Towers(), pairs()
    expected = model(batch)

    def named(chunk: Any) -> dict[str, Any]:
        a, b = model(chunk)
        return {"a": a, "more": [b, chunk[0][:, 0].long(), a.detach()]}

    found = cached_embeddings(named, split(batch, 4))
    assert list(found) == ["a", "more"]
    assert torch.allclose(found["a"], expected[0])
    assert torch.allclose(found["more"][0], expected[1])
    assert found["more"][1].dtype == torch.int64
    assert [z.requires_grad for z in (found["a"], *found["more"])] == [True, True, False, False]


def test_what_the_loss_returns_is_returned() -> None:
    model = Towers()
    found = cached_loss(model, split(pairs(), 4), lambda z: {"loss": model.loss(z), "rows": len(z[0])})
    assert found["rows"] == 11
    found["loss"].backward()
    assert model.log_scale.grad is not None


def test_an_output_that_the_loss_does_not_use() -> None:
    model, batch = Towers(), pairs()
    model.a(batch[0]).square().sum().backward()
    expected = gradients(model)
    cached_loss(model, split(batch, 3), lambda z: z[0].square().sum()).backward()
    assert close(gradients(model), expected)


def test_parameters_that_only_some_chunks_use() -> None:
    model = Towers()
    chunks = [(0, pairs(3)[0]), (1, pairs(4)[1]), (0, pairs(2)[0])]

    def expert(chunk: tuple[int, Tensor]) -> Tensor:
        return model.b(chunk[1]) if chunk[0] else model.a(chunk[1])

    torch.cat([expert(chunk) for chunk in chunks]).square().sum().backward()
    expected = gradients(model)
    cached_loss(expert, chunks, lambda z: z.square().sum()).backward()
    assert close(gradients(model), expected)


def test_sparse_gradients() -> None:
    table = nn.Embedding(10, 4, sparse=True)
    words = torch.tensor([1, 2, 2, 9, 1, 3, 3])
    (table(words) ** 3).sum().backward()
    expected = table.weight.grad.to_dense()  # type: ignore[union-attr]
    table.zero_grad()
    cached_loss(table, words.split(2), lambda z: (z**3).sum()).backward()
    assert table.weight.grad is not None
    assert table.weight.grad.is_sparse
    assert torch.allclose(table.weight.grad.to_dense(), expected)


def test_gradients_that_share_their_memory() -> None:
    # Autograd hands out one tensor for both; adding to it in place would count it twice.
    a, b = torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True)
    cached_loss(lambda x: x + (a + b), torch.ones(6, 4).split(2), lambda z: z.sum()).backward()
    assert a.grad is not None
    assert a.grad.tolist() == b.grad.tolist() == [6.0] * 4  # type: ignore[union-attr]


# -- inside a loop -------------------------------------------------------------------------------------------


def test_factors_accumulation_and_two_forwards_before_one_backward() -> None:
    model = Towers(dropout=0.4)
    first, second = split(pairs(seed=1), 4), split(pairs(7, seed=2), 3)
    torch.manual_seed(0)
    (3 * model.loss(chunked(model, first)) + model.loss(chunked(model, second)) / 7).backward()
    end, expected = torch.get_rng_state(), gradients(model)
    torch.manual_seed(0)
    one, other = (cached_loss(model, chunks, model.loss) for chunks in (first, second))
    (3 * one + other / 7).backward()
    assert torch.equal(torch.get_rng_state(), end)
    assert close(gradients(model), expected)
    torch.manual_seed(0)
    (3 * cached_loss(model, first, model.loss)).backward()
    (cached_loss(model, second, model.loss) / 7).backward()
    assert close(gradients(model), expected)


def test_grad_scaler_and_clipping() -> None:
    found = []
    for cached in (False, True):
        model, batch = Towers(dtype=torch.float32), pairs(dtype=torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss = cached_loss(model, split(batch, 4), model.loss) if cached else model.loss(model(batch))
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
        found.append([p.detach().clone() for p in model.parameters()])
    assert close(found[1], found[0], 1e-6)


def test_autocast_is_replayed_outside_of_its_block() -> None:
    model, batch = Towers(dropout=0.3, dtype=torch.float32), pairs(dtype=torch.float32)
    found, dtypes = [], []

    def encode(chunk: Any) -> Any:
        z = model(chunk)
        dtypes.append(z[0].dtype)
        return z

    for cached in (False, True):
        torch.manual_seed(3)
        chunks = split(batch, 4)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(cached_embeddings(encode, chunks) if cached else chunked(encode, chunks))
        loss.backward()
        found.append(gradients(model))
    assert dtypes == [torch.bfloat16] * (3 + 6)
    assert not torch.is_autocast_enabled("cpu")
    assert close(found[1], found[0], 1e-2)  # the sums over chunks are rounded in another order
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            loss = cached_loss(encode, chunks, model.loss)
        loss.backward()  # where autocast is on
    assert dtypes[9:] == [torch.float32] * 6


def test_torch_autograd_grad_of_some_weights() -> None:
    model, batch = Towers(), pairs()
    some = [model.b[3].weight, model.log_scale]
    expected = torch.autograd.grad(model.loss(model(batch)), some)
    found = torch.autograd.grad(cached_loss(model, split(batch, 4), model.loss), some)
    assert close(found, expected)
    assert all(p.grad is None for p in model.parameters())


def test_hooks_on_a_weight_see_its_whole_gradient_once() -> None:
    model, batch = Towers(), pairs()
    seen: list[str] = []

    def tenfold(gradient: Tensor) -> Tensor:
        seen.append("hook")
        return 10 * gradient

    model.a[0].weight.register_hook(tenfold)
    model.a[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append("post"))
    model.loss(model(batch)).backward()
    expected = gradients(model)
    cached_loss(model, split(batch, 2), model.loss).backward()
    assert close(gradients(model), expected)
    assert seen == ["hook", "post"] * 2
    assert len(model.a[0].weight._backward_hooks) == 1


def test_second_backward() -> None:
    model, chunks = Towers(dropout=0.3), split(pairs(), 4)
    value = cached_loss(model, chunks, model.loss)
    value.backward(retain_graph=True)
    once = gradients(model)
    value.backward()
    assert close(gradients(model), once), "the same masks again"
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        value.backward()
    linear = cached_loss(
        model, chunks, lambda z: z[0].sum()
    )  # its own graph keeps nothing that could be missed
    linear.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        linear.backward()


def test_gradient_of_a_gradient_is_refused() -> None:
    model = Towers()
    value = cached_loss(model, split(pairs(), 4), lambda z: (z[0] @ z[1].T).square().sum())
    (first,) = torch.autograd.grad(value, [model.a[0].weight], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_without_gradients_nothing_is_kept() -> None:
    model, batch = Towers(), pairs()
    with torch.no_grad():
        z = cached_embeddings(model, split(batch, 4))
    assert not z[0].requires_grad
    assert torch.allclose(z[0], model(batch)[0])


def test_one_graph_at_a_time() -> None:
    """The numbers that autograd keeps for backward, at their peak: of one chunk, not of the batch."""
    alive, peak = 0, 0

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal alive, peak
            # Detached: an output that a node keeps would otherwise keep the node.
            self.tensor, size = tensor.detach(), tensor.numel() * (tensor.data_ptr() not in weights)
            alive += size
            peak = max(peak, alive)
            weakref.finalize(self, release, size)

    def release(size: int) -> None:
        nonlocal alive
        alive -= size

    layers = [layer for _ in range(8) for layer in (nn.Linear(64, 64), nn.Tanh())]
    model, x = nn.Sequential(*layers, nn.Linear(64, 2)), torch.randn(64, 64)
    weights, peaks = {p.data_ptr() for p in model.parameters()}, {}
    for rows in (64, 4):
        gc.collect()
        alive = peak = 0
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            cached_loss(model, x.split(rows), lambda z: z.square().mean()).backward()
        peaks[rows] = peak
        gc.collect()
        assert alive == 0
    assert peaks[64] > 8 * 64 * 64
    assert peaks[4] < peaks[64] / 12


# -- what is trained -----------------------------------------------------------------------------------------


def test_a_frozen_tower() -> None:
    model, batch = Towers(), pairs()
    model.b.requires_grad_(False)
    model.loss(model(batch)).backward()
    expected = gradients(model)
    z = cached_embeddings(model, split(batch, 4))
    assert [part.requires_grad for part in z] == [True, False]
    model.loss(z).backward()
    assert close(gradients(model), expected)
    assert model.b[0].weight.grad is None


def test_all_frozen_but_the_loss() -> None:
    model, batch = Towers(), pairs()
    model.a.requires_grad_(False)
    model.b.requires_grad_(False)
    model.loss(model(batch)).backward()
    expected = gradients(model)
    cached_loss(model, split(batch, 4), model.loss).backward()
    assert close(gradients(model), expected)
    frozen = cached_loss(model, split(batch, 4), lambda z: z[0].sum())
    assert not frozen.requires_grad


@pytest.mark.parametrize("leaf", [True, False])
def test_inputs_that_need_a_gradient(leaf: bool) -> None:
    model, (x, y) = Towers(dropout=0.2), pairs()
    found = []
    for cached in (False, True):
        stem = nn.Linear(6, 6).double()
        stem.load_state_dict({"weight": torch.eye(6), "bias": torch.zeros(6)})
        own = x.clone().requires_grad_()
        inputs = [own[:4], own[4:]] if leaf else list(stem(own).tanh().split([4, 7]))
        chunks = list(zip(inputs, (y[:4], y[4:]), strict=True))
        torch.manual_seed(1)
        z = cached_embeddings(model, chunks) if cached else chunked(model, chunks)
        (2 * model.loss(z)).backward()
        found.append([own.grad, stem.weight.grad, *gradients(model)])
    assert found[0][0] is not None
    assert close(found[1], found[0])


def test_chunks_that_are_leaves() -> None:
    model = Towers()
    chunks = [x.clone().requires_grad_() for x in pairs()[0].split(4)]
    cached_loss(model.a, chunks, lambda z: (z**2).sum()).backward()
    found = [chunk.grad for chunk in chunks]
    expected = [torch.autograd.grad((model.a(chunk) ** 2).sum(), chunk)[0] for chunk in chunks]
    assert close(found, expected)


def test_encode_may_hand_its_input_on() -> None:
    x = torch.randn(5, 3, requires_grad=True)
    cached_loss(lambda chunk: chunk, x.split(2), lambda z: (z**2).sum()).backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, 2 * x)


# -- running statistics --------------------------------------------------------------------------------------


def normed() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3)).double()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_count_each_chunk_once(momentum: float | None) -> None:
    x = pairs()[0]
    plain, model = normed(), normed()
    for m in (plain, model):
        m[1].momentum = momentum
    torch.manual_seed(1)
    torch.cat([plain(c) for c in x.split(4)]).square().sum().backward()
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="1 BatchNorm1d layers train with the statistics of a chunk"):
        value = cached_loss(lambda c: model(c), x.split(4), lambda z: z.square().sum(), model=model)
    value.backward()
    assert close(gradients(model), gradients(plain))
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffer, dict(model.named_buffers())[name]), name
    assert model[1].track_running_stats
    assert plain[1].num_batches_tracked == 3


def test_running_statistics_out_of_sight() -> None:
    model, x = normed(), pairs()[0]
    with pytest.raises(NearfarError, match="pass model="):
        cached_loss(lambda c: model(c), x.split(4), lambda z: z.sum())
    model.eval()
    cached_loss(lambda c: model(c), x.split(4), lambda z: z.sum()).backward()
    instance = nn.Sequential(nn.Conv1d(1, 2, 3), nn.InstanceNorm1d(2), nn.Flatten()).double()
    cached_loss(lambda c: instance(c), x[:, None].split(4), lambda z: z.square().sum()).backward()


# -- what goes wrong -----------------------------------------------------------------------------------------


def test_an_error_in_the_second_pass_leaves_everything_as_it_was() -> None:
    model, x = normed(), pairs()[0]
    model[0].weight.register_hook(lambda g: g)
    calls = 0

    def encode(chunk: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise ZeroDivisionError("in the second chunk of the second pass")
        return model(chunk)

    with pytest.warns(UserWarning, match="BatchNorm1d"):
        value = cached_loss(encode, x.split(4), lambda z: z.square().sum(), model=model)
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        value.backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert model[1].track_running_stats
    assert len(model[0].weight._backward_hooks) == 1
    assert all(p.grad is None for p in model.parameters())


def test_an_error_in_the_first_pass_is_as_without_chunks() -> None:
    model, chunks = Towers(dropout=0.5), split(pairs(), 4)
    torch.manual_seed(2)
    chunked(model, chunks[:2])
    state = torch.get_rng_state()
    torch.manual_seed(2)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        cached_loss(model, [*chunks[:2], (chunks[2][1], chunks[2][0])], model.loss)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_chunk_that_comes_out_otherwise() -> None:
    model, own = Towers(), torch.Generator().manual_seed(0)

    def noisy(chunk: Any) -> Any:
        x = chunk[0] + 0.3 * torch.randn(chunk[0].shape, generator=own)
        return model((x, chunk[1]))

    with pytest.raises(NearfarError, match="did not come out the same"):
        cached_loss(noisy, split(pairs(), 4), model.loss).backward()
    model = Towers(dropout=0.1)
    value = cached_loss(model, split(pairs(), 4), model.loss)
    model.eval()
    with pytest.raises(NearfarError, match="did not come out the same"):
        value.backward()


def test_embeddings_that_are_not_finite_are_not_taken_for_another_mask() -> None:
    layer = nn.Linear(2, 2)
    x = torch.tensor([[torch.inf, 1.0], [2.0, torch.nan]])
    cached_loss(layer, [x], lambda z: z.nan_to_num().sum()).backward()


def test_weights_that_changed_in_between() -> None:
    model = Towers()
    value = cached_loss(model, split(pairs(), 4), lambda z: z[0].sum())
    with torch.no_grad():
        model.a[0].weight.add_(1.0)
    with pytest.raises(NearfarError, match="before the optimiser's step"):
        value.backward()


@pytest.mark.parametrize(
    ("encode", "message"),
    [
        (lambda x: x.sum(), "gave a single number for chunk 0"),
        (lambda x: (x, 3.0), "gave a float for chunk 0"),
        (lambda x: (), "gave nothing for chunk 0"),
        (lambda x: (x, x) if len(x) == 3 else x, "for chunk 2"),
    ],
)
def test_outputs_that_are_no_rows(encode: Any, message: str) -> None:
    with pytest.raises(NearfarError, match=message):
        cached_embeddings(encode, pairs()[0].split(4))


def test_no_chunks() -> None:
    with pytest.raises(NearfarError, match="no chunks"):
        cached_embeddings(nn.Identity(), [])


def test_checkpointing_inside_of_a_chunk() -> None:
    model, (x, _) = Towers(dropout=0.3), pairs()
    found = []
    for inner in (False, True):
        torch.manual_seed(0)

        def encode(chunk: Tensor, inner: bool = inner) -> Tensor:
            return checkpoint(model.a, chunk, use_reentrant=False) if inner else model.a(chunk)

        cached_loss(encode, x.split(4), lambda z: z.square().sum()).backward()
        found.append(gradients(model))
    assert close(found[0], found[1])
    with pytest.raises(NearfarError, match="use_reentrant=False"):
        cached_loss(
            lambda c: checkpoint(model.a[3], model.a[0](c), use_reentrant=True), x.split(4), lambda z: z.sum()
        )


# -- several processes ---------------------------------------------------------------------------------------


class Step(nn.Module):
    """What a wrapper should hold: from the batch to the loss."""

    def __init__(self, rows: int | None) -> None:
        super().__init__()
        self.towers, self.rows = Towers(), rows

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        if self.rows is None:
            return self.towers.loss(self.towers(batch))
        return cached_loss(self.towers, split(batch, self.rows), self.towers.loss)


def trained_towers() -> dict[str, Any]:
    rank = ranks.rank()
    batch = pairs(11 + rank, seed=rank)
    found: dict[str, Any] = {}
    every: dict[str, dict[str, Any]] = {
        "plain": {},
        "cached": {},
        "unused": {"find_unused_parameters": True},
        "static": {"static_graph": True},
    }
    for name, options in every.items():
        # Ranks with different numbers of chunks.
        step = DistributedDataParallel(Step(None if name == "plain" else 3 + 2 * rank), **options)
        optimizer = torch.optim.SGD(step.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            step(batch).backward()
            optimizer.step()
        found[name] = [p.detach() for p in step.parameters()]
    alone = DistributedDataParallel(Towers())
    other = DistributedDataParallel(Towers(), find_unused_parameters=True)
    for encode in (alone, lambda chunk: alone(chunk), lambda chunk: other(chunk)):
        try:
            cached_loss(encode, split(batch, 4), alone.module.loss).backward()
        except NearfarError as error:
            found.setdefault("errors", []).append(str(error))
    return found


def test_distributed_data_parallel_holds_the_step() -> None:
    first, second = together(trained_towers)
    for name in ("cached", "unused", "static"):
        assert close(first[name], first["plain"]), name
        assert all(torch.equal(x, y) for x, y in zip(first[name], second[name], strict=True)), name
    assert not close(first["plain"], list(Towers().parameters()), 0.01), "it moved"
    for errors in (first["errors"], second["errors"]):
        assert len(errors) == 3
        assert all("hold the whole step" in error for error in errors)


# -- the training option -------------------------------------------------------------------------------------


class Dry(ToySystem):
    """Without dropout, so that chunks make no difference."""

    def build_model(self) -> nn.Module:
        model = super().build_model()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model


def trained(folder: Path, kind: type[ToySystem] = ToySystem, **changes: Any) -> RunFolder:
    config = toy_config(trainer__threads=1, trainer__log_every=1, **changes)
    system = kind(config)
    system.prepare(print)
    return fit(system, config, RunFolder(folder), say=lambda _: None)


@pytest.mark.parametrize("changes", [{}, {"trainer__accumulate": 3, "batch_size": 10}], ids=str)
def test_a_run_in_chunks_is_the_plain_run(tmp_path: Path, changes: dict[str, Any]) -> None:
    plain = trained(tmp_path / "plain", Dry, **changes)
    cached = trained(tmp_path / "cached", Dry, trainer__cached_chunk=3, **changes)
    losses = [[r["loss"] for r in folder.log() if r["kind"] == "step"] for folder in (plain, cached)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] != losses[1], "it did run in chunks"
    models = [list(Checkpoint.load(folder.path).model.values()) for folder in (plain, cached)]
    assert close(models[1], models[0], 1e-3)


def test_bfloat16_run_in_chunks(tmp_path: Path) -> None:
    folder = trained(tmp_path, trainer__cached_chunk=3, trainer__precision="bf16-mixed", epochs=1)
    assert folder.finished


def dies(folder: Path, config: Any, steps: int) -> None:
    score, count = ToySystem.loss_of, 0

    def dying(self: ToySystem, model: Any, embeddings: Any, batch: Any) -> StepOutput:
        nonlocal count
        if count == steps:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        return score(self, model, embeddings, batch)

    ToySystem.loss_of = dying  # type: ignore[method-assign]
    fit(toy(config), config, RunFolder(folder), say=lambda _: None)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_kill_and_resume_in_chunks_is_bit_identical(tmp_path: Path, accumulate: int) -> None:
    config = toy_config(
        trainer__cached_chunk=3,
        trainer__accumulate=accumulate,
        trainer__checkpoint_steps=2,
        trainer__threads=1,
    )
    whole = fit(toy(config), config, RunFolder(tmp_path / "whole"), say=lambda _: None)
    killed = tmp_path / "killed"
    run_until_killed(dies, killed, config, 13)
    assert 0 < Checkpoint.load(killed).step < Checkpoint.load(whole.path).step
    fit(toy(config), config, RunFolder(killed), Resume.find(str(killed), config), say=lambda _: None)
    assert states_equal(Checkpoint.load(whole.path), Checkpoint.load(killed))
    assert records(whole) == records(RunFolder(killed))


def test_who_can_train_in_chunks() -> None:
    class Whole(ToySystem):
        name, encode = "whole", System.encode

        def training_step(self, model: Any, batch: Any) -> Any:
            return "the whole batch"

    whole: Any = Whole(toy_config())
    assert whole.step(nn.Identity(), None) == "the whole batch"
    with pytest.raises(NearfarError, match="system 'whole' does not encode its rows one by one"):
        whole.step(nn.Identity(), None, 4)
    with pytest.raises(TypeError, match="abstract method"):
        System()  # type: ignore[abstract]


def test_a_chunk_as_large_as_the_batch_is_refused() -> None:
    from nearfar.config.compose import compose_config

    run = ["experiment=molecules", "batch_size=64", "trainer.accelerator=cpu"]
    check_config(compose_config([*run, "trainer.cached_chunk=63"]))
    with pytest.raises(NearfarError, match="the batch is one chunk"):
        check_config(compose_config([*run, "trainer.cached_chunk=64"]))
    with pytest.raises(NearfarError, match="out of range: at least 1"):
        check_config(compose_config([*run, "trainer.cached_chunk=0"]))
