import re
from collections import Counter

import numpy as np
import torch
from torch import nn

from nearfar.models.text.tokens import TokenTable


class Standin:
    kind = "words"
    description = "stand-in words"

    def __init__(self, dim=64, **_):
        self.dim = dim

    def fit(self, texts):
        c = Counter(w for t in texts for w in re.findall(r"\w+|[^\w\s]", t.lower()))
        self.words = {w: i + 2 for i, w in enumerate(sorted(w for w, k in c.items() if k > 1))}
        return self

    def tokenize(self, texts):
        rows = [
            [self.words.get(w, 1) for w in re.findall(r"\w+|[^\w\s]", t.lower())][:128] or [1] for t in texts
        ]
        return TokenTable({"id": np.concatenate([np.array(r) for r in rows])}, [len(r) for r in rows])

    def build(self):
        m = Net(len(self.words) + 2, self.dim)
        return m

    def save(self, folder):
        pass


class Net(nn.Module):
    def __init__(self, n, d):
        super().__init__()
        self.e = nn.Embedding(n, d, padding_idx=0)
        self.c = nn.Conv1d(d, d, 3, padding=1)
        self.width = 2 * d
        self.drop = nn.Dropout(0.2)

    def forward(self, tokens):
        e = self.drop(self.e(tokens["id"]) * tokens.mask[..., None])
        h = torch.relu(self.c(e.transpose(1, 2)).transpose(1, 2))
        s = torch.cat([h, e], -1) * tokens.mask[..., None]
        return s, s.sum(1) / tokens.mask.sum(1, keepdim=True)
