"""The command line behind `tune run hyper-tune/…`: configurations by name, errors for people."""

import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from typing import TextIO

from omegaconf import DictConfig

from hyper_tune import parallel
from hyper_tune.entry import warn_of_learning_rate
from hyper_tune.errors import (
    EXIT_INTERRUPTED,
    EXIT_MISTAKE,
    EXIT_PEER_LOST,
    EXIT_STOPPED,
    PERSONS_MISTAKES,
    PeerLostError,
    StoppedError,
    UserError,
)
from hyper_tune.packaged import find_config, read_config, read_configuration
from hyper_tune.torchtune.fine_tune import fine_tune
from hyper_tune.torchtune.results import say
from hyper_tune.torchtune.settings import COMPONENTS

_PATIENCE_SECONDS = 5


def main(method: str | None = None) -> None:
    """Run the recipe as `tune run` calls it: ``--config NAME key=value …`` in ``sys.argv``.

    ``method``: what the entry point trains; None takes what the configuration names.
    """
    warnings.showwarning = _one_line_warning
    try:
        config = configuration(sys.argv[1:], method)
    except UserError as error:
        sys.exit(_report(error))
    sys.exit(_run(config))


def configuration(arguments: Sequence[str], method: str | None = None) -> DictConfig:
    """Return the configuration that ``--config NAME key=value ~key …`` describes.

    ``method``: as for `main`; see `read_configuration`.

    Raises:
        UserError: no such configuration, a file that is not YAML, an override that cannot be, or
            another method's name.
    """
    if "--config" not in arguments[:-1]:
        raise UserError("--config is missing; give the name of a configuration or a file.")
    position = arguments.index("--config")
    words = [*arguments[:position], *arguments[position + 2 :]]
    name = arguments[position + 1]
    config = read_configuration(name, words, COMPONENTS, method=method)
    if method is not None:
        warn_of_learning_rate(read_config(find_config(name)), config, method)
    return config


def _run(config: DictConfig) -> int:
    try:
        fine_tune(config)
    except PERSONS_MISTAKES as error:
        return _report(error)
    except OSError as error:
        return _report(UserError(f"{error}; nothing half-written is left, what was saved stays."))
    except KeyboardInterrupt:
        _report(UserError("interrupted; resume with resume_from_checkpoint=True."))
        return EXIT_INTERRUPTED
    except StoppedError as error:
        # A launcher whose first process has ended sends SIGTERM to the others, which end as well.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        say(str(error))
        return EXIT_STOPPED
    except PeerLostError as error:
        _write(error)
        return EXIT_PEER_LOST
    finally:
        parallel.stop()
    return 0


def _report(error: Exception) -> int:
    if int(os.environ.get("RANK", 0)):
        # The launcher ends the job at the first exit. Rank 0 has made the same mistake as a rule,
        # and speaks first; where it has not, this process lives on and must.
        time.sleep(_PATIENCE_SECONDS)
    _write(error)
    return EXIT_MISTAKE


def _write(error: Exception) -> None:
    rank = int(os.environ.get("RANK", 0))
    sys.stderr.write(f"error{f' (rank {rank})' if rank else ''}: {error}\n")


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
