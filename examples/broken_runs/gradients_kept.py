# %% [markdown]
# # `zero_grad` is missing
#
# PyTorch adds every gradient to those before. Without `zero_grad` each step goes along the sum of all gradients so
# far, which grows, points into the past, and throws the weights ever farther.

# %%
import torch
from gallery import Run, show, toy_pairs

from nearfar.losses import InfoNCELoss

text, image = toy_pairs(noise=4.0)


def train(broken: bool) -> Run:
    torch.manual_seed(0)
    encoder, loss = torch.nn.Linear(24, 16), InfoNCELoss(temperature=0.2)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.001)
    run = Run()
    for epoch in range(1, 11):
        for batch in torch.randperm(512).split(64):
            value = loss(encoder(image[batch]), text[batch])
            if not broken:
                optimizer.zero_grad()
            value.backward()
            norm = float(torch.nn.utils.get_total_norm([p.grad for p in encoder.parameters()]))
            optimizer.step()
            run.add(epoch=epoch, loss=value.item(), gradient_norm=norm, candidates=loss.record.candidates)
    return run


# %% [markdown]
# **Remedy.** `optimizer.zero_grad()` before `backward()`. Accumulate on purpose over a fixed number of batches, and
# divide the loss by it.

# %%
shown = show(train(broken=True), train(broken=False), "gradient-grows", curve="gradient_norm")
figure = shown.figure()
