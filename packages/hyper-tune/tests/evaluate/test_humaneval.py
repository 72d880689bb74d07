"""Problems, the programs that answers stand for, and pass@k by enumeration."""

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from hyper_tune.errors import UserError
from hyper_tune.evaluate.humaneval import Problem, mean_pass_at_k, pass_at_k, read_problems
from hyper_tune.evaluate.sandbox import Sandbox

PROBLEMS = Path(__file__).parents[1] / "data" / "problems.jsonl"
ROW = {
    "task_id": "t/0",
    "prompt": 'def one(x):\n    """One."""\n',
    "entry_point": "one",
    "test": "def check(c):\n    assert c(0) == 1\n",
}


def value(program: str) -> Any:
    names: dict[str, Any] = {}
    exec(program, names)
    return names["one"](0)


@pytest.mark.parametrize(
    ("answer", "chat"),
    [
        ("    return 1\n", False),
        ("    return 1", False),
        ("    return 1\n\n\ndef two():\n    syntax error", False),
        ("    return 1\n# and so on: not Python", False),
        ("    return 1\n\nprint(one(", False),
        ("    return 1\nclass X", False),
        ("    return 1\n\nif __name__ == '__main__", False),
        ("    if x:\n        return 2\n    return 1\n", False),
        ("```python\ndef one(x):\n    return 1\n```", True),
        ("Here:\n\n```python\ndef one(x):\n    return 1\n```\nThis returns 2.", True),
        ("```\nprint(1)\n```\nor\n```py\nasync_ = 1\ndef one(x):\n    return async_\n```", True),
        ("```python\nimport math\n\ndef one(x):\n    return math.ceil(0.5)", True),
        ("def one(x):\n    return 1\n", True),
        ("```python\n    return 1\n```", True),
        ("    return 1\n", True),
    ],
)
def test_the_program_of_an_answer(answer: str, chat: bool) -> None:
    assert value(Problem(**ROW).program(answer, chat=chat)) == 1


def test_a_question_holds_the_prompt_and_asks_for_code() -> None:
    problem = Problem(**ROW)
    assert problem.prompt.strip() in problem.question
    assert "code block" in problem.question


@pytest.mark.parametrize("samples", range(1, 7))
def test_pass_at_k_is_the_share_of_choices_with_one_that_passes(samples: int) -> None:
    for passed in range(samples + 1):
        results = [True] * passed + [False] * (samples - passed)
        for k in range(1, samples + 1):
            choices = list(itertools.combinations(results, k))
            expected = sum(any(choice) for choice in choices) / len(choices)
            assert pass_at_k(samples, passed, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_needs_k_samples_and_is_meant_over_problems() -> None:
    for k in (0, 3):
        with pytest.raises(ValueError, match="needs at least"):
            pass_at_k(2, 1, k)
    passed = {"a": [True, False], "b": [False, False], "c": [True, True]}
    assert mean_pass_at_k(passed, 1) == pytest.approx(50)
    assert mean_pass_at_k(passed, 2) == pytest.approx(200 / 3)


def test_problems_are_read_from_plain_and_packed_files(tmp_path: Path) -> None:
    problems = read_problems(PROBLEMS)
    assert [problem.task_id for problem in problems] == ["own/0", "own/1", "own/2"]
    packed = tmp_path / "p.jsonl.gz"
    packed.write_bytes(gzip.compress(PROBLEMS.read_bytes()))
    assert read_problems(packed) == problems


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no problems"),
        ("{", r":1: not JSON"),
        ("\n[]", r":2: not a HumanEval problem: no task_id, .*\(it has list\)"),
        (
            '{"question": "q", "answer": "#### 1"}',
            r":1: not a HumanEval problem: no task_id, prompt, entry_point, test \(it has answer, "
            r"question\); other data is for --task gsm8k or text\.",
        ),
        (json.dumps(ROW | {"test": 1}), r":1: test is int, expected text"),
        (json.dumps(ROW | {"prompt": "def ("}), r":1: prompt and test must be Python"),
        (json.dumps(ROW | {"test": "def"}), r":1: prompt and test must be Python"),
    ],
)
def test_what_is_no_problem_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_problems(path)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    for name, data in (
        ("p.jsonl", b"\xff"),
        ("p.jsonl.gz", b"no"),
        ("q.gz", gzip.compress(b"a")[:9]),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{name} cannot be read: "):
            read_problems(tmp_path / name)
    with pytest.raises(UserError, match=r"none\.jsonl cannot be read: "):
        read_problems(tmp_path / "none.jsonl")


def test_solutions_of_our_own_problems_pass_and_stubs_do_not() -> None:
    lines = PROBLEMS.read_text().splitlines()
    solutions = [json.loads(line)["canonical_solution"] for line in lines]
    try:
        with Sandbox() as sandbox:
            for problem, solution in zip(read_problems(PROBLEMS), solutions, strict=True):
                found = [
                    sandbox.judge(
                        problem.program(answer, chat=False),
                        *(problem.test, problem.entry_point, problem.context),
                    )
                    for answer in (solution, "    pass\n")
                ]
                assert [verdict.passed for verdict in found] == [True, False], found
    except UserError as error:
        pytest.skip(f"no sandbox on this machine: {error}")
