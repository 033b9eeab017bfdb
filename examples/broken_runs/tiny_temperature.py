# %% [markdown]
# # A temperature of .001
#
# Cosines are divided by the temperature: at .001 the logits reach 1,000, all of a row's gradient goes to its single
# hardest negative, and differences of a millionth of a cosine are beyond 32 bits.

# %%
import torch
from gallery import Run, show, toy_pairs

from nearfar.losses import InfoNCELoss

text, image = toy_pairs(noise=8.0)


def train(broken: bool) -> Run:
    torch.manual_seed(0)
    temperature = 0.001 if broken else 0.1
    encoder, loss = torch.nn.Linear(24, 16), InfoNCELoss(temperature=temperature)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.01)
    run = Run(context={"precision": "32-true"})
    for epoch in range(1, 5):
        for batch in torch.randperm(512).split(64):
            value = loss(encoder(image[batch]), text[batch])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            run.add(epoch=epoch, loss=value.item(), largest_logit=loss.record.scale, **loss.record.to_dict())
    return run


# %% [markdown]
# **Remedy.** Begin at .05 to .1. A learned temperature needs a bound (CLIP's is 1 / 100).

# %%
broken, repaired = train(broken=True), train(broken=False)
shown = show(broken, repaired, "numerical-risk")
shares = [run.series("hardest_share")[-1] for run in (broken, repaired)]
print(f"of the push, the hardest negative has {shares[0]:.2f}, repaired {shares[1]:.2f}")
figure = shown.figure()
