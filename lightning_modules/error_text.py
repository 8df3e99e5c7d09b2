"""Long error texts made short: one line that names the key, the value, the nearest valid one and the file."""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

MAX_LENGTH = 400

# What jsonargparse says of a key that no parameter has.
_UNKNOWN_KEY = (
    re.compile(r"Option '(?P<key>[^']+)' is not accepted"),
    re.compile(r"does not accept option '(?P<key>[^']+)'"),
    re.compile(r"unrecognized arguments: (?P<key>\S+)"),
)
_UNKNOWN_CLASS = re.compile(r"Expected a dot import path string: (?P<key>\w+)\s*$", re.MULTILINE)
# A value of a plain type, for which a class would do too: it is the type that is wrong.
_TYPE_OR_CLASS = re.compile(r"Expected a <class '\w+'>\n\s*- Expected a dot import path string: ")
# A module that cannot be imported, or lacks the class.
_IMPORT = re.compile(
    r"Problem with given class_path '(?P<path>[^']+)':\s*(?P<reason>(No module named|cannot import|module) [^\n]*)"
)
# A class of another kind than its place wants.
_SUBCLASS = re.compile(r"Import path (?P<path>[\w.]+ )?does not correspond to a subclass of (?P<base>\w+)")
_BASES = {
    "TrixTask": "lightning_modules.tasks.TrixTask, as docs/how-to/own-task.md shows, so that checkpoints of it can be used"
}
_ABSTRACT = re.compile(r"Expected an instantiatable class, but (?P<path>[\w.]+ )?is abstract")
# An option, or keys of a file, of a class that has not been named.
_NO_CLASS = re.compile(
    r"Parser key \"(?P<key>\w+)\":.*Not a valid subclass of .*Given value: (NestedArg\(key='(?P<option>[^']+)'|\{'init_args')",
    re.DOTALL,
)
# A class, or a function, instead of an optimizer or a schedule.
_CALLABLE = re.compile(
    r"Parser key \"(?P<key>\w+)\":\s*Type [^\n]* expects a function or a callable class: (?P<reason>[^\n]*?)\.*\. Got value: "
)
_CLASS = re.compile(r"<class '(.+?)'>")
_LITERAL = re.compile(r"Expected a typing\.Literal\[(?P<choices>[^\]]+)\]\. Got value: (?P<value>[^\n]*)")
_TYPE = re.compile(r"Expected a <class '(?P<type>[\w.]+)'>\. Got value: (?P<value>[^\n]*)")
_KEY = re.compile(r"Parser key \"(?P<key>[^\"]+)\":?")
_NESTED_KEY = re.compile(r"NestedArg\(key='(?P<key>[^']+)'")
# A value that fits none of several types: one reason for each, most of them beside the point.
_UNION = "Does not validate against any of the Union subtypes"
_REASON = re.compile(r"^\s*- (?P<reason>.+)$", re.MULTILINE)
_UNION_LITERAL = re.compile(r"Expected a typing\.Literal\[(?P<choices>.+)\]$")
_UNION_TYPE = re.compile(r"Expected a <class '(?P<type>[\w.]+)'>$")
_NO_MAPPING = re.compile(r"Parser key \"[^\"]+\": Unable to load config \"(?P<value>[^\"\n]*)\"")
_GIVEN = re.compile(r"Given value: (?P<value>[^\n]*)")
_BESIDE_THE_POINT = (
    "Not a valid subclass",
    "Expected a dot import path",
    "Not of type Path",
    "a class path",
    "a dict with",
    "Expected a path but",
    _UNION,
)


def one_line(message: object) -> str:
    """The text without line breaks, cut where it gets long."""
    text = " ".join(str(message).split())
    return text if len(text) <= MAX_LENGTH else text[: MAX_LENGTH - 3] + "..."


def did_you_mean(wrong: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """ "; did you mean NAME?" where one of the names is like it."""
    nearest = get_close_matches(wrong, list(names), n=1, cutoff=cutoff)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def shorten_parser_error(
    message: str,
    known_keys: Iterable[str],
    known_classes: Iterable[str],
    config_files: Sequence[Path] = (),
    options: Sequence[str] = (),
) -> str:
    """A message of the configuration parser in one line.

    Args:
        message: what jsonargparse says. known_keys: every key there is, dotted or not. known_classes: names of classes that a
            ``class_path`` may name. config_files: where a key may have come from. options: those of the command line; what is
            given there is not looked for in a file.
    """
    text, key = _shorten(message, known_keys, known_classes)
    is_option = any(option.split(".")[-1] == key.split(".")[-1] for option in options)
    return text if is_option else text + _place(key, config_files)


def _shorten(message: str, known_keys: Iterable[str], known_classes: Iterable[str]) -> tuple[str, str]:
    """The line, and the key that it is about."""
    for pattern in _UNKNOWN_KEY:
        if match := pattern.search(message):
            key = match["key"].split("=")[0]
            if pattern.pattern.startswith("unrecognized") and not key.startswith("-"):
                return f"unexpected argument {key!r}", ""
            nested, outer = _NESTED_KEY.search(message), _KEY.search(message)
            if nested and outer and key == f"--{nested['key']}":  # the parser of the class leaves out what leads to it
                key = f"--{outer['key']}.{nested['key']}"
            kind = "option" if key.startswith("-") else "key"
            return f"unknown {kind} {key!r}" + _nearest(key, known_keys), key
    if (match := _UNKNOWN_CLASS.search(message)) and not _TYPE_OR_CLASS.search(message):
        return f"unknown class {match['key']!r}" + _nearest(match["key"], known_classes), match["key"]
    if match := _IMPORT.search(message):
        return one_line(f"class {match['path']} cannot be imported: {match['reason']}"), match["path"]
    if match := _SUBCLASS.search(message):
        path = _class_path(match, message)
        return one_line(f"class {path} must derive from {_BASES.get(match['base'], match['base'])}"), path
    if match := _ABSTRACT.search(message):
        path = _class_path(match, message)
        return one_line(f"class {path} is abstract: name a class that derives from it"), path
    if match := _NO_CLASS.search(message):
        key = match["key"]
        what = f"--{key}.{match['option']}" if match["option"] else f"{key}.init_args"
        return one_line(f"{what} needs a class first: --{key} CLASS, or --config FILE"), f"--{key}"
    if match := _CALLABLE.search(message):
        why = _CLASS.sub(r"\1", match["reason"])
        return one_line(f"{match['key']}: {why}"), match["key"]
    for pattern, rule in ((_LITERAL, "must be one of"), (_TYPE, "must be of type")):
        if match := pattern.search(message):
            key = _last_key(message, match.start())
            wanted, value = match[1], match["value"].strip()
            return one_line(f"{key} {rule} {wanted}, got {value!r}"), key
    key, why = _last_key(message, len(message)), reason(message)
    if "are required: " in message and not key:
        why += "; a configuration file gives them: --config FILE"
    return one_line(f"{key}{' ' if why.startswith('must') else ': '}{why}" if key else why), key


def reason(message: str) -> str:
    """Why a value fits none of several types: the one reason that is of its own making, or the types."""
    if match := _NO_MAPPING.search(message):
        return f"must be keys and values, got {match['value']!r}"
    if _UNION not in message:
        return _KEY.sub("", message).strip()
    found = [_KEY.sub("", match["reason"]).strip() for match in _REASON.finditer(message)]
    found = [text for text in found if text and not text.startswith(_BESIDE_THE_POINT)]
    types = [match["type"] for text in found if (match := _UNION_TYPE.match(text)) and match["type"] != "NoneType"]
    choices = [match["choices"] for text in found if (match := _UNION_LITERAL.match(text))]
    own = [text for text in found if not _UNION_TYPE.match(text) and not _UNION_LITERAL.match(text)]
    if own:
        return own[0]
    given = _GIVEN.search(message)  # the innermost comes first
    value = given["value"].strip() if given else ""
    if choices:
        return f"must be one of {', '.join(choices)}, got {value!r}"
    if types:
        return f"must be of type {' or '.join(types)}, got {value!r}"
    return f"must be keys and values, got {value!r}" if given else message


def _class_path(match: re.Match[str], message: str) -> str:
    """Where the sentence that was matched names no class, it is the value that was given."""
    given = _GIVEN.search(message)
    return (match["path"] or (given["value"] if given else "")).strip()


def _last_key(message: str, end: int) -> str:
    nested = _NESTED_KEY.search(message)
    keys = [match["key"] for match in _KEY.finditer(message, 0, end)] + ([nested["key"]] if nested else [])
    return keys[-1] if keys else ""


def _nearest(key: str, candidates: Iterable[str]) -> str:
    """The known key most like this one: compared by the last part, for a config nests what the command line spells out."""
    wanted = key.lstrip("-").split(".")[-1]
    leaf_of = {candidate: candidate.split(".")[-1] for candidate in candidates}
    found = get_close_matches(wanted, sorted(set(leaf_of.values())), n=1, cutoff=0.6)
    if not found or (found[0] == wanted and not key.startswith("--")):  # the key of another class
        return ""
    place = key.lstrip("-").rpartition(".")[0]  # the candidate in the same place comes last
    full = sorted(
        (candidate for candidate, leaf in leaf_of.items() if leaf == found[0]),
        key=lambda name: (name.rpartition(".")[0] == place, len(name), name),
    )
    prefix = "--" if key.startswith("--") else ""
    return f"; did you mean {prefix}{full[-1] if prefix else found[0]}?"


def _place(key: str, config_files: Sequence[Path]) -> str:
    """ " (in FILE, line N)" where a configuration file holds the word."""
    word = key.split(".")[-1]
    if key.startswith("-") or key in ("", "config"):
        return ""
    for path in config_files:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            continue
        for number, line in enumerate(lines, start=1):
            if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", line.split("#")[0]):
                return f" (in {path}, line {number})"
    return ""
