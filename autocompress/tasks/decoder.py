"""A decoder-only language model in the layout of Llama, built to be traced and exported, filled from a Hugging Face folder.

Embedding, blocks of grouped-query attention with rotary positions (Su et al. 2021; Ainslie et al. 2023) and a SwiGLU MLP
(Shazeer 2020), each behind an RMSNorm (Zhang & Sennrich 2019), and a head that may share the embedding's weight. Modules
carry Hugging Face's names, so that ``*.safetensors`` load as they are. Shapes are fixed to one window length; the batch is free.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from autocompress.errors import TaskError

MODEL_TYPES = ("llama", "mistral", "qwen2")


@dataclass(frozen=True)
class DecoderConfig:
    """What ``config.json`` says, by Hugging Face's meaning of it."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tied: bool


def read_config(folder: Path) -> DecoderConfig:
    """``config.json`` of a folder; :class:`TaskError` names what this decoder does not do."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise TaskError(f"Cannot read {path} ({error}); a decoder folder has a config.json.") from error
    if raw.get("model_type") not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise TaskError(
            f"A decoder is one of {known}, {path} says {raw.get('model_type')!r}; write a task of your own."
        )
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise TaskError(f"Rotary positions must be unscaled, {path} has rope type {kind!r}; write a task of your own.")
    if raw.get("hidden_act", "silu") != "silu":
        raise TaskError(f"The MLP must be SwiGLU (hidden_act 'silu'), {path} has {raw['hidden_act']!r}.")
    try:
        heads = int(raw["num_attention_heads"])
        return DecoderConfig(
            vocab_size=int(raw["vocab_size"]),
            hidden_size=int(raw["hidden_size"]),
            intermediate_size=int(raw["intermediate_size"]),
            num_hidden_layers=int(raw["num_hidden_layers"]),
            num_attention_heads=heads,
            num_key_value_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or raw["hidden_size"] // heads),
            max_position_embeddings=_positions(raw),
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
            tied=bool(raw.get("tie_word_embeddings", False)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise TaskError(f"{path} lacks or garbles a size ({error!r}); take the model's own config.json.") from error


def _positions(raw: Mapping[str, Any]) -> int:
    """Longest window that full causal attention is right for."""
    positions = int(raw.get("max_position_embeddings", 2048))
    sliding = raw.get("sliding_window") if raw.get("use_sliding_window", True) else None
    return min(positions, int(sliding)) if sliding else positions


# ---------------------------------------------------------------- modules


def _linear(name: str, n_in: int, n_out: int, biased: Collection[str]) -> nn.Linear:
    return nn.Linear(n_in, n_out, bias=f"{name}.bias" in biased)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on (n, heads, t, head_dim), pairs being (i, i + head_dim / 2); tables are (t, head_dim)."""
    first, second = torch.chunk(x, 2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal attention; the number of heads follows from the projections' widths, so that whole KV groups can go."""

    def __init__(self, config: DecoderConfig, prefix: str, biased: Collection[str]) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.share = config.num_attention_heads // config.num_key_value_heads
        wide, narrow = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = _linear(f"{prefix}.q_proj", config.hidden_size, wide, biased)
        self.k_proj = _linear(f"{prefix}.k_proj", config.hidden_size, narrow, biased)
        self.v_proj = _linear(f"{prefix}.v_proj", config.hidden_size, narrow, biased)
        self.o_proj = _linear(f"{prefix}.o_proj", wide, config.hidden_size, biased)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(n, t, hidden) -> (n, t, hidden)."""
        q = rotate(self._heads(self.q_proj(x)), cos, sin)
        k = rotate(self._heads(self.k_proj(x)), cos, sin)
        v = self._heads(self.v_proj(x))
        if self.share > 1:  # each KV head serves ``share`` query heads
            k, v = k.repeat_interleave(self.share, dim=1), v.repeat_interleave(self.share, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        projected: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return projected

    def _heads(self, x: Tensor) -> Tensor:
        """(n, t, heads * head_dim) -> (n, heads, t, head_dim)."""
        return torch.unflatten(x, -1, (-1, self.head_dim)).transpose(1, 2)


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: DecoderConfig, prefix: str, biased: Collection[str]) -> None:
        super().__init__()
        self.gate_proj = _linear(f"{prefix}.gate_proj", config.hidden_size, config.intermediate_size, biased)
        self.up_proj = _linear(f"{prefix}.up_proj", config.hidden_size, config.intermediate_size, biased)
        self.down_proj = _linear(f"{prefix}.down_proj", config.intermediate_size, config.hidden_size, biased)

    def forward(self, x: Tensor) -> Tensor:
        """(n, t, hidden) -> (n, t, hidden)."""
        projected: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return projected


class Block(nn.Module):
    """Two residual branches: attention, then the MLP."""

    def __init__(self, config: DecoderConfig, prefix: str, biased: Collection[str]) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, f"{prefix}.self_attn", biased)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config, f"{prefix}.mlp", biased)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(n, t, hidden) -> (n, t, hidden)."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        branch: Tensor = self.mlp(self.post_attention_layernorm(x))
        return x + branch


class Body(nn.Module):
    """Everything below the head."""

    def __init__(self, config: DecoderConfig, biased: Collection[str]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        numbered = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(Block(config, f"model.layers.{i}", biased) for i in numbered)
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(n, t) -> (n, t, hidden)."""
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        normed: Tensor = self.norm(x)
        return normed


class Decoder(nn.Module):
    """Token ids (n, length) int64 -> next-token logits (n, length, vocabulary).

    ``biased``: names of the biases there are (Qwen2 has them on q, k and v).
    """

    def __init__(self, config: DecoderConfig, length: int, biased: Collection[str] = ()) -> None:
        super().__init__()
        self.config, self.length = config, length
        self.model = Body(config, biased)
        if not config.tied:
            self.lm_head = _linear("lm_head", config.hidden_size, config.vocab_size, biased)
        half = torch.arange(0, config.head_dim, 2, device="cpu", dtype=torch.float32) / config.head_dim
        angles = torch.outer(torch.arange(length, device="cpu").float(), config.rope_theta**-half)  # (t, head_dim / 2)
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """(n, length) -> (n, length, vocabulary)."""
        x = self.model(ids, self.cos, self.sin)
        if self.config.tied:
            return F.linear(x, self.model.embed_tokens.weight)
        logits: Tensor = self.lm_head(x)
        return logits

    def extra_repr(self) -> str:
        return f"{self.config}, length={self.length}"


# ---------------------------------------------------------------- weights


def load_decoder(folder: Path, length: int) -> Decoder:
    """The decoder of a Hugging Face folder, in float32, for windows of ``length`` tokens.

    Reads ``config.json`` and ``*.safetensors`` (never pickles). Raises :class:`TaskError` in one sentence.
    """
    config, state = read_config(folder), _read_weights(folder)
    if config.tied:
        state.pop("lm_head.weight", None)
    with torch.device("meta"):
        model = Decoder(config, length, [name for name in state if name.endswith(".bias")])
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    wrong = [name for name, shape in wanted.items() if name not in state or state[name].shape != shape]
    if wrong:
        found = tuple(state[wrong[0]].shape) if wrong[0] in state else "nothing"
        raise TaskError(
            f"The weights in {folder} must fit its config.json: {wrong[0]} is {found}, expected {tuple(wanted[wrong[0]])} "
            f"({len(wrong)} of {len(wanted)} tensors are missing or of another shape)."
        )
    if left := sorted(set(state) - set(wanted)):
        raise TaskError(f"This decoder has no place for {left[0]} ({len(left)} such tensors in {folder}).")
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return model.eval()


def _read_weights(folder: Path) -> dict[str, Tensor]:
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise TaskError(f"A decoder folder holds its weights as *.safetensors, {folder} has none; convert them first.")
    state: dict[str, Tensor] = {}
    for path in paths:
        try:
            state |= load_file(path)
        except (SafetensorError, OSError) as error:
            raise TaskError(f"Cannot read the weights {path} ({error}); fetch the file again.") from error
    return {name: tensor for name, tensor in state.items() if not name.endswith("rotary_emb.inv_freq")}
