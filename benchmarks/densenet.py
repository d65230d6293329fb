"""A small DenseNet (Huang et al. 2017) for CIFAR-10, trained here once and kept in the cache folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from mobilenet import N_CLASSES, trained_task

from autocompress.tasks import Task

EPOCHS = 3
STEM, GROWTH, LAYERS = 32, 16, (4, 4, 4)
"""Channels of the stem and of each layer, layers of each dense block; transitions halve channels and sides."""


class DenseLayer(nn.Module):
    """Norm and ReLU before the 3 x 3 convolution, whose output is concatenated to the input."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, GROWTH, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


class DenseNet(nn.Module):
    """(n, 3, 32, 32) images -> (n, 10) logits; the stem halves the sides."""

    def __init__(self) -> None:
        super().__init__()
        width, parts = STEM, list[nn.Module]()
        for i, layers in enumerate(LAYERS):
            for _ in range(layers):
                parts.append(DenseLayer(width))
                width += GROWTH
            parts += [nn.BatchNorm2d(width), nn.ReLU()]
            if i + 1 < len(LAYERS):
                parts += [nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2)]
                width //= 2
        self.stem, self.features = nn.Conv2d(3, STEM, 3, 2, 1, bias=False), nn.Sequential(*parts)
        self.classifier = nn.Linear(width, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.features(self.stem(x))
        logits: Tensor = self.classifier(features.mean((2, 3)))
        return logits


def densenet_task(data: Sequence[str]) -> Task:
    """The splits of ``cifar10`` with the trained network; trains it (some six CPU-minutes) where the cache has none."""
    return trained_task("densenet", DenseNet, data, EPOCHS)
