"""How good a sparse autoencoder is, measured on the model that it explains."""

from trix.superposition.evaluation.model_fit import ModelFit, model_fit

__all__ = ["ModelFit", "model_fit"]
