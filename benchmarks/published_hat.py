"""Transformers that Hardware-Aware Transformers (HAT, Wang et al., ACL 2020; MIT) timed, rebuilt as the kernels that ran.

Its encoders are one pass over a sentence; its decoders write one token at a time for five beams, as its script
``latency_dataset.py`` says. Published are averages over layers: sums over layers are exact, which layer has which width is not
known. Embeddings are left out: they read a few rows of a table. Knows the files' format; nothing of fitting.
"""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from published import Measured, Networks, measured, networks_of, numbered

from autocompress.types import Kernel

FloatArray = npt.NDArray[np.float64]
Row = dict[str, float]

VOCABULARY = {"wmt14ende": 32768, "wmt14enfr": 44512, "wmt19ende": 40000, "iwslt14deen": 6632}
"""The first is set by HAT's script; of the others the dictionaries are not in its repository: what fairseq makes of the same data
by the same script, of WMT'19 the number of byte-pair merges."""
LENGTHS = {"iwslt14deen": 23}
LENGTH = 30
"""Tokens of a sentence, and of its translation; of IWSLT 23."""
BEAMS = 5
INNER = 512
"""Width of queries, keys and values of all heads together."""
STEP = 512
"""Widths of feed-forward layers are multiples of it."""
AROUND = 25
DRIFT, UNSURE = 0.1, 0.1


def tasks_of(folder: Path, device: str) -> list[str]:
    """The translation tasks that were timed on a device, ``gpu_titanxp`` for one."""
    return sorted(path.name.split("_")[0] for path in (folder / "hat").glob(f"*_{device}_all.csv"))


def encoder(folder: Path, device: str) -> Measured:
    """Encoders of all tasks; a task is held out whole."""
    return _part(folder, device, "encoder")


def decoder(folder: Path, device: str) -> Measured:
    """Decoders of all tasks, one translation each; a task is held out whole."""
    return _part(folder, device, "decoder")


def _part(folder: Path, device: str, part: str) -> Measured:
    networks, ms, drifted, unsure = _read(folder, device, part)
    keep = ~drifted & ~unsure
    dropped = {
        f"timed while the rows around lay more than {DRIFT:.0%} off": int(drifted.sum()),
        f"standard deviation above {UNSURE:.0%}": int((unsure & ~drifted).sum()),
    }
    return replace(measured(networks.only(keep), ms[keep], (BEAMS, LENGTH), dropped), unit="tokens")


@cache
def _read(
    folder: Path, device: str, part: str
) -> tuple[Networks, FloatArray, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    nets, tasks, tables, ms, drifted, unsure = [], [], [], [], [], []
    for task in tasks_of(folder, device):
        with open(folder / "hat" / f"{task}_{device}_all.csv", newline="") as file:
            rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
        build = _encoder if part == "encoder" else _decoder
        nets += [build(row, task) for row in rows]
        tables += [(*_choices(row, part), task) for row in rows]
        tasks += [task] * len(rows)
        mean = np.array([row[f"latency_mean_{part}"] for row in rows])
        std = np.array([row[f"latency_std_{part}"] for row in rows])
        ms.append(mean)
        drifted.append(_drifts(mean, np.array([row[f"{part}_layer_num"] for row in rows])))
        unsure.append(std > UNSURE * mean)
    table = np.stack(
        [numbered([row[i] for row in tables]) for i in range(len(tables[0]))], 1
    )  # (n_networks, n_positions)
    table += np.append(0, np.cumsum(table.max(axis=0) + 1)[:-1])
    networks = networks_of(f"HAT {part}", nets, numbered(tasks), table)
    return networks, np.concatenate(ms), np.concatenate(drifted), np.concatenate(unsure)


def _drifts(ms: FloatArray, layers: FloatArray) -> npt.NDArray[np.bool_]:
    """Rows around which 51 networks took other times, in the median, than the file's of as many layers: they come in random
    order, so the machine was not the same."""
    usual = np.array([np.median(ms[layers == n]) for n in layers])
    padded = np.pad(ms / usual, AROUND, mode="reflect")
    around = np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * AROUND + 1), axis=1)
    return np.asarray(np.abs(around - 1) > DRIFT)


def _choices(row: Row, part: str) -> tuple[Any, ...]:
    """What an additive table would be indexed by; widths of layers count together with their number."""
    n, width = row[f"{part}_layer_num"], row[f"{part}_embed_dim"]
    found = [(n, width), (width, n * row[f"{part}_ffn_embed_dim_avg"]), n * row[f"{part}_self_attention_heads_avg"]]
    if part == "decoder":
        found += [n * row["decoder_ende_attention_heads_avg"]]
        found += [(row["encoder_embed_dim"], n * row["decoder_arbitrary_ende_attn_avg"])]
    return tuple(tuple(map(round, each)) if isinstance(each, tuple) else round(each) for each in found)


# ---------------------------------------------------------------- kernels


def linear(width: int, out: int, rows: int) -> Kernel:
    """A linear layer over ``rows`` positions."""
    return Kernel("linear", (width, rows), (out, rows))


def residual(width: int, rows: int) -> list[Kernel]:
    """An addition and its layer norm."""
    shape = width, rows
    return [Kernel("add", shape, shape, n_inputs=2), Kernel("norm", shape, shape)]


def attention(heads: float, rows: int) -> Kernel:
    """Attention of all positions with all; of the heads, the nearest power of two (laws do not tell them apart)."""
    n = 2 ** round(np.log2(heads))
    return Kernel("attention", (n, rows, INNER // n), (n, rows, INNER // n), n_inputs=3)


def _shares(average: float, layers: float, unit: int) -> list[int]:
    """One multiple of ``unit`` a layer, as even as can be, with the average that is published."""
    total, n = round(average * layers / unit), int(layers)
    return [unit * (total // n + (i < total % n)) for i in range(n)]


def _encoder(row: Row, task: str) -> Counter[Kernel]:
    rows, width = LENGTHS.get(task, LENGTH), int(row["encoder_embed_dim"])
    kernels: Counter[Kernel] = Counter()
    for inner in _shares(row["encoder_ffn_embed_dim_avg"], row["encoder_layer_num"], STEP):
        kernels.update([linear(width, 3 * INNER, rows), attention(row["encoder_self_attention_heads_avg"], rows)])
        kernels.update([linear(INNER, width, rows), linear(width, inner, rows), linear(inner, width, rows)])
        kernels.update(residual(width, rows) * 2)
    return kernels


def _decoder(row: Row, task: str) -> Counter[Kernel]:
    """Keys and values of the encoder's output are computed once. One query over t keys counts as square attention with as
    many products."""
    steps, layers = LENGTHS.get(task, LENGTH), row["decoder_layer_num"]
    width, source = int(row["decoder_embed_dim"]), int(row["encoder_embed_dim"])
    own = attention(row["decoder_self_attention_heads_avg"], round((BEAMS * steps / 2) ** 0.5))
    kernels: Counter[Kernel] = Counter({linear(width, VOCABULARY[task], BEAMS): steps})
    attended = _shares(row["decoder_arbitrary_ende_attn_avg"], layers, 1)
    for inner, n in zip(_shares(row["decoder_ffn_embed_dim_avg"], layers, STEP), attended, strict=True):
        cross = attention(row["decoder_ende_attention_heads_avg"], round((BEAMS * steps * n) ** 0.5))
        token = [linear(width, 3 * INNER, BEAMS), own, linear(INNER, width, BEAMS), linear(width, INNER, BEAMS), cross]
        token += [linear(INNER, width, BEAMS), linear(width, inner, BEAMS), linear(inner, width, BEAMS)]
        for kernel in token + residual(width, BEAMS) * 3:
            kernels[kernel] += steps
        kernels[linear(source, INNER, BEAMS * steps * n)] += 2
    return kernels
