# %% [markdown]
# # Cosines without a temperature
#
# Cross-entropy of plain cosines. They lie between −1 and 1, so that even a perfect model cannot bring the loss far
# below ln 64: it ranks well, and the loss looks stuck.

# %%
import math

import torch
from gallery import Run, show, toy_pairs
from torch.nn.functional import cross_entropy, normalize

from nearfar.metrics import retrieval_metrics

text, image = toy_pairs(noise=1.0)


def train(broken: bool) -> Run:
    torch.manual_seed(0)
    encoder, temperature = torch.nn.Linear(24, 16), 1.0 if broken else 0.1
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.02)
    run = Run(context={"sampler": "random"})
    for epoch in range(1, 7):
        for batch in torch.randperm(512).split(64):
            cosines = normalize(encoder(image[batch]), dim=1) @ normalize(text[batch], dim=1).T
            value = cross_entropy(cosines / temperature, torch.arange(64))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            run.add(epoch=epoch, loss=value.item(), candidates=64)
        with torch.no_grad():
            recall = retrieval_metrics(encoder(image), text)["R@1"]
        run.log[-1] |= {"val": {"R@1": recall.value}}
    return run


# %% [markdown]
# **Remedy.** Divide by a temperature of .05 to .1, or learn it. With logits in [−1, 1] the least loss of 64
# candidates is ln(1 + 63 e⁻²) = 2.26.

# %%
shown = show(train(broken=True), train(broken=False), "logits-flat", levels={"ln 64": math.log(64)})
figure = shown.figure()
