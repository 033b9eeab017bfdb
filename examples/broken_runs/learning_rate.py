# %% [markdown]
# # A learning rate 300 times too high
#
# Each step throws the weights far beyond where the gradient held. The loss lies above ln 64: the model is worse than
# one that knows nothing.

# %%
import math

import torch
from gallery import Run, show, toy_pairs

from nearfar.losses import InfoNCELoss

text, image = toy_pairs(noise=2.0)


def train(broken: bool) -> Run:
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(torch.nn.Linear(24, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
    loss = InfoNCELoss(temperature=4.0, normalize=False)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1.0 if broken else 0.003)
    run = Run(context={"lr": optimizer.param_groups[0]["lr"]})
    for epoch in range(1, 5):
        for batch in torch.randperm(512).split(64):
            value = loss(encoder(image[batch]), text[batch])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            run.add(epoch=epoch, loss=value.item(), candidates=loss.record.candidates)
    return run


# %% [markdown]
# **Remedy.** Divide by 10 until one batch can be overfitted; then warm up. Pretrained encoders take 1e-5 to 5e-5, new
# heads 1e-4 to 1e-3.

# %%
shown = show(train(broken=True), train(broken=False), "loss-above-chance", levels={"ln 64": math.log(64)})
figure = shown.figure()
