"""A folder is one process's: who takes it holds it until the file is closed or the process ends."""

import fcntl
from pathlib import Path
from typing import TextIO

from hyper_tune.durable import make_folder
from hyper_tune.errors import UserError


def take_folder(path: Path, *, option: str, does: str) -> TextIO:
    """Make a folder, lock ``.lock`` in it, and return that file; ``option`` is what chose it.

    Raises:
        UserError: another process ``does`` its work there, or it cannot be written.
    """
    try:
        make_folder(path)
        lock = (path / ".lock").open("w")
    except OSError as error:
        raise UserError(f"{option} {path} cannot be written: {error}.") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise UserError(
            f"another process {does} in {path}; wait for it, or set another {option}."
        ) from error
    return lock
