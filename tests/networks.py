"""Small real networks with every coupling of channels that the graph must follow or refuse; inputs are (n, 3, 8, 8)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.tasks.base import Split, Task
from autocompress.tasks.resnet import PadBlock, ProjectionBlock, ResNet


class InvertedResidual(nn.Module):
    """Expand, depthwise, project; linear bottleneck (MobileNetV2)."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        wide = 2 * c_in
        self.expand = nn.Sequential(nn.Conv2d(c_in, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(inplace=True))
        self.depthwise = nn.Sequential(
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(inplace=True)
        )
        self.project = nn.Sequential(nn.Conv2d(wide, c_out, 1, bias=False), nn.BatchNorm2d(c_out))
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class MobileNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.blocks = nn.Sequential(InvertedResidual(8, 8, 1), InvertedResidual(8, 12, 2), InvertedResidual(12, 12, 1))
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class DenseLayer(nn.Module):
    """Norm and ReLU before the convolution; the output is concatenated to the input."""

    def __init__(self, c_in: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(c_in)
        self.conv = nn.Conv2d(c_in, growth, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.first = nn.Sequential(DenseLayer(8, 6), DenseLayer(14, 6))
        self.transition = nn.Sequential(
            nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 10, 1, bias=False), nn.AvgPool2d(2)
        )
        self.second = nn.Sequential(DenseLayer(10, 6), DenseLayer(16, 6))
        self.norm = nn.BatchNorm2d(22)
        self.head = nn.Linear(22, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.transition(self.first(self.stem(x))))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(F.relu(self.norm(x)), 1), 1))


class Fire(nn.Module):
    """Squeeze, then 1 x 1 and 3 x 3 side by side (SqueezeNet)."""

    def __init__(self, c_in: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(c_in, squeeze, 1)
        self.one = nn.Conv2d(squeeze, expand, 1)
        self.three = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.one(x)), F.relu(self.three(x))], dim=1)


class SqueezeNet(nn.Module):
    """The classifier is a convolution, averaged to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), Fire(8, 6, 8), Fire(16, 6, 8)
        )
        self.classifier = nn.Sequential(nn.Dropout(), nn.Conv2d(16, 10, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x)).flatten(1)


class PreActivation(nn.Module):
    """Norm and ReLU stand before the convolutions; the stream itself is never rectified (ResNet v2)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8) for _ in range(4)])
        self.convs = nn.ModuleList([nn.Conv2d(8, 8, 3, 1, 1, bias=False) for _ in range(4)])
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i in (0, 2):
            y = self.convs[i](F.relu(self.norms[i](x)))
            x = x + self.convs[i + 1](F.relu(self.norms[i + 1](y)))
        return self.head(F.relu(self.norm(x)).mean((2, 3)))


class HardCodedView(nn.Module):
    """The reshape before the classifier names the size in numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 2, 1)
        self.conv2 = nn.Conv2d(8, 32, 3, 1, 1)
        self.hidden = nn.Linear(512, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x)))).view(-1, 512)
        return self.head(F.relu(self.hidden(x)))


class ChunkSplit(nn.Module):
    """Channels are taken apart and put together in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, 1, 1)
        self.left = nn.Conv2d(6, 6, 3, 1, 1)
        self.conv2 = nn.Conv2d(12, 10, 3, 2, 1)
        self.right = nn.Conv2d(4, 8, 3, 1, 1)
        self.head = nn.Linear(14, 10)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.chunk(F.relu(self.conv1(x)), 2, dim=1)
        x = F.relu(self.conv2(torch.cat([b, F.relu(self.left(a))], 1)))
        c, d = x.split([4, 6], 1)
        x = torch.cat([d, F.relu(self.right(c))], 1)
        return self.head(x.mean((2, 3)))


class SqueezeExcite(nn.Module):
    """A gate a channel, once with 1 x 1 convolutions and once with linear layers and views."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, 1, 1)
        self.down = nn.Conv2d(12, 4, 1)
        self.up = nn.Conv2d(4, 12, 1)
        self.conv = nn.Conv2d(12, 12, 3, 1, 1)
        self.fc1 = nn.Linear(12, 6)
        self.fc2 = nn.Linear(6, 12)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        x = F.relu(self.conv(x))
        n, c, _, _ = x.size()
        gate = self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1).view(n, c)))).sigmoid().view(n, c, 1, 1)
        return self.head((x * gate).mean((2, 3)))


class Grouped(nn.Module):
    """A grouped convolution between two plain ones: the channels around it are refused, those behind are not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 1, 1)
        self.grouped = nn.Conv2d(8, 8, 3, 1, 1, groups=2)
        self.last = nn.Conv2d(8, 12, 3, 2, 1)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.last(F.relu(self.grouped(F.relu(self.first(x))))))
        return self.head(x.mean((2, 3)))


class Shared(nn.Module):
    """One convolution runs twice, each time with a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 1, 1)
        self.twice = nn.Conv2d(8, 8, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 12, 3, 2, 1)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.twice(F.relu(self.first(x)))))
        x = F.relu(self.norm2(self.twice(x)))
        return self.head(F.relu(self.last(x)).mean((2, 3)))


class Tokens(nn.Module):
    """Linear layers on (n, tokens, channels): an MLP block with a residual, as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(24, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:  # (n, 3, 8, 8) -> rows as tokens of 24 values
        x = self.embed(x.reshape(-1, 8, 24))
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x.mean(1))


class Nested(nn.Module):
    """A residual branch that holds another one, and a shared norm module."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.a, self.b, self.c = (nn.Conv2d(8, 8, 3, 1, 1) for _ in range(3))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.a(x)
        y = y + self.b(F.relu(y))
        return self.head((x + self.c(F.relu(y))).mean((2, 3)))


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "resnet-a": lambda: ResNet(PadBlock, 1, widths=(6, 12, 16)),
    "resnet-b": lambda: ResNet(ProjectionBlock, 1, widths=(6, 10, 12)),
    "mobilenet": MobileNet,
    "densenet": DenseNet,
    "squeezenet": SqueezeNet,
    "preactivation": PreActivation,
    "view": HardCodedView,
    "chunk": ChunkSplit,
    "squeeze-excite": SqueezeExcite,
    "grouped": Grouped,
    "shared": Shared,
    "tokens": Tokens,
    "nested": Nested,
}


def network(name: str, seed: int = 0) -> nn.Module:
    """One of :data:`BUILDERS` in eval mode, with lively weights and norms: what goes wrong early must show in the logits."""
    return lively(BUILDERS[name], seed)


def lively(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Any network in eval mode, its weights and norms drawn with ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        for part in model.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(part.weight)
            if isinstance(part, nn.BatchNorm2d):
                nn.init.uniform_(part.weight, 0.5, 1.5)
                nn.init.normal_(part.bias, 0.0, 0.3)
                nn.init.normal_(part.running_mean, 0.0, 0.3)
                nn.init.uniform_(part.running_var, 0.5, 1.5)
    return model.eval()


def images(n: int, seed: int = 0) -> Tensor:
    """Smooth random images, so that inputs are correlated as real ones are.  # (n, 3, 8, 8)"""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, 3, 4, 4, generator=generator)
    return F.interpolate(coarse, (8, 8), mode="bilinear") + 0.1 * torch.randn(n, 3, 8, 8, generator=generator)


def task(name: str, n: int = 128, train: bool = True, seed: int = 0) -> Task:
    """A task on which the network is its own teacher: labels are what it answers, so it scores 100 %."""
    return taught(name, network(name, seed), n, train)


def taught(name: str, model: nn.Module, n: int = 128, train: bool = True) -> Task:
    """The task of answering as ``model`` does."""

    def split(n: int, seed: int) -> Split:
        inputs = images(n, seed)
        with torch.no_grad():
            return Split(inputs, model(inputs).argmax(1))

    return Task(
        name=name,
        model=model,
        calibration=split(n, 1),
        search=split(n, 2),
        report=split(n, 3),
        train=split(2 * n, 4) if train else None,
    )
