"""Where a run came from: command, versions, machine and git state, one record for each start."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from hyper_tune.parallel import world_size

_PACKAGES = (
    *("hyper-core", "lowrank-adapters", "rank-budget", "hyper-tune"),
    *("torch", "torchtune", "torchao", "safetensors", "tokenizers", "tiktoken", "datasets"),
    *("transformers", "accelerate", "sacrebleu", "rouge-score", "nltk", "jieba"),
)


def start_record(device: torch.device) -> dict[str, Any]:
    """Return what a later reader needs to start the same run again.

    ``command``: a line for a shell in ``folder``, that of the interpreter. Of torchrun's processes
    it is torchrun's, without what tells the machines of a job how they meet.

    >>> sorted(start_record(torch.device("cpu")))
    ['command', 'device', 'folder', 'git', 'platform', 'processes', 'python', 'time', 'versions']
    """
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(_command()),
        "folder": str(Path.cwd()),
        "processes": world_size(),
        "device": _device_name(device),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(),
        "git": git_state(Path.cwd()),
    }


def _command() -> list[str]:
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return sys.orig_argv
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    machines = int(os.environ["WORLD_SIZE"]) // here
    where = ["--standalone"] if machines == 1 else ["--nnodes", str(machines)]
    launcher = [sys.executable, "-m", "torch.distributed.run", *where]
    # A module that was started by -m is no script: each process's own line says what it is.
    return [*launcher, "--nproc_per_node", str(here), "--no-python", *sys.orig_argv]


def versions() -> dict[str, str]:
    """Return the installed versions of what changes a run's numbers."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return commit and changed files of the repository around ``folder``; None where is none."""
    commit = _git(folder, "rev-parse", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changed is None:
        return None
    return {"commit": commit.strip(), "changed": [line[3:] for line in changed.splitlines()]}


def _git(folder: Path, *arguments: str) -> str | None:
    # No repository's own hooks or monitors are run for a mere look.
    quiet = ("-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null")
    try:
        finished = subprocess.run(  # noqa: S603
            ["git", *quiet, *arguments],  # noqa: S607
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return finished.stdout if finished.returncode == 0 else None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores, {platform.machine()}"
