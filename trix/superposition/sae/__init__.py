"""Sparse autoencoders: one file for each architecture, a registry of them, training, and files.

An architecture of your own derives from :class:`SAE` and is named by its import path, ``own_sae.MySAE``.
"""

from trix.superposition.sae.base import ARCHITECTURES, RESTRAINTS, SAE, SAEStep, geometric_median
from trix.superposition.sae.batch_topk import BatchTopKSAE
from trix.superposition.sae.jumprelu import JumpReLUSAE
from trix.superposition.sae.load import latents_from_shard, load_sae, save_sae
from trix.superposition.sae.matryoshka import MatryoshkaSAE
from trix.superposition.sae.sparse_code import SparseCode
from trix.superposition.sae.standard import SparseAutoencoder
from trix.superposition.sae.topk import TopKSAE
from trix.superposition.sae.train import make_sae, train_sae
from trix.superposition.sae.transcoder import Transcoder

for _kind in (SparseAutoencoder, TopKSAE, BatchTopKSAE, JumpReLUSAE, MatryoshkaSAE, Transcoder):
    ARCHITECTURES.register(_kind.architecture, _kind)

__all__ = [
    "ARCHITECTURES",
    "RESTRAINTS",
    "SAE",
    "BatchTopKSAE",
    "JumpReLUSAE",
    "MatryoshkaSAE",
    "SAEStep",
    "SparseAutoencoder",
    "SparseCode",
    "TopKSAE",
    "Transcoder",
    "geometric_median",
    "latents_from_shard",
    "load_sae",
    "make_sae",
    "save_sae",
    "train_sae",
]
