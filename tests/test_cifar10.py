"""CIFAR-10: what is missing is told, every layout gives the same records, and the published accuracy comes out."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from autocompress.errors import TaskError, UsageError
from autocompress.tasks import cifar10 as room
from autocompress.tasks import load_task
from autocompress.tasks.resnet import PadBlock, ResNet

needs_assets = pytest.mark.skipif(not os.environ.get("AUTOCOMPRESS_DATA"), reason="AUTOCOMPRESS_DATA is not set")


@pytest.fixture
def nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder and an empty cache."""
    monkeypatch.setenv("AUTOCOMPRESS_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("AUTOCOMPRESS_DATA", raising=False)
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def some_images(n: int = 200) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, n, dtype=np.uint8)


def test_missing_data_says_what_where_and_how(nothing: Path) -> None:
    with pytest.raises(TaskError) as caught:
        load_task("cifar10:resnet20", [str(nothing)])
    message = str(caught.value)
    for words in (
        "FOLDER/cifar10_resnets/resnet20.safetensors",
        "akamaster/pytorch_resnet_cifar10",
        "FOLDER/cifar-10-batches-bin/",
        "cifar-10-binary.tar.gz",
        f"looked in {nothing}",
        "--data",
        "AUTOCOMPRESS_DATA",
    ):
        assert words in message
    assert "\n" not in message
    with pytest.raises(TaskError, match="looked in no folder, as none is given"):
        load_task("cifar10:resnet20")


def test_folders_come_from_both_and_must_exist(nothing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = nothing.parent / "other"
    other.mkdir()
    monkeypatch.setenv("AUTOCOMPRESS_DATA", f"{other}{os.pathsep}{os.pathsep}{nothing}")
    assert room.data_folders([str(nothing)]) == [nothing, other, nothing]
    with pytest.raises(UsageError, match=r"A data folder must exist, got .*absent"):
        load_task("cifar10:resnet20", [str(nothing / "absent")])


def test_other_weights_and_other_images_are_refused(nothing: Path) -> None:
    path = nothing / "resnet20.safetensors"
    save_file(ResNet(PadBlock, 3).state_dict(), path)
    with pytest.raises(TaskError, match="not those published for resnet20"):
        load_task("cifar10:resnet20", [str(nothing)])
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(TaskError, match="Cannot read the weights"):
        load_task("cifar10:resnet20", [str(nothing)])
    path.unlink()
    images, labels = some_images()
    np.savez(nothing / "cifar10_train.npz", images=images, labels=labels)
    with pytest.raises(TaskError, match=r"CIFAR-10 train images in .* are not the published ones"):
        load_task("cifar10:resnet20", [str(nothing)])
    (nothing / "cifar10_train.npz").write_bytes(b"no archive")
    with pytest.raises(TaskError, match="Cannot read the CIFAR-10 train images"):
        load_task("cifar10:resnet20", [str(nothing)])


def test_every_layout_gives_the_same_records(nothing: Path) -> None:
    pictures = pytest.importorskip("PIL.Image")
    images, labels = some_images()
    expected = [bytes([label, *image.transpose(2, 0, 1).ravel()]) for image, label in zip(images, labels, strict=True)]

    (nothing / "npz").mkdir()
    np.savez(nothing / "npz" / "cifar10_test.npz", images=images, labels=labels)
    (nothing / "bin").mkdir()
    (nothing / "bin" / "test_batch.bin").write_bytes(b"".join(expected))
    (nothing / "webp").mkdir()
    np.savez(nothing / "webp" / "test_labels.npz", labels=labels)
    for i, part in enumerate(images.reshape(2, 100, 32, 32, 3)):
        mosaic = part.reshape(5, 20, 32, 32, 3).swapaxes(1, 2).reshape(5 * 32, 20 * 32, 3)
        pictures.fromarray(mosaic).save(nothing / "webp" / f"test_{i:02d}.webp", lossless=True)

    for layout in ("npz", "bin", "webp"):
        records = room._read("test", nothing / layout)
        assert records is not None
        assert [bytes(row) for row in records] == expected
        assert room._read("train", nothing / layout) is None


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (32, 464_154), (56, 853_018)])
def test_networks_have_the_published_size_and_can_be_traced(depth: int, parameters: int) -> None:
    model = ResNet(PadBlock, (depth - 2) // 6).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))
    assert model(x).shape == (2, 10)


def test_augment_crops_and_mirrors_on_black() -> None:
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    out = room.augment(room.prepare(images), torch.Generator().manual_seed(1))
    again = room.augment(room.prepare(images), torch.Generator().manual_seed(1))
    assert torch.equal(out, again)
    pixels = ((out * room.STD + room.MEAN) * 255).round().to(torch.uint8)
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))  # with 0, which is black
    seen = set()
    for i in range(len(images)):
        views = {
            (dy, dx, mirrored): view.flip(2) if mirrored else view
            for dy in range(9)
            for dx in range(9)
            for mirrored in (False, True)
            for view in [padded[i, :, dy : dy + 32, dx : dx + 32]]
        }
        found = [key for key, view in views.items() if torch.equal(view, pixels[i])]
        assert len(found) == 1
        seen.add(found[0])
    assert {mirrored for _, _, mirrored in seen} == {False, True}
    assert len(seen) > 40


@pytest.mark.assets
@needs_assets
def test_splits_are_disjoint_chosen_by_seed_and_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOCOMPRESS_HOME", str(tmp_path))
    task = load_task("cifar10:resnet20")
    assert {name: len(split) for name, split in task.splits.items()} == {
        "calibration": 2000, "search": 2500, "report": 10_000, "train": 45_500,
    }  # fmt: skip
    rows = [bytes(row) for split in task.splits.values() for row in split.inputs.flatten(1).numpy()]
    assert len(set(rows)) == len(rows)
    assert all(split.targets.bincount().min() > 0.08 * len(split) for split in task.splits.values())
    assert task.report.take(1000).targets.bincount(minlength=10).min() > 50  # not sorted by class

    for path in (tmp_path / "cifar10").iterdir():  # a damaged cache is made again
        path.write_bytes(path.read_bytes()[:-1])
    assert load_task("cifar10:resnet20").hash == task.hash
    other = load_task("cifar10:resnet20", seed=1)
    assert torch.equal(other.report.inputs, task.report.inputs)
    assert not torch.equal(other.search.inputs, task.search.inputs)


@pytest.mark.slow
@pytest.mark.assets
@needs_assets
@pytest.mark.parametrize(("network", "correct"), [("resnet20", 9173), ("resnet32", 9263), ("resnet56", 9339)])
def test_the_published_accuracy_comes_out(network: str, correct: int) -> None:
    task = load_task(f"cifar10:{network}")
    with torch.inference_mode():
        outputs = torch.cat([task.model(inputs) for inputs, _ in task.batches(task.report, 500)])
    assert round(task.metric(outputs, task.report.targets) * 10_000) == correct
