"""What is asked, and what an answer is worth: texts, GSM8K, HumanEval."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from hyper_tune.errors import UserError
from hyper_tune.evaluate.gsm8k import final_number
from hyper_tune.evaluate.humaneval import mean_pass_at_k, read_problems
from hyper_tune.evaluate.sandbox import Sandbox
from hyper_tune.evaluate.text import Metric, import_metrics, text_metrics
from hyper_tune.records import Turn, read_records

_KS = (1, 10, 100)


@dataclass(frozen=True)
class Scored:
    """An answer to one row, and what `Task.score` found."""

    row: int
    answer: str
    score: Mapping[str, Any]


class Task(Protocol):
    """Rows of a file. ``name`` and ``data`` are for the record.

    ``scoring``: what a score depends on besides the answer and the data, as plain data.
    """

    name: str
    data: Path
    scoring: Mapping[str, Any]

    def __len__(self) -> int:
        """Return the number of rows."""

    def where(self, row: int) -> str:
        """Name a row, for a message."""

    def turns(self, row: int, *, chat: bool) -> Sequence[Turn]:
        """Return what is asked: in a chat format, or as text to go on with."""

    def score(self, row: int, answer: str, *, chat: bool) -> dict[str, Any]:
        """Return what one answer is worth, as plain data."""

    def metrics(self, scored: Sequence[Scored]) -> list[Metric]:
        """Return the figures of all answers."""


class _Conversations:
    """Conversations of a file, whose last turn is the reference."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.scoring: Mapping[str, Any] = {}
        self._rows = read_records(data)

    def __len__(self) -> int:
        """Return the number of conversations."""
        return len(self._rows)

    def where(self, row: int) -> str:
        """Name a row by file and line."""
        return f"{self.data}:{self._rows[row].line}"

    def reference(self, row: int) -> str:
        """Return the last turn, without the white space at its ends."""
        return self._rows[row].turns[-1].content.strip()

    def asked(self, row: int) -> tuple[Turn, ...]:
        """Return all turns but the last."""
        return self._rows[row].turns[:-1]


class TextTask(_Conversations):
    """Conversations whose last turn is the reference: BLEU-4, ROUGE-1, BLEU-4 of characters.

    Answers and references are compared without the white space at their ends.

    Raises:
        UserError: the file cannot be read; see `hyper_tune.records.read_records`.
        ModuleNotFoundError: the extra ``evaluate`` is not installed.
    """

    name = "text"

    def __init__(self, data: Path) -> None:
        import_metrics()
        super().__init__(data)

    def turns(self, row: int, *, chat: bool) -> Sequence[Turn]:
        """Return all turns but the last; as text, with an empty line after each."""
        asked = self.asked(row)
        return asked if chat else [Turn(turn.role, f"{turn.content}\n\n") for turn in asked]

    def score(self, row: int, answer: str, *, chat: bool) -> dict[str, Any]:
        """Return nothing: the figures are of all answers together."""
        return {}

    def metrics(self, scored: Sequence[Scored]) -> list[Metric]:
        """Return the figures of all answers."""
        answers = [found.answer.strip() for found in scored]
        return text_metrics(answers, [self.reference(found.row) for found in scored])


class Gsm8kTask(_Conversations):
    """GSM8K's questions; an answer is right if its final number is the reference's.

    Raises:
        UserError: the file cannot be read, or a reference has no ``#### number``.
    """

    name = "gsm8k"

    def __init__(self, data: Path) -> None:
        super().__init__(data)
        for row in range(len(self)):
            reference = self.reference(row)
            if "####" not in reference or final_number(reference) is None:
                raise UserError(
                    f"{self.where(row)}: the answer does not end in '#### number', so that --task "
                    "gsm8k has nothing to compare; --task text compares texts."
                )

    def turns(self, row: int, *, chat: bool) -> Sequence[Turn]:
        """Return the question alone, without examples."""
        asked = self.asked(row)
        return asked if chat else [Turn("user", f"Question: {asked[-1].content}\nAnswer:")]

    def score(self, row: int, answer: str, *, chat: bool) -> dict[str, Any]:
        """Return the final number, and whether it is right."""
        number = final_number(answer)
        right = number == final_number(self.reference(row))
        return {"number": None if number is None else str(number), "right": right}

    def metrics(self, scored: Sequence[Scored]) -> list[Metric]:
        """Return the share of right answers."""
        value = 100 * fmean(found.score["right"] for found in scored)
        return [Metric("exact match", value, "final number|zero-shot|mean over answers")]


class HumanEvalTask:
    """HumanEval's problems; an answer passes if its program passes the tests in the sandbox.

    Raises:
        UserError: the file cannot be read, or a row is not a problem.
    """

    name = "humaneval"

    def __init__(self, data: Path, sandbox: Sandbox) -> None:
        self.data = data
        self.scoring: Mapping[str, Any] = asdict(sandbox.limits)
        self._problems = read_problems(data)
        self._sandbox = sandbox

    def __len__(self) -> int:
        """Return the number of problems."""
        return len(self._problems)

    def where(self, row: int) -> str:
        """Name a row by file and problem."""
        return f"{self.data}, {self._problems[row].task_id}"

    def turns(self, row: int, *, chat: bool) -> Sequence[Turn]:
        """Return a question about the prompt, or the prompt itself to go on with."""
        problem = self._problems[row]
        return [Turn("user", problem.question if chat else problem.prompt)]

    def score(self, row: int, answer: str, *, chat: bool) -> dict[str, Any]:
        """Run the answer's program; the sandbox must be open."""
        problem = self._problems[row]
        verdict = self._sandbox.judge(
            problem.program(answer, chat=chat), problem.test, problem.entry_point, problem.context
        )
        return {"passed": verdict.passed, "reason": verdict.reason}

    def metrics(self, scored: Sequence[Scored]) -> list[Metric]:
        """Return pass@k for 1, 10, 100 and all samples, as far as there are so many of each."""
        passed = defaultdict(list)
        for found in scored:
            passed[self._problems[found.row].task_id].append(bool(found.score["passed"]))
        samples = min(map(len, passed.values()))
        return [
            Metric(f"pass@{k}", mean_pass_at_k(passed, k), f"unbiased|samples:{samples}|zero-shot")
            for k in sorted({*_KS, samples})
            if k <= samples
        ]
