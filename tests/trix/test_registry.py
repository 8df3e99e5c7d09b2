"""Names of parts: short ones, and import paths of what has been imported."""

import sys
from types import ModuleType

import pytest

from trix.nn.mixers import MIXERS
from trix.nn.tile_kinds import TILES
from trix.registry import Registry
from trix.routing import Router, SignatureRouter
from trix.routing.routers import ROUTERS


class Part:
    def __init__(self, size: int, *, colour: str = "red") -> None:
        self.size, self.colour = size, colour


class Better(Part):
    pass


@pytest.fixture
def registry() -> Registry[Part]:
    registry: Registry[Part] = Registry("part", Part)
    registry.register("plain", Part)
    return registry


def test_a_name_and_an_import_path_make_the_part(registry: Registry[Part]) -> None:
    assert registry.names == ("plain",)
    assert registry.make("plain", 3, arguments={"colour": "blue"}).colour == "blue"
    made = registry.make(f"{__name__}.Better", arguments={}, size=4)
    assert isinstance(made, Better)
    assert made.size == 4


def test_a_second_name_and_a_name_that_is_none_are_refused(registry: Registry[Part]) -> None:
    with pytest.raises(ValueError, match="part 'plain' must not be registered twice"):
        registry.register("plain", Better)
    with pytest.raises(ValueError, match=r"name of a part \('a.b'\) must be a Python name"):
        registry.register("a.b", Better)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plane", r"part \('plane'\) must be 'plain', or the import path of a class"),
        ("os.system", r"part \('os.system'\) must name a class of a module that has been imported"),
        ("colorsys.Nothing", "must name a class of a module that has been imported"),
        ("collections.OrderedDict", r"must derive from test_registry.Part|must derive from .*\.Part"),
        ("..", "must name a class"),
    ],
)
def test_other_names_are_refused(registry: Registry[Part], name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        registry.get(name)


def test_no_name_imports_a_module(registry: Registry[Part]) -> None:
    sys.modules.pop("colorsys", None)
    with pytest.raises(ValueError, match="that has been imported"):
        registry.get("colorsys.Colour")
    assert "colorsys" not in sys.modules


def test_arguments_that_do_not_fit_are_told_with_the_name(registry: Registry[Part]) -> None:
    with pytest.raises(ValueError, match=r"part 'plain': .*unexpected keyword argument 'weight'"):
        registry.make("plain", 3, arguments={"weight": 1})
    with pytest.raises(ValueError, match=r"unexpected keyword argument 'sizee'; did you mean size\?"):
        registry.make("plain", arguments={"sizee": 1})
    with pytest.raises(ValueError, match=r"arguments of part 'plain' \(size\) have a setting of their own"):
        registry.make("plain", arguments={"size": 1}, size=2)


def test_the_projects_own_kinds() -> None:
    assert ROUTERS.names == ("explicit", "emergent", "learned", "hash", "scattering")
    assert TILES.names == ("ternary",)
    assert MIXERS.names == ("attention", "resolvent", "ssd")


def test_a_router_is_found_in_a_module_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("own_routers")
    module.Mine = type("Mine", (SignatureRouter,), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_routers", module)
    made = ROUTERS.make("own_routers.Mine", 8, 4, arguments={"source": "explicit"}, top_k=2)
    assert isinstance(made, Router)
    assert made.top_k == 2
