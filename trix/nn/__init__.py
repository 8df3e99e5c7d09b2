"""Layers and small models made of ternary tiles."""

from trix.nn.attention import RotaryAttention
from trix.nn.block import StackConfig, TriXBlock, TriXStack
from trix.nn.classifier import PADDING_TOKEN, Classifier, ClassifierConfig
from trix.nn.context_code import ContextCode
from trix.nn.controls import GatedFFN, HashFFN
from trix.nn.dense import DenseFFN
from trix.nn.feature_code import FeatureCode
from trix.nn.feed_forward import FFNConfig
from trix.nn.ffn import TriXFFN
from trix.nn.fixed_code import FixedCode
from trix.nn.hierarchical import HierarchicalTriXFFN
from trix.nn.language_model import LanguageModel, LanguageModelConfig
from trix.nn.linear import TriXLinear
from trix.nn.magnitudes import GridSplines, HingeSplines
from trix.nn.mixer import Mixer
from trix.nn.packing import pack_model, unpack_model
from trix.nn.recurrent_mixer import RecurrentMixer
from trix.nn.resolvent_mixer import ResolventMixer
from trix.nn.routed_layer import RoutedLayer, routed_layers
from trix.nn.sparse_lookup import SparseLookupBlock, SparseLookupFFN
from trix.nn.sparse_lookup_v2 import SparseLookupBlockV2, SparseLookupFFNv2
from trix.nn.ssd_mixer import SSDMixer
from trix.nn.ternary_weight import TernaryWeight
from trix.nn.tiles import TernaryTiles, Tiles

__all__ = [
    "PADDING_TOKEN",
    "Classifier",
    "ClassifierConfig",
    "ContextCode",
    "DenseFFN",
    "FFNConfig",
    "FeatureCode",
    "FixedCode",
    "GatedFFN",
    "GridSplines",
    "HashFFN",
    "HierarchicalTriXFFN",
    "HingeSplines",
    "LanguageModel",
    "LanguageModelConfig",
    "Mixer",
    "RecurrentMixer",
    "ResolventMixer",
    "RotaryAttention",
    "RoutedLayer",
    "SSDMixer",
    "SparseLookupBlock",
    "SparseLookupBlockV2",
    "SparseLookupFFN",
    "SparseLookupFFNv2",
    "StackConfig",
    "TernaryTiles",
    "TernaryWeight",
    "Tiles",
    "TriXBlock",
    "TriXFFN",
    "TriXLinear",
    "TriXStack",
    "pack_model",
    "routed_layers",
    "unpack_model",
]
