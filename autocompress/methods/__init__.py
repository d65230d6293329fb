"""Compressors: a frozen config a method, and a handler registered for its type (``base.py``)."""

from autocompress.methods import gptq as gptq  # registers the handler of WeightQuant
from autocompress.methods.base import METHODS, LayerContext, LayerMethod, handler_of
from autocompress.methods.lookup import Lookup
from autocompress.methods.lowrank import LowRank
from autocompress.methods.pruning import BlockDrop, ChannelPruning
from autocompress.methods.quantization import StaticInt8, WeightQuant
from autocompress.methods.rate import RateDistortion
from autocompress.methods.sparsity import Sparse

METHODS.register("channels")(ChannelPruning)
METHODS.register("blocks")(BlockDrop)

__all__ = [
    "METHODS",
    "BlockDrop",
    "ChannelPruning",
    "LayerContext",
    "LayerMethod",
    "Lookup",
    "LowRank",
    "RateDistortion",
    "Sparse",
    "StaticInt8",
    "WeightQuant",
    "handler_of",
]
