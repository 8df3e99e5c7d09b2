"""Autoencoders as files: a folder with cfg.json and sae_weights.safetensors, which SAELens reads, too.

SAELens reads what an autoencoder does after training: one with a threshold is a ``jumprelu`` there, whatever it was trained
as. What we know besides (architecture, settings) is in the metadata, which SAELens keeps.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trix.regular_files import check_regular, read_regular
from trix.superposition.sae.base import ARCHITECTURES, SAE
from trix.superposition.sae.batch_topk import BatchTopKSAE
from trix.superposition.sae.jumprelu import JumpReLUSAE
from trix.superposition.sae.standard import SparseAutoencoder
from trix.superposition.sae.topk import TopKSAE
from trix.superposition.sae.transcoder import Transcoder
from trix.whole_file import whole_file, write_whole

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
MAX_CONFIG_BYTES = 2**20
SAELENS_VERSION = "6.54.12"  # whose files these are like; without a version from 6 on SAELens takes them for an older format
OURS = "trix"  # our entry in the metadata
FROM_SAELENS = ("standard", "topk", "jumprelu")  # their names are ours


def save_sae(sae: SAE, path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write an autoencoder to the folder ``path``, which is made; each of its two files is whole or not there.

    The scales are folded into what is written; ``sae`` stays as it is. Buffers that only training needs are not written.

    Args:
        metadata: plain values to keep with it, such as the model and the site that it is about.

    Raises:
        ValueError: a weight is not finite, metadata that JSON cannot hold or a key of ours in it, or ``path`` is a file.
        OSError: it cannot be written.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} must be a folder: an autoencoder is written as {CONFIG_FILE} and {WEIGHTS_FILE}")
    threshold_K = _threshold(sae)
    tensors = {name: value.float().cpu().clone().contiguous() for name, value in sae.folded_weights().items()}
    if threshold_K is not None:
        tensors["threshold"] = threshold_K
    for name, value in tensors.items():
        if not bool(value.isfinite().all()):
            raise ValueError(f"weight {name} ({int((~value.isfinite()).sum())} values that are not) must be finite")
    ours = {"architecture": sae.architecture, "settings": sae.settings()}
    taken = sorted(ours.keys() & (metadata or {}).keys())
    if taken:
        raise ValueError(f"metadata key ({taken[0]!r}) must be another one than architecture and settings")
    config = {
        "architecture": _saelens_architecture(sae),
        "d_in": sae.d_model,
        "d_sae": sae.k,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.centres_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            OURS: {**ours, **(metadata or {})},
        },
    }
    if isinstance(sae, Transcoder):
        config["d_out"] = sae.d_out
    if isinstance(sae, TopKSAE):
        config |= {"k": sae.active, "rescale_acts_by_decoder_norm": False}
    try:
        text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata must be plain values: {error}") from error
    with whole_file(folder / WEIGHTS_FILE) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
    write_whole(text.encode(), folder / CONFIG_FILE)


def load_sae(
    path: str | Path, d_model: int | None = None, k: int | None = None, map_location: str | torch.device = "cpu"
) -> SAE:
    """Read what :func:`save_sae` wrote, or SAELens' standard, topk and jumprelu autoencoders, for evaluation.

    Args:
        d_model, k: what the file must have, where they are given.

    Raises:
        ValueError: no such files, a pickle, an architecture that is not known, sizes that differ from each other or from
            d_model and k, weights that are not finite.
    """
    folder = Path(path)
    config = read_config(folder)
    width, num_latents = whole_number(config, "d_in", folder), whole_number(config, "d_sae", folder)
    for name, wanted, found in (("d_model", d_model, width), ("k", k, num_latents)):
        if wanted is not None and wanted != found:
            raise ValueError(f"{name} of {folder} ({found}) must be the one that is asked for ({wanted})")
    for name in ("normalize_activations", "reshape_activations"):
        if config.get(name, "none") != "none":
            raise ValueError(f"{name} of {folder} ({config[name]!r:.40}) must be 'none'")
    tensors = _read_weights(folder, config, width, num_latents)
    sae = _made(folder, config, width, num_latents, tensors["W_dec"].shape[1])
    _fill(sae, tensors, config, folder)
    return sae.to(map_location).eval()


def latents_from_shard(sae: SAE, X: Tensor, device: str | torch.device = "cpu", batch: int = 16384) -> Tensor:
    """z of activations [N, D], ``batch`` tokens at a time: float [N, K] on the CPU."""
    sae = sae.to(device)
    with torch.no_grad():
        return torch.cat([sae.encode(part.to(device)).cpu() for part in torch.split(X, batch)])


def _threshold(sae: SAE) -> Tensor | None:
    if isinstance(sae, JumpReLUSAE):
        return sae.threshold.detach().float().cpu().clone()
    if isinstance(sae, BatchTopKSAE):
        return sae.threshold.detach().float().cpu().expand(sae.k).clone()
    return None


def _saelens_architecture(sae: SAE) -> str:
    """What does the same after training; an architecture of the user's own that is none of these keeps its name."""
    if isinstance(sae, Transcoder):
        return "jumprelu_transcoder"
    kinds = {BatchTopKSAE: "jumprelu", JumpReLUSAE: "jumprelu", TopKSAE: "topk", SparseAutoencoder: "standard"}
    return next((name for kind, name in kinds.items() if isinstance(sae, kind)), sae.architecture)


def read_config(folder: Path) -> dict[str, Any]:
    """The cfg.json of an autoencoder's folder.

    Raises:
        ValueError: no folder, no such file, or no JSON object in it.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder} must be a folder with {CONFIG_FILE} and weights in safetensors; pickles (.pt, .bin) are not read"
        )
    config = read_json(folder / CONFIG_FILE)
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG_FILE} ({type(config).__name__}) must be a JSON object")
    return config


def read_json(path: Path) -> Any:
    """The content of a JSON file of at most MAX_CONFIG_BYTES.

    Raises:
        ValueError: no such file, or another content.
    """
    try:
        return json.loads(read_regular(path, MAX_CONFIG_BYTES))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON: {error}") from error


def whole_number(config: Mapping[str, Any], name: str, folder: Path) -> int:
    """A number >= 1 of a configuration.

    Raises:
        ValueError: it is something else.
    """
    value = config.get(name)
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} of {folder / CONFIG_FILE} ({value!r:.40}) must be a whole number >= 1")
    return value


def read_tensors(path: Path, shapes: Mapping[str, list[int]], optional: Collection[str] = ()) -> dict[str, Tensor]:
    """Tensors of a safetensors file, in float32; their shapes are compared before any of them is read.

    Raises:
        ValueError: no such file, a tensor is missing, of another shape, or not finite.
    """
    try:
        check_regular(path)
        with safe_open(path, framework="pt") as opened:
            names = set(opened.keys())
            for name, wanted in shapes.items():
                if name not in names:
                    if name in optional:
                        continue
                    raise ValueError(f"{path} must hold {name}")
                shape = list(opened.get_slice(name).get_shape())
                if shape != wanted:
                    raise ValueError(f"shape of {name} in {path} ({shape}) must be {wanted}, as {CONFIG_FILE} says")
            tensors = {name: opened.get_tensor(name) for name in shapes if name in names}
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file: {error}") from error
    for name, value in tensors.items():
        if not value.is_floating_point() or not bool(value.isfinite().all()):
            raise ValueError(f"{name} in {path} ({value.dtype}) must hold finite floating-point numbers")
    return {name: value.float() for name, value in tensors.items()}


def _read_weights(folder: Path, config: Mapping[str, Any], width: int, num_latents: int) -> dict[str, Tensor]:
    width_out = whole_number(config, "d_out", folder) if "d_out" in config else width
    shapes = {
        "W_enc": [width, num_latents],
        "b_enc": [num_latents],
        "W_dec": [num_latents, width_out],
        "b_dec": [width_out],
        "threshold": [num_latents],
    }
    return read_tensors(folder / WEIGHTS_FILE, shapes, optional=("threshold",))


def _made(folder: Path, config: Mapping[str, Any], width: int, num_latents: int, width_out: int) -> SAE:
    """An autoencoder of the right kind, with weights of its own."""
    metadata = config.get("metadata")
    ours = metadata.get(OURS) if isinstance(metadata, dict) else None
    if isinstance(ours, dict) and isinstance(ours.get("architecture"), str) and isinstance(ours.get("settings"), dict):
        d_out = ours["settings"].get("d_out", width)
        if d_out != width_out:  # compared first: no file makes weights that are larger than its own
            raise ValueError(f"d_out of {folder} ({d_out!r:.40}) must be the width of W_dec ({width_out})")
        return ARCHITECTURES.make(ours["architecture"], width, num_latents, arguments=ours["settings"])
    architecture = config.get("architecture")
    if architecture not in FROM_SAELENS:
        raise ValueError(f"architecture of {folder} ({architecture!r:.40}) must be one of {', '.join(FROM_SAELENS)}")
    arguments = {"active": whole_number(config, "k", folder)} if architecture == "topk" else {}
    return ARCHITECTURES.make(architecture, width, num_latents, arguments=arguments)


@torch.no_grad()
def _fill(sae: SAE, tensors: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path) -> None:
    """Give the autoencoder these weights, in the form in which it uses them."""
    weight_DK, bias_K = tensors["W_enc"], tensors["b_enc"]
    weight_KO = tensors["W_dec"]
    if config.get("rescale_acts_by_decoder_norm", False):  # of two equal ways to write the same, ours has rows of norm 1
        norm_K = weight_KO.norm(dim=-1).clamp_min(torch.finfo(weight_KO.dtype).tiny)
        weight_DK, bias_K, weight_KO = weight_DK * norm_K, bias_K * norm_K, weight_KO / norm_K.unsqueeze(-1)
    if sae.centres_input and not config.get("apply_b_dec_to_input", True):
        bias_K = bias_K + tensors["b_dec"] @ weight_DK
    sae.set_weights(weight_DK, bias_K, weight_KO, tensors["b_dec"])
    if isinstance(sae, JumpReLUSAE | BatchTopKSAE):
        if "threshold" not in tensors:
            raise ValueError(f"{folder / WEIGHTS_FILE} must hold a threshold for each latent")
        sae.set_threshold(tensors["threshold"])
