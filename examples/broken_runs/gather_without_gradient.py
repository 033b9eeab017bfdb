# %% [markdown]
# # Features are gathered without their gradient
#
# Four processes exchange their embeddings, so that each row sees all negatives. `all_gather` gives numbers without
# gradient: each process learns from its own 32 rows alone, and DistributedDataParallel divides by 4 once more. (The
# processes are played one after the other here.)

# %%
import torch
from gallery import Run, show, toy_pairs

from nearfar.losses import InfoNCELoss

text, image = toy_pairs()
WORLD = 4


def norm(module: torch.nn.Module) -> float:
    return float(torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None]))


def train(broken: bool) -> Run:
    torch.manual_seed(0)
    encoder, loss = torch.nn.Linear(24, 16), InfoNCELoss(temperature=0.2)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.5)
    run = Run(context={"world_size": WORLD})
    for epoch in range(1, 3):
        for batch in torch.randperm(512).split(128):
            whole = loss(encoder(image[batch]), text[batch])  # one process with all rows
            whole.backward()
            reference = norm(encoder)
            optimizer.zero_grad()
            for rank in range(WORLD):
                rows = encoder(image[batch])
                own = torch.arange(128) // (128 // WORLD) == rank
                gathered = torch.where(own[:, None], rows, rows.detach()) if broken else rows
                (loss(gathered, text[batch]) / WORLD).backward()
            run.add(epoch=epoch, loss=whole.item(), candidates=128, gradient_ratio=norm(encoder) / reference)
            optimizer.step()
            optimizer.zero_grad()
    return run


# %% [markdown]
# **Remedy.** Gather with gradient (`torch.distributed.nn.functional.all_gather`), or wrap the loss by
# `nearfar.training.distributed.DistributedLoss`. `nearfar.verify.loss(my_loss, ranks=4)` certifies any loss on real
# processes.

# %%
shown = show(
    train(broken=True),
    train(broken=False),
    "gradient-scale",
    curve="gradient_ratio",
    levels={"one process": 1.0},
)
figure = shown.figure()
