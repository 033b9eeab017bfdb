# %% [markdown]
# # One candidate: the loss is 0 from the first step
#
# The loop gives the loss one pair at a time and averages afterwards. Each query has a single candidate, its own
# partner: it is chosen with probability 1 whatever the model does.

# %%
import math

import torch
from gallery import Run, show, toy_pairs

from nearfar.losses import InfoNCELoss

text, image = toy_pairs(64)


def train(broken: bool) -> Run:
    torch.manual_seed(0)
    encoder, loss = torch.nn.Linear(24, 16), InfoNCELoss(temperature=0.2)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.02)
    run = Run()
    for epoch in range(1, 7):
        for batch in torch.randperm(64).split(16):
            rows = encoder(image[batch])
            if broken:
                pairs = zip(rows.split(1), text[batch].split(1), strict=True)
                value = torch.stack([loss(row, own) for row, own in pairs]).mean()
            else:
                value = loss(rows, text[batch])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            norm = float(torch.nn.utils.get_total_norm([p.grad for p in encoder.parameters()]))
            run.add(epoch=epoch, loss=value.item(), gradient_norm=norm, candidates=loss.record.candidates)
    return run


# %% [markdown]
# **Remedy.** Give the loss the whole batch. The same happens with batches of one row on each process and no
# gathering, and with a mask that leaves out every other row. (nearfar's losses warn of it at once, too.)

# %%
shown = show(train(broken=True), train(broken=False), "nothing-to-learn", levels={"ln 16": math.log(16)})
figure = shown.figure()
