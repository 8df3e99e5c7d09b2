"""The class path of a task or of data, as a checkpoint stores it; and the class that such a path stands for, where it is safe.

A checkpoint's word imports nothing by itself: its class must be of these packages, torch or lightning, or of a module that the
user trusts on this command line.
"""

import sys
from collections.abc import Collection, Mapping
from importlib import import_module
from inspect import isclass
from pathlib import Path
from typing import Any, TypeVar

from lightning_modules.error_text import one_line
from lightning_modules.errors import UserError
from lightning_modules.trust import OWN, denial, is_class_path

ClassT = TypeVar("ClassT")
# Settings of a network whose value may be the import path of a class.
PARTS = ("mixer", "routing", "tiles")


def class_path(kind: type) -> str:
    """Where a class can be imported from: "module.Class"."""
    return f"{kind.__module__}.{kind.__qualname__}"


def import_class(path: Any, base: type[ClassT], source: Path | str, trusted: Collection[str] = ()) -> type[ClassT]:
    """The class of a path that a file names; nothing of an untrusted module is run.

    Args:
        path: what the file says. base: what the class must derive from. source: the file. trusted: the modules of the user's
            own that may be imported, besides these packages, torch and lightning.

    Raises:
        UserError: no class path, a module that is not trusted or cannot be imported, or no class that derives from base.
    """
    if not isinstance(path, str) or not is_class_path(path):
        raise UserError(f"{source}: class path ({path!r:.80}) must name a class of a module, as in own_task.Task")
    module, _, name = path.rpartition(".")
    if not any(module == root or module.startswith(f"{root}.") for root in (*OWN, *trusted)):
        raise UserError(denial(path, source))
    try:
        found = getattr(import_module(module), name)
    except (Exception, SystemExit) as error:  # whatever a module does as it is imported
        reason = one_line(f"{type(error).__name__}: {error}")
        raise UserError(f"class {path} (named by {source}) cannot be imported: {reason}") from error
    if not isclass(found) or not issubclass(found, base):
        raise UserError(f"{path} (named by {source}) must be a class derived from {class_path(base)}")
    return found


def import_parts(settings: Any, source: Path | str, trusted: Collection[str] = ()) -> None:
    """Import the modules of the parts that settings of a network name by class path: networks take what is imported.

    Args:
        settings: nested mappings; every ``mixer``, ``routing`` or ``tiles`` among them counts. Others: see import_class.

    Raises:
        UserError: as :func:`import_class`.
    """
    if isinstance(settings, Mapping):
        for name, value in settings.items():
            if name not in PARTS or not isinstance(value, str) or not is_class_path(value):
                import_parts(value, source, trusted)
            elif value.rpartition(".")[0] not in sys.modules:  # what runs in this process has been trusted
                import_class(value, object, source, trusted)
