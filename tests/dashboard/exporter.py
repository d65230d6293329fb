"""An export that takes no model: it writes a small, valid ONNX file and a certificate, in a worker's process."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import onnx
from onnx import TensorProto, helper

from autocompress.results import Progress
from autocompress.service.store import Job, JobStore


def export_something(
    store: JobStore, job: Job, progress: Callable[[Progress], None], cancelled: Callable[[], bool]
) -> dict[str, Any]:
    progress(Progress(stage="export", done=0, total=1, message="writing ONNX"))
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", value[:1], value[1:])
    model, certificate = job.folder / "model.onnx", job.folder / "certificate.json"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), model)
    certificate.write_text(json.dumps({"plan": job.request["pick"], "parity": 1e-6}))
    return {"onnx": str(model), "certificate": str(certificate)}
