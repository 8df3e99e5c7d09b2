"""What latents and tiles have to do with each other: which latent goes with which tile, and which of them decides."""

from trix.superposition.tiles.alignment import Alignment, signature_alignment
from trix.superposition.tiles.causal import CausalCheck, at_block, at_router, best_tiles, causal_check, decided_by
from trix.superposition.tiles.contingency import Contingency, Information, contingency, information
from trix.superposition.tiles.information import latent_information, permuted_within, tile_entropy
from trix.superposition.tiles.insertion import Edit, InsertionComparison, insertion_against_steering, signature_of_latent
from trix.superposition.tiles.merging import TileMerge, merge_into, merge_redundant_tiles, tile_distances
from trix.superposition.tiles.probe import ProbeScores, tile_probe
from trix.superposition.tiles.traffic import Traffic, decoder_rows, read_traffic, with_tiles_of

__all__ = [
    "Alignment",
    "CausalCheck",
    "Contingency",
    "Edit",
    "Information",
    "InsertionComparison",
    "ProbeScores",
    "TileMerge",
    "Traffic",
    "at_block",
    "at_router",
    "best_tiles",
    "causal_check",
    "contingency",
    "decided_by",
    "decoder_rows",
    "information",
    "insertion_against_steering",
    "latent_information",
    "merge_into",
    "merge_redundant_tiles",
    "permuted_within",
    "read_traffic",
    "signature_alignment",
    "signature_of_latent",
    "tile_distances",
    "tile_entropy",
    "tile_probe",
    "with_tiles_of",
]
