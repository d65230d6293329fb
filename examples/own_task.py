"""A task of your own: a trained model, its data and a metric.

Try: autocompress compress examples/own_task.py:wine --budget 'size_mb<=50%' --out wine
"""

import torch
from sklearn.datasets import load_wine
from torch import nn

from autocompress.tasks import Split, Task


def wine() -> Task:
    """Three kinds of wine told apart by 13 chemical measurements."""
    values, kinds = load_wine(return_X_y=True)
    inputs = torch.tensor((values - values.mean(0)) / values.std(0), dtype=torch.float32)  # (178, 13)
    targets = torch.tensor(kinds)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    train, search, report = (Split(inputs[rows], targets[rows]) for rows in order.split([88, 45, 45]))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(train.inputs), train.targets).backward()
        optimizer.step()
    return Task("wine", model, calibration=train.take(64), search=search, report=report, train=train)
