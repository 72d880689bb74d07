"""Plain values as JSON, so that nothing but data passes between two processes."""

import json
from collections.abc import Callable
from typing import Any


class NotPlainError(TypeError):
    """A value that is not made of plain ones, or a text that stands for none."""


def encode(value: Any) -> str:
    """Return a line of JSON for None, numbers, texts, bytes, lists, tuples, sets and dicts of them.

    An instance of a subclass is written as its base: a ``Counter`` as a ``dict``.

    Raises:
        NotPlainError: it holds anything else, or is nested too deeply.

    >>> encode([1, (2.5, "a"), {3}])
    '[1, {"tuple": [2.5, "a"]}, {"set": [3]}]'
    """
    try:
        return json.dumps(_plain(value))
    except (RecursionError, ValueError) as error:
        raise NotPlainError(f"a value that cannot be written: {error}") from error


def decode(text: str | bytes) -> Any:
    """Return the value of a line that `encode` wrote, made of built-in types and nothing else.

    Raises:
        NotPlainError: the line is not one of `encode`'s.

    >>> decode(encode({"a": (1, 2)}))
    {'a': (1, 2)}
    """
    try:
        return _value(json.loads(text))
    except (RecursionError, ValueError, TypeError) as error:
        raise NotPlainError(f"not a value: {error}") from error


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (int, float, str)):
        return value
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[_plain(key), _plain(item)] for key, item in value.items()]}
    if isinstance(value, (tuple, set, frozenset)):
        kind = next(kind for kind in (tuple, set, frozenset) if isinstance(value, kind))
        return {kind.__name__: [_plain(item) for item in value]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    raise NotPlainError(f"a value of type {type(value).__name__} is not plain data")


def _value(found: Any) -> Any:
    if isinstance(found, list):
        return [_value(item) for item in found]
    if not isinstance(found, dict):
        return found
    if len(found) != 1:
        raise NotPlainError("an object has one key")
    ((kind, content),) = found.items()
    if kind not in _MAKERS:
        raise NotPlainError(f"unknown kind {str(kind)[:20]!r}")
    return _MAKERS[kind](content)


def _dict(pairs: Any) -> dict[Any, Any]:
    return {_value(key): _value(item) for key, item in pairs}


_MAKERS: dict[str, Callable[[Any], Any]] = {
    "dict": _dict,
    "tuple": lambda items: tuple(map(_value, items)),
    "set": lambda items: set(map(_value, items)),
    "frozenset": lambda items: frozenset(map(_value, items)),
    "bytes": bytes.fromhex,
    "complex": lambda parts: complex(*map(float, parts)),
}
