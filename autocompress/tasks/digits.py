"""The task that needs nothing: scikit-learn's 8x8 handwritten digits and a small ResNet, trained on the spot."""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from autocompress.errors import TaskError
from autocompress.files import cache_dir, write_bytes
from autocompress.tasks import resnet
from autocompress.tasks.augment import random_crop
from autocompress.tasks.base import Split, Task, cross_entropy
from autocompress.types import digest

N_TRAIN, N_SEARCH, N_CALIBRATION = 1000, 300, 512  # of 1,797; the other 497 are the report split
EPOCHS, BATCH, RATE = 20, 50, 0.1
MEAN, STD = 0.305, 0.376  # of the training pixels, scaled to [0, 1]


def digits(seed: int = 0) -> Task:
    """Digits as (1, 8, 8) images and a ResNet-14 of 16, 32 and 64 channels (175,000 parameters).

    The splits and the trained model are always the same; ``seed`` picks the calibration images among the training
    images. Training takes seconds on one core, its outcome is kept in :func:`~autocompress.files.cache_dir`.
    """
    images, labels = _load()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train_ids, search_ids, report_ids = torch.split(order, [N_TRAIN, N_SEARCH, len(order) - N_TRAIN - N_SEARCH])
    train = Split(images[train_ids], labels[train_ids])
    chosen = torch.randperm(N_TRAIN, generator=torch.Generator().manual_seed(seed))[:N_CALIBRATION]
    return Task(
        name="digits",
        model=_trained(train),
        calibration=Split(train.inputs[chosen], train.targets[chosen]),
        search=Split(images[search_ids], labels[search_ids]),
        report=Split(images[report_ids], labels[report_ids]),
        train=train,
        prepare=prepare,
        augment=augment,
    )


def prepare(images: Tensor) -> Tensor:
    """Pixels 0..16 -> zero mean, unit variance."""
    return (images.float() / 16 - MEAN) / STD


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to one pixel on the black background."""
    black = -MEAN / STD
    return random_crop(images - black, 1, generator) + black


def _load() -> tuple[Tensor, Tensor]:
    """Images uint8 (1797, 1, 8, 8) with pixels 0..16, labels int64 (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise TaskError("Task 'digits' needs scikit-learn; install it with 'pip install scikit-learn'.") from error
    pixels, labels = load_digits(return_X_y=True)
    return torch.from_numpy(pixels).to(torch.uint8).reshape(-1, 1, 8, 8), torch.from_numpy(labels).long()


def _trained(train: Split) -> nn.Module:
    """The trained network, from the cache where this code has trained it on this data before."""
    data = hashlib.sha256(train.inputs.numpy().tobytes() + train.targets.numpy().tobytes()).hexdigest()
    code = [Path(__file__).read_text(encoding="utf-8"), inspect.getsource(resnet), inspect.getsource(random_crop)]
    path = cache_dir() / "digits" / f"{digest([code, data, torch.__version__])}.safetensors"
    if path.exists():
        with suppress(SafetensorError, RuntimeError, OSError):  # a damaged file is made again
            model = _network()
            model.load_state_dict(load_file(path))
            return model
    model = _network()
    logging.getLogger(__name__).info("Training the digits network, once; this takes some seconds.")
    with single_thread():
        _fit(model, train)
    write_bytes(path, save(model.state_dict()))
    return model


def _network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return resnet.ResNet(resnet.ProjectionBlock, 2, channels_in=1)


def _fit(model: nn.Module, train: Split) -> None:
    """SGD with momentum and one cosine-shaped cycle of the learning rate."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = EPOCHS * (len(train) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    model.train()
    for _ in range(EPOCHS):
        for batch in torch.split(torch.randperm(len(train), generator=generator), BATCH):
            inputs = augment(prepare(train.inputs[batch]), generator)
            optimizer.zero_grad()
            cross_entropy(model(inputs), train.targets[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    model.eval()


@contextmanager
def single_thread() -> Iterator[None]:
    """One thread inside, so that sums are taken in one order; the number before is restored."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
