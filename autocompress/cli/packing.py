"""The verbs about size on disk: pack and unpack."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from autocompress.cli import options as o
from autocompress.cli.console import out, print_json, quiet_stdout
from autocompress.errors import UsageError

Output = Annotated[
    Path | None, typer.Option("-o", "--out", metavar="FILE", help="The file to write; it must not exist yet.")
]


def pack(
    model: Annotated[Path, typer.Argument(help="The .onnx or .safetensors file.")],
    out_file: Output = None,
    as_json: o.Json = False,
) -> None:
    """Write a model file smaller, without losing a bit.

    What was written has been read back and compared. Without -o: beside the model, with .acpack behind its name.

    \b
    Example:
      autocompress pack model.onnx -o model.acpack
    """
    _need_file(model)
    with quiet_stdout():
        from autocompress.methods.coding import SUFFIX, pack_file

        done = pack_file(model, out_file or model.with_name(model.name + SUFFIX))
    if as_json:
        print_json(asdict(done))
        return
    share = done.packed_bytes / done.original_bytes
    out.print(
        f"{done.path}: {done.packed_bytes / 1e6:.4g} MB, {share:.1%} of {done.original_bytes / 1e6:.4g} MB "
        f"({done.tensors} tensors).",
        markup=False,
    )


def unpack(
    packed: Annotated[Path, typer.Argument(help="A file that 'autocompress pack' has written.")],
    out_file: Output = None,
    as_json: o.Json = False,
) -> None:
    """Write the file that was packed, byte for byte, with every hash checked.

    Without -o: beside the packed file, without .acpack behind its name.

    \b
    Example:
      autocompress unpack model.acpack -o model.onnx
    """
    _need_file(packed)
    with quiet_stdout():
        from autocompress.methods.coding import SUFFIX, Packed, unpack_file

        if out_file is None and packed.suffix != SUFFIX:
            raise UsageError(
                f"{packed} does not end in {SUFFIX}, so it says no name for its original; give one with -o."
            )
        if out_file is None:
            with Packed(packed) as opened:
                kind = opened.kind
            name = packed.with_suffix("")
            out_file = name if name.suffix == kind else name.with_suffix(kind)
        done = unpack_file(packed, out_file)
    if as_json:
        print_json(asdict(done))
        return
    out.print(f"{done.path}: {done.original_bytes / 1e6:.4g} MB, SHA-256 {done.sha256}.", markup=False)


def _need_file(path: Path) -> None:
    if not path.is_file():
        raise UsageError(f"There is no file {str(path)!r}.")
