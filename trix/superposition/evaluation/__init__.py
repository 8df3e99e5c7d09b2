"""How good a sparse autoencoder is: what it reconstructs, what the model loses, what its latents tell, beside its controls."""

from trix.superposition.evaluation.model_fit import ModelFit, model_fit, model_fits

__all__ = ["ModelFit", "model_fit", "model_fits"]
