"""The sandbox where something is missing: a parent, a layer, the rights of root."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from hyper_tune.errors import UserError
from hyper_tune.evaluate import sandbox as module
from hyper_tune.evaluate.sandbox import Sandbox

HOSTILE = runpy.run_path(str(Path(__file__).with_name("hostile.py")))
SQUARES, FORGERIES, ATTEMPTS, outcome = (
    HOSTILE[name] for name in ("SQUARES", "FORGERIES", "ATTEMPTS", "outcome")
)
pytestmark = pytest.mark.usefixtures("nothing_left")


def test_a_parent_that_is_killed_leaves_nothing_behind(
    sandbox: Sandbox, bare_package: Callable[[Path], None], tmp_path: Path
) -> None:
    bare_package(tmp_path)
    code = (
        "from hyper_tune.evaluate.sandbox import *\n"
        "with Sandbox(Limits(cpu_seconds=5, wall_seconds=300)) as s:\n"
        "    print('go', flush=True)\n"
        "    s.judge('import time\\ndef f(n): time.sleep(1000)', 'def check(f): f(1)', 'f')\n"
    )
    places = {"TMPDIR": str(tmp_path), "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ | places
    ) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        below = wait_for(lambda: psutil.Process(parent.pid).children(recursive=True), 4)
        parent.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(below, timeout=60)
    assert alive == []


def wait_for(found: Callable[[], list[psutil.Process]], count: int) -> list[psutil.Process]:
    """Wait until there are so many: two that wait, and the two in the sandbox."""
    end = time.monotonic() + 60
    while len(found()) < count:
        assert time.monotonic() < end
        time.sleep(0.05)
    return found()


# What is broken, and what the start of the sandbox then says.
DEFECTS = {
    "no namespaces": ("linux", "unshare", "lambda flags: check(-1, 'unshare')", "unshare"),
    "the old root": ("linux", "make_root", "lambda folder: None", "can be seen"),
    "no filter": ("isolation", "refuse_calls", "lambda: None", "it can start a process"),
    "an end that can be put off": ("seccomp", "_DEATH_SIGNAL", "99", "it can outlive its parent"),
    "the machine is not known": (
        *("seccomp", "platform", "type('p', (), {'machine': staticmethod(lambda: 'vax')})"),
        "calls of vax are not known",
    ),
    "files can be written": (
        *("linux", "mount_read_only"),
        "lambda s, t: libc.mount(s.encode(), t.encode(), None, ctypes.c_ulong(_BIND), None)",
        "/usr can be written",
    ),
    "an end without a word": ("isolation", "_limit", "None", "it ended"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_without_one_of_its_layers_nothing_is_run(
    sandbox: Sandbox, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, what, instead, message = DEFECTS[name]
    shutil.copytree(Path(module.__file__).parent / "jail", tmp_path / "jail")
    with (tmp_path / "jail" / f"{file}.py").open("a") as code:
        code.write(f"\n{what} = {instead}\n")
    monkeypatch.setattr(module, "_PACKAGE", tmp_path)
    with pytest.raises(UserError, match=f"generated code is not run: .*{message}"), Sandbox():
        raise AssertionError("the sandbox opened")


def runnable_by_nobody() -> str | None:
    """A Python that an ordinary user can start, new enough, where root runs the tests."""
    check = "import sys; sys.exit(sys.version_info < (3, 11))"
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        try:
            done = subprocess.run([python, "-c", check], user=65534, group=65534, extra_groups=[])
        except OSError:
            continue
        if done.returncode == 0:
            return python
    return None


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that every user may enter; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="every test here runs as an ordinary user")
def test_an_ordinary_user_has_the_same_sandbox(
    sandbox: Sandbox, bare_package: Callable[[Path], None], public_folder: Path
) -> None:
    python = runnable_by_nobody()
    if python is None:
        pytest.skip("no Python here that an ordinary user can start")
    bare_package(public_folder)
    wanted = "def check(f):\n    found = f()\n    assert {!r} in found, found\n"
    asked = [(program, SQUARES) for program in FORGERIES.values()]
    asked += [
        (outcome(attempt), wanted.format(error))
        for attempt, error in ATTEMPTS.values()
        if not re.search(r"{\w+", attempt)
    ]
    code = (
        "import json, os, sys\nfrom hyper_tune.evaluate.sandbox import *\n"
        f"with Sandbox({sandbox.limits!r}) as s:\n"
        "    passed = [s.judge(p, tests, 'f').passed for p, tests in json.load(sys.stdin)]\n"
        "print(json.dumps([os.getuid(), passed]))\n"
    )
    found = subprocess.run(
        [python, "-B", "-c", code],
        **{"user": 65534, "group": 65534, "extra_groups": []},
        input=json.dumps(asked),
        env={"PYTHONPATH": str(public_folder), "TMPDIR": str(public_folder)},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    user, passed = json.loads(found.stdout)
    assert user == 65534
    assert passed == [False] * len(FORGERIES) + [True] * (len(asked) - len(FORGERIES))
