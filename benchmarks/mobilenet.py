"""A small MobileNetV1 (Howard et al. 2017) for CIFAR-10, trained here once and kept in the cache folder.

The modules stand as in AMC's release (``conv_bn``, then depthwise-separable blocks, one linear classifier), which finds
what it prunes by their order.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from common import quality

from autocompress.files import cache_dir, write_atomically
from autocompress.tasks import Task
from autocompress.tasks.cifar10 import cifar10

WIDTHS = (32, 64, 128, 128, 256, 256, 256, 256, 512)
"""Output channels of the stem and of each block: half of MobileNetV1's, and fewer blocks."""
STRIDES = (2, 1, 2, 1, 2, 1, 1, 1, 1)
N_CLASSES = 10
EPOCHS, BATCH, RATE, DECAY = 5, 64, 0.1, 5e-4


def conv_bn(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


def conv_dw(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(inputs, outputs, 1, 1, 0, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class MobileNet(nn.Module):
    """(n, 3, 32, 32) images -> (n, 10) logits; ``widths``: output channels of the stem and of each block."""

    def __init__(self, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.conv1 = conv_bn(3, widths[0], STRIDES[0])
        blocks = zip(widths[:-1], widths[1:], STRIDES[1:], strict=True)
        self.features = nn.Sequential(*(conv_dw(*block) for block in blocks))
        self.classifier = nn.Sequential(nn.Linear(widths[-1], N_CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.features(self.conv1(x))
        logits: Tensor = self.classifier(features.mean((2, 3)))
        return logits


def mobilenet_task(data: Sequence[str]) -> Task:
    """The splits of ``cifar10`` with the trained network; trains it (some eight CPU-minutes) where the cache has none."""
    return trained_task("mobilenet", MobileNet, data)


def trained_task(name: str, make: Callable[[], nn.Module], data: Sequence[str], epochs: int = EPOCHS) -> Task:
    """The splits of ``cifar10`` with a network that ``make`` builds, as trained here once."""
    task = replace(cifar10("resnet20", data), name=f"cifar10:{name}", model=make())
    path = cache_dir() / "benchmarks" / f"{name}.safetensors"
    if not path.exists():
        train(task, make, epochs)
        state = {key: tensor.contiguous() for key, tensor in task.model.state_dict().items()}
        write_atomically(path, lambda temporary: save_file(state, temporary))
    model = make()
    model.load_state_dict(load_file(path))
    return replace(task, model=model)


def train(task: Task, make: Callable[[], nn.Module], epochs: int = EPOCHS) -> None:
    """Train ``task.model`` in its place on ``task.train``: SGD with momentum, one cycle of the rate, crops and flips.

    ``make`` gives an untrained model of its form.
    """
    assert task.train is not None and task.augment is not None
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = make().to(memory_format=torch.channels_last)
    steps = len(task.train) // BATCH
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, nesterov=True, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, epochs * steps)
    start = time.process_time()
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(len(task.train), generator=generator)
        for rows in order[: steps * BATCH].split(BATCH):
            images = task.augment(task.prepare(task.train.inputs[rows]), generator)
            loss = task.loss(model(images.to(memory_format=torch.channels_last)), task.train.targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        accuracy = quality(task, model.eval(), task.search)
        print(
            f"epoch {epoch}: {accuracy:.2%} of the search split, {time.process_time() - start:.0f} CPU-seconds",
            flush=True,
        )
    task.model.load_state_dict(model.state_dict())
    task.model.eval()
