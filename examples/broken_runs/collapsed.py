# %% [markdown]
# # No negatives: all embeddings become one
#
# A loss that only draws partners together has a perfect solution: give every item the same vector. The loss falls to
# 0 and looks like success.

# %%
import torch
from gallery import Run, show, toy_pairs
from torch.nn.functional import cosine_similarity

from nearfar.losses import InfoNCELoss
from nearfar.metrics import embedding_health

text, image = toy_pairs(noise=8.0)


def network(width: int) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(width, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))


def train(broken: bool) -> Run:
    torch.manual_seed(0)
    texts, images, loss = network(16), network(24), InfoNCELoss(temperature=0.1)
    optimizer = torch.optim.Adam([*texts.parameters(), *images.parameters()], lr=0.02)
    run = Run()
    for epoch in range(1, 7):
        for batch in torch.randperm(512).split(64):
            x, y = images(image[batch]), texts(text[batch])
            value = (1 - cosine_similarity(x, y)).mean() if broken else loss(x, y)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        with torch.no_grad():
            health = embedding_health({"images": images(image), "texts": texts(text)})
        run.add(epoch=epoch, train_loss=value.item(), **health)
    return run


# %% [markdown]
# **Remedy.** Negatives (any contrastive loss), or what keeps them apart without: a stopped gradient with a predictor
# (SimSiam), variance terms (VICReg). Log the mean cosine of different rows: 1 is collapse.

# %%
shown = show(
    train(broken=True), train(broken=False), "collapse", curve="images/mean_cosine", levels={"one point": 1.0}
)
figure = shown.figure()
