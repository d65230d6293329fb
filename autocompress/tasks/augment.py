"""How batches of images lie, and random crops and flips, driven by a generator so that training can be repeated."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def images_first(inputs: Tensor) -> Tensor:
    """A copy of images by rows, for gradients; other inputs as they are.

    The gradient of a strided 1 x 1 convolution channels-last corrupts memory in the CPU build of torch 2.13. A copy, since images
    of one channel count as contiguous either way, and what convolutions make of them follows their strides.
    """
    return inputs.clone(memory_format=torch.contiguous_format) if inputs.ndim == 4 else inputs


def random_crop(images: Tensor, pad: int, generator: torch.Generator, flip: bool = False) -> Tensor:
    """Pad ``images`` (n, c, h, w) with zeros by ``pad`` pixels, crop to (h, w) at random, maybe mirror."""
    n, _, height, width = images.shape
    shift = torch.randint(0, 2 * pad + 1, (2, n, 1), generator=generator)
    rows = shift[0] + torch.arange(height)  # (n, h)
    columns = shift[1] + torch.arange(width)  # (n, w)
    if flip:
        mirrored = torch.rand(n, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded = nn.functional.pad(images, (pad, pad, pad, pad))
    cropped = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (n, h, w, c)
    return images_first(cropped.movedim(-1, 1))
