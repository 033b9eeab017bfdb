# %% [markdown]
# # The same batches again in every epoch
#
# The sampler has a seed of its own, and nobody calls `set_epoch`: every epoch has the same batches in the same order.
# Each item meets the same 63 negatives for ever, out of thousands.

# %%
import torch
from gallery import Run, show, toy_pairs

from nearfar.batching import RandomBatchSampler
from nearfar.losses import InfoNCELoss

text, image = toy_pairs(1024, noise=6.0)


def train(broken: bool) -> Run:
    torch.manual_seed(0)
    encoder, loss = torch.nn.Linear(24, 16), InfoNCELoss(temperature=0.1)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.02)
    sampler = RandomBatchSampler(1024, batch_size=64, seed=0)
    run = Run()
    for epoch in range(1, 13):
        sampler.set_epoch(0 if broken else epoch)
        for batch in sampler:
            value = loss(encoder(image[batch]), text[batch])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            run.add(epoch=epoch, loss=value.item(), candidates=loss.record.candidates)
    return run


# %% [markdown]
# **Remedy.** `sampler.set_epoch(epoch)` before each epoch (samplers of nearfar go on by themselves where nothing else
# is said), or `shuffle=True` with a generator that is not made anew.

# %%
shown = show(train(broken=True), train(broken=False), "loss-periodic")
figure = shown.figure()
