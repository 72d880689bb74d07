"""The sandbox that tests judge in, and what sees that nothing of it is left."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from hyper_tune.errors import UserError
from hyper_tune.evaluate import sandbox as module
from hyper_tune.evaluate.sandbox import Limits, Sandbox

SMALL = Limits(cpu_seconds=1, wall_seconds=20, memory_mib=256, files_mib=16)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    try:
        with Sandbox(SMALL) as made:
            yield made
    except UserError as error:
        if machine_has_namespaces():
            raise
        pytest.skip(f"no sandbox on this machine: {error}")


def machine_has_namespaces() -> bool:
    """Whether another program can make namespaces here, so that it is not the machine's fault."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    command = ["unshare", *user, "--mount", "--net", "--pid", "--fork"]
    done = subprocess.run([*command, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True)
    return done.returncode == 0


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """No process that a test started is there when it ends, whoever its parent is by then."""
    before = in_a_sandbox()
    children = set(psutil.Process().children(recursive=True))  # of other tests' servers
    yield
    assert set(psutil.Process().children(recursive=True)) <= children
    _, alive = psutil.wait_procs(in_a_sandbox() - before, timeout=20)
    for process in alive:
        process.kill()
    assert alive == []


def in_a_sandbox() -> set[psutil.Process]:
    """All processes of this machine that were started for a sandbox of this package."""
    return {
        process
        for process in psutil.process_iter(["cmdline"])
        if (process.info["cmdline"] or [""])[-1] == str(module._PACKAGE)
    }


@pytest.fixture
def bare_package() -> Callable[[Path], None]:
    """What copies the sandbox into a package that imports nothing else, and so starts quickly."""

    def copy(folder: Path) -> None:
        package = Path(module.__file__).parents[1]
        shutil.copytree(package / "evaluate", folder / "hyper_tune" / "evaluate")
        (folder / "hyper_tune" / "errors.py").write_text("class UserError(ValueError): pass\n")

    return copy
