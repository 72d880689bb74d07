"""What an entry point that is named for a method makes of a configuration."""

import warnings
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hyper_tune.errors import UserError
from hyper_tune.method import METHODS, OWN_SETTINGS

RECIPES = {f"hyper-tune/{name}_full": name for name in METHODS}


def for_method(config: DictConfig, method: str, *, packaged: bool) -> DictConfig:
    """Return ``config`` with ``method.name`` set.

    The ``packaged`` files serve every method: what a method has no use for is left out. A file of
    one's own stays as it is, so that a setting that contradicts the method is refused later on.

    >>> config = OmegaConf.create({"method": {"name": "hyperadalora", "alpha": 6, "budget": 3}})
    >>> OmegaConf.to_container(for_method(config, "dora", packaged=True))
    {'method': {'name': 'dora', 'alpha': 6}}
    """
    values: Any = OmegaConf.to_container(config, resolve=False)
    section = values.get("method")
    if isinstance(section, dict):
        if packaged:
            foreign = OWN_SETTINGS - METHODS[method].settings
            section = {key: value for key, value in section.items() if key not in foreign}
            section["name"] = method
        values["method"] = {"name": method, **section}
    return OmegaConf.create(values)


def refuse_other_method(config: DictConfig, method: str) -> None:
    """Refuse a configuration that names another method than the entry point's.

    Raises:
        UserError: it does; both are named.
    """
    section = config.get("method")
    named = section.get("name") if isinstance(section, DictConfig) else method
    if named != method:
        other = f"hyper-tune/{named}_full"
        run = f"run {other}" if other in RECIPES else f"choose one of {', '.join(RECIPES)}"
        raise UserError(
            f"method.name is {named!r}, but hyper-tune/{method}_full trains {method}; {run}, or "
            "leave method.name out."
        )


def warn_of_learning_rate(before: DictConfig, now: DictConfig, method: str) -> None:
    """Say that a rate which was made for hypernetworks is now that of the factors themselves."""
    was, rate = (OmegaConf.select(each, "optimizer.lr") for each in (before, now))
    made_for = METHODS.get(str(OmegaConf.select(before, "method.name")))
    if was == rate and made_for and made_for.generated and not METHODS[method].generated:
        warnings.warn(
            f"optimizer.lr is {rate}, which the configuration has for {before.method.name}, whose "
            f"steps reach hypernetworks; {method} trains the factors themselves, for which "
            "torchtune's LoRA has 3e-4: set optimizer.lr.",
            stacklevel=2,
        )
