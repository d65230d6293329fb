"""Residual networks for small images: option A shortcuts as in He et al. (2015) for CIFAR-10, option B for digits.

Plain modules without control flow on values, so that ``torch.fx`` can trace them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class PadBlock(nn.Module):
    """Two 3x3 convolutions; where the width doubles, the shortcut is a stride-2 slice padded with zeros (option A)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.pad = (channels - channels_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels_in, h, w) -> (n, channels, h / stride, w / stride)."""
        out = self.bn2(self.conv2(nn.functional.relu(self.bn1(self.conv1(x)))))
        if self.pad:
            x = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return nn.functional.relu(out + x)


class ProjectionBlock(nn.Module):
    """Two 3x3 convolutions; where the shape changes, the shortcut is a 1x1 convolution with batch norm (option B)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels_in, h, w) -> (n, channels, h / stride, w / stride)."""
        out = self.bn2(self.conv2(nn.functional.relu(self.bn1(self.conv1(x)))))
        return nn.functional.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """A 3x3 stem, three stages of ``blocks`` blocks with ``widths`` channels, global average pooling, 10 logits.

    He et al.'s networks have ``6 * blocks + 2`` layers; all stages but the first start with stride 2.
    """

    def __init__(
        self,
        block: type[PadBlock] | type[ProjectionBlock],
        blocks: int,
        channels_in: int = 3,
        widths: Sequence[int] = (16, 32, 64),
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = _stage(block, blocks, widths[0], widths[0], 1)
        self.layer2 = _stage(block, blocks, widths[0], widths[1], 2)
        self.layer3 = _stage(block, blocks, widths[1], widths[2], 2)
        self.linear = nn.Linear(widths[2], 10)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels_in, h, w) -> logits (n, 10)."""
        x = nn.functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def _stage(
    block: type[PadBlock] | type[ProjectionBlock], blocks: int, channels_in: int, channels: int, stride: int
) -> nn.Sequential:
    first = block(channels_in, channels, stride)
    return nn.Sequential(first, *(block(channels, channels, 1) for _ in range(blocks - 1)))
