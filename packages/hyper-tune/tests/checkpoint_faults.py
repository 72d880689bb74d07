"""Writers of checkpoints that are stopped at every point, in a process that may be forked.

Run as a script: `checkpoint_faults.py FOLDER` takes each folder of checkpoints in FOLDER/before
and each fault, starts writers of step 3 in copies of it, stops the n-th at its n-th opportunity,
until one is not stopped, and writes how each ended to FOLDER/after/KIND/FAULT/ended.json.
"""

import errno
import io
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from hyper_tune.checkpoint import write_checkpoint

FINISHED, REFUSED, OTHER, SURVIVED = 0, 7, 8, 9
CALLS = [(io, "open")] + [
    (os, name) for name in ("open", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir")
]
BYTES = 24


def state(step: int) -> dict[str, Any]:
    """What is saved at a step: the tensors' file is the smallest, the manifest the largest."""
    return {"w": torch.arange(2.0) + step, "step": step, "note": f"{step}" * 110}


def kill() -> NoReturn:
    """Die at once, as by a power switch."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def refuse() -> NoReturn:
    """Fail as on a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class CallFault:
    """Counts the calls of `CALLS`, and strikes instead of the call number ``number``."""

    def __init__(self, strike: Callable[[], NoReturn], number: int) -> None:
        self._strike = strike
        self._left = number
        for module, name in CALLS:
            setattr(module, name, self._counted(getattr(module, name)))

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self._left -= 1
            if self._left == -1:
                self._strike()
            return function(*arguments, **options)

        return call

    @property
    def struck(self) -> bool:
        """Whether there were as many calls."""
        return self._left < 0


class ByteFault:
    """Lets no file grow beyond ``number`` times `BYTES`: writing on is refused, or kills."""

    struck = False

    def __init__(self, action: signal.Handlers, number: int) -> None:
        signal.signal(signal.SIGXFSZ, action)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (number * BYTES, number * BYTES))


FAULTS: dict[str, Callable[[int], CallFault | ByteFault]] = {
    "killed at a call": partial(CallFault, kill),
    "refused at a call": partial(CallFault, refuse),
    "killed at a byte": partial(ByteFault, signal.SIG_DFL),
    "refused at a byte": partial(ByteFault, signal.SIG_IGN),
}


def attempt(folder: Path, fault: str, number: int) -> int:
    """Write step 3 in a process of its own that has the fault; return how it ended."""
    process = os.fork()
    if process == 0:
        ended = OTHER
        try:
            made = FAULTS[fault](number)
            write_checkpoint(folder, 3, state(3), keep=2)
            ended = SURVIVED if made.struck else FINISHED
        except OSError:
            ended = REFUSED
        finally:
            os._exit(ended)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def stop_everywhere(before: Path, folder: Path, fault: str) -> None:
    """Stop writers at every opportunity until one finishes."""
    ended: list[int] = []
    while FINISHED not in ended:
        copy = folder / str(len(ended))
        shutil.copytree(before, copy)
        ended.append(attempt(copy, fault, len(ended)))
    (folder / "ended.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    for kind in (root / "before").iterdir():
        for name in FAULTS:
            stop_everywhere(kind, root / "after" / kind.name / name, name)
