"""Builds what a configuration names by ``_component_``, with messages for people."""

import difflib
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from traceback import walk_tb
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from omegaconf import OmegaConf
from torch import Tensor
from torchtune import config
from torchtune.config._errors import InstantiationError
from torchtune.config._utils import _get_component_from_path

from hyper_tune.errors import UserError
from hyper_tune.torchtune.settings import Component

_KINDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    NoneType: "null",
}
_BUGS = (AttributeError, LookupError, NameError, RecursionError, TypeError)


def build(section: str, component: Component, *arguments: Any, **overrides: Any) -> Any:
    """Import and call ``component["_component_"]`` with its other keys as arguments.

    Whatever says what is wrong with what it was given is a person's mistake: arguments that do not
    fit the call, and errors of any class, those of `is_bug` excepted. These keep their traceback,
    with a note that names ``section``.

    Raises:
        UserError: the component does not exist, refuses its arguments, or cannot read what it
            needs; ``section`` is named, and the nearest argument to one it does not have.
        Exception: a bug of the component, as it was raised.
    """
    name = component["_component_"]
    refuse_wrong_kinds(section, component, find_component(section, component))
    try:
        return config.instantiate(OmegaConf.create(dict(component)), *arguments, **overrides)
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        hint = _nearest_argument(component, reason)
        if is_bug(error) and not hint and not _at_the_call(error):
            error.add_note(f"while {section}: {name} was built")
            raise
        raise UserError(f"{section}: {name} cannot be built: {reason}{hint}") from error


def is_bug(error: Exception) -> bool:
    """Whether an error is one that Python raises where code is wrong, and not what it was given.

    Of assertions it is those without a text; torch checks arguments by the others.

    >>> is_bug(IndexError("list index out of range")), is_bug(ValueError("lr is below 0"))
    (True, False)
    """
    if isinstance(error, AssertionError):
        return not str(error)
    return isinstance(error, _BUGS)


def _at_the_call(error: Exception) -> bool:
    """Whether an error is of the call of the component, and not of anything inside of it."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    return bool(frame.f_globals.get("__name__") == config.instantiate.__module__)


def find_component(section: str, component: Component) -> Callable[..., Any]:
    """Return what ``component["_component_"]`` names.

    Raises:
        UserError: there is nothing of that name; ``section`` is named.
    """
    name = component["_component_"]
    try:
        found: Callable[..., Any] = _get_component_from_path(name)
    except (InstantiationError, ValueError) as error:
        reason = _missing_name(name) or " ".join(str(error).split())
        raise UserError(f"{section}: {name} cannot be built: {reason}") from error
    return found


def refuse_wrong_kinds(section: str, component: Component, builder: Callable[..., Any]) -> None:
    """Refuse a value of another kind than a builder's annotations say, where these are plain.

    Many builders take any value, such as 'no' for a flag, and act as they happen to.

    Raises:
        UserError: names the key, its value and what it must be.
    """
    try:
        parameters = inspect.signature(builder, eval_str=True).parameters
    except Exception:
        return  # the annotations, or all of it, are not to be had
    for key, value in component.items():
        kinds = _plain_kinds(parameters[key]) if key in parameters else ()
        if kinds and not _is_one_of(value, kinds):
            raise UserError(
                f"{section}.{key} is {value!r}, but must be {_listed(kinds)}; correct it."
            )


def _plain_kinds(parameter: inspect.Parameter) -> tuple[Any, ...]:
    """Return what a parameter may be: of `_KINDS`, or tuples of these; empty where it may be else.

    A tuple type such as ``tuple[float, float]`` is a list of so many in a configuration.
    """
    kinds = _alternatives(parameter.annotation)
    if parameter.default is None and NoneType not in kinds:
        kinds = (*kinds, NoneType)
    keyed = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    return kinds if keyed and all(map(_is_plain, kinds)) else ()


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    union = get_origin(annotation) in (Union, UnionType)
    # A configuration has no tensors.
    return tuple(k for k in (get_args(annotation) if union else (annotation,)) if k != Tensor)


def _is_plain(kind: Any) -> bool:
    if get_origin(kind) is tuple:
        return all(_is_plain(one) for part in get_args(kind) for one in _alternatives(part))
    return isinstance(kind, type) and kind in _KINDS


def _is_one_of(value: object, kinds: Sequence[Any]) -> bool:
    return any(_is_a(value, kind) for kind in kinds)


def _is_a(value: object, kind: Any) -> bool:
    if get_origin(kind) is tuple:
        parts = [_alternatives(part) for part in get_args(kind)]
        if not isinstance(value, list | tuple) or len(value) != len(parts):
            return False
        return all(map(_is_one_of, value, parts))
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, kind) or (kind is float and isinstance(value, int))


def _listed(kinds: Sequence[Any]) -> str:
    return " or ".join(
        f"[{', '.join(_listed(_alternatives(part)) for part in get_args(kind))}]"
        if get_origin(kind) is tuple
        else _KINDS[kind]
        for kind in kinds
    )


def _missing_name(component: str) -> str:
    """Say that a module which was imported lacks the name; empty where that is not the reason."""
    module, _, name = component.rpartition(".")
    if module not in sys.modules or hasattr(sys.modules[module], name):
        return ""
    near = difflib.get_close_matches(name, dir(sys.modules[module]), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "; correct it."
    return f"{module} has no {name!r}{hint}"


def _nearest_argument(component: Component, reason: str) -> str:
    unknown = re.search(r"unexpected keyword argument '(\w+)'", reason)
    if unknown is None or unknown[1] not in component:
        return ""
    known = inspect.signature(_get_component_from_path(component["_component_"])).parameters
    near = difflib.get_close_matches(unknown[1], known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(known)}."


def build_tokenizer(component: Component) -> Any:
    """Build the tokenizer from the files that are there now.

    tiktoken copies every file it reads into a cache, by path alone: another tokenizer at the same
    (relative) path would be read as the first one. So the cache is turned off.

    Raises:
        UserError: the tokenizer cannot be built; also by a bug, which a file of another form than
            its reader expects cannot be told from.
    """
    os.environ["TIKTOKEN_CACHE_DIR"] = ""
    try:
        return build("tokenizer", component)
    except (AttributeError, LookupError, TypeError) as error:
        raise UserError(
            f"tokenizer: {component['_component_']} cannot be built: {error!r}; its files may be "
            "of another form, or damaged: fetch them again."
        ) from error
