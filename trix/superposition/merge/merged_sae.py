"""A sparse autoencoder whose latents are clusters of another one's.

Legend: N tokens, D width, K latents of the base, M merged latents.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trix.regular_files import check_regular
from trix.superposition.analysis.encoding import SparseCoder
from trix.superposition.merge.medoid import labels_from_merge_matrix
from trix.superposition.merge.refit import ActivationBatches, MergeMap, encoded_pairs, merged_latents, ridge_refit
from trix.whole_file import whole_file


class MergedSAE(nn.Module):
    """x_hat = (z M) W_dec + b_dec, where z are the latents of the base and z M sums those of each cluster.

    It has what any autoencoder has for those who read or steer it: d_model, k (= M), W_dec [M, D], b_dec [D], encode, decode,
    forward, dec.weight. It has no W_enc, for a sum of latents is no linear map and a threshold.

    Args:
        base: the autoencoder whose latents are merged; held, not copied.
        merge_map: cluster of each of its latents [K], or the merge matrix [K, M].
        W_dec: decoder [M, D]. b_dec: its intercept [D].

    Raises:
        ValueError: shapes that do not fit, or a decoder that is not of floating-point numbers.
    """

    base: SparseCoder
    merge_map: Tensor

    def __init__(self, base: SparseCoder, merge_map: MergeMap, W_dec: Tensor, b_dec: Tensor) -> None:
        super().__init__()
        label_K = torch.as_tensor(labels_from_merge_matrix(merge_map))
        num_merged = int(label_K.max()) + 1
        if len(label_K) != base.k:
            raise ValueError(f"merge_map ({len(label_K)} latents) must map the k ({base.k}) latents of the base")
        for name, value in {"W_dec": W_dec, "b_dec": b_dec}.items():
            if not value.is_floating_point():
                raise ValueError(f"{name} ({value.dtype}) must be of floating-point numbers")
        if W_dec.ndim != 2 or len(W_dec) != num_merged:
            raise ValueError(f"W_dec {tuple(W_dec.shape)} must be [M ({num_merged}), D]")
        if b_dec.shape != W_dec.shape[1:]:
            raise ValueError(f"b_dec {tuple(b_dec.shape)} must be [D ({W_dec.shape[1]})]")
        self.base = base
        self.d_model, self.k = base.d_model, num_merged
        self.register_buffer("merge_map", label_K.to(W_dec.device))
        self.W_dec = nn.Parameter(W_dec.detach().clone(memory_format=torch.contiguous_format))
        self.b_dec = nn.Parameter(b_dec.detach().clone())

    @property
    def dec(self) -> SimpleNamespace:
        """``dec.weight``: a view of W_dec as nn.Linear has it, [D, M]."""
        return SimpleNamespace(weight=self.W_dec.T)

    def encode(self, x_ND: Tensor) -> Tensor:
        """z M: float32 [N, M] >= 0, 0 where no latent of the cluster is active."""
        return merged_latents(self.base.encode(x_ND), self.merge_map, self.k)

    def decode(self, z_NM: Tensor) -> Tensor:
        """Activations [N, D] of merged latents."""
        return torch.addmm(self.b_dec, z_NM, self.W_dec)

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """(x_hat [N, D], merged latents [N, M])."""
        z_NM = self.encode(x_ND)
        return self.decode(z_NM), z_NM

    def to_tensors(self) -> dict[str, Tensor]:
        """All of its state and its base's as tensors on the CPU; :meth:`from_tensors` makes the same of them."""
        return {name: value.detach().cpu().contiguous().clone() for name, value in self.state_dict().items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], base: SparseCoder) -> "MergedSAE":
        """What :meth:`to_tensors` wrote.

        Args:
            base: an autoencoder of the architecture and sizes of the base; a copy of it takes the base's weights.

        Raises:
            ValueError: tensors that are missing, unknown, of other shapes, or not finite.
        """
        for name in ("merge_map", "W_dec", "b_dec"):
            if name not in tensors:
                raise ValueError(f"tensors ({', '.join(sorted(tensors))}) must include {name}")
        for name, value in tensors.items():
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name} ({int((~torch.isfinite(value)).sum())} values that are not) must be finite")
        merged = cls(copy.deepcopy(base), tensors["merge_map"], tensors["W_dec"], tensors["b_dec"])
        own = merged.state_dict()
        for name in sorted(own.keys() | tensors.keys()):
            found, wanted = _kind(tensors.get(name)), _kind(own.get(name))
            if found != wanted:
                raise ValueError(
                    f"tensors must be those of a merged autoencoder with this base: {name} ({found}) must be {wanted}"
                )
        merged.load_state_dict(dict(tensors))
        return merged


def _kind(tensor: Tensor | None) -> str:
    if tensor is None:
        return "missing"
    number = "float" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "int"
    return f"{number} {list(tensor.shape)}"


def merge_sae(
    sae: SparseCoder,
    merge_map: MergeMap,
    X_iter: ActivationBatches,
    l2: float = 1e-3,
    device: torch.device | str = "cpu",
) -> MergedSAE:
    """Merge the latents of `sae` by `merge_map` and refit the decoder; arguments and errors as of ``ridge_refit``.

    `sae` moves to the device and becomes the base of the result.
    """
    refit = ridge_refit(encoded_pairs(X_iter, sae, device), merge_map, l2, device)
    return MergedSAE(sae, merge_map, refit.W_dec_MD, refit.b_dec_D)


def save_merged_sae(merged: MergedSAE, path: Path | str) -> None:
    """Write the tensors of a merged autoencoder as one safetensors file, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    with whole_file(Path(path)) as partial:
        save_file(merged.to_tensors(), partial)


def load_merged_sae(path: Path | str, base: SparseCoder) -> MergedSAE:
    """Read what :func:`save_merged_sae` wrote; `base` as in :meth:`MergedSAE.from_tensors`.

    Raises:
        ValueError: a file of another form, or of another autoencoder. OSError: it is no regular file.
    """
    check_regular(path)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file: {error}") from error
    return MergedSAE.from_tensors(tensors, base)
