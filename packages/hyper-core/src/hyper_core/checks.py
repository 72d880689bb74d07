"""Checks of arguments that several files share."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hyper_core.errors import HyperError


def check_choice(what: str, value: Any, choices: Sequence[str]) -> None:
    """Raise a `HyperError` unless ``value`` is one of ``choices``.

    >>> check_choice("state", "static", ("recurrent", "static"))
    """
    if not isinstance(value, str) or value not in choices:
        raise HyperError(f"{what} is {value!r}, expected one of {', '.join(choices)}; choose one.")


def is_number(value: Any) -> bool:
    """Return whether ``value`` is a finite number, and not a string, a tensor or a truth value.

    >>> [is_number(value) for value in (1, 0.5, True, "1", float("nan"))]
    [True, True, False, False, False]
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@contextmanager
def naming_role(role: str) -> Iterator[None]:
    """Put the role before the text of a `HyperError` that knows nothing of roles.

    >>> with naming_role("p"):
    ...     raise HyperError("too large.")
    Traceback (most recent call last):
    hyper_core.errors.HyperError: role 'p': too large.
    """
    try:
        yield
    except HyperError as error:
        raise HyperError(f"role {role!r}: {error}") from None
