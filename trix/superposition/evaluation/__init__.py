"""How good a sparse autoencoder is: its reconstruction, the loss of the model, its latents, each compared with controls."""

from trix.superposition.evaluation.model_fit import ModelFit, model_fit, model_fits

__all__ = ["ModelFit", "model_fit", "model_fits"]
