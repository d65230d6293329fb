"""Language models: a decoder in a Hugging Face folder, judged by its perplexity on windows of held-out text.

``lm:FOLDER`` needs, in FOLDER, ``config.json`` and ``*.safetensors``, and tokens to calibrate and search on (``calib``) and to
report on (``eval``): ``NAME_ids.npy`` of token ids, or ``NAME.txt``, which the folder's own tokenizer reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from autocompress.errors import TaskError
from autocompress.tasks.base import Split, Task
from autocompress.tasks.decoder import load_decoder, read_config
from autocompress.tasks.folders import data_folders

PREFIX = "lm:"
Ids = npt.NDArray[np.integer]
WINDOW = 256
"""Tokens of a window where the ids do not come in windows; a shorter context of the model is kept to."""
N_CALIBRATION, N_SEARCH, N_SLICE = 64, 32, 2
"""Windows: 16,384 tokens of statistics, 8,192 that judge a candidate, 512 that rank it: every candidate on others."""
BATCH = 2
IGNORED = -100
"""Target of a window's last position, whose next token lies outside."""


def language_model(spec: str, data: Sequence[str] = (), seed: int = 0) -> Task:
    """The decoder in ``spec``'s folder: a path, or a name inside one of the data folders.

    Perplexity is ``exp`` of the mean next-token loss over windows that do not overlap. ``seed`` picks 64 windows for
    calibration and 32 for the search among those of ``calib``; the others are for recovery. The report split is all of
    ``eval``. Raises ``TaskError`` that says what is missing and where it goes.
    """
    folder = _folder(spec, data_folders(data))
    config = read_config(folder)
    ids = {name: _ids(folder, name) for name in ("calib", "eval")}
    length = _window(ids, config.max_position_embeddings)
    calib, report = (_windows(folder, name, rows, length, config.vocab_size) for name, rows in ids.items())
    order = torch.randperm(len(calib), generator=torch.Generator().manual_seed(seed))
    n_calibration, n_search = _shares(folder, len(calib))
    calibration, search, rest = (
        calib[part] for part in torch.split(order, [n_calibration, n_search, len(calib) - n_calibration - n_search])
    )
    return Task(
        name=spec,
        model=load_decoder(folder, length),
        calibration=_split(calibration),
        search=_split(search),
        report=_split(report),
        train=_split(rest) if len(rest) else None,
        metric_name="perplexity",
        higher_is_better=False,
        score=token_loss,
        loss=mean_loss,
        prepare=as_ids,
        log_scores=True,
        class_axis=-1,
        batch_size=BATCH,
        slice_size=N_SLICE,
        withheld={"int8": "calibrated 8-bit activations are not verified on language models"},
    )


def as_ids(stored: Tensor) -> Tensor:
    """Stored ids -> int64, which models and files take.  # (n, length)"""
    return stored.long()


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean loss of the next tokens of each window, in nats; logits (n, length, vocabulary).  # (n,)"""
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.reshape(targets.shape).sum(1) / (targets != IGNORED).sum(1)


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean next-token loss in nats, a scalar."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def _split(windows: Tensor) -> Split:
    """Windows and their next tokens.  # both (n, length)"""
    ends = torch.full((len(windows), 1), IGNORED)
    return Split(windows, torch.cat([windows[:, 1:].long(), ends], dim=1))


# ---------------------------------------------------------------- finding and reading


def _folder(spec: str, folders: Sequence[Path]) -> Path:
    name = spec.removeprefix(PREFIX)
    places = [Path(name).expanduser(), *(folder / name for folder in folders)]
    found = next((place for place in places if name and (place / "config.json").is_file()), None)
    if found is None:
        looked = ", ".join(str(place) for place in places)
        raise TaskError(
            f"Task {spec!r} needs a Hugging Face folder with config.json, *.safetensors and token ids; looked in {looked}: "
            "write lm:FOLDER with its path, or name the folder above it with --data or AUTOCOMPRESS_DATA."
        )
    return found


def _ids(folder: Path, name: str) -> Ids:
    """Token ids of a file: one row (n,), or windows (n, length)."""
    path, text = folder / f"{name}_ids.npy", folder / f"{name}.txt"
    if path.is_file():
        try:
            ids: Ids = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise TaskError(f"Cannot read the token ids {path} ({error}); write them with numpy.save.") from error
        if not np.issubdtype(ids.dtype, np.integer) or ids.ndim not in (1, 2):
            raise TaskError(f"Token ids are integers (n,) or (n, length), {path} has {ids.dtype} {ids.shape}.")
        return ids
    if text.is_file():
        return _tokenized(folder, text)
    use = "calibration and search (training text)" if name == "calib" else "the report (held-out text)"
    raise TaskError(
        f"Tokens for {use} are missing in {folder}: put {path.name} (integers, (n,) or (n, length)) or {text.name} there."
    )


def _tokenized(folder: Path, text: Path) -> Ids:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise TaskError(
            f"Reading {text} needs transformers for its tokenizer; install autocompress[text], or give token ids instead."
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        found = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TaskError(
            f"{text} cannot be tokenized ({reason}); put the model's tokenizer.json into {folder}."
        ) from error
    return np.asarray(found, np.int64)


def _window(ids: dict[str, Ids], context: int) -> int:
    """Tokens a window: those of the shortest ids that come in windows, within the model's context."""
    widths = [rows.shape[1] for rows in ids.values() if rows.ndim == 2]
    return min(min(widths, default=WINDOW), context)


def _windows(folder: Path, name: str, ids: Ids, length: int, vocabulary: int) -> Tensor:
    """Windows one after the other, rests left out.  # (n, length) int32"""
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        worst = int(ids.min()) if ids.min() < 0 else int(ids.max())
        raise TaskError(f"Token ids lie within the model's vocabulary of {vocabulary}, {name} in {folder} has {worst}.")
    rows = ids.reshape(len(ids), -1) if ids.ndim == 2 else ids.reshape(1, -1)
    each = rows.shape[1] // length
    if length < 2 or len(rows) * each == 0:
        raise TaskError(f"At least one window of {length} tokens is needed, {name} in {folder} has {ids.size} tokens.")
    cut = rows[:, : each * length].reshape(-1, length)
    return torch.from_numpy(cut.astype(np.int32))


def _shares(folder: Path, n: int) -> tuple[int, int]:
    """Windows for calibration and search; of few, two thirds and one third."""
    if n < 3:
        raise TaskError(
            f"Calibration and search need at least 3 windows, calib in {folder} has {n}; give it more text."
        )
    n_search = min(N_SEARCH, n // 3)
    return min(N_CALIBRATION, n - n_search), n_search
