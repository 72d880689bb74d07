"""JSON from files that anyone may have written: one reading of each text, and no surprises."""

import json
from typing import Any, NoReturn

_PARTS = 50_000


def parse(content: bytes, limit: int) -> Any:
    """Return the value of a JSON text of at most ``limit`` bytes.

    Raises:
        ValueError: it is longer, not JSON, has more than 50,000 lists and objects, which take many
            times their text, names a key twice, or has a number that is not finite.
        RecursionError: it is nested too deeply.

    >>> parse(b'{"step": 3}', 100)
    {'step': 3}
    """
    if len(content) > limit:
        raise ValueError(f"{len(content)} bytes of JSON, at most {limit} are read")
    parts = content.count(b"[") + content.count(b"{")
    if parts > _PARTS:
        raise ValueError(f"{parts} lists and objects, at most {_PARTS} are read")
    return json.loads(content, object_pairs_hook=_object, parse_constant=_refuse_constant)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a finite number")
