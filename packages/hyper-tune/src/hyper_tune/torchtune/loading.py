"""Data sets of torchtune's and datasets' loaders, with messages for people where they fail."""

import difflib
import inspect
from collections.abc import Callable
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


def build_dataset(section: str, component: Component, tokenizer: Any) -> Any:
    """Build a data set of torchtune's or of this package's from its component.

    Raises:
        UserError: a key that no loader has, or a loader that fails.
    """
    builder = find_component(section, component)
    _refuse_misspelt(section, component, builder)
    refuse_wrong_kinds(section, component, builder)
    source = component.get("source", _default_of(builder, "source"))
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


def _refuse_misspelt(section: str, component: Component, builder: Callable[..., Any]) -> None:
    """Refuse a key that the builder does not have.

    Where it hands other keys on to datasets' loader of a kind of file, which has options of its
    own, only one that is nearly another's name is refused here.
    """
    from datasets import load_dataset

    parameters = inspect.signature(builder).parameters
    given = {key: value for key, value in component.items() if key != "_component_"}
    if all(each.kind is not each.VAR_KEYWORD for each in parameters.values()):
        known_fields(section, given, {*parameters} - {"tokenizer"})
        return
    known = {*parameters, *inspect.signature(load_dataset).parameters}
    for key in given.keys() - known:
        near = difflib.get_close_matches(str(key), known, n=1, cutoff=_NEAR)
        if near:
            raise UserError(f"{section} has no key {key!r}; did you mean {near[0]!r}?")


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
