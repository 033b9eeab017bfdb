# %% [markdown]
# # The query stands in its own gallery
#
# Retrieval of the same view: every query is compared with all rows, and so with itself, which is always nearest. R@1
# is 1, and was 1 before the first step.

# %%
import warnings

import torch
from gallery import Run, show, toy_pairs

from nearfar.losses import InfoNCELoss
from nearfar.metrics import paired_difference, retrieval_ranks

warnings.simplefilter("ignore", UserWarning)  # nearfar says at once that queries stand in their own gallery
_, items = toy_pairs(512)


def train(broken: bool) -> Run:
    torch.manual_seed(0)
    encoder, loss = torch.nn.Linear(24, 16), InfoNCELoss(temperature=0.2)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.005)
    seen = items if broken else items + 4 * torch.randn(512, 24)  # the other view of each item

    def hits() -> torch.Tensor:
        with torch.no_grad():
            return torch.as_tensor(
                retrieval_ranks(encoder(seen), encoder(items)).hits(1), dtype=torch.float64
            )

    run, before = Run(), hits()
    for epoch in range(1, 5):
        for batch in torch.randperm(512).split(64):
            first, second = (items[batch] + 4 * torch.randn(64, 24) for _ in range(2))
            value = loss(encoder(first), encoder(second))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        run.add(epoch=epoch, train_loss=value.item(), val={"R@1": hits().mean().item()})
    scores = {"before_training": before, "metrics": hits()}
    change = paired_difference(scores["metrics"].numpy(), before.numpy())
    interval = {"value": change.value, "low": change.low, "high": change.high}
    run.context = {name: {"val": {"R@1": {"value": each.mean().item()}}} for name, each in scores.items()}
    run.context |= {"monitor": "R@1", "gain": {"val": {"R@1": interval}}}
    return run


# %% [markdown]
# **Remedy.** Query by a different view of the item, or leave the query itself out of the gallery (leave one out). A
# score says nothing without that of the untrained model beside it.

# %%
shown = show(train(broken=True), train(broken=False), "training-no-gain", curve="R@1")
figure = shown.figure()
