"""The choices that give a state its meaning, saved beside it and compared when it is loaded."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from hyper_core.bodies.config import BodyConfig
from hyper_core.errors import HyperError
from hyper_core.recursion import Recursion
from hyper_core.roles import Role

Choices = dict[str, object]


def choices_of(
    recursion: Recursion,
    roles: Mapping[str, Role],
    networks: Mapping[str, Sequence[int]],
    config: BodyConfig,
) -> Choices:
    """Return by name what decides how the weights are read, where their shapes do not tell.

    >>> from hyper_core import MLPConfig
    >>> role = Role("rows", "free", 1.0, False, "all")
    >>> choices_of(Recursion("static"), {"p": role}, {"p": [0, 0]}, MLPConfig(8, (4,)))["config"]
    'MLPConfig(hidden=8, widths=(4,))'
    """
    choices: Choices = {"state": recursion.state, "config": _text(config)}
    if recursion.state == "damped":
        choices["relaxation"] = float(recursion.relaxation)
    for name, role in roles.items():
        choices[f"tokens[{name!r}]"] = role.tokens
        choices[f"outputs[{name!r}]"] = role.output
        choices[f"norms[{name!r}]"] = float(role.norm)
        choices[f"networks[{name!r}]"] = list(networks[name])
    return choices


def encode(choices: Choices) -> Tensor:
    """Return the choices as the bytes of a JSON text, uint8: a tensor like the rest of the state.

    >>> decode(encode({"state": "static"}))
    {'state': 'static'}
    """
    return torch.tensor(list(json.dumps(choices).encode()), dtype=torch.uint8)


def decode(saved: Tensor) -> Choices:
    """Return the choices that `encode` wrote.

    Raises:
        HyperError: they are not readable.
    """
    try:
        choices: object = json.loads(bytes(saved.tolist()))
    except (ValueError, TypeError):
        choices = None
    if not isinstance(choices, dict):
        raise HyperError(
            "choices in the state dict is not readable, expected the bytes of a JSON text; load "
            "what state_dict() returned."
        )
    return choices


def check_saved(
    choices: Choices, here: Mapping[str, Tensor], saved: Mapping[str, Any], prefix: str
) -> None:
    """Compare a state dict with the choices and the state dict of what is to load it.

    Torch would copy what fits before it refuses the rest, and leave a mixture of two runs.
    ``saved`` may be that of a larger module, where ``prefix`` stands before the names. One without
    choices is no whole state dict: what it lacks is left to `torch.nn.Module.load_state_dict`,
    which knows whether it may. On the meta device choices have no values to compare.

    Raises:
        HyperError: choices, names or shapes differ; the first that does is named.
    """
    own = {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}
    whole = "choices" in own
    if whole and not own["choices"].is_meta:
        there = decode(own["choices"])
        for name in dict.fromkeys([*choices, *there]):
            if choices.get(name) != there.get(name):
                raise HyperError(
                    f"the state dict was made with {name} {there.get(name)!r}, expected "
                    f"{choices.get(name)!r}; make the GeneratedParameters as that run did."
                )
    for name in dict.fromkeys([*here, *own]):
        found, wanted = _shape(own, name), _shape(here, name)
        if found != wanted and (whole or (found and wanted)):
            raise HyperError(
                f"{name} of the state dict is {found or 'missing'}, expected {wanted or 'none'}; "
                "load what state_dict() of such a GeneratedParameters returned."
            )


def _shape(tensors: Mapping[str, Tensor], name: str) -> str | None:
    return f"of the shape {tuple(tensors[name].shape)}" if name in tensors else None


def _text(config: Any) -> str:
    name = type(config).__name__
    if not is_dataclass(config):
        return name
    sizes = [field.name for field in fields(config) if field.compare]
    return f"{name}({', '.join(f'{size}={getattr(config, size)!r}' for size in sizes)})"
