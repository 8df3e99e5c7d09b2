"""Layers and small models made of ternary tiles."""

from trix.nn.attention import KeyValueCache, RotaryAttention
from trix.nn.block import TriXBlock, TriXStack
from trix.nn.classifier import PADDING_TOKEN, Classifier, ClassifierConfig
from trix.nn.controls import GatedFFN, HashFFN
from trix.nn.ffn import DenseFFN, FFNConfig, TriXFFN
from trix.nn.hierarchical import HierarchicalTriXFFN
from trix.nn.language_model import LanguageModel, LanguageModelConfig
from trix.nn.linear import TriXLinear
from trix.nn.magnitudes import GridSplines, HingeSplines
from trix.nn.packing import pack_model, unpack_model
from trix.nn.routed_layer import RoutedLayer, routed_layers
from trix.nn.sparse_lookup import SparseLookupBlock, SparseLookupFFN
from trix.nn.sparse_lookup_v2 import SparseLookupBlockV2, SparseLookupFFNv2
from trix.nn.ternary_weight import TernaryWeight
from trix.nn.tiles import TernaryTiles

__all__ = [
    "PADDING_TOKEN",
    "Classifier",
    "ClassifierConfig",
    "DenseFFN",
    "FFNConfig",
    "GatedFFN",
    "GridSplines",
    "HashFFN",
    "HierarchicalTriXFFN",
    "HingeSplines",
    "KeyValueCache",
    "LanguageModel",
    "LanguageModelConfig",
    "RotaryAttention",
    "RoutedLayer",
    "SparseLookupBlock",
    "SparseLookupBlockV2",
    "SparseLookupFFN",
    "SparseLookupFFNv2",
    "TernaryTiles",
    "TernaryWeight",
    "TriXBlock",
    "TriXFFN",
    "TriXLinear",
    "TriXStack",
    "pack_model",
    "routed_layers",
    "unpack_model",
]
