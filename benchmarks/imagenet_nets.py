"""MCUNet and MobileNetV2 with published weights as tasks, judged on 500 images of ImageNet: relative drops, never an accuracy.

``FOLDER/imagenet_models`` and ``FOLDER/imagenet_sample1000`` are looked for in the folders of ``--data``.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from autocompress.errors import TaskError
from autocompress.tasks import Split, Task, load_task

CALIBRATION, SEARCH = 200, 300
"""Images; the other 500 are the report's."""


def found(data: Sequence[str], name: str) -> Path:
    """A folder or file of the assets. Raises ``TaskError`` where none has it."""
    for folder in data:
        if (path := Path(folder) / name).exists():
            return path
    raise TaskError(f"{name} must lie in a folder of --data, got {', '.join(data) or 'none'}.")


def unit(inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1, act: bool = True) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *([nn.ReLU6()] if act else []))


class Inverted(nn.Module):
    """Inverted residual block: expansion, depthwise convolution, projection."""

    def __init__(self, form: dict[str, Any], shortcut: bool) -> None:
        super().__init__()
        inputs, outputs = form["in_channels"], form["out_channels"]
        middle = form["mid_channels"] or inputs * form["expand_ratio"]
        self.expand = unit(inputs, middle, 1, 1) if form["expand_ratio"] > 1 else nn.Identity()
        self.depth = unit(middle, middle, form["kernel_size"], form["stride"], middle)
        self.project = unit(middle, outputs, 1, 1, act=False)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.depth(self.expand(x)))
        return x + y if self.shortcut else y


class MCUNet(nn.Module):
    """(n, 3, 176, 176) images in -1..1 -> (n, 1000) logits; ``form``: the published description."""

    def __init__(self, form: dict[str, Any]) -> None:
        super().__init__()
        first = form["first_conv"]
        self.stem = unit(3, first["out_channels"], first["kernel_size"], first["stride"])
        blocks = [Inverted(b["mobile_inverted_conv"], b["shortcut"] is not None) for b in form["blocks"]]
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(form["classifier"]["in_features"], form["classifier"]["out_features"])

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.blocks(self.stem(x)).mean((2, 3)))
        return logits


def mcunet(data: Sequence[str]) -> Task:
    """MCUNet 320 kB (Lin et al. 2020): 0.74 M parameters, batch norms alive."""
    folder = found(data, "imagenet_models/mcunet")
    form = json.loads((folder / "mcunet-320kb-1mb.json").read_text())
    model = MCUNet(form)
    theirs = load_file(folder / "mcunet-320kb-1mb.safetensors")
    model.load_state_dict(dict(zip(model.state_dict(), _in_order(theirs, len(form["blocks"])), strict=True)))
    return _task("mcunet", model, data, form["resolution"])


def _in_order(theirs: dict[str, Tensor], n_blocks: int) -> list[Tensor]:
    """The published tensors in the order of :class:`MCUNet`'s state."""
    units = ["first_conv"]
    for i in range(n_blocks):
        parts = ("inverted_bottleneck", "depth_conv", "point_linear")
        names = [f"blocks.{i}.mobile_inverted_conv.{part}" for part in parts]
        units += [name for name in names if f"{name}.conv.weight" in theirs]
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    keys = [f"{u}.{leaf}" for u in units for leaf in ("conv.weight", *(f"bn.{part}" for part in norm))]
    return [theirs[key] for key in (*keys, "classifier.linear.weight", "classifier.linear.bias")]


class Same(nn.Module):
    """A convolution with its bias, TensorFlow's SAME padding for even images, and ReLU6 where the description has it."""

    def __init__(self, weight: Tensor, bias: Tensor, stride: int, act: int) -> None:
        super().__init__()
        outputs, inputs, kernel, _ = weight.shape
        groups = outputs if inputs == 1 else 1
        self.pad = 1 if stride == 2 else 0
        self.conv = nn.Conv2d(inputs * groups, outputs, kernel, stride, 0 if self.pad else kernel // 2, groups=groups)
        self.conv.weight.data, self.conv.bias.data = weight, bias  # type: ignore[union-attr]
        self.act = nn.ReLU6() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.conv(functional.pad(x, (0, 1, 0, 1)) if self.pad else x))
        return y


class MobileNetV2(nn.Module):
    """(n, 3, 224, 224) images in -1..1 -> (n, 1000) logits, by the published list of operations; batch norm is folded."""

    def __init__(self, program: list[dict[str, Any]], arrays: dict[str, np.ndarray[Any, Any]]) -> None:
        super().__init__()
        self.steps = [op for op in program if op["op"] in ("CONV_2D", "DEPTHWISE_CONV_2D", "ADD", "MEAN")]
        layers = {}
        for op in self.steps:
            if "key" in op:
                weight, bias = (torch.from_numpy(arrays[f"{op['key']}.{part}"]).float() for part in ("weight", "bias"))
                layers[op["key"]] = Same(weight, bias, op["s"], op["act"])
        last = [op["key"] for op in self.steps if "key" in op][-1]
        head = layers.pop(last).conv
        self.layers = nn.ModuleDict(layers)
        self.classifier = nn.Linear(head.in_channels, 1000)
        self.classifier.weight.data = head.weight.data[1:].flatten(1).contiguous()  # 0 is the background
        self.classifier.bias.data = head.bias.data[1:]  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        values = {self.steps[0]["inp"]: x}
        for op in self.steps[:-1]:
            if op["op"] == "ADD":
                values[op["out"]] = values[op["inp"][0]] + values[op["inp"][1]]
            elif op["op"] == "MEAN":
                values[op["out"]] = values[op["inp"][0]].mean((2, 3))
            else:
                values[op["out"]] = self.layers[op["key"]](values[op["inp"]])
        logits: Tensor = self.classifier(values[self.steps[-1]["inp"]])
        return logits


def mobilenet_v2(data: Sequence[str]) -> Task:
    """MobileNetV2 1.0 (Sandler et al. 2018), 3.5 M parameters. Its weights lie on a grid of 8 bits."""
    folder = found(data, "imagenet_models/float_dequant")
    graph = json.loads((folder / "tf2_mobilenet_v2_1.0_224_ptq.graph.json").read_text())
    arrays = np.load(folder / "tf2_mobilenet_v2_1.0_224_ptq_f16.npz")
    return _task("mobilenet_v2", MobileNetV2(graph["program"], dict(arrays)), data, graph["resolution"])


def network_task(spec: str, data: Sequence[str]) -> Task:
    """One of these two by its name, ``python_llama`` where the data lies, or what the project knows."""
    own = {"mcunet": mcunet, "mobilenet_v2": mobilenet_v2}
    if spec in own:
        return own[spec](data)
    at = next((str(Path(f) / "python_llama") for f in data if (Path(f) / "python_llama").is_dir()), "")
    return load_task(spec.replace("python_llama", at), data)


def _task(name: str, model: nn.Module, data: Sequence[str], side: int) -> Task:
    images, labels = _images(found(data, "imagenet_sample1000"), side)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    parts = order.split([CALIBRATION, SEARCH, len(order) - CALIBRATION - SEARCH])
    calibration, search, report = (Split(images[rows], labels[rows]) for rows in parts)
    return Task(name, model.eval(), calibration, search, report, prepare=_centred, batch_size=50, slice_size=100)


def _centred(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def _images(folder: Path, side: int) -> tuple[Tensor, Tensor]:
    """uint8 (1000, 3, side, side), the middle 7/8 of the images; labels int64 (1000,)."""
    with (folder / "labels.tsv").open() as lines:
        rows = list(csv.DictReader(lines, delimiter="\t"))
    pixels = []
    for row in rows:
        with Image.open(folder / "images" / row["file"]) as image:
            small = image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR, box=(16, 16, 240, 240))
            pixels.append(torch.from_numpy(np.array(small)).permute(2, 0, 1))
    return torch.stack(pixels), torch.tensor([int(row["class_index"]) for row in rows])
