"""Time and memory of the losses of nearfar.integrations beside those of the libraries they stand in for.

    python benchmarks/integrations.py                 # batches of 2,048 and 8,192; minutes on two cores
    python benchmarks/integrations.py --batch 2048

Forward and backward, float32, embeddings (batch, 256) to gradients. Repeats alternate between the two ways, so that a
disturbance meets both; the first of each does not count. *Ratio* is the median over repeats of the quotient within
each. *MB* is the peak of what PyTorch's allocator held beyond the inputs in one step. Where a library is not installed
(open_clip and lightly need torchvision), what its loss computes is written out, which the table states.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch: its profiler announces every start

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from nearfar.integrations import lightly, open_clip, pytorch_metric_learning

Step = Callable[[], Tensor]
WRITTEN_OUT = "written out"


def sentence_pairs(a: Tensor, b: Tensor, symmetric: bool) -> tuple[Step, Step, str]:
    """Embeddings in place of a model: the loss alone is measured."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    from nearfar.integrations.sentence_transformers import InfoNCELoss

    model = torch.nn.Identity()
    options: dict[str, object] = {}
    if symmetric:
        options = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    theirs = MultipleNegativesRankingLoss(model, scale=20.0, **options)  # type: ignore[arg-type]
    ours = InfoNCELoss(model, 1 / 20, symmetric=symmetric)
    return (
        lambda: ours.compute_loss_from_embeddings([a, b]),
        lambda: theirs.compute_loss_from_embeddings([a, b], None),  # type: ignore[arg-type]
        "sentence-transformers",
    )


def clip(a: Tensor, b: Tensor) -> tuple[Step, Step, str]:
    ours, target = open_clip.ClipLoss(), torch.arange(len(a))

    def theirs() -> Tensor:
        x, y = normalize(a, dim=1), normalize(b, dim=1)
        image, text = 14.3 * x @ y.T, 14.3 * y @ x.T
        return (cross_entropy(image, target) + cross_entropy(text, target)) / 2

    return lambda: ours(normalize(a, dim=1), normalize(b, dim=1), 14.3), theirs, WRITTEN_OUT


def siglip(a: Tensor, b: Tensor) -> tuple[Step, Step, str]:
    ours = open_clip.SigLipLoss()

    def theirs() -> Tensor:
        logits = 10.0 * normalize(a, dim=1) @ normalize(b, dim=1).T - 10.0
        return -logsigmoid((2 * torch.eye(len(a)) - 1) * logits).sum() / len(a)

    return lambda: ours(normalize(a, dim=1), normalize(b, dim=1), 10.0, -10.0), theirs, WRITTEN_OUT


def two_views(a: Tensor, b: Tensor) -> tuple[Step, Step, str]:
    """lightly's way: similarities of each pair of views, the diagonals of the same views taken out."""
    half_a, half_b = a[: len(a) // 2], b[: len(a) // 2]
    ours, n = lightly.NTXentLoss(0.5), len(a) // 2

    def theirs() -> Tensor:
        x, y = normalize(half_a, dim=1), normalize(half_b, dim=1)
        other = ~torch.eye(n, dtype=torch.bool)
        aa, bb = ((z @ z.T / 0.5)[other].view(n, -1) for z in (x, y))
        ab, ba = x @ y.T / 0.5, y @ x.T / 0.5
        logits = torch.cat([torch.cat([ab, aa], 1), torch.cat([ba, bb], 1)])
        return cross_entropy(logits, torch.arange(n).repeat(2))

    return lambda: ours(half_a, half_b), theirs, WRITTEN_OUT


def labelled(a: Tensor, b: Tensor) -> tuple[Step, Step, str]:
    from pytorch_metric_learning.losses import SupConLoss

    labels = torch.arange(len(a)) % (len(a) // 8)
    ours, theirs = pytorch_metric_learning.SupConLoss(0.1), SupConLoss(0.1)
    return lambda: ours(a, labels), lambda: theirs(a, labels), "pytorch-metric-learning"


CASES: dict[str, Callable[[Tensor, Tensor], tuple[Step, Step, str]]] = {
    "sentence-transformers, one direction": lambda a, b: sentence_pairs(a, b, False),
    "sentence-transformers, symmetric": lambda a, b: sentence_pairs(a, b, True),
    "open_clip ClipLoss": clip,
    "open_clip SigLipLoss": siglip,
    "lightly NTXentLoss (half the batch, two views)": two_views,
    "pytorch-metric-learning SupConLoss (8 a class)": labelled,
}


def seconds(step: Step, inputs: tuple[Tensor, ...]) -> float:
    begin = time.perf_counter()
    torch.autograd.grad(step(), inputs, allow_unused=True)
    return time.perf_counter() - begin


def peak(step: Step, inputs: tuple[Tensor, ...]) -> float:
    """The most that the allocator held in one step, in MB."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        torch.autograd.grad(step(), inputs, allow_unused=True)
    most = total = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            most = max(most, total)
    return most / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="*", default=[2048, 8192])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="losses whose names hold this word")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(
        "| loss | batch | beside | value, difference | nearfar s | other s | ratio | nearfar MB | other MB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for batch in options.batch:
        generator = torch.Generator().manual_seed(0)
        a = torch.randn(batch, 256, generator=generator)
        b = (a + torch.randn(batch, 256, generator=generator)).requires_grad_()
        a.requires_grad_()
        for name, case in CASES.items():
            if options.only.lower() not in name.lower():
                continue
            try:
                ours, theirs, beside = case(a, b)
            except ImportError as error:
                print(f"| {name} | {batch:,} | not installed: {error.name} | | | | | | |")
                continue
            gap = abs(ours().item() - theirs().item())
            times = [(seconds(ours, (a, b)), seconds(theirs, (a, b))) for _ in range(options.repeats + 1)][1:]
            mine, other = (statistics.median(each) for each in zip(*times, strict=True))
            ratio = statistics.median(y / x for x, y in times)
            print(
                f"| {name} | {batch:,} | {beside} | {gap:.1e} | {mine:.3f} | {other:.3f} | {ratio:.1f} × | "
                f"{peak(ours, (a, b)):,.0f} | {peak(theirs, (a, b)):,.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
