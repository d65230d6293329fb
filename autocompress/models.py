"""Models of plans at a rung, made once: what took minutes (refit, distillation) is kept as safetensors beside the results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, fx, nn

from autocompress.database import LevelDatabase
from autocompress.deploy import deploy
from autocompress.errors import StoreError, UsageError
from autocompress.files import make_folder, write_bytes
from autocompress.finish import finish
from autocompress.methods.quantization import ActivationQuant
from autocompress.pairing import pair
from autocompress.recover import Recovery, recover
from autocompress.reorder import reordered
from autocompress.types import Fidelity, Plan, digest

RANGE, STEPS = ".range", "recovery.steps"


class Models:
    """Live and deployed models of one database's plans.

    ``folder``: where refitted and recovered models are kept; ``recovery``: how to distil (``None``: that rung is refused);
    ``reference``: the original's outputs on the search split, asked for when needed. ``steps``: how long a recovered model must
    have been trained at least; a model trained for longer serves, too.
    """

    def __init__(
        self,
        database: LevelDatabase,
        folder: Path,
        recovery: Recovery | None,
        reference: Callable[[], Tensor],
        cancelled: Callable[[], bool] | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> None:
        self.database, self.folder, self.recovery = database, folder, recovery
        self.steps = recovery.steps if recovery else 0
        self.reference, self.cancelled, self.on_step = reference, cancelled, on_step

    def deployed(self, plan: Plan, fidelity: Fidelity) -> fx.GraphModule:
        """Batch norm folded, weights rounded, channels in the order that is exported: what is judged and handed out."""
        return reordered(self.database, plan, deploy(self.live(plan, fidelity)))

    def live(self, plan: Plan, fidelity: Fidelity) -> fx.GraphModule:
        """The trainable model of a plan at a rung."""
        if fidelity not in ("refitted", "recovered"):
            return self.database.stitch(plan)
        path = self.path(plan, fidelity)
        if path.exists():
            kept = _read(path)
            if fidelity == "refitted" or int(kept[STEPS]) >= self.steps:
                return _restore(self.database.stitch(plan), kept)
        model = finish(self.database, plan, self.cancelled) if fidelity == "refitted" else self._recovered(plan)
        make_folder(path.parent)
        write_bytes(path, save({**_state(model), STEPS: torch.tensor(self.steps)}))
        return model

    def recovery_key(self) -> object:
        """What decides the rung ``recovered``, for the ledger."""
        return [asdict(self.recovery) if self.recovery else None, self.steps]

    def path(self, plan: Plan, fidelity: Fidelity) -> Path:
        """Where a model is kept: named by everything that decides it."""
        settings = asdict(self.recovery) if fidelity == "recovered" and self.recovery else None
        key = digest([self.database.key, self.database.space.plan_to_json(plan), fidelity, settings])
        return self.folder / f"{fidelity}-{key}.safetensors"

    def _recovered(self, plan: Plan) -> fx.GraphModule:
        if self.recovery is None:
            raise UsageError("This run has no recovery; give it training data and recover_minutes above 0.")
        start = self.live(plan, "refitted")
        original, settings = self.database.graph.module, replace(self.recovery, steps=self.steps)
        pairing = pair(self.database, plan)
        task, reference = self.database.task, self.reference()
        return recover(start, original, task, settings, reference, self.on_step, self.cancelled, pairing)


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers and the ranges of quantized activations."""
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in model.state_dict().items()}
    for name, part in model.named_modules():
        if isinstance(part, ActivationQuant):
            tensors[name + RANGE] = torch.tensor([part.scale, float(part.zero_point)], dtype=torch.float64)
    return tensors


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load(path.read_bytes())
    except SafetensorError as error:
        raise StoreError(f"{path} cannot be read ({error}); delete it and run the same command again.") from error


def _restore(model: fx.GraphModule, tensors: dict[str, Tensor]) -> fx.GraphModule:
    """Fill a stitched model, which has the right shapes, with what was kept."""
    tensors = {name: tensor for name, tensor in tensors.items() if name != STEPS}
    parts = dict(model.named_modules())
    for name in [name for name in tensors if name.endswith(RANGE)]:
        part, (scale, zero) = parts[name.removesuffix(RANGE)], tensors.pop(name).tolist()
        assert isinstance(part, ActivationQuant)
        part.scale, part.zero_point = scale, int(zero)
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        if leaf == "bias" and parts[owner].bias is None:  # refit gives a layer one
            parts[owner].bias = nn.Parameter(torch.empty_like(tensor))
        if leaf == "scale" and getattr(parts[owner], "scale", None) is None:  # recovery may have trained a grid
            parts[owner].scale = torch.empty_like(tensor)
    for name, part in parts.items():
        if isinstance(getattr(part, "bias", None), nn.Parameter) and f"{name}.bias" not in tensors:
            part.bias = None  # or leaves it to the norm behind
    model.load_state_dict(tensors, strict=True)
    return model
