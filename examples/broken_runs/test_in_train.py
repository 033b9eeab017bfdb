# %% [markdown]
# # Test items are in the training set
#
# The table held every item twice, and rows were split at random. Most rows of the test set are items that the model
# was trained on, and it knows them by heart.

# %%
import torch
from gallery import Run, show, toy_pairs

from nearfar.losses import InfoNCELoss
from nearfar.metrics import retrieval_metrics

text, image = toy_pairs(400, noise=12.0, image_width=256)


def train(broken: bool) -> Run:
    torch.manual_seed(0)
    item = torch.arange(400) % 200 if broken else torch.arange(400)  # which item a row of the table is about
    rows = torch.randperm(400)
    train_rows, test_rows = item[rows[:300]], item[rows[300:]]
    encoder, loss = torch.nn.Linear(256, 16), InfoNCELoss(temperature=0.1)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.01)
    ids = {name: {"ids": each.tolist()} for name, each in (("train", train_rows), ("test", test_rows))}
    run = Run(context={"splits": ids})
    for epoch in range(1, 16):
        for batch in train_rows.unique()[torch.randperm(len(train_rows.unique()))].split(50):
            value = loss(encoder(image[batch]), text[batch])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        once = test_rows.unique()
        with torch.no_grad():
            recall = retrieval_metrics(encoder(image[once]), text[once])["R@1"]
        run.add(epoch=epoch, train_loss=value.item(), val={"R@1": recall.value})
    run.context["chance"] = recall.chance
    return run


# %% [markdown]
# **Remedy.** Split by what repeats (the product, the patient, the scaffold), and compare ids or hashes of content of
# both sides. Without the leak the score is what the model is worth on items that it has not seen.

# %%
broken, repaired = train(broken=True), train(broken=False)
chance = {"chance": repaired.context["chance"]}
shown = show(broken, repaired, "split-leak", curve="R@1", levels=chance)
figure = shown.figure()
