"""Which tile a token goes to: routers, balance, calibration, claims, surgery."""

from trix.routing.base_router import Router
from trix.routing.claims import ClaimMatrix
from trix.routing.hash_router import HashRouter
from trix.routing.hierarchical_router import HierarchicalRouter
from trix.routing.router import LearnedRouter, SignatureRouter
from trix.routing.scattering_router import ScatteringRouter
from trix.routing.surgery import SignatureSurgery, SurgeryLog

__all__ = [
    "ClaimMatrix",
    "HashRouter",
    "HierarchicalRouter",
    "LearnedRouter",
    "Router",
    "ScatteringRouter",
    "SignatureRouter",
    "SignatureSurgery",
    "SurgeryLog",
]
