"""Autoencoders of other projects, as the architecture here that does the same: EleutherAI's sparsify, dictionary_learning.

SAELens' folders are read and written by :mod:`trix.superposition.sae.load`. Shapes: D width, K latents.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trix.superposition.sae.base import SAE
from trix.superposition.sae.batch_topk import BatchTopKSAE
from trix.superposition.sae.jumprelu import JumpReLUSAE
from trix.superposition.sae.load import read_config, read_tensors, whole_number
from trix.superposition.sae.standard import SparseAutoencoder
from trix.superposition.sae.topk import TopKSAE

SPARSIFY_WEIGHTS = "sae.safetensors"
DICTIONARY_CLASSES = ("AutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "JumpReluAutoEncoder")
# What the JumpReluAutoEncoder calls its weights; the others have them as linear layers.
_JUMP_RELU = ("W_enc", "b_enc", "W_dec", "b_dec")
_LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight", "b_dec")


def load_sparsify(path: str | Path) -> TopKSAE:
    """Read a folder of sparsify 1.x (cfg.json, sae.safetensors): a TopK autoencoder, for evaluation.

    Raises:
        ValueError: other files; a transcoder, a skip connection or another activation than TopK; weights that do not fit or
            are not finite.
    """
    folder = Path(path)
    config = read_config(folder)
    for name, wanted in {"activation": "topk", "transcode": False, "skip_connection": False}.items():
        if config.get(name, wanted) != wanted:
            raise ValueError(f"{name} of {folder} ({config[name]!r:.40}) must be {wanted!r}")
    width, active = whole_number(config, "d_in", folder), whole_number(config, "k", folder)
    k = config.get("num_latents") or width * whole_number(config, "expansion_factor", folder)
    if type(k) is not int or k < 1:
        raise ValueError(f"num_latents of {folder} ({k!r:.40}) must be a whole number >= 1")
    shapes = {"encoder.weight": [k, width], "encoder.bias": [k], "W_dec": [k, width], "b_dec": [width]}
    tensors = read_tensors(folder / SPARSIFY_WEIGHTS, shapes)
    sae = TopKSAE(width, k, active=active)
    sae.set_weights(tensors["encoder.weight"].t(), tensors["encoder.bias"], tensors["W_dec"], tensors["b_dec"])
    return sae.eval()


def from_dictionary_learning(tensors: Mapping[str, Any], config: Mapping[str, Any]) -> SAE:
    """The autoencoder of dictionary_learning's state_dict and config, for evaluation.

    The files themselves (ae.pt, config.json) are read by :func:`lightning_modules.dictionary_files.load_dictionary_learning`.

    Args:
        config: with the name of the class at trainer.dict_class.

    Raises:
        ValueError: a class that is not one of DICTIONARY_CLASSES, a weight that is missing, does not fit or is not finite.
    """
    trainer = config.get("trainer")
    name = trainer.get("dict_class") if isinstance(trainer, Mapping) else None
    if name not in DICTIONARY_CLASSES:
        raise ValueError(f"trainer.dict_class ({name!r:.40}) must be one of {', '.join(DICTIONARY_CLASSES)}")
    names = _JUMP_RELU if name == "JumpReluAutoEncoder" else _LINEAR
    if name == "AutoEncoder":
        names = (*names[:3], "bias")
    found = [_tensor(tensors, key, dims) for key, dims in zip(names, (2, 1, 2, 1), strict=True)]
    if name == "JumpReluAutoEncoder":
        return _jump_relu(found, _tensor(tensors, "threshold", 1))
    weight_DK, bias_K, weight_KD, bias_D = found[0].t(), found[1], found[2].t(), found[3]
    width, k = weight_DK.shape
    if name == "AutoEncoder":
        sae: SAE = SparseAutoencoder(width, k)
    else:
        num_active = _tensor(tensors, "k", 0)
        if num_active.is_floating_point() or num_active.is_complex():
            raise ValueError(f"weight k ({num_active.dtype}) must be an integer")
        active = int(num_active)
        sae = (TopKSAE if name == "AutoEncoderTopK" else BatchTopKSAE)(width, k, active=active)
    sae.set_weights(weight_DK, bias_K, weight_KD, bias_D)
    if isinstance(sae, BatchTopKSAE):
        sae.set_threshold(_tensor(tensors, "threshold", 0).float().clamp_min(0.0).expand(k))
    return sae.eval()


def _jump_relu(found: list[Tensor], threshold_K: Tensor) -> SAE:
    """Its encoder reads x itself; ours reads x - b_dec, so b_dec W_enc goes into the bias."""
    weight_DK, bias_K, weight_KD, bias_D = found
    if bias_D.shape != weight_DK.shape[:1]:
        raise ValueError(f"shape of b_dec ({list(bias_D.shape)}) must be that of the rows of W_enc ({weight_DK.shape[0]})")
    for name, value_K in {"b_enc": bias_K, "threshold": threshold_K}.items():
        if value_K.shape != weight_DK.shape[1:]:
            raise ValueError(f"shape of {name} ({list(value_K.shape)}) must be {list(weight_DK.shape[1:])}")
    sae = JumpReLUSAE(*weight_DK.shape)
    sae.set_weights(weight_DK, bias_K + bias_D @ weight_DK, weight_KD, bias_D)
    sae.set_threshold(threshold_K)
    return sae.eval()


def _tensor(tensors: Mapping[str, Any], name: str, dims: int) -> Tensor:
    value = tensors.get(name)
    if not isinstance(value, Tensor) or value.dim() != dims:
        found = f"{value.dim()} axes" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"weight {name} ({found}) must be a tensor of {dims} axes")
    return value.float() if value.is_floating_point() else value
