"""The recipes, configurations and data sets that the package ships, by name."""

import difflib
from collections.abc import Collection, Mapping, Sequence
from importlib import resources
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from hyper_tune.checks import known_fields
from hyper_tune.entry import for_method, refuse_other_method
from hyper_tune.errors import UserError
from hyper_tune.overrides import apply_overrides

_RECIPES = "hyper-tune"


def packaged_configs() -> dict[str, Path]:
    """Return the configurations that the package ships, by name.

    >>> "llama3_1_8b" in packaged_configs()
    True
    """
    folder = Path(str(resources.files("hyper_tune") / "configs"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def packaged_recipes() -> dict[str, Path]:
    """Return the entry points that `tune run` finds, by the name that it is given.

    >>> "hyper-tune/hyperadalora_full" in packaged_recipes()
    True
    """
    folder = Path(str(resources.files("hyper_tune"))).parent / _RECIPES
    paths = sorted(path for path in folder.glob("*.py") if path.stem != "__init__")
    return {f"{_RECIPES}/{path.stem}": path for path in paths}


def packaged_data() -> dict[str, Path]:
    """Return the data sets that ``data=NAME`` means, by name.

    >>> "gsm8k" in packaged_data()
    True
    """
    folder = Path(str(resources.files("hyper_tune") / "configs" / "data"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(name: str) -> Path:
    """Return the file that ``--config`` means: a packaged name, or a path.

    Raises:
        UserError: neither; the packaged names and the nearest one are listed.
    """
    return _find("--config ", name, packaged_configs())


def _find(option: str, name: str, packaged: Mapping[str, Path]) -> Path:
    if name in packaged:
        return packaged[name]
    if Path(name).is_file():
        return Path(name)
    near = difflib.get_close_matches(name, packaged, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    kind = "data set" if option == "data=" else "configuration"
    raise UserError(
        f"{option}{name} is neither a file nor a {kind} of this package, which has "
        f"{', '.join(packaged)}.{hint}"
    )


DATA_KEYS = ("dataset", "dataset_val", "validation_fraction", "exact_match", "data_dir")


def read_configuration(
    name: str,
    words: Sequence[str],
    components: Collection[str] = (),
    *,
    method: str | None = None,
) -> DictConfig:
    """Return the configuration ``name`` with the data set and the overrides of the command line.

    The word ``data=NAME``, wherever it is, puts a packaged data set or a file of one in the place
    of the `DATA_KEYS`, before the other words change what is there; see `apply_overrides`.
    ``method``: of the entry point; see `for_method`.

    Raises:
        UserError: no such configuration or data set, a file that is not YAML, an override that
            cannot be, or the name of another method.
    """
    config = read_config(find_config(name))
    words = choose_data_(config, words)
    if method is None:
        return apply_overrides(config, words, components)
    chosen = for_method(config, method, packaged=name in packaged_configs())
    chosen = apply_overrides(chosen, words, components)
    refuse_other_method(chosen, method)
    return chosen


def choose_data_(config: DictConfig, words: Sequence[str]) -> list[str]:
    """Put the data set of the last ``data=NAME`` in ``config``; return the other words.

    Raises:
        UserError: no such data set, or a file that is none.
    """
    chosen = [word.removeprefix("data=") for word in words if word.startswith("data=")]
    if chosen:
        _set_data(config, chosen[-1])
    return [word for word in words if not word.startswith("data=")]


def _set_data(config: DictConfig, name: str) -> None:
    path = _find("data=", name, packaged_data())
    data = read_config(path)
    known_fields(f"data={name}", {str(key): None for key in data}, set(DATA_KEYS))
    if "dataset" not in data:
        raise UserError(f"data={name}: {path} has no section dataset.")
    for key in DATA_KEYS:
        if key in data:
            config[key] = data._get_node(key)
        elif key != "data_dir":
            config.pop(key, None)


def read_config(path: Path) -> DictConfig:
    """Return the keys and values of a YAML file, interpolations not yet resolved.

    Raises:
        UserError: it is not YAML, or not a mapping.
    """
    try:
        loaded = OmegaConf.load(path)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not a readable YAML file: {reason}.") from error
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path} must hold keys and values, such as `seed: 0`.")
    return loaded
