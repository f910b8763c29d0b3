"""Random rows, and models that have learnt some of them by heart."""

import numpy as np
import torch


def random_rows(count, length=12, seed=0):
    """Tokenised rows, every token scored."""
    ids = np.random.default_rng(seed).integers(3, 128, (count, length)).tolist()
    return [{"input_ids": x, "labels": x} for x in ids]


def learnt(model, rows, steps=60):
    """The model, in eval mode, after some steps on the rows, which are of one length."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    batch = torch.tensor([row["input_ids"] for row in rows])
    model.train()
    for _ in range(steps):
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
