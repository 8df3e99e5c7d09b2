"""Activations on disk: written once, read many times."""

from trix.superposition.dump import activations, reader
from trix.superposition.dump.activations import dump_layer_activations, dump_sites
from trix.superposition.dump.reader import ActivationDump, build_offsets, stream_shards

__all__ = [
    "ActivationDump",
    "activations",
    "build_offsets",
    "dump_layer_activations",
    "dump_sites",
    "reader",
    "stream_shards",
]
