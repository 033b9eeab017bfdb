# %% [markdown]
# # The neighbour list is in a different order from the data
#
# Hard negatives come from a list of nearest neighbours. Here the table was shuffled after the list was made, so that
# row 7 of the list is about a different item than row 7 of the data. Training runs, and batches are random ones.

# %%
import torch
from gallery import Run, show, toy_pairs

from nearfar.batching import HardNegativeSampler, measure_hardness, nearest_neighbors
from nearfar.losses import InfoNCELoss

text, image = toy_pairs(1024)


def train(broken: bool) -> Run:
    torch.manual_seed(0)
    encoder, loss = torch.nn.Linear(24, 16), InfoNCELoss(temperature=0.1)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.01)
    order = torch.randperm(1024) if broken else torch.arange(1024)
    listed = nearest_neighbors(text[order], k=20)  # of the table as it was before it was shuffled
    sampler = HardNegativeSampler(listed, batch_size=64, hard_ratio=0.5, hardness_k=20)
    true = nearest_neighbors(text, k=20)
    run = Run(context={"sampler": "hard", "hard_ratio": 0.5, "hardness_k": 20, "batch_size": 64})
    for epoch in range(1, 4):
        sampler.set_epoch(epoch)
        measured = measure_hardness(sampler.plan(), true)
        run.add(
            kind="plan",
            epoch=epoch,
            composes_hard_batches=True,
            hardness=measured.neighbors,
            hardness_random=measured.random,
        )
        for batch in sampler:
            value = loss(encoder(image[batch]), text[batch])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            run.add(kind="step", epoch=epoch, loss=value.item(), candidates=loss.record.candidates)
    return run


# %% [markdown]
# **Remedy.** Look neighbours up by id: give `nearest_neighbors(..., ids=ids)` and the sampler the ids of the data,
# which refuses a list in a different order. `measure_hardness` counts neighbours in each batch, beside chance.

# %%
shown = show(train(broken=True), train(broken=False), "hardness-not-above-random", curve="hardness")
figure = shown.figure()
