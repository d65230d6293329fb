"""Compressors: a frozen config a method, and a handler registered for its type (``base.py``)."""

from autocompress.methods import gptq as gptq  # registers the handler of WeightQuant
from autocompress.methods.base import METHODS, LayerContext, LayerMethod, handler_of
from autocompress.methods.billm import BiLLM
from autocompress.methods.cur import CUR
from autocompress.methods.datafree import UDFC
from autocompress.methods.datafree_quant import UDFCQuant
from autocompress.methods.factored import Factored
from autocompress.methods.grouped import GroupedSVD
from autocompress.methods.inputs import InputChannels
from autocompress.methods.lookup import Lookup
from autocompress.methods.lord import OutputFeatures
from autocompress.methods.lowrank import LowRank
from autocompress.methods.mpo import TensorTrain
from autocompress.methods.pruning import BlockDrop, ChannelPruning
from autocompress.methods.quantization import CalibratedInt8, StaticInt8, WeightQuant
from autocompress.methods.rate import RateDistortion
from autocompress.methods.sparsity import Sparse
from autocompress.methods.spqr import SpQR
from autocompress.methods.tucker import Tucker2

METHODS.register("channels")(ChannelPruning)
METHODS.register("blocks")(BlockDrop)
METHODS.register("udfc")(UDFC)
METHODS.register("inputs")(InputChannels)

__all__ = [
    "CUR",
    "METHODS",
    "UDFC",
    "BiLLM",
    "BlockDrop",
    "CalibratedInt8",
    "ChannelPruning",
    "Factored",
    "GroupedSVD",
    "InputChannels",
    "LayerContext",
    "LayerMethod",
    "Lookup",
    "LowRank",
    "OutputFeatures",
    "RateDistortion",
    "Sparse",
    "SpQR",
    "StaticInt8",
    "TensorTrain",
    "Tucker2",
    "UDFCQuant",
    "WeightQuant",
    "handler_of",
]
