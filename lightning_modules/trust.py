"""Whose code a configuration or a checkpoint may name: that of torch, lightning and this project; any other only on the user's
own word.

A class path is an order to import a module. The user gives that order by a YAML file behind ``--config``, by an option of the
command line, by ``--trust MODULE`` or by TRIX_TRUST. What a run folder or a checkpoint says is no order.
"""

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from inspect import isclass
from pathlib import Path
from typing import Any

from lightning_modules.commands.arguments import TRUST, take_out
from lightning_modules.errors import UserError

VARIABLE = "TRIX_TRUST"
OWN = ("lightning", "lightning_modules", "ort_ops", "torch", "trix")
# Options and keys whose value may be a class path as it stands, without a class_path key.
SLOTS = frozenset({"accelerator", "callbacks", "class_path", "data", "logger", "lr_scheduler", "model", "optimizer"})
SLOTS |= {"architecture", "mixer", "plugins", "profiler", "routing", "strategy", "tiles"}
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_DENIED = re.compile(r"Importing '(?P<path>[\w.]+)' is not allowed")


def take_out_trust(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The modules that ``--trust`` (repeatable, commas allowed) and TRIX_TRUST name, and the arguments without the option.

    Raises:
        UserError: no name, or one that no module can have.
    """
    given, rest = take_out(TRUST, arguments, f"the name of a module: {TRUST} own_task")
    return trusted_modules(given), rest


def trusted_modules(given: Iterable[str]) -> list[str]:
    """The modules that TRIX_TRUST and the values of ``--trust`` name.

    Raises:
        UserError: a name that no module can have.
    """
    names = ",".join([os.environ.get(VARIABLE, ""), *given]).split(",")
    names = [name.strip() for name in names if name.strip()]
    for name in names:
        if not _MODULE.fullmatch(name) or name.split(".")[0] == "jsonargparse":  # which holds the rules themselves
            raise UserError(f"{TRUST} or {VARIABLE} ({name!r}) must name a Python module, as in own_task or own.tasks")
    return names


def named_on_command_line(arguments: Sequence[str], configs: Iterable[Any]) -> list[str]:
    """The packages of the class paths that the user gives: those in the YAML of ``--config``, and in the options.

    The standard library is left out: nothing in it is a task, a data module or a callback.

    Args:
        arguments: the command line as given. configs: the content of each file behind ``--config``.
    """
    paths = {path for config in configs for path in _dotted_texts(config)}
    for place, argument in enumerate(arguments):
        option, has_value, value = argument.partition("=")
        if option.startswith("--") and option.rstrip("+").split(".")[-1].lstrip("-") in SLOTS:
            paths.add(value if has_value else "".join(arguments[place + 1 : place + 2]))
    roots = {path.split(".")[0] for path in paths if _DOTTED.fullmatch(path)}
    return sorted(roots - sys.stdlib_module_names - {"jsonargparse"})


@contextmanager
def working_folder_searched(modules: Sequence[str]) -> Iterator[None]:
    """Search the working folder, after all else, where there is a module of the user's to be found."""
    here = str(Path.cwd())
    added = [] if not modules or here in sys.path else [here]
    sys.path += added
    try:
        yield
    finally:
        for folder in added:
            sys.path.remove(folder)


@contextmanager
def only_trusted_imports(modules: Sequence[str]) -> Iterator[None]:
    """Let the parser import from the project's own packages and from these; all else is refused before it is imported.

    As :func:`working_folder_searched`. The parser's settings belong to the process: after the block it still refuses what is
    not the project's own.
    """
    from jsonargparse import set_parsing_settings  # the light commands do without it

    set_parsing_settings(
        import_path_denylist=["*"],
        import_path_allowlist=[*OWN, *modules],
        instantiate_subclass_spec_in_any=False,
    )
    try:
        with working_folder_searched(modules):
            yield
    finally:
        set_parsing_settings(import_path_denylist=[module for module in modules if module not in OWN])


def denied_import(message: str, source: Path | None) -> str | None:
    """What to tell the user where the parser's message says that an import was refused; None where it says something else.

    Args:
        source: the configuration that the user did not name: that of a run folder.
    """
    match = _DENIED.search(message)
    return None if match is None else denial(match["path"], source)


def denial(path: str, source: Path | str | None) -> str:
    """What to tell the user of a class path that is not trusted. source: the file that names it, unless the user does."""
    by = "" if source is None else f" (named by {source})"
    root = path.split(".")[0]
    if root == "__main__":
        return f"class {path}{by} was defined in a script: a module of its own makes it one that can be imported"
    if root in sys.stdlib_module_names:
        return f"class {path}{by} is in Python's standard library, which holds no part of a run"
    return f"class {path}{by} is code from outside torch, lightning and trix: if you trust it, add {TRUST} {root}"


def is_class_path(text: str) -> bool:
    """Whether it may be one: names with dots between them."""
    return _DOTTED.fullmatch(text) is not None


def check_classes(config: Any, key: str = "") -> None:
    """Raise UserError where a class_path of a parsed configuration names anything but a class.

    The parser has checked classes against the type of their place. A function in such a place would be called.
    """
    if isinstance(config, Mapping):
        path = config.get("class_path")
        if isinstance(path, str) and not isclass(named(path)):
            raise UserError(f"{key or 'configuration'}.class_path ({path}) must name a class, not a function or a value")
        for name, value in config.items():
            part = "" if name == "init_args" else str(name)
            check_classes(value, ".".join(filter(None, (key, part))))
    elif isinstance(config, list | tuple):
        for value in config:
            check_classes(value, key)


def named(path: str) -> Any:
    """What an import path that the parser has accepted stands for."""
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:end])
        if name in sys.modules:
            found: Any = import_module(name)
            for part in parts[end:]:
                found = getattr(found, part, None)
            return found
    return None


def _dotted_texts(value: Any) -> Iterator[str]:
    stack, seen = [value], set()
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            if _DOTTED.fullmatch(item):
                yield item
        elif isinstance(item, dict | list) and id(item) not in seen:
            seen.add(id(item))
            stack += item.values() if isinstance(item, dict) else item
