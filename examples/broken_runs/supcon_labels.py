# %% [markdown]
# # Labels that are row numbers
#
# SupCon takes rows with equal labels for positives. The loop passes the positions of the rows instead of their
# classes: no two are equal, no row has a positive, and there is nothing to learn.

# %%
import torch
from gallery import Run, show

from nearfar.losses import SupConLoss

generator = torch.Generator().manual_seed(0)
classes = torch.arange(512) % 8
x = 2 * torch.randn(8, 24, generator=generator)[classes] + torch.randn(512, 24, generator=generator)


def train(broken: bool) -> Run:
    torch.manual_seed(0)
    encoder, loss = torch.nn.Linear(24, 16), SupConLoss(temperature=0.2)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.005)
    run = Run()
    for epoch in range(1, 5):
        for batch in torch.randperm(512).split(64):
            value = loss(encoder(x[batch]), batch if broken else classes[batch])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            run.add(epoch=epoch, loss=value.item(), rows=64, **loss.record.to_dict())
    return run


# %% [markdown]
# **Remedy.** Pass the class of each row, and batches in which classes come more than once (`BalancedBatchSampler`).
# `record.positives_per_row` says how many a row has.

# %%
shown = show(train(broken=True), train(broken=False), "no-positives", curve="positives_per_row")
figure = shown.figure()
