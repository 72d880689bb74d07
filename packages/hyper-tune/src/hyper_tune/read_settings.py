"""From a configuration to the arguments of a settings class: the part that every recipe shares."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hyper_tune.checks import known_fields, require_text
from hyper_tune.errors import UserError
from hyper_tune.method import METHODS, MethodConfig

Made = TypeVar("Made")


def read_settings(kind: type, config: DictConfig) -> dict[str, Any]:
    """Return the values of the fields of ``kind``, which has ``method`` and ``output_dir``.

    Raises:
        UserError: an interpolation that leads nowhere, an unknown key, a field without a default
            that is missing, or a section ``method`` that is none or has no name.
    """
    try:
        values = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"configuration: {str(error).splitlines()[0]}.") from error
    assert isinstance(values, dict)
    marked = sorted(OmegaConf.missing_keys(config))
    if marked:
        raise UserError(f"configuration: {marked[0]} is ???, which means missing; give a value.")
    known_fields("configuration", values, {entry.name for entry in fields(kind)})
    for entry in fields(kind):
        if entry.default is MISSING and values.get(entry.name) is None:
            raise UserError(
                f"configuration: the key {entry.name!r} is missing; add it to the file."
            )
    if not isinstance(values["method"], Mapping):
        raise UserError("configuration: method must be a section of keys, such as name.")
    if values["method"].get("name") is None:
        raise UserError(
            f"configuration: method.name is missing; choose one of {', '.join(METHODS)}."
        )
    method = MethodConfig.from_mapping(values["method"])
    require_text("output_dir", values["output_dir"])
    return {**values, "method": method, "output_dir": Path(values["output_dir"])}


def make_settings(section: str, kind: Callable[..., Made], values: Mapping[str, Any]) -> Made:
    """Return ``kind(**values)``.

    Raises:
        UserError: a value that ``kind`` refuses.
    """
    try:
        return kind(**values)
    except TypeError as error:
        raise UserError(f"{section}: a value has the wrong type ({error}).") from error
