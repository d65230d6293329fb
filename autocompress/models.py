"""Models of plans at a rung, made once: what took minutes (refit, distillation) is kept as safetensors beside the results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor, fx, nn

from autocompress.database import LevelDatabase
from autocompress.deploy import deploy
from autocompress.errors import UsageError
from autocompress.files import write_bytes
from autocompress.finish import finish
from autocompress.methods.quantization import ActivationQuant
from autocompress.recover import Recovery, recover
from autocompress.types import Fidelity, Plan, digest

RANGE = ".range"


class Models:
    """Live and deployed models of one database's plans.

    ``folder``: where refitted and recovered models are kept; ``recovery``: how to distil (``None``: that rung is refused);
    ``reference``: the original's outputs on the search split, asked for when needed.
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
        self.reference, self.cancelled, self.on_step = reference, cancelled, on_step

    def deployed(self, plan: Plan, fidelity: Fidelity) -> fx.GraphModule:
        """Batch norm folded, weights rounded: what is judged and exported."""
        return deploy(self.live(plan, fidelity))

    def live(self, plan: Plan, fidelity: Fidelity) -> fx.GraphModule:
        """The trainable model of a plan at a rung."""
        if fidelity not in ("refitted", "recovered"):
            return self.database.stitch(plan)
        path = self.path(plan, fidelity)
        if path.exists():
            return _restore(self.database.stitch(plan), path)
        model = finish(self.database, plan, self.cancelled) if fidelity == "refitted" else self._recovered(plan)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, save(_state(model)))
        return model

    def path(self, plan: Plan, fidelity: Fidelity) -> Path:
        """Where a model is kept: named by everything that decides it."""
        settings = vars(self.recovery) if fidelity == "recovered" and self.recovery else None
        key = digest([self.database.key, self.database.space.plan_to_json(plan), fidelity, settings])
        return self.folder / f"{fidelity}-{key}.safetensors"

    def _recovered(self, plan: Plan) -> fx.GraphModule:
        if self.recovery is None:
            raise UsageError("This run has no recovery; give it training data and recover_minutes above 0.")
        start = self.live(plan, "refitted")
        original = self.database.graph.module
        return recover(
            start, original, self.database.task, self.recovery, self.reference(), self.on_step, self.cancelled
        )


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers and the ranges of quantized activations."""
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in model.state_dict().items()}
    for name, part in model.named_modules():
        if isinstance(part, ActivationQuant):
            tensors[name + RANGE] = torch.tensor([part.scale, float(part.zero_point)], dtype=torch.float64)
    return tensors


def _restore(model: fx.GraphModule, path: Path) -> fx.GraphModule:
    """Fill a stitched model, which has the right shapes, with what was kept."""
    tensors = load(path.read_bytes())
    parts = dict(model.named_modules())
    for name in [name for name in tensors if name.endswith(RANGE)]:
        part, (scale, zero) = parts[name.removesuffix(RANGE)], tensors.pop(name).tolist()
        assert isinstance(part, ActivationQuant)
        part.scale, part.zero_point = scale, int(zero)
    model.load_state_dict(tensors, strict=True)
    return model
