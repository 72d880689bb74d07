"""Hostile programs: none passes, none gets out, and every layer that is missing is noticed."""

import gzip
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from hyper_tune.errors import UserError
from hyper_tune.evaluate import sandbox as module
from hyper_tune.evaluate.sandbox import Limits, Sandbox

HOSTILE = runpy.run_path(str(Path(__file__).parent / "hostile.py"))
FORGERIES, ATTEMPTS, CALLS, ENDLESS = (
    HOSTILE[name] for name in ("FORGERIES", "ATTEMPTS", "CALLS", "ENDLESS")
)
SQUARES = "def check(f):\n    assert f(3) == 9\n    assert f(4) == 16\n"
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


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No process that a test started is there when it ends, whoever its parent is by then."""
    before = in_a_sandbox()
    yield
    assert psutil.Process().children(recursive=True) == []
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


def test_a_right_answer_passes_and_a_wrong_one_does_not(sandbox: Sandbox) -> None:
    assert sandbox.judge("def f(n): return n * n", SQUARES, "f") == module.Verdict(True)
    wrong = sandbox.judge("def f(n): return n + n", SQUARES, "f")
    assert wrong == module.Verdict(False, "AssertionError")


def test_an_exception_is_no_answer(sandbox: Sandbox) -> None:
    tests = "def check(f):\n    assert f() == \"KeyError: 'a'\"\n"
    verdict = sandbox.judge("def f(): raise KeyError('a')", tests, "f")
    assert verdict == module.Verdict(False, "KeyError: 'a'")


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


def outcome(attempt: str) -> str:
    """A program whose f says by which exception an attempt failed, or what it brought."""
    return (
        f"{attempt}\n"
        "def f():\n"
        "    try: return f'it worked: {str(attempt())[:50]}'\n"
        "    except BaseException as error: return [k.__name__ for k in type(error).__mro__]\n"
    )


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
    assert verdict == module.Verdict(False, "its tests ended without a verdict")


def test_values_come_back_as_they_were_made(sandbox: Sandbox) -> None:
    values = (
        "[None, True, 3, 2.5, 'ä\\udc80', b'\\x00', (1, [2]), {3}, frozenset({4}), 1j, {(1,): {}}]"
    )
    tests = (
        f"def check(f):\n    wanted = {values}\n    found = f(wanted)\n    assert found == wanted\n"
        "    assert [type(v) for v in found] == [type(v) for v in wanted]\n"
        "    assert str(f(float('nan'))) == 'nan' and f(x=float('-inf')) == float('-inf')\n"
    )
    assert sandbox.judge("def f(x): return x", tests, "f") == module.Verdict(True)
    counted = "from collections import Counter\ndef f(x): return Counter(x)"
    tests = "def check(f): assert type(f('aab')) is dict and f('aab') == {'a': 2, 'b': 1}"
    assert sandbox.judge(counted, tests, "f") == module.Verdict(True)


def test_a_candidate_changes_no_argument_of_its_tests(sandbox: Sandbox) -> None:
    tests = (
        "def check(f):\n    given = [3, 1]\n    assert f(given) == 1\n    assert given == [3, 1]\n"
    )
    assert sandbox.judge("def f(x): x.sort(); return x[0]", tests, "f").passed


def test_what_is_not_plain_data_is_an_answer_of_the_candidate_and_a_mistake_of_the_tests(
    sandbox: Sandbox,
) -> None:
    verdict = sandbox.judge("def f(n): return (n for n in [9])", SQUARES, "f")
    reason = "NotPlainError: a value of type generator is not plain data"
    assert verdict == module.Verdict(False, reason)
    with pytest.raises(UserError, match=r"the tests of f call it with .* \(a value of type functi"):
        sandbox.judge("def f(g): return 9", "def check(f):\n    f(lambda: 1)\n", "f")


def test_tests_may_use_the_prompt_and_call_the_candidate_by_name(sandbox: Sandbox) -> None:
    context = "def double(x):\n    return 2 * x\ndef half(x):\n    pass\n"
    tests = "def check(candidate):\n    assert half(double(3)) == 3 == candidate(6)\n"
    assert sandbox.judge("def half(x): return x // 2", tests, "half", context).passed
    # Their helpers are the prompt's, not the candidate's.
    cheat = "def double(x): return 3\ndef half(x): return 3"
    assert not sandbox.judge(
        cheat, tests + "    assert half(double(4)) == 4\n", "half", context
    ).passed


def test_a_parent_that_is_killed_leaves_nothing_behind(sandbox: Sandbox, tmp_path: Path) -> None:
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


def bare_package(folder: Path) -> None:
    """Copy what is tested into a package that imports nothing else, and so starts quickly."""
    package = Path(module.__file__).parents[1]
    shutil.copytree(package / "evaluate", folder / "hyper_tune" / "evaluate")
    (folder / "hyper_tune" / "errors.py").write_text("class UserError(ValueError): pass\n")


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
def test_an_ordinary_user_has_the_same_sandbox(sandbox: Sandbox, public_folder: Path) -> None:
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
        f"with Sandbox({SMALL!r}) as s:\n"
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


@pytest.mark.skipif("HYPER_TUNE_HUMANEVAL" not in os.environ, reason="no HYPER_TUNE_HUMANEVAL")
def test_all_canonical_solutions_pass(sandbox: Sandbox) -> None:
    with gzip.open(os.environ["HYPER_TUNE_HUMANEVAL"], "rt") as file:
        rows = [json.loads(line) for line in file]

    def judge(row: dict[str, str]) -> bool:
        program = row["prompt"] + row["canonical_solution"]
        context = row["prompt"] + "    pass\n"
        return made.judge(program, row["test"], row["entry_point"], context).passed

    with Sandbox() as made, ThreadPoolExecutor(2) as threads:
        verdicts = list(threads.map(judge, rows))
    assert len(rows) == 164
    assert [row["task_id"] for row, ok in zip(rows, verdicts, strict=True) if not ok] == []
