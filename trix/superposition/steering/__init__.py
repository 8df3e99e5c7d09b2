"""Steering a model by the latents of a sparse autoencoder, also while it generates."""

from trix.superposition.steering import hooks
from trix.superposition.steering.hooks import (
    LatentModifier,
    SteeringHandle,
    merge_wrapper,
    multi_latent_modifier,
    register_prehook_last_row,
    set_or_scale_latent,
    steering,
)

__all__ = [
    "LatentModifier",
    "SteeringHandle",
    "hooks",
    "merge_wrapper",
    "multi_latent_modifier",
    "register_prehook_last_row",
    "set_or_scale_latent",
    "steering",
]
