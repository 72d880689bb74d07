"""Refusals of single values, in one line each."""

import math
from typing import TypeGuard

from lowrank_adapters.errors import AdapterError


def check_whole(name: str, value: object, least: int = 1) -> None:
    """Refuse what is no whole number of at least ``least``.

    Raises:
        AdapterError: names the value.

    >>> check_whole("rank", 8)
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise AdapterError(f"{name} is {value!r}, expected a whole number of at least {least}.")


def check_positive(name: str, value: object) -> None:
    """Refuse what is no finite number above zero.

    Raises:
        AdapterError: names the value.
    """
    if not _is_number(value) or not 0 < value < math.inf:
        raise AdapterError(f"{name} is {value!r}, expected a finite number above 0.")


def check_dropout(value: object) -> None:
    """Refuse what is no probability below one.

    Raises:
        AdapterError: names the value.
    """
    if not _is_number(value) or not 0 <= value < 1:
        raise AdapterError(f"dropout is {value!r}, expected a probability from 0 to below 1.")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
