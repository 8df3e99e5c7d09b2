"""ResNet-BK: research tools around the resolvent of a lattice operator, with the names of the interface that they follow."""

from trix.resnet_bk.core import BirmanSchwingerCore
from trix.resnet_bk.kernel import birman_schwinger_kernel, free_resolvent, prefix_determinant
from trix.resnet_bk.potential import PrimeBumpPotential
from trix.resnet_bk.scattering import ScatteringRouter
from trix.resnet_bk.semiseparable import SemiseparableMatrix
from trix.resnet_bk.statistics import SpacingStatistics, spacing_statistics

__all__ = [
    "BirmanSchwingerCore",
    "PrimeBumpPotential",
    "ScatteringRouter",
    "SemiseparableMatrix",
    "SpacingStatistics",
    "birman_schwinger_kernel",
    "free_resolvent",
    "prefix_determinant",
    "spacing_statistics",
]
