"""Values and gradients side by side with the libraries people come from; docs/losses.md, "Where libraries differ".

Each test needs its library and is left out without it: none of them is a dependency. Peers compute in the precision
they are given; in half they are asked for the same numbers in float32, since their own sums overflow or round.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import oracles
from nearfar.contrast import DuplicateMask
from nearfar.errors import NearfarError
from nearfar.functional import clip, info_nce, siglip, supcon
from nearfar.losses import CrossBatchMemory, InfoNCELoss, SupConLoss
from nearfar.metrics import retrieval_metrics
from nearfar.training.grad_cache import cached_loss

N, D = 12, 8
CLASSES = torch.tensor([2, -7, 2, 0, 5, -7, 2, 0, 9, 5, 2, 0])  # classes of four, three, two, two and one
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SLACK = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    found = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return found.to(dtype).requires_grad_()


def views(dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    """Two views for nearfar, and the same numbers for a peer."""
    ours = draw(N, D, dtype=dtype), draw(N, D, seed=1, dtype=dtype)
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    return ours, [x.detach().to(wide).requires_grad_() for x in ours]


def same(value: Tensor, ours: tuple[Tensor, ...], theirs: Tensor, inputs: list[Tensor]) -> None:
    """One value and its gradients, within the rounding of the inputs."""
    oracles.agree(value, ours, theirs.double(), inputs[: len(ours)], SLACK[ours[0].dtype], floor=1e-2)


# -- info-nce-pytorch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["in batch", "unpaired", "paired"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_info_nce_pytorch(dtype, mode, reduction):
    peer = pytest.importorskip("info_nce")
    (a, b), others = views(dtype)
    keys = {"in batch": None, "unpaired": draw(20, D, seed=2), "paired": draw(N, 5, D, seed=2)}[mode]
    more = None if keys is None else keys.detach().to(dtype)
    negatives = None if more is None else more.to(others[0].dtype)
    mode = "paired" if mode == "paired" else "unpaired"
    loss = InfoNCELoss(0.1, symmetric=False, in_batch=more is None, reduction=reduction)
    found = loss(a, b, negatives=more)
    exact = peer.InfoNCE(0.1, reduction=reduction, negative_mode=mode)(*others, negatives)
    assert found.shape == exact.shape
    if reduction == "none":
        assert torch.allclose(found.double(), exact.double(), rtol=SLACK[dtype], atol=SLACK[dtype])
        found, exact = (found * found.detach()).sum(), (exact * exact.detach()).sum()
    same(found, (a, b), exact, others)
    assert loss.record.candidates == (N if more is None else 1 + more.shape[-2])


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.ones(3), torch.ones(3, 2)),
        (torch.ones(3, 2), torch.ones(3)),
        (torch.ones(3, 2), torch.ones(4, 2)),
        (torch.ones(3, 2), torch.ones(3, 5)),
        (torch.ones(3, 2), torch.ones(3, 2), torch.ones(2)),
        (torch.ones(3, 2), torch.ones(3, 2), torch.ones(4, 5)),
        (torch.ones(3, 2), torch.ones(3, 2), torch.ones(4, 5, 2)),
    ],
)
def test_both_refuse_shapes_that_do_not_fit(arguments):
    peer = pytest.importorskip("info_nce")
    a, b, *negatives = arguments
    mode = "paired" if negatives and negatives[0].ndim == 3 else "unpaired"
    with pytest.raises(ValueError, match=r"must|same|components"):
        peer.info_nce(*arguments, negative_mode=mode)
    with pytest.raises(ValueError, match=r"needed|dimensions|matrix|partner"):
        info_nce(
            a,
            b,
            negatives=negatives[0] if negatives else None,
            in_batch=not negatives,
            symmetric=not negatives,
        )


# -- pytorch-metric-learning -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_supcon_of_metric_learning(dtype):
    peer = pytest.importorskip("pytorch_metric_learning.losses")
    (z, _), others = views(dtype)
    same(supcon(z, CLASSES), (z,), peer.SupConLoss(0.1)(others[0], CLASSES), others)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by", ["row", "pair"])
def test_nt_xent_of_classes(dtype, by):
    peer = pytest.importorskip("pytorch_metric_learning.losses")
    reducers = pytest.importorskip("pytorch_metric_learning.reducers")
    (z, _), others = views(dtype)
    if by == "row":
        reducer = reducers.PerAnchorReducer(reducers.AvgNonZeroReducer())
        exact = peer.NTXentLoss(0.1, reducer=reducer)(others[0], CLASSES)
        same(supcon(z, CLASSES, denominator="own"), (z,), exact, others)
        return
    positives = (CLASSES[:, None] == CLASSES).sum(1) - 1
    each = supcon(z, CLASSES, denominator="own", reduction="none")
    mean = (each * positives).sum() / positives.sum()
    same(mean, (z,), peer.NTXentLoss(0.1)(others[0], CLASSES), others)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("denominator", ["all", "own"])
def test_a_reference_set_with_labels_of_its_own(dtype, denominator):
    peer = pytest.importorskip("pytorch_metric_learning.losses")
    reducers = pytest.importorskip("pytorch_metric_learning.reducers")
    z, ref, kinds = (
        draw(N, D, dtype=dtype),
        draw(7, D, seed=1, dtype=dtype),
        torch.tensor([2, 0, 77, 2, -7, -7, 2]),
    )
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    others = [x.detach().to(wide).requires_grad_() for x in (z, ref)]
    found = supcon(z, CLASSES, memory=ref, memory_labels=kinds, in_batch=False, denominator=denominator)
    reducer = reducers.PerAnchorReducer(reducers.AvgNonZeroReducer())
    loss = peer.SupConLoss(0.1) if denominator == "all" else peer.NTXentLoss(0.1, reducer=reducer)
    same(found, (z, ref), loss(others[0], CLASSES, ref_emb=others[1], ref_labels=kinds), others)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_self_supervised_nt_xent(symmetric, dtype):
    peer = pytest.importorskip("pytorch_metric_learning.losses")
    (a, b), others = views(dtype)
    exact = peer.SelfSupervisedLoss(peer.NTXentLoss(0.1), symmetric=symmetric)(*others)
    if symmetric:
        found = supcon(torch.cat([a, b]), torch.arange(N).repeat(2))
    else:
        found = info_nce(a, b, temperature=0.1, symmetric=False)
    same(found, (a, b), exact, others)


@pytest.mark.parametrize("kind", ["SupConLoss", "NTXentLoss"])
def test_cross_batch_memory_of_metric_learning(kind):
    peer = pytest.importorskip("pytorch_metric_learning.losses")
    theirs = peer.CrossBatchMemory(getattr(peer, kind)(0.1), D, memory_size=3 * N - 5)
    # Theirs takes the batch in before it is scored, so that of as many rows it keeps fewer earlier ones.
    ours = CrossBatchMemory(size=2 * N - 5, dim=D, ids=True).double()
    loss = SupConLoss(0.1, denominator="own" if kind == "NTXentLoss" else "all", reduction="none")
    for step in range(5):
        z, labels = (
            draw(N, D, seed=step),
            torch.randint(4, (N,), generator=torch.Generator().manual_seed(step)),
        )
        exact = theirs(z, labels)
        each = loss(z, labels, memory=ours.rows(), memory_labels=ours.ids())
        count = (labels[:, None] == torch.cat([labels, ours.ids()])).sum(1) - 1
        weight = count if kind == "NTXentLoss" else (count > 0).double()  # a mean over pairs, or over rows
        assert ((each * weight).sum() / weight.sum()).item() == pytest.approx(exact.item(), rel=1e-6)
        ours.push(z, labels)


@pytest.mark.filterwarnings("ignore:no row of this batch")
def test_nothing_to_learn_is_zero_in_both():
    peer = pytest.importorskip("pytorch_metric_learning.losses")
    for labels in ([0], [0, 0, 0], [1, 2, 3]):
        z, kinds = draw(len(labels), 2), torch.tensor(labels)
        assert peer.NTXentLoss(0.1)(z, kinds) == 0
        value = supcon(z, kinds, denominator="own")
        assert value.item() == 0.0
        assert not torch.autograd.grad(value, z)[0].any()
    # Where they differ: of one class alone, SupCon pulls its rows together, down to ln(n - 1).
    z = draw(3, 2)
    assert peer.SupConLoss(0.1)(z, torch.zeros(3).long()) == 0
    assert supcon(z, torch.zeros(3).long()).item() >= math.log(2)


def test_the_logarithm_of_a_tiny_quotient_stops():
    """Where they differ: at -ln(tiny) theirs has no gradient any more."""
    peer = pytest.importorskip("pytorch_metric_learning.losses")
    z = torch.tensor([[1.0, 0.0], [-1.0, 0.2], [0.9, 0.1], [-0.8, 0.3]], requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1])
    each = supcon(z, labels, temperature=0.01, denominator="own", reduction="none")
    exact = torch.stack(oracles.losses(oracles.supcon(z.double(), labels, 100.0)[0], "own"))
    assert torch.allclose(each.double(), exact, rtol=1e-4)
    assert exact.min() > 100
    assert peer.NTXentLoss(0.01)(z, labels).item() == pytest.approx(
        -math.log(torch.finfo(torch.float32).tiny)
    )
    assert not torch.autograd.grad(peer.NTXentLoss(0.01)(z, labels), z)[0].any()
    assert torch.autograd.grad(each.sum(), z)[0].norm(dim=1).min() > 1


# -- sentence-transformers -------------------------------------------------------------------------------------------


def ranking(**options):
    peer = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    loss = peer.MultipleNegativesRankingLoss(torch.nn.Identity(), **options)
    return lambda *columns: loss.compute_loss_from_embeddings(list(columns), torch.empty(0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("hard", [0, 1, 3])
def test_multiple_negatives_ranking(dtype, both, hard):
    (a, b), others = views(dtype)
    mined = draw(N, hard, D, seed=2).detach().to(dtype) if hard else None
    more = [] if mined is None else list(mined.to(others[0].dtype).unbind(1))
    options = (
        {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"} if both else {}
    )
    exact = ranking(scale=20.0, **options)(*others, *more)
    negatives = None if mined is None else mined.flatten(0, 1)
    found = info_nce(a, b, temperature=0.05, symmetric=both, negatives=negatives)
    same(found, (a, b), exact, others)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ranking_with_the_other_queries_as_negatives(dtype):
    (a, b), others = views(dtype)
    exact = ranking(directions=("query_to_doc", "query_to_query"))(*others)
    itself = DuplicateMask(torch.arange(N))
    found = info_nce(a, b, temperature=0.05, symmetric=False, negatives=a, negatives_mask=itself)
    same(found, (a, b), exact, others)


class Embedder(torch.nn.Module):
    """As much of a SentenceTransformer as its cached loss asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(D, 5, dtype=torch.float64)
        with torch.no_grad():
            self.layer.weight.copy_(draw(5, D, seed=9))

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": torch.tanh(self.layer(features["input_ids"]))}


@pytest.mark.parametrize("factor", [1.0, 1000.0])
def test_cached_ranking(factor):
    """Both take large batches in two passes: the same value and gradients, scaled losses too."""
    peer = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    model = torch.nn.Sequential(Embedder())  # theirs looks at its first part
    texts = [draw(N, D, seed=seed).detach() for seed in range(3)]  # query, document, hard negative
    theirs = peer.CachedMultipleNegativesRankingLoss(model, mini_batch_size=5)
    exact = theirs([{"input_ids": x} for x in texts], torch.empty(0)) * factor
    exact.backward()
    wanted = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()

    def encode(chunk):
        return tuple(model({"input_ids": x})["sentence_embedding"] for x in chunk)

    loss = InfoNCELoss(0.05, symmetric=False)
    chunks = list(zip(*(x.split(5) for x in texts), strict=True))
    found = cached_loss(encode, chunks, lambda z: loss(z[0], z[1], negatives=z[2])) * factor
    found.backward()
    assert found.item() == pytest.approx(exact.item(), rel=1e-9)
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-7, atol=1e-9 * factor)


# -- lightly and solo-learn ------------------------------------------------------------------------------------------


def lightly(name: str):
    return getattr(pytest.importorskip("lightly.loss", exc_type=ImportError), name)


def simclr(a: Tensor, b: Tensor, temperature: float, decoupled: bool) -> Tensor:
    """SimCLR's algorithm 1 (2n rows, one positive each), and equation 6 of decoupled contrastive learning."""
    z = torch.nn.functional.normalize(torch.cat([a, b]))
    losses = []
    for i in range(2 * len(a)):
        partner = (i + len(a)) % (2 * len(a))
        left = [j for j in range(2 * len(a)) if j not in ((i, partner) if decoupled else (i,))]
        scores = (z[i] * z).sum(1) / temperature
        losses.append(torch.logsumexp(scores[left], 0) - scores[partner])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 10.0])
def test_simclr_and_its_decoupled_form(dtype, decoupled, temperature):
    (a, b), others = views(dtype)
    exact = simclr(*others, temperature, decoupled)
    denominator = "negatives" if decoupled else "all"
    found = supcon(
        torch.cat([a, b]), torch.arange(N).repeat(2), temperature=temperature, denominator=denominator
    )
    same(found, (a, b), exact, others)


@pytest.mark.parametrize("name", ["NTXentLoss", "DCLLoss"])
def test_simclr_of_lightly(name):
    a, b = draw(N, D), draw(N, D, seed=1)
    loss = lightly(name)(temperature=0.3)
    same(simclr(a, b, 0.3, name == "DCLLoss"), (a, b), loss(a, b), [a, b])


def test_memory_bank_of_lightly():
    a, b = draw(N, D), draw(N, D, seed=1)
    loss = lightly("NTXentLoss")(temperature=0.3, memory_bank_size=(20, D)).double()
    bank = torch.nn.functional.normalize(loss.memory_bank.bank)  # of unit length in float32 only
    loss.memory_bank.bank = bank.clone()
    found = info_nce(a, b, temperature=0.3, symmetric=False, negatives=bank, in_batch=False)
    same(found, (a, b), loss(a, b), [a, b])


def test_positives_and_negatives_by_matrices():
    """solo-learn's SimCLR takes both as matrices: the rest is left out."""
    z, temperature = draw(2 * N, D), 0.2
    labels = CLASSES.repeat(2)
    positive = (labels[:, None] == labels).fill_diagonal_(False)
    negative = ~positive & (torch.rand(2 * N, 2 * N, generator=torch.Generator().manual_seed(0)) < 0.6)
    negative.fill_diagonal_(False)
    unit = torch.nn.functional.normalize(z)
    powers = (unit @ unit.T / temperature).exp()
    log_p = powers.log() - (powers * (positive | negative)).sum(1, keepdim=True).log()
    exact = -((log_p * positive).sum(1) / positive.sum(1)).mean()
    found = supcon(z, positives=positive, mask=~(positive | negative), temperature=temperature)
    same(found, (z,), exact, [z])


# -- the program of the authors of SupCon ----------------------------------------------------------------------------


def khosla(views: Tensor, same: Tensor, temperature: float, base: float, one: bool) -> Tensor:
    """Several views (n, views, d), positives (n, n) between items; anchors of all views or of the first alone."""
    n, count, _ = views.shape
    rows = torch.nn.functional.normalize(torch.cat(views.unbind(1)), dim=1)
    losses = []
    for i in range(n if one else n * count):
        scores = (rows[i] * rows).sum(1) / temperature
        others = [j for j in range(n * count) if j != i]
        mine = [j for j in others if same[i % n, j % n]]
        log_z = torch.logsumexp(scores[others], 0)
        losses.append(temperature / base * torch.stack([log_z - scores[j] for j in mine]).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("mode", ["all", "one"])
@pytest.mark.parametrize("who", ["labels", "matrix", "nobody else"])
def test_the_authors_supcon(mode, who):
    z, temperature, base = draw(N, 3, D), 0.2, 0.07
    matrix = CLASSES[:, None] == CLASSES
    if who == "matrix":  # not symmetric
        matrix = matrix | (torch.rand(N, N, generator=torch.Generator().manual_seed(0)) < 0.2)
    if who == "nobody else":
        matrix = torch.eye(N, dtype=torch.bool)
    exact = khosla(z, matrix, temperature, base, mode == "one")
    rows, item = torch.cat(z.unbind(1)), torch.arange(N).repeat(3)
    to_whom = {
        "labels": {"labels": CLASSES.repeat(3)},
        "matrix": {"positives": matrix.repeat(3, 3)},
        "nobody else": {"labels": item},
    }[who]
    part = slice(0, N if mode == "one" else 3 * N)
    found = supcon(rows, **to_whom, temperature=temperature, rows=part, reduction="sum")
    same(found / part.stop * (temperature / base), (z,), exact, [z])


# -- open_clip and transformers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_clip_of_transformers(scale):
    pytest.importorskip("transformers")
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    a, b = draw(N, D), draw(N, D, seed=1)
    s = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    unit = [torch.nn.functional.normalize(x) for x in (a, b)]
    exact = image_text_contrastive_loss(unit[1] @ unit[0].T * s)
    oracles.agree(clip(a, b, s), (a, b, s), exact, (a, b, s), 1e-9)


def test_clip_and_siglip_of_open_clip():
    peer = pytest.importorskip("open_clip.loss", exc_type=ImportError)
    a, b = draw(N, D), draw(N, D, seed=1)
    s, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (14.3, -10.0))
    unit = [torch.nn.functional.normalize(x) for x in (a, b)]
    exact = peer.ClipLoss()(*unit, s)
    oracles.agree(clip(a, b, s), (a, b, s), exact, (a, b, s), 1e-9)
    exact = peer.SigLipLoss()(*unit, s, bias)
    oracles.agree(siglip(a, b, s, bias), (a, b, s, bias), exact, (a, b, s, bias), 1e-9)


# -- torchmetrics -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_retrieval_of_torchmetrics():
    """Without ties and for scores above 0 alone: theirs drops a relevant item that scores 0 or less."""
    peer = pytest.importorskip("torchmetrics.functional.retrieval")
    a, b = (draw(30, D, seed=seed, dtype=torch.float32).detach() for seed in (0, 1))
    found = retrieval_metrics(a, b, ks=(1, 5))
    scores = torch.nn.functional.normalize(a) @ torch.nn.functional.normalize(b).T
    target = torch.eye(30, dtype=torch.bool)

    def mean(metric, shift, **options):
        each = [metric(scores[i] + shift, target[i], **options) for i in range(30)]
        return torch.stack(each).mean().item()

    assert found["MRR"].value == pytest.approx(mean(peer.retrieval_reciprocal_rank, 2.0))
    assert found["R@1"].value == pytest.approx(mean(peer.retrieval_hit_rate, 2.0, top_k=1))
    assert found["R@5"].value == pytest.approx(mean(peer.retrieval_hit_rate, 2.0, top_k=5))
    assert found["MRR"].value > 1.01 * mean(peer.retrieval_reciprocal_rank, 0.0)


def test_ties_count_by_expectation_here():
    """Theirs go by the order of the rows: of a collapsed encoder that is 1 for the first query and 0 for the last."""
    peer = pytest.importorskip("torchmetrics.functional.retrieval")
    scores, target = torch.ones(4, 4), torch.eye(4, dtype=torch.bool)
    theirs = [peer.retrieval_hit_rate(scores[i], target[i], top_k=1).item() for i in range(4)]
    assert sorted(theirs) == [0.0, 0.0, 0.0, 1.0]
    harmonic = sum(1 / rank for rank in range(1, 5)) / 4
    found = retrieval_metrics(torch.ones(4, 2), torch.ones(4, 2), ks=(1,))
    assert found["R@1"].value == pytest.approx(0.25)
    assert found["MRR"].value == pytest.approx(harmonic)


# -- refused here ----------------------------------------------------------------------------------------------------


def test_a_negative_temperature_is_an_error_here():
    """lightly takes one, and then pushes pairs apart."""
    with pytest.raises(NearfarError, match="above 0"):
        supcon(draw(4, 2), torch.arange(2).repeat(2), temperature=-1.0)
