"""Which tile a token goes to: routers, balance, claims."""

from trix.routing.claims import ClaimMatrix
from trix.routing.router import LearnedRouter, SignatureRouter

__all__ = ["ClaimMatrix", "LearnedRouter", "SignatureRouter"]
