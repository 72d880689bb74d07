"""Checks of single settings: each failure names the field, its value, the rule and the remedy."""

import difflib
import math
from collections.abc import Mapping
from typing import Any

from hyper_tune.errors import UserError


def require(condition: bool, field: str, value: object, rule: str, remedy: str) -> None:
    """Raise a `UserError` that names the field, its value, the rule and the remedy.

    >>> require(True, "device", "cpu", "must be cpu or cuda", "set one")
    """
    if not condition:
        raise UserError(f"{field} is {value!r}, but {rule}; {remedy}.")


def require_choice(
    field: str, value: object, choices: Mapping[str, object] | tuple[str, ...]
) -> None:
    """Raise a `UserError` that lists the choices and the nearest name."""
    if isinstance(value, str) and value in choices:
        return
    near = difflib.get_close_matches(str(value), list(choices), n=1)
    hint = f"did you mean {near[0]!r}?" if near else "choose one of them."
    raise UserError(f"{field} is {value!r}, but must be one of {', '.join(choices)}; {hint}")


def known_fields(section: str, given: Mapping[str, Any], known: set[str]) -> None:
    """Raise a `UserError` for the first key of ``given`` that ``section`` does not have."""
    for key in given:
        if key in known:
            continue
        near = difflib.get_close_matches(str(key), sorted(known), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(known))}."
        raise UserError(f"{section} has no key {key!r}; {hint}")


def require_number(
    field: str,
    value: object,
    *,
    whole: bool = False,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> None:
    """Refuse what is no finite number, or no ``whole`` one, or outside its bounds.

    >>> require_number("method.pruning.finish_by", 0.7, above=0, most=1)
    """
    kind = int if whole else (int, float)
    fits = (
        isinstance(value, kind)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and (above is None or value > above)
        and (least is None or value >= least)
        and (most is None or value <= most)
        and (below is None or value < below)
    )
    bounds = {"above": above, "at least": least, "at most": most, "below": below}
    rule = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)
    name = "a whole number" if whole else "a number"
    expected = f"{name} {rule}".rstrip()
    require(fits, field, value, f"must be {expected}", "correct it")


def require_flag(field: str, value: object) -> None:
    """Refuse what is neither True nor False.

    >>> require_flag("compile", False)
    """
    require(isinstance(value, bool), field, value, "must be True or False", "set one")


def require_text(field: str, value: object) -> None:
    """Refuse what is not text, or is empty.

    >>> require_text("output_dir", "runs/first")
    """
    text = isinstance(value, str) and bool(value)
    require(text, field, value, "must be text", "put quotes around it if it looks like a number")
