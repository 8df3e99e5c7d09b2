"""The class path of a task or of data, as a checkpoint stores it; and the class that such a path stands for, where it is safe.

A checkpoint's word imports nothing by itself: a task or data must be of ``lightning_modules``, a part of a network of ``trix``,
or of a module that the user trusts on this command line. Torch and lightning hold classes that download or write as they run.
"""

import sys
from collections.abc import Collection, Iterator, Mapping
from importlib import import_module
from inspect import isabstract, isclass
from pathlib import Path
from typing import Any, TypeVar

from lightning_modules.commands.arguments import TRUST
from lightning_modules.error_text import one_line
from lightning_modules.errors import UserError
from lightning_modules.trust import OWN, denial, is_class_path

ClassT = TypeVar("ClassT")
# Settings of a network whose value may be the import path of a class, and the setting that stands next to each in our
# configurations. A task of the user's own may have a setting of the same name that means something else.
PARTS = {"mixer": "num_layers", "routing": "num_tiles", "tiles": "num_tiles", "architecture": "k"}


def class_path(kind: type) -> str:
    """Where a class can be imported from: "module.Class"."""
    return f"{kind.__module__}.{kind.__qualname__}"


def import_class(
    path: Any,
    base: type[ClassT],
    source: Path | str,
    trusted: Collection[str] = (),
    package: str = "lightning_modules",
) -> type[ClassT]:
    """The class of a path that a file names; nothing of an untrusted module is run.

    Args:
        path: what the file says. base: what the class must derive from. source: the file. trusted: the modules that may be
            imported besides the package. package: the one of this project where such classes are.

    Raises:
        UserError: no class path, a module that is not trusted or cannot be imported, no class that derives from base, base
            itself, or an abstract class.
    """
    if not isinstance(path, str) or not is_class_path(path):
        raise UserError(f"{source}: class path ({path!r:.80}) must name a class of a module, as in own_task.Task")
    module, _, name = path.rpartition(".")
    if not any(module == root or module.startswith(f"{root}.") for root in (package, *trusted)):
        root = module.split(".")[0]
        if root not in OWN:
            raise UserError(denial(path, source))
        raise UserError(f"class {path} (named by {source}) must be in {package}; if you trust it, add {TRUST} {root}")
    try:
        found = getattr(import_module(module), name)
    except (Exception, SystemExit) as error:  # whatever a module does as it is imported
        reason = one_line(f"{type(error).__name__}: {error}")
        raise UserError(f"class {path} (named by {source}) cannot be imported: {reason}") from error
    if not isclass(found) or not issubclass(found, base) or found is base:
        raise UserError(f"{path} (named by {source}) must be a class derived from {class_path(base)}")
    if isabstract(found):
        methods = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
        raise UserError(f"{path} (named by {source}) must have no abstract methods, it has {methods}")
    return found


def part_paths(settings: Any) -> Iterator[str]:
    """The class paths of the parts of networks that settings name, nested mappings; for which settings count see PARTS."""
    if isinstance(settings, Mapping):
        for name, value in settings.items():
            if isinstance(value, Mapping):
                yield from part_paths(value)
            elif PARTS.get(name) in settings and isinstance(value, str) and is_class_path(value):
                yield value


def import_parts(settings: Any, source: Path | str, trusted: Collection[str] = ()) -> None:
    """Import the modules of the parts that settings of a network name by class path: networks take what is imported.

    Args:
        settings: as :func:`part_paths`. Others: see import_class.

    Raises:
        UserError: as :func:`import_class`.
    """
    for path in part_paths(settings):
        if path.rpartition(".")[0] not in sys.modules:  # what runs in this process has been trusted
            import_class(path, object, source, trusted, package="trix")
