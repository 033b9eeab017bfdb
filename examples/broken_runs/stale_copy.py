# %% [markdown]
# # The evaluation looks at a copy of the model
#
# The model was copied for evaluation (an average of weights, a second process, an export) and the copy never follows.
# The loss falls, and validation is the same to the last digit in every epoch.

# %%
import copy

import torch
from gallery import Run, show, toy_pairs

from nearfar.losses import InfoNCELoss
from nearfar.metrics import retrieval_metrics

_, items = toy_pairs(512)


def train(broken: bool) -> Run:
    torch.manual_seed(0)
    encoder, loss = torch.nn.Linear(24, 16), InfoNCELoss(temperature=0.2)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.005)
    run, copied = Run(), copy.deepcopy(encoder)
    seen = items + 4 * torch.randn(512, 24)  # the other view of each item
    for epoch in range(1, 6):
        for batch in torch.randperm(512).split(64):
            first, second = (items[batch] + 4 * torch.randn(64, 24) for _ in range(2))
            value = loss(encoder(first), encoder(second))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        with torch.no_grad():
            judged = copied if broken else encoder
            metrics = retrieval_metrics(judged(seen), judged(items))
        run.add(
            epoch=epoch, train_loss=value.item(), val={name: metrics[name].value for name in ("R@1", "MRR")}
        )
    return run


# %% [markdown]
# **Remedy.** Evaluate the model that is trained, update the average in every step, and embed anew for each
# evaluation.

# %%
shown = show(train(broken=True), train(broken=False), "metric-constant", curve="R@1")
figure = shown.figure()
