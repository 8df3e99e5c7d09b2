"""ResNet-BK: research tools around the resolvent of a lattice operator, with the names of the interface that they follow."""

import sys

from trix.resnet_bk.config import ResNetBKConfig
from trix.resnet_bk.core import BirmanSchwingerCore
from trix.resnet_bk.kernel import birman_schwinger_kernel, free_resolvent, prefix_determinant
from trix.resnet_bk.language_model import LanguageModel, LanguageModelOutput
from trix.resnet_bk.mixer import BirmanSchwingerMixer
from trix.resnet_bk.potential import PrimeBumpPotential
from trix.resnet_bk.scattering import ScatteringRouter
from trix.resnet_bk.semiseparable import SemiseparableMatrix
from trix.resnet_bk.statistics import SpacingStatistics, spacing_statistics

__all__ = [
    "BirmanSchwingerCore",
    "BirmanSchwingerMixer",
    "LanguageModel",
    "LanguageModelOutput",
    "PrimeBumpPotential",
    "ResNetBKConfig",
    "ScatteringRouter",
    "SemiseparableMatrix",
    "SpacingStatistics",
    "birman_schwinger_kernel",
    "free_resolvent",
    "prefix_determinant",
    "spacing_statistics",
]

if "transformers" in sys.modules:  # importing it takes seconds, so it is left to those who use it
    import trix.resnet_bk.hugging_face  # noqa: F401 (it registers the model)
