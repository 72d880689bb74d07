"""HumanEval: problems, programs made of a model's answers, and pass@k."""

import gzip
import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyper_tune.errors import UserError

_KEYS = ("task_id", "prompt", "entry_point", "test")
# Where a base model, which does not know when to stop, goes on with something else.
_NEXT = re.compile(r"\n(?:class |def |#|if |print\(|@|```)")
_FENCED = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
_ASK = (
    "Complete this Python function. Answer with the whole function and what it needs, in one code "
    "block.\n\n```python\n{prompt}\n```"
)


@dataclass(frozen=True)
class Problem:
    """One row: ``prompt`` ends in a docstring, ``test`` defines ``check(candidate)``."""

    task_id: str
    prompt: str
    entry_point: str
    test: str

    @property
    def question(self) -> str:
        """What a model with a chat format is asked; others are given the prompt to go on with."""
        return _ASK.format(prompt=self.prompt.strip())

    @property
    def context(self) -> str:
        """What the tests may use: the prompt's imports and helpers."""
        return f"{self.prompt}\n    pass\n"

    def program(self, answer: str, *, chat: bool) -> str:
        """Return the code that an answer stands for.

        In a chat, the first code block, or else answer, that defines the function comes after the
        prompt and replaces its stub. Any other answer goes on where the prompt ends, as far as the
        function goes.

        >>> problem = Problem("1", "def one():\\n", "one", "")
        >>> problem.program("    return 1\\n\\nprint(one())", chat=False)
        'def one():\\n    return 1\\n'
        """
        blocks = _FENCED.findall(answer) if chat else []
        name = re.escape(self.entry_point)
        defined = re.compile(rf"^(?:async\s+)?def\s+{name}\b", re.MULTILINE)
        for block in (*blocks, answer) if chat else ():
            if defined.search(block):
                return f"{self.context}\n{block}"
        rest = blocks[0] if blocks else answer
        return f"{self.prompt}{_NEXT.split(rest)[0]}".rstrip() + "\n"


def read_problems(path: Path) -> list[Problem]:
    """Read a ``.jsonl`` or ``.jsonl.gz`` file of problems.

    Raises:
        UserError: it cannot be read, is empty, or a row is not a problem; file and line are named.
    """
    problems = [_problem(f"{path}:{number}", row) for number, row in _rows(path)]
    if not problems:
        raise UserError(f"{path} holds no problems.")
    return problems


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number}: not JSON: {error}.") from error


def _problem(where: str, row: Any) -> Problem:
    missing = [key for key in _KEYS if not isinstance(row, dict) or key not in row]
    if missing:
        there = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
        raise UserError(
            f"{where}: not a HumanEval problem: no {', '.join(missing)} (it has {there}); "
            "other data is for --task gsm8k or text."
        )
    wrong = [key for key in _KEYS if not isinstance(row[key], str)]
    if wrong:
        raise UserError(f"{where}: {wrong[0]} is {type(row[wrong[0]]).__name__}, expected text.")
    problem = Problem(**{key: row[key] for key in _KEYS})
    for code in (problem.context, problem.test):
        try:
            compile(code, where, "exec")
        except (SyntaxError, ValueError) as error:
            raise UserError(f"{where}: prompt and test must be Python: {error}.") from error
    return problem


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Return the chance that one of ``k`` answers passes, drawn from ``samples`` of which some did.

    1 - C(samples - passed, k) / C(samples, k): unbiased (Chen et al. 2021, section 2.1).

    Raises:
        ValueError: ``k`` is more than ``samples``.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs at least {k} samples of each problem, got {samples}")
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


def mean_pass_at_k(passed: Mapping[str, list[bool]], k: int) -> float:
    """Return the mean of pass@k over problems, from 0 to 100."""
    values = [pass_at_k(len(found), sum(found), k) for found in passed.values()]
    return 100 * math.fsum(values) / len(values)
