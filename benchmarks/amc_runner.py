"""AMC's own search on a CPU until its time is up; started by ``amc_reference.py`` in the folder of the checkout.

python amc_runner.py SECONDS FOLDER amc_search.py [its options]. ``FOLDER/loaders.pt`` holds the images as lists of batches.
The list of all that stands between the script and its old surroundings is in ``amc_reference.py``.
"""

from __future__ import annotations

import builtins
import io
import os
import runpy
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(str(Path(__file__).parent))
from mobilenet import N_CLASSES, MobileNet

BEGINS = "** Actual replay buffer size"
"""What the script says when images, features and the original's accuracy are there, and the search is next."""


class Writer:
    """Stands for TensorBoard's: nothing is drawn."""

    def __init__(self, logdir: str) -> None: ...

    def add_scalar(self, name: str, value: float, step: int) -> None: ...

    def add_text(self, name: str, text: str, step: int) -> None: ...


def module(name: str, **members: Any) -> None:
    """Let ``import name`` find these members."""
    found = types.ModuleType(name)
    vars(found).update(members)
    sys.modules[name] = found


def stay_on_cpu() -> None:
    """``cuda()`` is asked of tensors, losses and networks."""
    tensor: Any = torch.Tensor
    network: Any = torch.nn.Module
    tensor.cuda = network.cuda = lambda self, *_, **__: self


def old_names() -> None:
    """``np.float``, a terminal to ask for its width, and views of what was contiguous once."""
    numpy: Any = np
    numpy.float = float
    system: Any = os
    system.popen = lambda *_: io.StringIO("24 80")
    tensor: Any = torch.Tensor
    view = tensor.view
    tensor.view = lambda self, *shape: view(self if self.is_contiguous() else self.contiguous(), *shape)


def our_problem(folder: Path) -> None:
    """Our images where the script makes data loaders, our network where it makes ImageNet's MobileNet."""
    loaders = torch.load(folder / "loaders.pt")
    module("lib.data", get_split_dataset=lambda *_, **__: (loaders["calibration"], loaders["search"], N_CLASSES))
    module("models.mobilenet", MobileNet=lambda n_class: MobileNet())
    module("tensorboardX", SummaryWriter=Writer)


def one_number() -> None:
    """The environment takes ``float()`` of the agent's array of one action."""
    from env.channel_pruning_env import ChannelPruningEnv

    step = ChannelPruningEnv.step
    ChannelPruningEnv.step = lambda self, action: step(self, np.asarray(action).item())


def stamp(seconds: float) -> None:
    """Each line begins with the CPU-seconds of the search; the first episode that ends after ``seconds`` is the last."""
    say = builtins.print
    start: list[float] = []

    def stamped(*values: Any, **options: Any) -> None:
        text = " ".join(map(str, values))
        if text.startswith(BEGINS):
            start.append(time.process_time())
        spent = time.process_time() - start[0] if start else 0.0
        say(f"{spent:.2f}", text, flush=True)
        if text.startswith("#") and "episode_reward" in text and spent >= seconds:
            sys.exit(0)

    builtins.print = stamped


def main() -> None:
    seconds, folder, script = float(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    sys.argv = sys.argv[3:]
    sys.path.insert(0, os.getcwd())
    torch.set_num_threads(1)
    stay_on_cpu()
    old_names()
    our_problem(folder)
    one_number()
    stamp(seconds)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
