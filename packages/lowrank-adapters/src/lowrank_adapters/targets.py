"""Which modules of a model a name, a glob or an expression stands for."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from lowrank_adapters.errors import AdapterError

ALL_LINEAR = "all-linear"
Pattern = str | re.Pattern[str]
Value = TypeVar("Value")
_NOTHING = "{} matches no module that can be adapted"


def choose(
    names: Sequence[str],
    linear: Iterable[str],
    targets: Pattern | Sequence[Pattern],
    exclude: Pattern | Sequence[Pattern] = (),
) -> list[str]:
    """Return the ``names`` that ``targets`` stand for and ``exclude`` does not, in their order.

    ``names``: the modules that can be adapted. ``linear``: what "all-linear" stands for.

    Raises:
        AdapterError: a pattern that matches nothing, or nothing is left.

    >>> choose(["0.q", "0.v", "1.q"], ["0.q"], ["q", "re:0\\\\..*"], exclude="1.*")
    ['0.q', '0.v']
    """
    chosen: set[str] = set()
    for pattern in _listed(targets):
        whole = pattern == ALL_LINEAR
        chosen.update(linear if whole else matching(names, pattern, f"targets: {_NOTHING}"))
    for pattern in _listed(exclude):
        chosen.difference_update(matching(names, pattern, f"exclude: {_NOTHING}"))
    if not chosen:
        raise AdapterError(f"no module is left to adapt; {_list('the model has', names)}.")
    return [name for name in names if name in chosen]


def by_module(what: str, patterns: Mapping[str, Value], names: Sequence[str]) -> dict[str, Value]:
    """Return the value of each of ``names`` that a pattern stands for; the first one counts.

    Raises:
        AdapterError: a pattern that matches nothing.

    >>> by_module("rank_pattern", {"0.q": 8, "q": 4}, ["0.q", "0.v", "1.q"])
    {'0.q': 8, '1.q': 4}
    """
    values: dict[str, Value] = {}
    for pattern, value in patterns.items():
        for name in matching(
            names, pattern, f"{what}: {{}} matches no adapted module", "adapted are"
        ):
            values.setdefault(name, value)
    return values


def matching(
    names: Iterable[str],
    pattern: Pattern,
    refusal: str = _NOTHING,
    there_are: str = "the model has",
) -> list[str]:
    """Return the names that a pattern stands for.

    A pattern is a whole name, a suffix of it at a dot ("q_proj"), a glob of either ("layers.0.*"),
    or an expression for the whole name, compiled or after "re:".

    Raises:
        AdapterError: it matches nothing (near names are listed), or is no expression.

    >>> matching(["layers.0.up_proj", "layers.0.p_proj"], "p_proj")
    ['layers.0.p_proj']
    """
    names = list(names)
    expression = _expression(pattern)
    if expression is not None:
        found = [name for name in names if expression.fullmatch(name)]
    else:
        found = [n for n in names if fnmatchcase(n, str(pattern)) or fnmatchcase(n, f"*.{pattern}")]
    if not found:
        shown = pattern if isinstance(pattern, str) else f"re:{pattern.pattern}"
        near = difflib.get_close_matches(shown.rpartition(".")[2], _kinds(names), n=2)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise AdapterError(f"{refusal.format(repr(shown))}; {hint}{_list(there_are, names)}.")
    return found


def _expression(pattern: Pattern) -> re.Pattern[str] | None:
    if isinstance(pattern, re.Pattern):
        return pattern
    if not pattern.startswith("re:"):
        return None
    try:
        return re.compile(pattern[3:])
    except re.error as error:
        raise AdapterError(f"{pattern!r} is no regular expression: {error}.") from error


def _listed(patterns: Pattern | Sequence[Pattern]) -> Sequence[Pattern]:
    return [patterns] if isinstance(patterns, str | re.Pattern) else patterns


def _kinds(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _list(there_are: str, names: Iterable[str]) -> str:
    kinds = _kinds(names)
    return f"{there_are} {', '.join(kinds)}" if kinds else f"{there_are} none"
