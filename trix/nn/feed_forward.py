"""Which feed-forward layer a block holds: the configuration, and the layer made of it."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple, TypeVar

from torch import nn

from trix.nn.dense import DenseFFN
from trix.nn.ffn import TriXFFN
from trix.nn.fixed_code import FixedCode
from trix.nn.hierarchical import HierarchicalTriXFFN
from trix.nn.routed_layer import RoutedLayer
from trix.nn.sparse_lookup import SparseLookupFFN
from trix.nn.sparse_lookup_v2 import SparseLookupFFNv2
from trix.routing.base_router import Router
from trix.routing.router import SignatureRouter

CodeT = TypeVar("CodeT", bound=FixedCode)


class _Kind(NamedTuple):
    """make: d_model and the settings by name -> the layer. settings: the fields of FFNConfig that it takes."""

    make: Callable[..., nn.Module]
    settings: tuple[str, ...]


def _dense(d_model: int, d_ff: int | None) -> DenseFFN:
    return DenseFFN(d_model, 4 * d_model if d_ff is None else d_ff)


_ALL_ROUTED = ("num_tiles", "top_k", "balance_weight", "balance_rate")
_ALL_TRIX = (*_ALL_ROUTED, "d_ff", "routing", "diversity_weight", "target_diversity", "tiles", "tiles_args")
_KINDS = {
    "trix": _Kind(TriXFFN, (*_ALL_TRIX, "max_k", "confidence_threshold", "routing_args")),
    "hierarchical": _Kind(HierarchicalTriXFFN, (*_ALL_TRIX, "tiles_per_cluster", "num_probes")),
    "sparse_lookup": _Kind(SparseLookupFFN, (*_ALL_ROUTED, "dropout")),
    "sparse_lookup_v2": _Kind(SparseLookupFFNv2, (*_ALL_ROUTED, "diversity_weight", "dropout")),
    "dense": _Kind(_dense, ("d_ff",)),
}
_OF_CONTEXT = ("context_tokens", "context_decay")
# A control may keep the settings of what it is compared with.
_CONTROLS = ("dense", "none")


@dataclass(frozen=True)
class FFNConfig:
    """Which feed-forward layer a block holds.

    Args:
        kind: ``trix`` (tiles), ``hierarchical`` (many tiles, found by clusters: :class:`~trix.nn.HierarchicalTriXFFN`),
            ``sparse_lookup`` or ``sparse_lookup_v2`` (:class:`~trix.nn.SparseLookupFFN`, :class:`~trix.nn.SparseLookupFFNv2`),
            or a control: ``dense`` (float, width d_ff) or ``none`` (no feed-forward layer at all).
        routing: ``explicit``, ``emergent``, ``scattering``, or a control, ``learned`` or ``hash``: see
            :class:`~trix.nn.TriXFFN`. Or the import path of a :class:`~trix.routing.Router`.
        route_on: what a block lets the signatures read. ``embedding``: the normalised embedding of the token, in every layer: a
            token goes to the same tiles whatever its context. ``hidden``: the layer's own input, so the context, too.
            ``context``: a code of the last few tokens that nothing trains, the same in every layer: of their ids
            (:class:`~trix.nn.ContextCode`), or of their features where tokens are vectors (:class:`~trix.nn.FeatureCode`).
            ``hash`` and ``scattering`` read none of the three.
        signatures: ``learned``, or ``drawn``: frozen at their random start values, so that they never move a token to another
            tile. None: ``drawn`` with ``routing: explicit`` and ``route_on: context``, ``learned`` otherwise.
        context_tokens, context_decay: number of tokens in that code, the token itself among them, and the factor on the weight
            from a token to the one before it.
        tiles_per_cluster, num_probes: for a hierarchical layer alone, which in turn has no max_k.
        tiles: ``ternary``, or the import path of a :class:`~trix.nn.Tiles`. routing_args, tiles_args: what a router and tiles
            of the user's own are made with besides.
        All others: see :class:`~trix.nn.TriXFFN`; a dense layer reads only d_ff (default 4 * d_model), a sparse lookup
            num_tiles, top_k, route_on, balance_weight, balance_rate and, v2, diversity_weight. ``hash`` needs token ids,
            ``scattering`` a mixer that gives the phase.
    """

    kind: Literal["trix", "hierarchical", "sparse_lookup", "sparse_lookup_v2", "dense", "none"] = "trix"
    num_tiles: int = 16
    d_ff: int | None = None
    top_k: int = 1
    routing: str = "explicit"
    route_on: Literal["embedding", "hidden", "context"] = "embedding"
    signatures: Literal["learned", "drawn"] | None = None
    context_tokens: int = 2
    context_decay: float = 0.8
    balance_weight: float = 0.01
    balance_rate: float = 0.01
    max_k: int | None = None
    confidence_threshold: float = 0.3
    diversity_weight: float = 0.0
    target_diversity: float = 0.5
    tiles_per_cluster: int | None = None
    num_probes: int | None = None
    tiles: str = "ternary"
    routing_args: dict[str, Any] = field(default_factory=dict)
    tiles_args: dict[str, Any] = field(default_factory=dict)

    def build(self, d_model: int, dropout: float = 0.0) -> nn.Module | None:
        """The layer, or None for ``none``.

        Args:
            dropout: in a sparse lookup, which adds its update to the residual stream itself.

        Raises:
            ValueError: another kind, an argument that the kind does not have, and as the layer.
        """
        if self.kind == "none":
            return None
        if self.kind not in _KINDS:
            names = ", ".join(map(repr, _KINDS))
            raise ValueError(f"kind ({self.kind!r}) must be {names} or 'none'")
        kind = _KINDS[self.kind]
        if self.kind not in _CONTROLS:
            self._check_foreign(kind)
            if self.route_on not in ("embedding", "hidden", "context"):
                raise ValueError(f"route_on ({self.route_on!r}) must be 'embedding', 'hidden' or 'context'")
            if self.signatures not in ("learned", "drawn", None):
                raise ValueError(f"signatures ({self.signatures!r}) must be 'learned', 'drawn' or None")
        available = {f.name: getattr(self, f.name) for f in fields(self)} | {"dropout": dropout}
        layer = kind.make(d_model, **{name: available[name] for name in kind.settings})
        if isinstance(layer, RoutedLayer) and self._are_drawn(layer.router):
            layer.freeze_all_signatures(tag="as drawn")
        return layer

    def _are_drawn(self, router: Router) -> bool:
        if self.signatures is None:
            return self.route_on == "context" and self.routing == "explicit"
        if self.signatures == "drawn" and not isinstance(router, SignatureRouter):
            raise ValueError(f"signatures ('drawn') needs routing 'explicit' or 'emergent', got {self.routing!r}")
        return self.signatures == "drawn"

    def make_code(self, kind: type[CodeT], num_rows: int, d_model: int) -> CodeT:
        """The code that the signatures of all layers read with ``route_on: context``.

        Args:
            kind: class of the code. num_rows: rows of its table, which is the number of ids, or of features.

        Raises:
            ValueError: as :class:`~trix.nn.FixedCode`.
        """
        return kind(num_rows, d_model, self.context_tokens, self.context_decay)

    def _check_foreign(self, kind: _Kind) -> None:
        of_context = () if self.route_on != "context" else _OF_CONTEXT
        for f in fields(self):
            if f.name in ("kind", "route_on", "signatures", *kind.settings, *of_context):
                continue
            default, value = getattr(_DEFAULTS, f.name), getattr(self, f.name)
            if value != default:
                where = f"route_on is {self.route_on!r}" if f.name in _OF_CONTEXT else f"kind is {self.kind!r}"
                raise ValueError(f"{f.name} ({value}) must be {default} where {where}")


_DEFAULTS = FFNConfig()
