"""Every format of records becomes conversations; what is wrong is named with file and line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hyper_tune.errors import UserError
from hyper_tune.records import Conversation, Turn, read_records

PAIR = {"question": "What is {2}?", "answer": "{4}"}
PLAIN_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\nAdd {x}\n\n### Response:\n"
)
INPUT_PROMPT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd {x}\n\n### Input:\n2, {instruction}\n\n### Response:\n"
)
CHAT = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho"), ("user", "?"),
        ("assistant", "!")]  # fmt: skip
SHAREGPT = {"user": "human", "assistant": "gpt"}
RECORDS: dict[str, tuple[str, dict[str, Any], list[tuple[str, str]]]] = {
    "pair": ("question_answer", PAIR, [("user", "What is {2}?"), ("assistant", "{4}")]),
    "alpaca": (
        "alpaca",
        {"instruction": "Add {x}", "output": "3"},
        [("user", PLAIN_PROMPT), ("assistant", "3")],
    ),
    "alpaca with a blank input": (
        "alpaca",
        {"instruction": "Add {x}", "input": "\n ", "output": "3"},
        [("user", PLAIN_PROMPT), ("assistant", "3")],
    ),
    "alpaca with an input": (
        "alpaca",
        {"instruction": "Add {x}", "input": "2, {instruction}", "output": "3"},
        [("user", INPUT_PROMPT), ("assistant", "3")],
    ),
    "chat": ("chat", {"messages": [{"role": r, "content": c} for r, c in CHAT]}, CHAT),
    "ShareGPT": (
        "chat",
        {"conversations": [{"from": SHAREGPT.get(r, r), "value": c} for r, c in CHAT]},
        CHAT,
    ),
}


def write(folder: Path, *lines: object, name: str = "data.jsonl") -> Path:
    path = folder / name
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def expected(turns: list[tuple[str, str]], line: int) -> Conversation:
    return Conversation(tuple(Turn(role, content) for role, content in turns), line)


@pytest.mark.parametrize("kind", RECORDS)
@pytest.mark.parametrize("auto", [True, False])
def test_each_format_alone_and_detected(tmp_path: Path, kind: str, auto: bool) -> None:
    name, record, turns = RECORDS[kind]
    more = {**record, "id": 7}
    path = write(tmp_path, record, "", more)
    found = read_records(path, *([] if auto else [name]))
    assert found == [expected(turns, 1), expected(turns, 3)]


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_read_with_the_line_of_each_record(tmp_path: Path, indent: int | None) -> None:
    pairs = [{"question": f"{i}\n?", "answer": "][,}{"} for i in range(3)]
    text = "\n\n " + json.dumps(pairs, indent=indent)
    path = write(tmp_path, text, name="data.json")
    turns = [[("user", f"{i}\n?"), ("assistant", "][,}{")] for i in range(3)]
    lines = [3, 3, 3] if indent is None else [4, 8, 12]
    assert read_records(path) == [expected(t, n) for t, n in zip(turns, lines, strict=True)]
    assert [text.split("\n")[n - 1].lstrip(" [")[0] for n in lines] == ["{"] * 3


@settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50
)
@given(st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), min_size=1), st.booleans())
def test_any_text_comes_back(
    tmp_path: Path, pairs: list[tuple[str, str]], ascii_only: bool
) -> None:
    kept = [(q, a) for q, a in pairs if q.strip() and a.strip()] or [("q", "a")]
    rows = [{"question": q, "answer": a} for q, a in kept]
    for name, text in (
        ("data.jsonl", "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)),
        ("data.json", json.dumps(rows, ensure_ascii=ascii_only)),
    ):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        found = [tuple(turn.content for turn in c.turns) for c in read_records(path)]
        assert found == kept


@pytest.mark.parametrize("prefix", [b"\xef\xbb\xbf", b""])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
def test_byte_order_mark_and_line_ends(tmp_path: Path, prefix: bytes, end: bytes) -> None:
    path = tmp_path / "data.jsonl"
    line = json.dumps(PAIR).encode()
    path.write_bytes(prefix + line + (end or b"\n") + line + end)
    turns = RECORDS["pair"][2]
    assert read_records(path) == [expected(turns, 1), expected(turns, 2)]


def text_of(path: Path, *arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        read_records(path, *arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


TURNS = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"question": "?"}, "the key 'answer' is missing; it has question (read as question_"),
        ({"question": "?", "answer": 4}, "'answer' is int, expected text (read as question_answer"),
        ({"question": None, "answer": "4"}, "'question' is NoneType, expected text (read as "),
        ({"question": " \t", "answer": "4"}, "'question' is empty (read as question_answer)."),
        ({"instruction": "Add"}, "the key 'output' is missing; it has instruction (read as alpaca"),
        ({"instruction": "Add", "input": 3, "output": "4"}, "'input' is int, expected text (read "),
        ({"instruction": "Add", "output": ""}, "'output' is empty (read as alpaca)."),
        ({"messages": []}, "'messages' must be a list of at least one message (read as chat)."),
        ({"messages": "hi"}, "'messages' must be a list of at least one message (read as chat)."),
        ({"conversations": []}, "'conversations' must be a list of at least one message (read as"),
        ({"messages": ["hi"]}, "a message is str, expected an object (read as chat)."),
        ({"messages": [{"role": "user"}]}, "the key 'content' is missing; it has role (read as "),
        ({"messages": [{"content": "?"}]}, "the key 'role' is missing; it has content (read as "),
        ({"conversations": TURNS}, "the key 'from' is missing; it has content, role (read as chat"),
        (
            {"messages": [{"role": "bot", "content": "?"}]},
            "the role 'bot' is unknown; expected system, user, human, assistant, gpt (read as chat",
        ),
        ({"messages": TURNS[:1]}, "the last turn is the user's, not the assistant's (read as chat"),
        ({"text": "?", "a": 1}, "no known format has the keys a, text; expected question and "),
        ({}, "no known format has the keys (none); expected question and answer, instruction and "),
        ([PAIR], "expected an object, got list."),
        ("3", "expected an object, got int."),
        ("null", "expected an object, got NoneType."),
        ("{'question': 1}", "not JSON: Expecting property name enclosed in double quotes."),
        ('{"question": "?"', "not JSON: Expecting ',' delimiter."),
        ('{"question": "?"} {}', "not JSON: Extra data."),
        ('{"question": ' + "[" * 200_000, "not JSON: "),
        ('{"question": ' + "9" * 5000 + "}", "not JSON: "),
    ],
)
def test_a_record_that_does_not_fit_is_named_with_file_and_line(
    tmp_path: Path, record: object, text: str
) -> None:
    path = write(tmp_path, "", "", record)
    if isinstance(record, list):
        path = write(tmp_path, "", "", PAIR, record)
        assert text_of(path) == f"{path}:4: {text}"
        return
    assert text_of(path).startswith(f"{path}:3: {text}")


@pytest.mark.parametrize("kind", RECORDS)
def test_a_file_of_mixed_formats_is_refused_at_the_first_that_differs(
    tmp_path: Path, kind: str
) -> None:
    name, record, _ = RECORDS[kind]
    other = {"instruction": "a", "output": "b"} if name == "question_answer" else PAIR
    path = write(tmp_path, record, record, other)
    text = text_of(path)
    assert text.startswith(f"{path}:3: ")
    assert text.endswith(f"(read as {name}).")


@pytest.mark.parametrize("name", ["question_answer", "alpaca", "chat"])
def test_a_record_without_keys_is_refused_in_every_format(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, {})
    key = {"question_answer": "question", "alpaca": "instruction", "chat": "messages"}[name]
    text = text_of(path, name)
    assert text.startswith(f"{path}:1: ")
    assert f"'{key}'" in text
    assert text.endswith(f"(read as {name}).")


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ('[\n{"question": "?",\n "answer": }]', 3, "Expecting value"),
        ('[\n{"question": "?", "answer": "!"}\n', 3, "Expecting ',' delimiter"),
        ('[\n{"question": "?", "answer": "!"}\n{"question": "?", "answer": "!"}]', 3,
         "Expecting ',' delimiter"),
        ('[\n,{"question": "?", "answer": "!"}]', 2, "Expecting value"),
        ('[{"question": "?", "answer": "!"}]\n]', 2, "Extra data"),
        ('[{"question": "?", "answer": "!"}]\n[{"question": "?", "answer": "!"}]', 2, "Extra data"),
    ],
)  # fmt: skip
def test_an_array_that_is_not_json_is_named_with_its_line(
    tmp_path: Path, text: str, line: int, message: str
) -> None:
    path = tmp_path / "data.json"
    path.write_text(text)
    assert text_of(path) == f"{path}:{line}: not JSON: {message}."


def test_a_wrong_element_of_an_array_is_named_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, "[", json.dumps(PAIR) + ",", '{"question":', '"?"}]')
    assert text_of(path).startswith(f"{path}:3: the key 'answer' is missing")
    path = write(tmp_path, "[", json.dumps(PAIR) + ",", "7]")
    assert text_of(path) == f"{path}:3: expected an object, got int."


@pytest.mark.parametrize("text", ["", "\n \n\t\n", "[]", "[ \n ]\n"])
def test_a_file_without_records(tmp_path: Path, text: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    assert text_of(path) == f"{path} holds no records."


def test_a_missing_file_lists_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    assert text_of(path) == f"{path} does not exist; no data file is in {tmp_path}."
    write(tmp_path, PAIR, name="b.json")
    write(tmp_path, PAIR, name="a.jsonl")
    assert text_of(path) == f"{path} does not exist; {tmp_path} has a.jsonl, b.json."
    lost = tmp_path / "nowhere" / "x.json"
    assert text_of(lost) == f"{lost} does not exist; no data file is in {lost.parent}."


def test_a_missing_file_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert text_of(Path("data")) == f"data does not exist; no data file is in {tmp_path}."
    write(tmp_path, PAIR, name="a.jsonl")
    assert text_of(Path("data")) == f"data does not exist; {tmp_path} has a.jsonl."


@pytest.mark.parametrize("prefix", [b"\xef\xbb\xbf", b""])
def test_a_file_that_is_not_utf8_is_named_with_its_line(tmp_path: Path, prefix: bytes) -> None:
    path = tmp_path / "data.jsonl"
    line = json.dumps(PAIR).encode() + b"\n"
    path.write_bytes(prefix + line + line + "é".encode("latin-1") + line)
    text = text_of(path)
    assert re.fullmatch(rf"{re.escape(str(path))}:3: not UTF-8 \(.*\); convert the file\.", text)


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, PAIR)
    assert text_of(path, "csv") == (
        "format is 'csv', but must be auto, question_answer, alpaca, chat."
    )
