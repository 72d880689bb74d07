"""Builds what a configuration names by ``_component_``, with messages for people."""

import os
from typing import Any

from omegaconf import OmegaConf
from torchtune import config
from torchtune.config._errors import InstantiationError

from hyper_tune.errors import UserError
from hyper_tune.torchtune.settings import Component


def build(section: str, component: Component, *arguments: Any, **overrides: Any) -> Any:
    """Import and call ``component["_component_"]`` with its other keys as arguments.

    Raises:
        UserError: the component does not exist or refuses its arguments; ``section`` is named.
    """
    try:
        return config.instantiate(OmegaConf.create(dict(component)), *arguments, **overrides)
    except (InstantiationError, TypeError) as error:
        name = component["_component_"]
        reason = " ".join(str(error).split())
        raise UserError(f"{section}: {name} cannot be built: {reason}") from error


def build_tokenizer(component: Component) -> Any:
    """Build the tokenizer from the files that are there now.

    tiktoken copies every file it reads into a cache, by path alone: another tokenizer at the same
    (relative) path would be read as the first one. So the cache is turned off.

    Raises:
        UserError: the tokenizer cannot be built.
    """
    os.environ["TIKTOKEN_CACHE_DIR"] = ""
    return build("tokenizer", component)
