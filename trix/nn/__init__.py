"""Layers and small models made of ternary tiles."""

from trix.nn.attention import RotaryAttention
from trix.nn.block import TriXBlock, TriXStack
from trix.nn.classifier import Classifier, ClassifierConfig
from trix.nn.ffn import DenseFFN, FFNConfig, TriXFFN
from trix.nn.language_model import LanguageModel, LanguageModelConfig
from trix.nn.linear import TriXLinear
from trix.nn.packing import pack_model, unpack_model
from trix.nn.ternary_weight import TernaryWeight
from trix.nn.tiles import TernaryTiles

__all__ = [
    "Classifier",
    "ClassifierConfig",
    "DenseFFN",
    "FFNConfig",
    "LanguageModel",
    "LanguageModelConfig",
    "RotaryAttention",
    "TernaryTiles",
    "TernaryWeight",
    "TriXBlock",
    "TriXFFN",
    "TriXLinear",
    "TriXStack",
    "pack_model",
    "unpack_model",
]
