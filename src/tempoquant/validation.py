"""Errors of pydantic, as one sentence that names the key, its value, and the values that it may
have.
"""

import dataclasses
import difflib
from typing import Any

from pydantic import ValidationError

_MAX_VALUE = 80  # characters
_UNKNOWN = "unexpected_keyword_argument"


def explain(error: ValidationError, kind: type) -> str:
    """Describe the first error in a dataclass's values, without a full stop; unknown keys come
    first.

    Values come from TOML and JSON, so the sentence says list where pydantic says tuple.
    """
    known = [field.name for field in dataclasses.fields(kind)]
    found = error.errors(include_url=False, include_context=False)
    first = next((each for each in found if each["type"] == _UNKNOWN), found[0])
    path, value = _path(first["loc"], known), shorten(first["input"])
    message = first["msg"].replace("valid tuple", "list").replace("Tuple", "List")
    if first["type"] == _UNKNOWN:
        near = difflib.get_close_matches(path, known, 1)
        return f"unknown key {path!r}{f', perhaps {near[0]!r}' if near else ''}; known: {', '.join(known)}"
    if first["type"].startswith("missing"):
        return f"{path} is missing: add it"
    if message.startswith("Input should "):
        return f"{path} {message.removeprefix('Input ')}, not {value}"
    return f"{path} is {value}: {message[0].lower()}{message[1:]}"


def shorten(value: Any) -> str:
    """Return a value for a message: one line of bounded length."""
    text = repr(value)
    return text if len(text) <= _MAX_VALUE else text[: _MAX_VALUE - 3] + "…"


def _path(location: tuple[int | str, ...], known: list[str]) -> str:
    """Return a location such as layers[0] or bin_fractions.high_noise. Angle brackets hold
    alternatives of a type, which have no key; a number at the start is that of a positional
    argument.
    """
    parts = [part for part in location if not str(part).startswith("<")]
    if parts and isinstance(parts[0], int):
        parts[0] = known[parts[0]] if parts[0] < len(known) else f"argument {parts[0]}"
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")
