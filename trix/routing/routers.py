"""The routers that a configuration can name."""

from functools import partial

from trix.registry import Registry
from trix.routing.base_router import Router
from trix.routing.hash_router import HashRouter
from trix.routing.router import LearnedRouter, SignatureRouter
from trix.routing.scattering_router import ScatteringRouter

ROUTERS: Registry[Router] = Registry("routing", Router)  # type: ignore[type-abstract]
ROUTERS.register("explicit", partial(SignatureRouter, source="explicit"))
ROUTERS.register("emergent", partial(SignatureRouter, source="emergent"))
ROUTERS.register("learned", LearnedRouter)
ROUTERS.register("hash", HashRouter)
ROUTERS.register("scattering", ScatteringRouter)
