"""CIFAR-10 and its pretrained ResNets (He et al. 2015), found in folders of the user's and checked by hash.

Whatever form the images come in, they become the records of CIFAR-10's own binary format (a label byte, then 3,072
pixel bytes, channels first), sorted: so one hash, and one meaning of a seed, serve every source.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from autocompress.errors import TaskError
from autocompress.files import cache_dir, write_bytes
from autocompress.tasks.augment import random_crop
from autocompress.tasks.base import Split, Task, tensor_bytes
from autocompress.tasks.folders import data_folders
from autocompress.tasks.resnet import PadBlock, ResNet

Records = npt.NDArray[np.uint8]  # (n, 3073)

RECORD_BYTES = 1 + 3 * 32 * 32
RECORDS_SHA256 = {
    "train": "72083841cd0fa633f09b24c0833cf6d6a1809caff400317117334e0aa6b0ed46",
    "test": "f1bbb931260cda782c84c1948c82d910e2c193cb1d56756293f445027090946b",
}
WEIGHTS_SHA256 = {  # over names, shapes and values, so that any conversion of the published checkpoints will do
    "resnet20": "53c9982b1e74172b13c739eebbee94a58fb2b2236f62225c430ed4bf36f9caf1",
    "resnet32": "efb2e7792a6ac35ac94dc741099f1185dfc397867967e55a3359c019872c96d8",
    "resnet56": "25e0110b775206865f5a1953882e1e84033b6ccbd161ce6c4a192af3ae2e6a37",
}
NETWORKS = tuple(WEIGHTS_SHA256)
N_CALIBRATION, N_SEARCH = 2000, 2500
MEAN = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)


def cifar10(network: str, data: Sequence[str] = (), seed: int = 0) -> Task:
    """``resnet20``, ``resnet32`` or ``resnet56`` on (3, 32, 32) images, as published: 91.73, 92.63 and 93.39 % top-1.

    ``data`` and ``AUTOCOMPRESS_DATA`` name the folders to look in. ``seed`` picks 2,000 calibration and 2,500 search
    images among the training images; the other 45,500 are for recovery. The report split is all 10,000 test images.
    Raises ``TaskError`` that says what is missing and where it goes, or which file is not the published one.
    """
    folders = data_folders(data)
    model = _load_model(network, folders)
    train, test = _load_records("train", folders), _load_records("test", folders)
    lacking = []
    if model is None:
        lacking.append(
            f"FOLDER/cifar10_resnets/{network}.safetensors (from github.com/akamaster/pytorch_resnet_cifar10)"
        )
    if train is None or test is None:
        lacking.append("FOLDER/cifar-10-batches-bin/ (from cs.toronto.edu/~kriz/cifar-10-binary.tar.gz)")
    if model is None or train is None or test is None:
        looked = ", ".join(str(folder) for folder in folders) or "no folder, as none is given"
        raise TaskError(
            f"Task 'cifar10:{network}' lacks {' and '.join(lacking)}; looked in {looked}: "
            "name FOLDER with --data or AUTOCOMPRESS_DATA, docs/tasks.md lists the accepted layouts."
        )
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    calibration, search, rest = torch.split(order, [N_CALIBRATION, N_SEARCH, len(order) - N_CALIBRATION - N_SEARCH])
    report = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))  # sorted records are sorted by class
    return Task(
        name=f"cifar10:{network}",
        model=model,
        calibration=_split(train, calibration),
        search=_split(train, search),
        report=_split(test, report),
        train=_split(train, rest),
        prepare=prepare,
        augment=augment,
    )


def prepare(images: Tensor) -> Tensor:
    """Bytes -> [0, 1] -> minus the ImageNet mean, divided by its standard deviation."""
    return (images.float() / 255 - MEAN) / STD


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Crop at random from 4 black pixels of padding and mirror every second image (He et al. 2015, section 4.2)."""
    black = -MEAN / STD
    return random_crop(images - black, 4, generator, flip=True) + black


def _split(records: Records, rows: Tensor) -> Split:
    chosen = torch.from_numpy(records)[rows]
    return Split(chosen[:, 1:].reshape(-1, 3, 32, 32).contiguous(), chosen[:, 0].long())


# ---------------------------------------------------------------- weights


def _load_model(network: str, folders: Sequence[Path]) -> nn.Module | None:
    """The pretrained network, or ``None`` where no folder holds it."""
    name = f"{network}.safetensors"
    places = [place for folder in folders for place in (folder / "cifar10_resnets" / name, folder / name)]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        return None
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise TaskError(f"Cannot read the weights {path} ({error}); fetch the file again.") from error
    if (found := weights_sha256(state)) != WEIGHTS_SHA256[network]:
        raise TaskError(
            f"The weights in {path} are not those published for {network}: their SHA-256 is {found[:16]}..., "
            f"expected {WEIGHTS_SHA256[network][:16]}...; fetch them again, or use other weights by a task of your own."
        )
    model = ResNet(PadBlock, blocks=(int(network.removeprefix("resnet")) - 2) // 6)
    model.load_state_dict(state)
    return model


def weights_sha256(state: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes and bytes in order of names; counters of batches are left out."""
    sha = hashlib.sha256()
    for name in sorted(state):
        if not name.endswith("num_batches_tracked"):
            sha.update(f"{name} {tuple(state[name].shape)}\0".encode())
            sha.update(tensor_bytes(state[name].contiguous()))
    return sha.hexdigest()


# ---------------------------------------------------------------- images


def _load_records(split: str, folders: Sequence[Path]) -> Records | None:
    """Sorted and checked records of ``train`` or ``test``, cached, or ``None`` where no folder holds them."""
    expected = RECORDS_SHA256[split]
    cached = cache_dir() / "cifar10" / f"{split}-{expected[:16]}.bin"
    if cached.is_file():
        records = np.fromfile(cached, np.uint8)
        if hashlib.sha256(records.data).hexdigest() == expected:
            return records.reshape(-1, RECORD_BYTES)  # a damaged file is made again
    for folder in folders:
        for place in (folder, folder / "cifar10", folder / "cifar-10-batches-bin"):
            found = _read(split, place)
            if found is None:
                continue
            records = found[np.argsort(found.view(f"V{RECORD_BYTES}").ravel(), kind="stable")]
            if (sha := hashlib.sha256(records.data).hexdigest()) != expected:
                raise TaskError(
                    f"The CIFAR-10 {split} images in {place} are not the published ones: the SHA-256 of their "
                    f"sorted records is {sha[:16]}..., expected {expected[:16]}...; fetch them again."
                )
            write_bytes(cached, records.tobytes())
            return records
    return None


def _read(split: str, folder: Path) -> Records | None:
    """Records in the order of the files, or ``None`` where ``folder`` has none of the three layouts."""
    try:
        if (folder / f"cifar10_{split}.npz").is_file():
            return _read_npz(folder / f"cifar10_{split}.npz")
        if (folder / f"{split}_labels.npz").is_file():
            return _read_mosaics(split, folder)
        batches = sorted(folder.glob("data_batch_[1-5].bin" if split == "train" else "test_batch.bin"))
        if batches:
            return np.concatenate([np.fromfile(batch, np.uint8) for batch in batches]).reshape(-1, RECORD_BYTES)
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise TaskError(f"Cannot read the CIFAR-10 {split} images in {folder} ({error}); fetch them again.") from error
    return None


def _read_npz(path: Path) -> Records:
    with np.load(path) as arrays:
        return _records(arrays["images"].transpose(0, 3, 1, 2), arrays["labels"])


def _read_mosaics(split: str, folder: Path) -> Records:
    """Lossless WebP pictures of 32x32 tiles, row by row, and the labels in the same order."""
    try:
        from PIL import Image
    except ImportError as error:
        raise TaskError(
            f"Decoding the CIFAR-10 mosaics in {folder} needs Pillow; install it with 'pip install pillow'."
        ) from error
    parts = []
    for path in sorted(folder.glob(f"{split}_[0-9]*.webp")):
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))  # (rows * 32, columns * 32, 3)
        rows, columns = pixels.shape[0] // 32, pixels.shape[1] // 32
        tiles = pixels.reshape(rows, 32, columns, 32, 3).transpose(0, 2, 4, 1, 3)
        parts.append(tiles.reshape(-1, 3, 32, 32))
    with np.load(folder / f"{split}_labels.npz") as arrays:
        return _records(np.concatenate(parts), arrays["labels"])


def _records(images: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8]) -> Records:
    """Images (n, 3, 32, 32) and labels (n,) as records."""
    return np.concatenate([labels.astype(np.uint8)[:, None], images.reshape(len(images), -1)], axis=1)
