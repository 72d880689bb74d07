"""What the sandbox says of honest programs: right and wrong answers, of every kind of value."""

import gzip
import json
import os
import runpy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hyper_tune.errors import UserError
from hyper_tune.evaluate.sandbox import Sandbox, Verdict

SQUARES = runpy.run_path(str(Path(__file__).with_name("hostile.py")))["SQUARES"]
pytestmark = pytest.mark.usefixtures("nothing_left")


def test_a_right_answer_passes_and_a_wrong_one_does_not(sandbox: Sandbox) -> None:
    assert sandbox.judge("def f(n): return n * n", SQUARES, "f") == Verdict(True)
    wrong = sandbox.judge("def f(n): return n + n", SQUARES, "f")
    assert wrong == Verdict(False, "AssertionError")


def test_an_exception_is_no_answer(sandbox: Sandbox) -> None:
    tests = "def check(f):\n    assert f() == \"KeyError: 'a'\"\n"
    verdict = sandbox.judge("def f(): raise KeyError('a')", tests, "f")
    assert verdict == Verdict(False, "KeyError: 'a'")


def test_values_come_back_as_they_were_made(sandbox: Sandbox) -> None:
    values = (
        "[None, True, 3, 2.5, 'ä\\udc80', b'\\x00', (1, [2]), {3}, frozenset({4}), 1j, {(1,): {}}]"
    )
    tests = (
        f"def check(f):\n    wanted = {values}\n    found = f(wanted)\n    assert found == wanted\n"
        "    assert [type(v) for v in found] == [type(v) for v in wanted]\n"
        "    assert str(f(float('nan'))) == 'nan' and f(x=float('-inf')) == float('-inf')\n"
    )
    assert sandbox.judge("def f(x): return x", tests, "f") == Verdict(True)
    counted = "from collections import Counter\ndef f(x): return Counter(x)"
    tests = "def check(f): assert type(f('aab')) is dict and f('aab') == {'a': 2, 'b': 1}"
    assert sandbox.judge(counted, tests, "f") == Verdict(True)


def test_what_is_not_plain_data_is_an_answer_of_the_candidate_and_a_mistake_of_the_tests(
    sandbox: Sandbox,
) -> None:
    verdict = sandbox.judge("def f(n): return (n for n in [9])", SQUARES, "f")
    reason = "NotPlainError: a value of type generator is not plain data"
    assert verdict == Verdict(False, reason)
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
