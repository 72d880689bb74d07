"""Runs a stranger's code where it can do no harm, and lets its tests alone say whether it passed.

The candidate and its tests are in two processes, each with namespaces, a user and limits of its
own. The tests call the candidate through a pipe that carries plain values, so that they judge what
it answered, and it cannot reach them: it has no verdict to forge.
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from hyper_tune.errors import UserError
from hyper_tune.evaluate.jail.roles import ENDED

_START_SECONDS = 120
_MOST_BYTES = 1 << 16
_BY_SIGNAL = 192  # what `jail.isolation` adds the negative number of a signal to, modulo 256
_PACKAGE = Path(__file__).parent
_OPTIONS = ("-P", "-s", "-S", "-B", "-c")
_START = "import sys; sys.path.insert(0, sys.argv[1]); from jail.main import main; main()"
_REMEDY = (
    "It needs Linux 5.12 or newer and new namespaces: on Ubuntu 24.04 set "
    "kernel.apparmor_restrict_unprivileged_userns=0, in a container allow unshare and mount, or "
    "take the written answers to a machine that has them."
)


@dataclass(frozen=True)
class Limits:
    """What a candidate has at most, and its tests again.

    ``cpu_seconds``: of processor time; ``wall_seconds``: for all of a candidate's tests.
    ``memory_mib``: of address space. ``files_mib``: in a folder in memory, and of one file.
    ``open_files``: descriptors. ``reply_bytes``: of one answer. There is one process, one thread.
    """

    cpu_seconds: int = 10
    wall_seconds: float = 60.0
    memory_mib: int = 512
    files_mib: int = 16
    open_files: int = 32
    reply_bytes: int = 1 << 20


@dataclass(frozen=True)
class Verdict:
    """Whether the tests passed; if not, why: the candidate's or the tests' own words, cut."""

    passed: bool
    reason: str = ""


class Sandbox:
    """Judges programs by their tests, in processes that are isolated; a context.

    Linux only. Each process has namespaces of mounts, processes, network and IPC of its own, and
    of users unless it was started by root, who becomes nobody. It has no capability, and a filter
    refuses what makes a process, a program, a socket, or memory that no limit counts. It sees the
    files of Python and of the system's libraries, read-only, and an empty folder in memory.

    Promised: a program passes only if the values that it answers satisfy its tests; it reads and
    changes nothing outside. Not promised: to withstand a hole in the kernel, or to notice a program
    that knows its tests by heart.

    Raises:
        UserError: this machine does not allow it; nothing is run.

    >>> with Sandbox() as sandbox:  # doctest: +SKIP
    ...     sandbox.judge("def one(): return 1", "def check(f): assert f() == 1", "one")
    Verdict(passed=True, reason='')
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()

    def __enter__(self) -> Self:
        """Make the folder to build on, and try a program that passes and one that fails."""
        self._folder = tempfile.TemporaryDirectory(prefix="hyper-tune-sandbox-")
        try:
            tests = "def check(f): assert f(2) == 4"
            right = self.judge("def f(n): return 2 * n", tests, "f")
            wrong = self.judge("def f(n): return n", tests, "f")
            if (right.passed, wrong.passed) != (True, False):
                raise UserError(f"the sandbox does not work here: {right}, {wrong}.")
        except BaseException:
            self._folder.cleanup()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the folder; no process is left."""
        self._folder.cleanup()

    def judge(self, program: str, tests: str, entry_point: str, context: str = "") -> Verdict:
        """Run ``check(candidate)`` of ``tests`` on the function ``entry_point`` of ``program``.

        ``context``: code that the tests may use besides. Arguments and results are copies: plain
        values, made of built-in types.

        Raises:
            UserError: the sandbox cannot be built, or the tests need more than plain values.
        """
        common = {
            "folder": self._folder.name,
            "limits": asdict(self.limits),
            "parent": os.getpid(),
            "entry_point": entry_point,
        }
        hear_call, call = os.pipe()
        hear_reply, reply = os.pipe()
        with _Process((hear_call, reply)) as candidate, _Process((call, hear_reply)) as judge:
            for descriptor in (hear_call, call, hear_reply, reply):
                os.close(descriptor)
            candidate.ask(common | {"program": program, "calls": hear_call, "replies": reply})
            judge.ask(
                common | {"context": context, "tests": tests, "calls": call, "replies": hear_reply}
            )
            found = judge.answer(self.limits.wall_seconds)
            ending = candidate.ending() if found and ENDED in str(found.get("reason")) else ""
        if found is None:
            return Verdict(False, f"not done in {self.limits.wall_seconds:g} seconds")
        if "unsendable" in found:
            raise UserError(
                f"the tests of {entry_point} call it with what cannot be sent to another process "
                f"({found['unsendable']}); leave them out."
            )
        if found.get("passed") is True:
            return Verdict(True)
        reason = str(found.get("reason", "its tests ended without a verdict"))
        return Verdict(False, f"{reason}{ending}")


class _Process:
    """A process in a sandbox: asked once, answers once, and is killed at the end."""

    def __init__(self, pipes: tuple[int, ...]) -> None:
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, *_OPTIONS, _START, str(_PACKAGE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PYTHONHASHSEED": "0"},
            cwd="/",
            pass_fds=pipes,
            start_new_session=True,
        )
        self._buffer = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process.wait()

    def ask(self, request: Mapping[str, Any]) -> None:
        """Send what is to be done, and wait until the isolation stands.

        Raises:
            UserError: it does not.
        """
        assert self._process.stdin is not None
        with suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(json.dumps(request).encode())
        said = self.answer(_START_SECONDS)
        if said is None:
            said = {"refused": f"it did not start in {_START_SECONDS} seconds"}
        if "ready" not in said:
            raise UserError(
                f"generated code is not run: this machine allows no sandbox "
                f"({said.get('refused', 'it ended')}). {_REMEDY}"
            )

    def answer(self, seconds: float) -> dict[str, Any] | None:
        """Return the next line; None if there is none in time, {} if none can be had."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        end = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            left = end - time.monotonic()
            if left <= 0 or not poll.poll(1000 * left):
                return None
            data = os.read(descriptor, 1 << 16)
            self._buffer += data
            if not data or len(self._buffer) > _MOST_BYTES:
                return {}
        line, self._buffer = self._buffer.split(b"\n", 1)
        try:
            return dict(json.loads(line))
        except (ValueError, TypeError, RecursionError):
            # Tests, too, are a stranger's.
            return {}

    def ending(self) -> str:
        """Return in words by which signal the process ended, if it did."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)
        code = self._process.returncode
        if code is None or code < _BY_SIGNAL:
            return ""
        number = 256 - code
        limit = " (a limit)" if number == signal.SIGKILL else ""
        return f", by {signal.Signals(number).name}{limit}"
