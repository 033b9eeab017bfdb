# %% [markdown]
# # Positives at the wrong offset
#
# Two views of each item are put one below the other, first all first views and then all second ones. The positive of
# row i is row i + n. This loop takes its neighbour in the list, i ^ 1, as it would be were the views interleaved. The
# true partner then counts as a negative: the loss lies above ln 127, and is least for a model that tells nothing
# apart.

# %%
import math

import torch
from gallery import Run, show, toy_pairs
from torch.nn.functional import cross_entropy, normalize

_, items = toy_pairs(1024)


def train(broken: bool) -> Run:
    torch.manual_seed(0)
    encoder = torch.nn.Linear(24, 16)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.01)
    run = Run()
    for epoch in range(1, 3):
        for batch in torch.randperm(1024).split(64):
            views = torch.cat([items[batch] + 0.5 * torch.randn(64, 24) for _ in range(2)])
            z = normalize(encoder(views), dim=1)
            logits = (z @ z.T / 0.2).fill_diagonal_(-torch.inf)
            positive = torch.arange(128) ^ 1 if broken else (torch.arange(128) + 64) % 128
            value = cross_entropy(logits, positive)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            run.add(epoch=epoch, loss=value.item(), candidates=127)
    return run


# %% [markdown]
# **Remedy.** Two views as two arguments leave no offset to get wrong: `InfoNCELoss()(first, second)`. For your own:
# on views without noise the cosine of each row with its positive has to be 1.

# %%
shown = show(train(broken=True), train(broken=False), "loss-above-chance", levels={"ln 127": math.log(127)})
figure = shown.figure()
