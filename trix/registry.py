"""Named kinds of a part: the project's own by a short name, a user's own by the import path of its class."""

import re
import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from inspect import isclass, signature
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Short names for the kinds of one part.

    A name without a dot is looked up here. A name with dots is the import path of a class, ``own_router.MyRouter``, whose
    module must have been imported: a name may come from a file, and no file decides what is imported.

    Args:
        part: what it is called in errors. base: what a class named by its path must derive from.
    """

    def __init__(self, part: str, base: type[T]) -> None:
        self.part, self._base = part, base
        self._kinds: dict[str, Callable[..., T]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The short names, in the order of their registration."""
        return tuple(self._kinds)

    def register(self, name: str, kind: Callable[..., T]) -> None:
        """Let a short name stand for a class, or for anything else that makes the part.

        Raises:
            ValueError: the name is taken, or no Python name.
        """
        if name in self._kinds:
            raise ValueError(f"{self.part} {name!r} must not be registered twice")
        if not name.isidentifier():
            raise ValueError(f"name of a {self.part} ({name!r}) must be a Python name")
        self._kinds[name] = kind

    def get(self, name: str) -> Callable[..., T]:
        """What makes the part of this name.

        Raises:
            ValueError: a name that is not registered, a path that names no class of an imported module, or a class of
                another kind.
        """
        if name in self._kinds:
            return self._kinds[name]
        if "." not in name:
            names = ", ".join(map(repr, self._kinds))
            raise ValueError(f"{self.part} ({name!r}) must be {names}, or the import path of a class")
        kind = _imported(name)
        if not isclass(kind):
            raise ValueError(f"{self.part} ({name!r}) must name a class of a module that has been imported")
        if not issubclass(kind, self._base):
            raise ValueError(f"{self.part} ({name!r}) must derive from {self._base.__module__}.{self._base.__qualname__}")
        return kind

    def make(self, name: str, *positional: Any, arguments: Mapping[str, Any], **named: Any) -> T:
        """The part of this name.

        Args:
            positional, named: what every part of the kind is made with. arguments: what this one takes besides.

        Raises:
            ValueError: as :meth:`get`, or the part does not take the arguments.
        """
        kind = self.get(name)
        given_twice = sorted(arguments.keys() & named.keys())
        if given_twice:
            raise ValueError(f"arguments of {self.part} {name!r} ({', '.join(given_twice)}) have a setting of their own")
        try:
            return kind(*positional, **named, **arguments)
        except TypeError as error:
            raise ValueError(f"{self.part} {name!r}: {error}{_nearest_argument(kind, str(error))}") from error


def _nearest_argument(kind: Callable[..., Any], message: str) -> str:
    """ "; did you mean NAME?" where Python names an argument that is like one of the part's."""
    unknown = re.search(r"unexpected keyword argument '(\w+)'", message)
    nearest = get_close_matches(unknown[1], signature(kind).parameters, n=1) if unknown else []
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _imported(path: str) -> Any:
    module_name, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module_name), name, None)
