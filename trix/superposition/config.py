"""The settings of each part. Unknown keys are refused, with the nearest known one; values are not converted."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

DTypeName = Literal["bf16", "fp16", "fp32"]


class Settings(BaseModel):
    """Typed, frozen settings.

    Raises:
        ValueError: an unknown key, or a value of another type or out of range (pydantic's ValidationError).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, given: Any) -> Any:
        if isinstance(given, dict):
            for key in (key for key in given if key not in cls.model_fields):
                nearest = get_close_matches(str(key), cls.model_fields, n=1)
                hint = f"; did you mean {nearest[0]}?" if nearest else ""
                raise ValueError(f"key {key!r} must be one of {', '.join(cls.model_fields)}{hint}")
        return given


class DumpConfig(Settings):
    """What :func:`~trix.superposition.dump.dump_layer_activations` reads and writes.

    Args:
        layer: the block whose input is dumped, counted from 0. max_len: tokens of a text that are read; the rest is cut off.
        batch_size: texts of a batch. dtype: of the stored activations.
        shard_tokens: tokens of a shard; the last one may have fewer.
        drop_sinks: leave out attention sinks: the first position, if the model comes from Hugging Face, and tokens whose norm
            is more than 10 times the median of their batch.
        strict: raise an error at the first activation that is NaN or infinite, instead of leaving its token out.
    """

    layer: int = Field(default=13, ge=0)
    max_len: int = Field(default=32, ge=1)
    batch_size: int = Field(default=64, ge=1)
    dtype: DTypeName = "bf16"
    shard_tokens: int = Field(default=65536, ge=1)
    drop_sinks: bool = True
    strict: bool = False


class SAEConfig(Settings):
    """A sparse autoencoder and its training.

    Args:
        k: latents, the size of the dictionary. active: latents of a token that may be active, where the architecture fixes it.
        lr: learning rate. l1: weight of the sparsity loss, where the architecture has one. epochs: passes over the activations.
        batch_size: tokens of a step. architecture: its name in the registry of :mod:`trix.superposition.sae`.

    Raises:
        ValueError: active > k, and as Settings.
    """

    k: int = Field(default=2048, ge=1)
    active: int = Field(default=32, ge=1)
    lr: float = Field(default=3e-4, gt=0, allow_inf_nan=False)
    l1: float = Field(default=1e-3, ge=0, allow_inf_nan=False)
    epochs: int = Field(default=2, ge=1)
    batch_size: int = Field(default=4096, ge=1)
    architecture: str = "standard"

    @model_validator(mode="after")
    def _check_active(self) -> Self:
        if self.active > self.k:
            raise ValueError(f"active ({self.active}) must be <= k ({self.k})")
        return self


class AnalysisConfig(Settings):
    """How latents are analysed.

    Args:
        topk: tokens kept of each latent. min_activation: activations up to this count as none. similarity_threshold: above it
            two latents are alike.
    """

    topk: int = Field(default=200, ge=1)
    min_activation: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    similarity_threshold: float = Field(default=0.85, ge=-1, le=1)


class MergeConfig(Settings):
    """How latents are merged.

    Args:
        n_clusters: merged latents; None lets their number follow from that of the latents. alpha, beta, gamma: weights of
            cosine, correlation and Jaccard similarity. l2_reg: ridge penalty of the refit.
    """

    n_clusters: int | None = Field(default=None, ge=1)
    alpha: float = Field(default=0.5, ge=0, allow_inf_nan=False)
    beta: float = Field(default=0.4, ge=0, allow_inf_nan=False)
    gamma: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    l2_reg: float = Field(default=1e-3, ge=0, allow_inf_nan=False)


class Paths(Settings):
    """Where the parts write.

    Args:
        shards_dir: folder of the activations. sae_path: the autoencoder. summary_csv: the table of latents.
    """

    shards_dir: str | Path = "acts_shards"
    sae_path: str | Path = "sae_weights.pt"
    summary_csv: str | Path = "latent_summary.csv"
