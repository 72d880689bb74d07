"""The recipes and configurations that the package ships, by name."""

import difflib
from importlib import resources
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from hyper_tune.errors import UserError

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


def find_config(name: str) -> Path:
    """Return the file that ``--config`` means: a packaged name, or a path.

    Raises:
        UserError: neither; the packaged names and the nearest one are listed.
    """
    packaged = packaged_configs()
    if name in packaged:
        return packaged[name]
    if Path(name).is_file():
        return Path(name)
    near = difflib.get_close_matches(name, packaged, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UserError(
        f"--config {name} is neither a file nor a configuration of this package, which has "
        f"{', '.join(packaged)}.{hint}"
    )


def read_config(path: Path) -> DictConfig:
    """Return the keys and values of a YAML file, interpolations not yet resolved.

    Raises:
        UserError: it is not YAML, or not a mapping.
    """
    try:
        loaded = OmegaConf.load(path)
    except Exception as error:
        raise UserError(f"{path} is not a readable YAML file: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path} must hold keys and values, such as `seed: 0`.")
    return loaded
