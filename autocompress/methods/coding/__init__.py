"""Lossless coding of model files: smaller on disk and on the wire, bit for bit the same when unpacked."""

from autocompress.methods.coding.container import SUFFIX, Packed, Packing, pack, pack_file, unpack, unpack_file
from autocompress.methods.coding.planes import Form, coded_bytes

__all__ = ["SUFFIX", "Form", "Packed", "Packing", "coded_bytes", "pack", "pack_file", "unpack", "unpack_file"]
