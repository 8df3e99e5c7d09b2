"""Models, and the files of activations."""

from trix.superposition.backends import io_store
from trix.superposition.backends.base_model import CausalLMBackend, Site
from trix.superposition.backends.gguf import convert_gguf
from trix.superposition.backends.hf_causal_lm import HFCausalLM
from trix.superposition.backends.trix_model import TriXBackend

__all__ = ["CausalLMBackend", "HFCausalLM", "Site", "TriXBackend", "convert_gguf", "io_store"]
