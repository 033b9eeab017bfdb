# %% [markdown]
# # The encoder is not in the optimiser
#
# The optimiser was made before the encoder was replaced, and moves the weights of the old one. Nothing fails: the
# loss is computed, gradients flow, and the loss stays at ln 64, as one of 64 candidates is guessed.

# %%
import math

import torch
from gallery import Run, show, toy_pairs

from nearfar.losses import InfoNCELoss

text, image = toy_pairs(text_width=64, image_width=96)


def train(broken: bool) -> Run:
    torch.manual_seed(0)
    encoder, loss = torch.nn.Linear(96, 64), InfoNCELoss(temperature=0.8)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.02)
    if broken:
        encoder = torch.nn.Linear(96, 64)  # a second one, which no optimiser knows
    run = Run()
    for epoch in range(1, 5):
        for batch in torch.randperm(512).split(64):
            value = loss(encoder(image[batch]), text[batch])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            run.add(epoch=epoch, loss=value.item(), candidates=loss.record.candidates)
    return run


# %% [markdown]
# **Remedy.** Make the optimiser of the model that is trained, after everything that replaces modules: `.to()`, LoRA,
# `torch.compile`, a new head. Does the model overfit one batch? If not, its weights do not move.

# %%
shown = show(train(broken=True), train(broken=False), "loss-at-chance", levels={"ln 64": math.log(64)})
figure = shown.figure()
