"""Compressors: a frozen config a method, and a handler registered for its type (``base.py``)."""

from autocompress.methods.base import METHODS, LayerContext, LayerMethod, handler_of
from autocompress.methods.lowrank import LowRank
from autocompress.methods.pruning import BlockDrop, ChannelPruning
from autocompress.methods.quantization import StaticInt8, WeightQuant
from autocompress.methods.rate import RateDistortion

METHODS.register("channels")(ChannelPruning)
METHODS.register("blocks")(BlockDrop)

__all__ = [
    "METHODS",
    "BlockDrop",
    "ChannelPruning",
    "LayerContext",
    "LayerMethod",
    "LowRank",
    "RateDistortion",
    "StaticInt8",
    "WeightQuant",
    "handler_of",
]
