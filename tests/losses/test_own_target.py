"""The loss of one's own that docs/losses.md shows, run from that page and compared with loops over pairs."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nearfar.contrast import SparseWeights
from nearfar.errors import NearfarError
from nearfar.losses import ContrastiveLoss, Target, target_loss

PAGE = Path(__file__).parents[2] / "docs" / "losses.md"
N, DIM = 12, 5


def from_page(name: str) -> Any:
    """A class of the page's section, as it stands there."""
    section = PAGE.read_text().split("## A loss of your own in 20 lines")[1].split("\n## ")[0]
    space: dict[str, Any] = {"torch": torch, "__name__": __name__}
    for example in doctest.DocTestParser().get_examples(section):
        if example.source.startswith(("from", "class", "@")):
            exec(compile(example.source, str(PAGE), "exec", dont_inherit=True), space)
    return space[name]


def test_the_page_keeps_its_promise_of_20_lines() -> None:
    section = PAGE.read_text().split("## A loss of your own in 20 lines")[1]
    first = doctest.DocTestParser().get_examples(section)
    lines = [line for example in first for line in example.source.splitlines()]
    end = next(i for i, line in enumerate(lines) if "return self.keep" in line)
    assert end + 1 <= 20


def draw(seed: int) -> Tensor:
    return torch.randn(N, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def links(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three positives of each row, never itself; row 0 has none, since its weigh 0."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([(i + 1 + torch.randperm(N - 1, generator=generator)[:3]) % N for i in range(N)])
    weight = torch.rand(N, 3, generator=generator, dtype=torch.float64) + 0.1
    weight[0] = 0.0
    return index, weight


def by_loops(
    z: Tensor, index: Tensor, weight: Tensor, temperature: float, inside: bool = False
) -> list[Tensor]:
    unit = [row / row.norm() for row in z]
    losses = []
    for i in range(N):
        if weight[i].sum() == 0:
            continue
        logits = {j: unit[i] @ unit[j] / temperature for j in range(N) if j != i}
        every = torch.stack(list(logits.values())).logsumexp(0)
        pairs = [(w, logits[j]) for j, w in zip(index[i].tolist(), weight[i], strict=True)]
        if inside:
            losses.append(every - sum(w * s.exp() for w, s in pairs).log())  # type: ignore[union-attr]
        else:
            losses.append(every - sum(w / weight[i].sum() * s for w, s in pairs))
    return losses


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.01])
def test_a_step_is_that_of_loops_over_pairs(temperature: float) -> None:
    index, weight = links()
    encoder = torch.nn.Linear(DIM, 4, dtype=torch.float64)
    same = torch.nn.Linear(DIM, 4, dtype=torch.float64)
    same.load_state_dict(encoder.state_dict())
    loss: ContrastiveLoss = from_page("LinkLoss")(temperature)
    values = []
    for model, of in ((encoder, loss), (same, None)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(2):
            z = model(draw(0))
            value = (
                of(z, index, weight) if of else torch.stack(by_loops(z, index, weight, temperature)).mean()
            )
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            values.append(value.detach())
    torch.testing.assert_close(values[:2], values[2:], rtol=1e-9, atol=1e-12)
    assert values[1] != values[0]
    torch.testing.assert_close(encoder.weight, same.weight, rtol=1e-8, atol=1e-10)


def test_its_record_and_its_parts() -> None:
    index, weight = links()
    loss = from_page("LinkLoss")(0.2)
    z = draw(0).requires_grad_()
    whole = loss(z, index, weight)
    share = weight[1:] / weight[1:].sum(1, keepdim=True)
    record = loss.record
    assert record.floor == pytest.approx(-(share * share.log()).sum(1).mean().item())
    assert (record.rows_without_positives, record.candidates) == (1.0, N - 1.0)
    assert record.to_dict()["positives_by"] == "weights"
    (gradient,) = torch.autograd.grad(whole, z)
    parts = sum(loss(z, index, weight, rows=slice(start, start + 5)) for start in range(0, N, 5))
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts, z)[0], gradient)


@pytest.mark.parametrize("tile", [None, (3, 4), (5, 2)])
@pytest.mark.parametrize("place", ["outside", "inside"])
def test_tiles_and_both_places_of_the_sum(tile: tuple[int, int] | None, place: Any) -> None:
    index, weight = links(1)
    z = draw(1).requires_grad_()
    target = from_page("Links")(index, weight)
    value, _ = target_loss(z, None, target, temperature=0.3, sum=place, tile=tile)
    exact = torch.stack(by_loops(z, index, weight, 0.3, place == "inside")).mean()
    torch.testing.assert_close(value, exact)
    torch.testing.assert_close(torch.autograd.grad(value, z), torch.autograd.grad(exact, z))
    entries, _ = target_loss(z, None, SparseWeights(index, weight, N), temperature=0.3, sum=place, tile=tile)
    torch.testing.assert_close(entries, exact)


def test_a_second_view_and_a_learned_scale() -> None:
    index, weight = links(2)
    a, b = draw(2).requires_grad_(), draw(3).requires_grad_()
    scale = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    target = from_page("Links")(index, weight)
    value, _ = target_loss(a, b, target, scale=scale)
    units = [[row / row.norm() for row in view] for view in (a, b)]
    losses = []
    for i in range(1, N):
        logits = torch.stack(
            [scale * units[0][i] @ units[1][j] for j in range(N)]
        )  # its own partner is a candidate
        share = weight[i] / weight[i].sum()
        losses.append(logits.logsumexp(0) - (share * logits[index[i]]).sum())
    exact = torch.stack(losses).mean()
    torch.testing.assert_close(value, exact)
    torch.testing.assert_close(
        torch.autograd.grad(value, (a, b, scale)), torch.autograd.grad(exact, (a, b, scale))
    )


def test_what_a_target_lacks_is_said() -> None:
    index, weight = links()
    target: Target = from_page("Links")(index, weight)
    with pytest.raises(NearfarError, match=r"Links has one direction only: write transposed\(\)"):
        target_loss(draw(0), draw(1), target, both=True)
    with pytest.raises(NearfarError, match="'outside' or 'inside' the logarithm"):
        target_loss(draw(0), None, target, sum="between")  # type: ignore[arg-type]
    with pytest.raises(NearfarError, match="the target is for"):
        target_loss(draw(0)[:5], None, target)
    with pytest.raises(NearfarError, match=r"target is a Tensor; a nearfar\.losses\.Target is needed"):
        target_loss(draw(0), None, weight)  # type: ignore[arg-type]
    with pytest.raises(NearfarError, match="temperature"):
        target_loss(draw(0), None, target, temperature=0.0)
