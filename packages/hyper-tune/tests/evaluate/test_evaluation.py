"""An evaluation that is stopped goes on, and its figures are those of its answers."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hyper_tune.errors import UserError
from hyper_tune.evaluate.evaluation import Extent, evaluate
from hyper_tune.evaluate.generation import Decoding
from hyper_tune.evaluate.sandbox import Limits, Sandbox, Verdict
from hyper_tune.evaluate.tasks import Gsm8kTask, HumanEvalTask, TextTask
from hyper_tune.evaluate.text import text_metrics
from hyper_tune.records import Turn

PROBLEMS = Path(__file__).parents[1] / "data" / "problems.jsonl"
END = 0


class Parrot:
    """A model of bytes that has learned answers by heart; it counts what it is made to do.

    Its answer is a function of what it is shown of its own row, and where: padding would spoil it.
    """

    name, identity, chat, max_length, stop_tokens = "parrot", "1", True, 4096, [END]
    device = torch.device("cpu")

    def __init__(self, learned: dict[str, str]) -> None:
        self.learned = {prompt.encode(): answer.encode() for prompt, answer in learned.items()}
        self.loaded = 0
        self.asked: list[str] = []
        self.die_after: int | None = None

    def load_(self) -> None:
        self.loaded += 1

    def encode(self, turns: Sequence[Turn]) -> list[int]:
        return list("|".join(turn.content for turn in turns).encode())

    def text(self, tokens: Sequence[int]) -> str:
        if self.die_after is not None:
            if self.die_after == 0:
                raise KeyboardInterrupt
            self.die_after -= 1
        return bytes(tokens).decode()

    def start(self, rows: int, length: int) -> None:
        self.read: list[list[int]] = [[] for _ in range(rows)]

    def logits(self, tokens: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        new = tokens.shape[1]
        logits = torch.zeros(len(tokens), 256)
        for row, seen in enumerate(visible[:, -new:]):
            for token, place in zip(tokens[row][seen], positions[row][seen], strict=True):
                assert int(place) == len(self.read[row])
                self.read[row].append(int(token))
            text = bytes(self.read[row])
            prompt = next(p for p in self.learned if text.startswith(p))
            written = len(text) - len(prompt)
            if written == 0:
                self.asked.append(prompt.decode())
            answer = [*self.learned[prompt], END]
            logits[row, answer[min(written, len(answer) - 1)]] = 1e9
        return logits


QUESTIONS = ["What is 1 plus 1?", "And two plus two, do you think?", "3+3?", "How many eggs are 4?"]
NUMBERS = ["2", "4", "6", "4"]
ANSWERS = ["It is 2.\n#### 2", "The answer is 5", "6", "four"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    rows = [
        {"question": q, "answer": f"So\n#### {n}"} for q, n in zip(QUESTIONS, NUMBERS, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def parrot() -> Parrot:
    return Parrot(dict(zip(QUESTIONS, ANSWERS, strict=True)))


GREEDY = Decoding(64)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_gsm8k_counts_the_final_numbers(parrot: Parrot, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    (metric,) = evaluate(parrot, Gsm8kTask(data), folder, decoding=GREEDY, batch_size=3)
    assert (metric.name, metric.value) == ("exact match", 50.0)
    scores = {row["row"]: (row["number"], row["right"]) for row in lines(folder / "scores.jsonl")}
    assert scores == {0: ("2", True), 1: ("5", False), 2: ("6", True), 3: (None, False)}
    answers = {row["row"]: row["answer"] for row in lines(folder / "answers.jsonl")}
    assert answers == dict(enumerate(ANSWERS))
    results = json.loads((folder / "results.json").read_text())
    assert results["metrics"][0]["value"] == 50.0
    assert (results["rows"], results["samples"]) == (4, 1)
    assert results["settings"]["sha256"]
    assert {"command", "versions", "time", "git"} <= results.keys()


def test_texts_are_compared_with_their_references(
    parrot: Parrot, data: Path, tmp_path: Path
) -> None:
    found = evaluate(parrot, TextTask(data), tmp_path / "out", decoding=GREEDY)
    references = [f"So\n#### {number}" for number in NUMBERS]
    assert found == text_metrics(ANSWERS, references)


def test_what_was_stopped_goes_on_and_nothing_is_asked_twice(
    parrot: Parrot, data: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    evaluate(parrot, TextTask(data), whole, decoding=GREEDY, batch_size=1)
    folder = tmp_path / "out"
    parrot.asked, parrot.die_after = [], 2
    with pytest.raises(KeyboardInterrupt):
        evaluate(parrot, TextTask(data), folder, decoding=GREEDY, batch_size=1)
    assert len(lines(folder / "answers.jsonl")) == 2
    with (folder / "answers.jsonl").open("a") as file:
        file.write('{"row": 3, "samp')
    parrot.die_after = None
    evaluate(parrot, TextTask(data), folder, decoding=GREEDY, batch_size=1)
    # The third was read when the process was stopped.
    assert sorted(parrot.asked) == sorted([*QUESTIONS, parrot.asked[2]])
    for name in ("answers.jsonl", "scores.jsonl", "settings.json"):
        assert (folder / name).read_text() == (whole / name).read_text()
    loaded = parrot.loaded
    evaluate(parrot, TextTask(data), folder, decoding=GREEDY)
    assert parrot.loaded == loaded


def test_more_rows_and_samples_are_added(parrot: Parrot, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    warm = Decoding(64, temperature=0.5)

    def figures(extent: Extent) -> tuple[int, int]:
        evaluate(parrot, Gsm8kTask(data), folder, decoding=warm, extent=extent)
        results = json.loads((folder / "results.json").read_text())
        return results["rows"], results["samples"]

    assert figures(Extent(1, limit=2)) == (2, 1)
    assert figures(Extent(3, limit=1)) == (1, 3)
    assert len(parrot.asked) == 4
    assert figures(Extent(2, limit=100)) == (4, 2)
    keys = [(row["row"], row["sample"]) for row in lines(folder / "answers.jsonl")]
    assert len(set(keys)) == len(keys) == 4 + 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoding": Decoding(64, seed=1)}, "holds answers of seed = 0, but this is 1; give anot"),
        ({"decoding": Decoding(9)}, "holds answers of max_new_tokens = 64, but this is 9"),
        ({"identity": "2"}, "holds answers of identity = '1', but this is '2'"),
        ({"task": TextTask}, "holds answers of task = 'gsm8k', but this is 'text'"),
        ({"more": "\n"}, "holds answers of sha256 = "),
        ({"extent": Extent(2)}, "2 samples at temperature 0 would all be the same; set --temp"),
    ],
)
def test_what_belongs_to_another_evaluation_is_not_mixed(
    parrot: Parrot, data: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "out"
    evaluate(parrot, Gsm8kTask(data), folder, decoding=GREEDY)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    data.write_text(data.read_text() + change.get("more", ""))
    parrot.identity = change.get("identity", "1")
    task = change.get("task", Gsm8kTask)(data)
    keys = {"decoding": change.get("decoding", GREEDY), "extent": change.get("extent", Extent())}
    loaded = parrot.loaded
    with pytest.raises(UserError, match=message):
        evaluate(parrot, task, folder, **keys)
    assert parrot.loaded == loaded
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_two_evaluations_do_not_write_in_one_folder(
    parrot: Parrot, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"

    class Second(Parrot):
        """Asks for an evaluation of the same folder while it answers."""

        def text(self, tokens: Sequence[int]) -> str:
            before = {path.name: path.read_bytes() for path in folder.iterdir()}
            with pytest.raises(UserError) as refused:
                evaluate(parrot, Gsm8kTask(data), folder, decoding=GREEDY)
            assert str(refused.value) == (
                f"another process evaluates in {folder}; wait for it, or set another --output."
            )
            assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
            return super().text(tokens)

    second = Second(dict(zip(QUESTIONS, ANSWERS, strict=True)))
    evaluate(second, Gsm8kTask(data), folder, decoding=GREEDY, batch_size=1)
    assert (second.loaded, parrot.loaded) == (1, 0)
    evaluate(parrot, Gsm8kTask(data), folder, decoding=GREEDY)  # it is free again


def test_a_folder_that_cannot_be_written_is_named(
    parrot: Parrot, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^--output .*file cannot be written: "):
        evaluate(parrot, Gsm8kTask(data), tmp_path / "file", decoding=GREEDY)
    assert parrot.loaded == 0


def test_a_folder_may_be_moved_with_its_data(parrot: Parrot, data: Path, tmp_path: Path) -> None:
    evaluate(parrot, Gsm8kTask(data), tmp_path / "out", decoding=GREEDY)
    moved = (tmp_path / "out").rename(tmp_path / "there")
    parrot.name = "elsewhere"
    data = data.rename(tmp_path / "other.jsonl")
    evaluate(parrot, Gsm8kTask(data), moved, decoding=GREEDY)
    assert parrot.loaded == 1


def test_a_prompt_that_is_too_long_is_named_before_the_weights(
    parrot: Parrot, data: Path, tmp_path: Path
) -> None:
    parrot.max_length = 90
    with pytest.raises(UserError, match=r"questions\.jsonl:2: the prompt and its answer take 95 t"):
        evaluate(parrot, Gsm8kTask(data), tmp_path / "out", decoding=GREEDY)
    assert parrot.loaded == 0
    assert not (tmp_path / "out").exists()


def test_a_task_refuses_data_of_another(data: Path, tmp_path: Path) -> None:
    with data.open("a") as file:
        file.write('{"question": "And?", "answer": "six"}\n')
    with pytest.raises(UserError, match=r"questions\.jsonl:5: the answer does not end in '#### nu"):
        Gsm8kTask(data)
    with pytest.raises(UserError, match="not a HumanEval problem"):
        HumanEvalTask(data, Sandbox())
    with pytest.raises(UserError, match="no known format has the keys canonical_solution"):
        TextTask(PROBLEMS)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no records"):
        TextTask(tmp_path / "empty.jsonl")


class Believer(Sandbox):
    """A sandbox that runs nothing: a program passes if it has a certain word."""

    def judge(self, program: str, tests: str, entry_point: str, context: str = "") -> Verdict:
        return Verdict("right" in program, "" if "right" in program else "wrong")


@pytest.mark.parametrize("chat", [True, False])
def test_humaneval_means_pass_at_k_over_problems(tmp_path: Path, chat: bool) -> None:
    task = HumanEvalTask(PROBLEMS, Believer())
    prompts = [task.turns(row, chat=chat)[0].content for row in range(3)]
    parrot = Parrot(dict(zip(prompts, ["  right", "  no", "  right"], strict=True)))
    parrot.chat = chat
    folder = tmp_path / "out"
    extent = Extent(samples=2)
    found = evaluate(
        parrot, task, folder, decoding=Decoding(64, 0.5), extent=extent, batch_size=4, jobs=3
    )
    assert [(metric.name, round(metric.value, 6)) for metric in found] == [
        ("pass@1", 66.666667),
        ("pass@2", 66.666667),
    ]
    scores = {(row["row"], row["sample"]): row["reason"] for row in lines(folder / "scores.jsonl")}
    assert scores == {(r, s): "wrong" if r == 1 else "" for r in range(3) for s in range(2)}


def test_programs_are_run_again_under_other_limits_and_answers_are_kept(tmp_path: Path) -> None:
    judged = []

    class Counting(Believer):
        def judge(self, program: str, tests: str, entry_point: str, context: str = "") -> Verdict:
            judged.append(self.limits.cpu_seconds)
            return Verdict(self.limits.cpu_seconds > 1)

    def figure(seconds: int) -> float:
        task = HumanEvalTask(PROBLEMS, Counting(Limits(cpu_seconds=seconds)))
        return evaluate(parrot, task, tmp_path / "out", decoding=GREEDY)[0].value

    task = HumanEvalTask(PROBLEMS, Believer())
    parrot = Parrot({task.turns(row, chat=True)[0].content: "  right" for row in range(3)})
    assert [figure(seconds) for seconds in (1, 2, 2, 1)] == [0.0, 100.0, 100.0, 0.0]
    assert judged == [1, 1, 1, 2, 2, 2, 1, 1, 1]
    assert parrot.loaded == 1


def test_a_mistake_in_scoring_ends_it_and_keeps_what_was_scored(
    parrot: Parrot, data: Path, tmp_path: Path
) -> None:
    class Stumbling(Gsm8kTask):
        tried = 0

        def score(self, row: int, answer: str, *, chat: bool) -> dict[str, Any]:
            type(self).tried += 1
            time.sleep(0.05)
            if row == 1:
                raise UserError("stumbled")
            return super().score(row, answer, chat=chat)

    data.write_text(data.read_text() * 20)
    folder = tmp_path / "out"
    with pytest.raises(UserError, match="stumbled"):
        evaluate(parrot, Stumbling(data), folder, decoding=GREEDY, batch_size=40)
    assert Stumbling.tried < 40
    assert [row["row"] for row in lines(folder / "scores.jsonl")] == [0]
    evaluate(parrot, Gsm8kTask(data), folder, decoding=GREEDY)
    assert len(lines(folder / "scores.jsonl")) == 80
    assert parrot.loaded == 1


def test_questions_of_a_model_without_a_chat_format(data: Path) -> None:
    turns = Gsm8kTask(data).turns(2, chat=False)
    assert [turn.content for turn in turns] == ["Question: 3+3?\nAnswer:"]
    assert [turn.content for turn in TextTask(data).turns(2, chat=False)] == ["3+3?\n\n"]
    prompt = HumanEvalTask(PROBLEMS, Believer()).turns(0, chat=False)[0].content
    assert prompt == json.loads(PROBLEMS.read_text().splitlines()[0])["prompt"]
