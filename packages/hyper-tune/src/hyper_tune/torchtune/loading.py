"""Data sets of torchtune's and datasets' loaders, with messages for people where they fail."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torchtune import config

from hyper_tune.checks import known_fields
from hyper_tune.errors import UserError
from hyper_tune.torchtune.components import find_component, refuse_wrong_kinds
from hyper_tune.torchtune.settings import Component

# Kinds of files that datasets reads; any other source without a folder of that name is on the Hub.
FILE_KINDS = ("arrow", "csv", "json", "parquet", "text")
_MAY_HOLD_PICKLES = ("pandas", "webdataset")
_NEAR = 0.75
# What torchtune's columns may be, by name.
_COLUMNS = {"instruction", "input", "output"}


def build_dataset(section: str, component: Component, tokenizer: Any) -> Any:
    """Build a data set of torchtune's or of this package's from its component.

    Raises:
        UserError: a key that no loader has, or a loader that fails.
    """
    builder = find_component(section, component)
    source = component.get("source", _default_of(builder, "source"))
    _refuse_unknown(section, component, builder, source)
    refuse_wrong_kinds(section, component, builder)
    if source in _MAY_HOLD_PICKLES:
        raise UserError(
            f"{section}.source is {source!r}, whose files may hold pickles, which are not read; "
            "convert them to json, csv or parquet."
        )
    try:
        return config.instantiate(OmegaConf.create(dict(component)), tokenizer)
    except UserError:
        raise
    except Exception as error:
        # Loaders fail by errors of the network, of file formats and of their own.
        failed = f"{component['_component_']} cannot be built"
        raise UserError(why(section, source, failed, error)) from error


def why(section: str, source: str | None, failed: str, error: Exception) -> str:
    """Return a message about a loader's error.

    ``failed``: what did. Where ``source`` is a data set of the Hub that this machine cannot reach,
    the message says how to fetch it and which key to set.
    """
    reason = _reason(error)
    if source is None or not _is_of_hub(source) or not _is_of_network(error):
        return f"{section}: {failed}: {reason}."
    folder = f"data/{source.rpartition('/')[2]}"
    return (
        f"{section}: {source} cannot be fetched from the Hugging Face Hub: {reason}.\n"
        "Where there is a network, fetch it with:\n"
        f"  hf download --repo-type dataset {source} --local-dir {folder}\n"
        f"bring the folder here, and set {section}.source={folder}."
    )


def columns_of(samples: Any) -> list[str]:
    """Return the names of the columns that one of torchtune's data sets reads, if it says them."""
    return list(getattr(getattr(samples, "_data", None), "column_names", None) or [])


def _refuse_unknown(
    section: str, component: Component, builder: Callable[..., Any], source: str | None
) -> None:
    """Refuse a key that neither the builder has nor datasets' loader, where it hands keys on to it.

    Of what a builder of one's own hands on nothing is known: only a key that is nearly one of its
    own is refused.
    """
    parameters = inspect.signature(builder).parameters
    given = {key: value for key, value in component.items() if key != "_component_"}
    handed_on = [name for name, each in parameters.items() if each.kind is each.VAR_KEYWORD]
    known = {*parameters} - {"tokenizer", *handed_on}
    if handed_on == ["load_dataset_kwargs"]:
        known |= _options_of_loader(source)
    elif handed_on:
        given = {key: value for key, value in given.items() if _is_near(key, known)}
    known_fields(section, given, known)
    columns = given.get("column_map")
    if component["_component_"].startswith("torchtune.") and isinstance(columns, Mapping):
        known_fields(f"{section}.column_map", columns, _COLUMNS)


def _is_near(key: str, known: set[str]) -> bool:
    return bool(difflib.get_close_matches(str(key), known, n=1, cutoff=_NEAR))


def _options_of_loader(source: str | None) -> set[str]:
    """Return the keys that `datasets.load_dataset` takes, beside those that it is given anyway.

    Each kind of file has options of its own. Which kind a folder or a data set of the Hub holds is
    known when it is opened, so that those of all kinds are let through to it.
    """
    from datasets import load_dataset

    parameters = inspect.signature(load_dataset).parameters
    own = {name for name, each in parameters.items() if each.kind is not each.VAR_KEYWORD}
    for kind in (source,) if source in FILE_KINDS else FILE_KINDS:
        module = import_module(f"datasets.packaged_modules.{kind}.{kind}")
        own |= {field.name for field in fields(getattr(module, f"{kind.capitalize()}Config"))}
    return own - {"path", "streaming"}


def _default_of(builder: Callable[..., Any], name: str) -> str | None:
    parameter = inspect.signature(builder).parameters.get(name)
    default = None if parameter is None else parameter.default
    return default if isinstance(default, str) else None


def _is_of_hub(source: str) -> bool:
    return source not in FILE_KINDS and not Path(source).exists()


def _is_of_network(error: BaseException | None) -> bool:
    from datasets.exceptions import DatasetNotFoundError

    while error is not None:
        module = type(error).__module__.partition(".")[0]
        if isinstance(error, ConnectionError | TimeoutError | DatasetNotFoundError):
            return True
        if module in ("httpx", "httpx2", "huggingface_hub", "requests"):
            return True
        error = error.__cause__
    return False


def _reason(error: BaseException) -> str:
    """Return the text of an error's first cause; loaders wrap it in texts that say nothing."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, StopIteration):
        return "it holds no rows"
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}({text})" if isinstance(error, KeyError) or not text else text
