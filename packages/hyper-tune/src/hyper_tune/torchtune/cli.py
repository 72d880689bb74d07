"""The command line behind `tune run hyper-tune/…`: configurations by name, errors for people."""

import os
import sys
import time
import warnings
from typing import TextIO

from omegaconf import DictConfig, OmegaConf
from torchtune import config

from hyper_tune import parallel
from hyper_tune.errors import EXIT_MISTAKE, PERSONS_MISTAKES, UserError
from hyper_tune.packaged import find_config, read_config
from hyper_tune.torchtune.fine_tune import fine_tune


def main() -> None:
    """Run the recipe as `tune run` calls it: ``--config NAME key=value …`` in ``sys.argv``."""
    warnings.showwarning = _one_line_warning
    try:
        _resolve_config_argument(sys.argv)
        overrides = [word for word in sys.argv[1:] if "=" in word and not word.startswith("--")]
        _refuse_bad_overrides(overrides)
    except UserError as error:
        sys.exit(_report(error))
    config.parse(_run)()


def _resolve_config_argument(arguments: list[str]) -> None:
    if "--config" not in arguments[:-1]:
        raise UserError("--config is missing; give the name of a configuration or a file.")
    position = arguments.index("--config") + 1
    path = find_config(arguments[position])
    loaded = read_config(path)
    arguments[position] = str(path)
    for word in arguments[1 : position - 1] + arguments[position + 1 :]:
        if word.startswith("~") and OmegaConf.select(loaded, word[1:]) is not None:
            continue
        if word.count("=") != 1 or word.startswith("~"):
            raise UserError(
                f"{word!r} is not understood; overrides are written key=value, with one '=', or "
                "~key to remove a key that is there."
            )


def _refuse_bad_overrides(overrides: list[str]) -> None:
    try:
        OmegaConf.from_dotlist(overrides)
    except Exception as error:
        raise UserError(f"overrides: {str(error).splitlines()[0]}") from error


def _run(cfg: DictConfig) -> int:
    try:
        fine_tune(cfg)
    except PERSONS_MISTAKES as error:
        return _report(error)
    except KeyboardInterrupt:
        return _report(UserError("interrupted; resume with resume_from_checkpoint=True."))
    finally:
        parallel.stop()
    return 0


def _report(error: Exception) -> int:
    if int(os.environ.get("RANK", 0)) == 0:
        sys.stderr.write(f"error: {error}\n")
    else:
        # The launcher ends the job at the first exit; rank 0 must have spoken by then.
        time.sleep(2)
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
