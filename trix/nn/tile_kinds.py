"""The tiles that a configuration can name."""

from trix.nn.tiles import TernaryTiles, Tiles
from trix.registry import Registry

TILES: Registry[Tiles] = Registry("tiles", Tiles)  # type: ignore[type-abstract]
TILES.register("ternary", TernaryTiles)
