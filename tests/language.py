"""A tiny Llama in a Hugging Face folder, with token ids that have something to learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from autocompress.tasks.decoder import Decoder, read_config

SMALL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
LENGTH = 24


def write_folder(folder: Path, windows: int = 40, seed: int = 0, steps: int = 0, **changes: Any) -> Path:
    """The folder, its weights drawn (and trained for some steps) with ``seed``; ``changes`` are to config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**SMALL, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    biased = [f"model.layers.{i}.self_attn.{n}_proj.bias" for i in range(config["num_hidden_layers"]) for n in "qkv"]
    model = Decoder(read_config(folder), LENGTH, biased if config["model_type"] == "qwen2" else ())
    for parameter in model.parameters():
        scale = 0.2 if parameter.ndim > 1 else 0.1
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale + (parameter.ndim == 1)
    ids = _ids(windows + 12, config["vocab_size"], generator)
    _train(model, ids[:windows], steps, generator)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    np.save(folder / "calib_ids.npy", ids[:windows].numpy().astype(np.uint16))
    np.save(folder / "eval_ids.npy", ids[windows:].numpy().astype(np.uint16))
    return folder


def _ids(n: int, vocabulary: int, generator: torch.Generator) -> torch.Tensor:
    """Counting sequences with noise.  # (n, LENGTH)"""
    start = torch.randint(0, vocabulary, (n, 1), generator=generator)
    step = torch.randint(1, 4, (n, 1), generator=generator)
    noise = (torch.rand(n, LENGTH, generator=generator) < 0.1) * torch.randint(
        0, vocabulary, (n, LENGTH), generator=generator
    )
    return (start + step * torch.arange(LENGTH) + noise) % vocabulary


def _train(model: Decoder, ids: torch.Tensor, steps: int, generator: torch.Generator) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(steps):
        batch = ids[torch.randint(len(ids), (16,), generator=generator)]
        logits = model(batch)[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
