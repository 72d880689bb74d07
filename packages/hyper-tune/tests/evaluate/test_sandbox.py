"""Hostile programs: none passes, and none gets out."""

import os
import runpy
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hyper_tune.evaluate.sandbox import Limits, Sandbox, Verdict

HOSTILE = runpy.run_path(str(Path(__file__).with_name("hostile.py")))
SQUARES, FORGERIES, ATTEMPTS, CALLS, ENDLESS, outcome = (
    HOSTILE[name] for name in ("SQUARES", "FORGERIES", "ATTEMPTS", "CALLS", "ENDLESS", "outcome")
)
pytestmark = pytest.mark.usefixtures("nothing_left")


def unguarded(program: str) -> bool:
    """Whether a program passes where candidate and tests share a process, as is usual."""
    code = (
        f"names = {{}}\nexec({program!r}, names)\nexec({SQUARES!r}, names)\n"
        "names['check'](names['f'])\n"
    )
    finished = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, timeout=60)
    return finished.returncode == 0


def test_the_forgeries_are_real() -> None:
    """Under the usual guard, several are believed."""
    passed = {name for name, program in FORGERIES.items() if unguarded(program)}
    assert passed >= {
        *("equal to everything", "a number equal to everything", "exit with success"),
        *("exit with success when imported", "exit without cleaning up"),
        *("the caller's frame says passed", "check is replaced in every name space"),
        "passed written to every descriptor",
    }


@pytest.mark.parametrize("name", FORGERIES)
def test_no_forgery_passes(sandbox: Sandbox, name: str) -> None:
    verdict = sandbox.judge(FORGERIES[name], SQUARES, "f")
    assert not verdict.passed
    assert verdict.reason


@pytest.mark.parametrize("name", ATTEMPTS)
def test_every_attempt_fails_by_the_sandbox(
    sandbox: Sandbox, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt, error = ATTEMPTS[name]
    monkeypatch.setenv("HYPER_TUNE_SECRET", "secret")
    (tmp_path / "tests.jsonl").write_text("secret")
    tmp_path.chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as server:
        values = {"{tests!r}": repr(str(tmp_path / "tests.jsonl")), "{parent}": str(os.getpid())}
        values["{port}"] = str(server.getsockname()[1])
        for key, value in values.items():
            attempt = attempt.replace(key, value)
        tests = f"def check(f):\n    found = f()\n    assert {error!r} in found, found\n"
        verdict = sandbox.judge(outcome(attempt), tests, "f")
    assert verdict.passed, verdict.reason


@pytest.mark.parametrize("name", CALLS)
def test_every_refused_call_fails_with_eperm(sandbox: Sandbox, name: str) -> None:
    program = (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"def f(): return [{CALLS[name]}, ctypes.get_errno()]\n"
    )
    verdict = sandbox.judge(program, "def check(f):\n    assert f() == [-1, 1], f()\n", "f")
    assert verdict.passed, verdict.reason


@pytest.mark.parametrize("name", ENDLESS)
def test_what_never_ends_is_ended(sandbox: Sandbox, name: str) -> None:
    program, sign = ENDLESS[name]
    begin = time.monotonic()
    if sign == "seconds":
        with Sandbox(Limits(wall_seconds=1)) as sandbox:
            verdict = sandbox.judge(program, SQUARES, "f")
    else:
        verdict = sandbox.judge(program, SQUARES, "f")
    assert not verdict.passed
    assert sign in verdict.reason
    assert time.monotonic() - begin < 120


def test_the_candidate_has_no_descriptor_but_its_pipes(sandbox: Sandbox) -> None:
    program = (
        "import os, stat\n"
        "def f():\n"
        "    found = []\n"
        "    for number in range(32):\n"
        "        try: mode = os.fstat(number).st_mode\n"
        "        except OSError: continue\n"
        "        found.append('pipe' if stat.S_ISFIFO(mode) else stat.filemode(mode)[0])\n"
        "    return sorted(found)\n"
    )
    tests = "def check(f):\n    assert f() == ['c'] * 3 + ['pipe'] * 2, f()\n"
    verdict = sandbox.judge(program, tests, "f")
    assert verdict.passed, verdict.reason


def test_the_candidate_knows_nothing_of_its_tests(sandbox: Sandbox) -> None:
    program = (
        "import gc, sys\n"
        "def texts():\n"
        "    frame = sys._getframe()\n"
        "    while frame:\n"
        "        yield from map(repr, [*frame.f_locals.values(), *frame.f_globals.values()])\n"
        "        frame = frame.f_back\n"
        "    yield from (repr(t) for t in gc.get_objects() if isinstance(t, (dict, list, tuple)))\n"
        "def f(): return any(''.join(['mag', 'pie']) in text for text in texts())\n"
    )
    tests = "def check(f):\n    bird = 'magpie'\n    assert f() is False\n"
    assert sandbox.judge(program, tests, "f").passed
    assert sandbox.judge("bird = 'magpie'\n" + program, tests, "f").reason == "AssertionError"


@pytest.mark.parametrize("said", ["no", "[1]", "{", "[" * 50_000, "x" * 1_000_000])
def test_tests_that_speak_for_the_judge_are_not_understood(sandbox: Sandbox, said: str) -> None:
    tests = (
        "import os\ndef check(f):\n    for number in range(3, 32):\n"
        f"        try: os.write(number, {said!r}.encode() + b'\\n')\n"
        "        except OSError: pass\n    os._exit(0)\n"
    )
    verdict = sandbox.judge("def f(n): return n", tests, "f")
    assert verdict == Verdict(False, "its tests ended without a verdict")


def test_a_candidate_changes_no_argument_of_its_tests(sandbox: Sandbox) -> None:
    tests = (
        "def check(f):\n    given = [3, 1]\n    assert f(given) == 1\n    assert given == [3, 1]\n"
    )
    assert sandbox.judge("def f(x): x.sort(); return x[0]", tests, "f").passed
