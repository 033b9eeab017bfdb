# %% [markdown]
# # The same text stands several times in a batch
#
# 512 pictures of 32 products share 32 texts. Whoever takes all other rows of the batch for negatives pushes a picture
# away from its own text, wherever that comes a second time.

# %%
import torch
from gallery import Run, show, toy_pairs

from nearfar.losses import DuplicateMask, InfoNCELoss
from nearfar.metrics import batch_signals

kinds, images = toy_pairs(32)
product = torch.arange(512) % 32
text, image = (
    kinds[product],
    images[product] + 0.5 * torch.randn(512, 24, generator=torch.Generator().manual_seed(1)),
)


def train(broken: bool) -> Run:
    torch.manual_seed(0)
    encoder, loss = torch.nn.Linear(24, 16), InfoNCELoss(temperature=0.1)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.02)
    run = Run()
    for epoch in range(1, 5):
        for batch in torch.randperm(512).split(64):
            copies = DuplicateMask(product[batch])
            mask = None if broken else copies
            value = loss(encoder(image[batch]), text[batch], mask=mask)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            signals = batch_signals(copies=copies, left_out=mask)
            run.add(epoch=epoch, loss=value.item(), uniform_level=loss.record.uniform_level, **signals)
    return run


# %% [markdown]
# **Remedy.** Leave copies out of the negatives: `mask=DuplicateMask(ids)` in the loss, `mask_duplicates=true` in a
# run of nearfar. The loss then falls much lower, as it no longer asks for what cannot be.

# %%
shown = show(train(broken=True), train(broken=False), "duplicates")
figure = shown.figure()
