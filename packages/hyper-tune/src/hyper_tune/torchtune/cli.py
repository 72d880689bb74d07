"""The command line behind `tune run hyper-tune/…`: configurations by name, errors for people."""

import difflib
import os
import sys
import time
import warnings
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TextIO

from omegaconf import DictConfig, OmegaConf

from hyper_core import HyperError
from hyper_tune import parallel
from hyper_tune.errors import UserError
from hyper_tune.torchtune.overrides import apply_overrides
from hyper_tune.torchtune.recipe import FineTuning
from hyper_tune.torchtune.settings import COMPONENTS, RecipeSettings
from lowrank_adapters import AdapterError
from rank_budget import BudgetError

PERSONS_MISTAKES = (UserError, AdapterError, BudgetError, HyperError)
EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130
_PATIENCE_SECONDS = 5


def packaged_configs() -> dict[str, Path]:
    """Return the configurations that the package ships, by name.

    >>> "llama3_1_8b" in packaged_configs()
    True
    """
    folder = Path(str(resources.files("hyper_tune") / "configs"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


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


def main() -> None:
    """Run the recipe as `tune run` calls it: ``--config NAME key=value …`` in ``sys.argv``."""
    warnings.showwarning = _one_line_warning
    try:
        loaded = read_config(sys.argv[1:])
    except UserError as error:
        sys.exit(_report(error))
    sys.exit(_run(loaded))


def read_config(arguments: Sequence[str]) -> DictConfig:
    """Return the configuration that ``--config NAME key=value ~key …`` describes.

    Raises:
        UserError: no such configuration, a file that is not YAML, or an override that cannot be.
    """
    if "--config" not in arguments[:-1]:
        raise UserError("--config is missing; give the name of a configuration or a file.")
    position = arguments.index("--config")
    path = find_config(arguments[position + 1])
    try:
        loaded = OmegaConf.load(path)
    except Exception as error:
        raise UserError(f"{path} is not a readable YAML file: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path} must hold keys and values, such as `seed: 0`.")
    words = [*arguments[:position], *arguments[position + 2 :]]
    return apply_overrides(loaded, words, COMPONENTS)


def _run(cfg: DictConfig) -> int:
    try:
        settings = RecipeSettings.from_config(cfg)
        with FineTuning(settings) as run:
            if parallel.rank() == 0:
                run.folder.write_text("config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
            run.train()
    except PERSONS_MISTAKES as error:
        return _report(error)
    except OSError as error:
        return _report(UserError(f"{error}; nothing half-written is left, what was saved stays."))
    except KeyboardInterrupt:
        _report(UserError("interrupted; resume with resume_from_checkpoint=True."))
        return EXIT_INTERRUPTED
    finally:
        parallel.stop()
    return 0


def _report(error: Exception) -> int:
    rank = int(os.environ.get("RANK", 0))
    if rank:
        # The launcher ends the job at the first exit. Rank 0 has made the same mistake as a rule,
        # and speaks first; where it has not, this process lives on and must.
        time.sleep(_PATIENCE_SECONDS)
    sys.stderr.write(f"error{f' (rank {rank})' if rank else ''}: {error}\n")
    return EXIT_MISTAKE


def _one_line_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    del filename, lineno, file, line
    if int(os.environ.get("RANK", 0)) == 0 and issubclass(category, UserWarning):
        sys.stderr.write(f"warning: {message}\n")
