"""What the words after ``--config`` change in a configuration, in their order."""

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hyper_tune.errors import UserError


def apply_overrides(
    config: DictConfig, words: Sequence[str], components: Collection[str] = ()
) -> DictConfig:
    """Return ``config`` with ``key=value`` set and ``~key`` removed, in order.

    As in torchtune, a section with a ``_component_`` may be given a name alone, which is then its
    component: ``optimizer=torch.optim.SGD``. So may the ``components`` that are null or absent.
    Values are YAML; a mapping is merged into a section, anything else replaces what was there.

    Raises:
        UserError: a word of another form, a key to remove that is not there, or a value that is no
            YAML.

    >>> config = OmegaConf.create({"optimizer": {"_component_": "Adam", "lr": 1.0}, "seed": 0})
    >>> changed = apply_overrides(config, ["optimizer=SGD", "optimizer.lr=0.5", "~seed"])
    >>> OmegaConf.to_container(changed)
    {'optimizer': {'_component_': 'SGD', 'lr': 0.5}}
    """
    config = OmegaConf.create(OmegaConf.to_container(config, resolve=False))
    for word in words:
        key, is_value, text = word.partition("=")
        if word.startswith("~") and not is_value:
            _remove(config, word.removeprefix("~"))
        elif is_value and key and not key.startswith(("~", "-")):
            _set(config, key, _value(key, text, word), components)
        else:
            raise UserError(
                f"{word!r} is not understood; overrides are written key=value, or ~key to remove "
                "a key that is there."
            )
    return config


def _value(key: str, text: str, word: str) -> Any:
    if key.endswith("max_filename"):
        return text  # torchtune counts its digits, leading zeros included
    if text == "None":
        return None
    try:
        parsed = OmegaConf.create(f"value: {text}")
        return OmegaConf.to_container(parsed, resolve=False)["value"]
    except Exception as error:
        raise UserError(f"{word!r}: the value is not YAML; put quotes around it.") from error


def _set(config: DictConfig, key: str, value: Any, components: Collection[str]) -> None:
    there = _find(config, key)
    is_section = isinstance(there, DictConfig)
    if isinstance(value, str) and (key in components or (is_section and "_component_" in there)):
        OmegaConf.update(config, f"{key}._component_", value, force_add=True)
        return
    parent = key.rpartition(".")[0]
    if parent and not OmegaConf.is_config(_find(config, parent)):
        OmegaConf.update(config, parent, {}, force_add=True)
    merge = is_section and isinstance(value, Mapping)
    OmegaConf.update(config, key, value, merge=merge, force_add=True)


def _find(config: DictConfig, key: str) -> Any:
    """Return what is at a dotted key, unresolved; None where nothing is."""
    node: Any = config
    for part in key.split("."):
        if not isinstance(node, DictConfig) or part not in node:
            return None
        node = node._get_node(part)
    return node if OmegaConf.is_config(node) else node._value()


def _remove(config: DictConfig, key: str) -> None:
    parent, _, last = key.rpartition(".")
    section = _find(config, parent) if parent else config
    if not isinstance(section, DictConfig) or last not in section:
        keys = list(section) if isinstance(section, DictConfig) else list(config)
        near = difflib.get_close_matches(last, [str(name) for name in keys], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(map(str, keys))}."
        raise UserError(f"~{key}: there is no such key to remove; {hint}")
    del section[last]
