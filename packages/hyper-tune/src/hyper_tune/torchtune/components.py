"""Builds what a configuration names by ``_component_``, with messages for people."""

import difflib
import inspect
import os
import re
import sys
from collections.abc import Callable
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


def build(section: str, component: Component, *arguments: Any, **overrides: Any) -> Any:
    """Import and call ``component["_component_"]`` with its other keys as arguments.

    Raises:
        UserError: the component does not exist, refuses its arguments, or cannot read what it
            needs; ``section`` is named, and the nearest argument to one it does not have.
    """
    name = component["_component_"]
    refuse_wrong_kinds(section, component, find_component(section, component))
    try:
        return config.instantiate(OmegaConf.create(dict(component)), *arguments, **overrides)
    except UserError:
        raise
    except Exception as error:
        # Components refuse what they are given by errors of any class.
        reason = " ".join((repr(error) if isinstance(error, KeyError) else str(error)).split())
        hint = _nearest_argument(component, reason)
        raise UserError(f"{section}: {name} cannot be built: {reason}{hint}") from error


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
        if kinds and not any(_is_a(value, kind) for kind in kinds):
            expected = " or ".join(_KINDS[kind] for kind in kinds)
            raise UserError(f"{section}.{key} is {value!r}, but must be {expected}; correct it.")


def _plain_kinds(parameter: inspect.Parameter) -> tuple[type, ...]:
    """Return what a parameter may be, of `_KINDS`; empty where it may be something else."""
    annotation = parameter.annotation
    union = get_origin(annotation) in (Union, UnionType)
    # A configuration has no tensors.
    kinds = [kind for kind in (get_args(annotation) if union else (annotation,)) if kind != Tensor]
    if parameter.default is None:
        kinds.append(NoneType)
    keyed = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    return tuple(dict.fromkeys(kinds)) if keyed and all(map(_is_plain, kinds)) else ()


def _is_plain(kind: object) -> bool:
    return isinstance(kind, type) and kind in _KINDS


def _is_a(value: object, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, kind) or (kind is float and isinstance(value, int))


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
        UserError: the tokenizer cannot be built.
    """
    os.environ["TIKTOKEN_CACHE_DIR"] = ""
    return build("tokenizer", component)
