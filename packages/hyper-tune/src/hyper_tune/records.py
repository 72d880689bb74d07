"""Records of conversations: question/answer, Alpaca and chat, as read from a file or a stream."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyper_tune.errors import UserError
from hyper_tune.tables import read_csv, read_parquet


@dataclass(frozen=True)
class Turn:
    """One message: ``role`` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Messages in order, the last by the assistant, and the line of the file they came from."""

    turns: tuple[Turn, ...]
    line: int


SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)


class _RecordError(ValueError):
    """What is wrong with one record; the reader adds file and line."""


def _text(record: Mapping[str, Any], key: str, *, empty: bool = False) -> str:
    if key not in record:
        raise _RecordError(f"the key {key!r} is missing; it has {', '.join(sorted(record))}")
    value = record[key]
    if not isinstance(value, str):
        raise _RecordError(f"{key!r} is {type(value).__name__}, expected text")
    if not empty and not value.strip():
        raise _RecordError(f"{key!r} is empty")
    return value


def _question_answer(record: Mapping[str, Any]) -> list[Turn]:
    return [Turn("user", _text(record, "question")), Turn("assistant", _text(record, "answer"))]


def _alpaca(record: Mapping[str, Any]) -> list[Turn]:
    instruction = _text(record, "instruction")
    given = _text(record, "input", empty=True) if "input" in record else ""
    template = _ALPACA_WITH_INPUT if given.strip() else _ALPACA
    # Filled by replacement in one pass, so that braces in the data stay as they are.
    prompt = template.format(instruction=instruction, input=given)
    return [Turn("user", prompt), Turn("assistant", _text(record, "output"))]


def _chat(record: Mapping[str, Any]) -> list[Turn]:
    key, role_key, text_key = (
        ("conversations", "from", "value")
        if "conversations" in record and "messages" not in record
        else ("messages", "role", "content")
    )
    messages = record.get(key)
    if not isinstance(messages, list) or not messages:
        raise _RecordError(f"{key!r} must be a list of at least one message")
    turns = []
    for message in messages:
        if not isinstance(message, dict):
            raise _RecordError(f"a message is {type(message).__name__}, expected an object")
        role = _text(message, role_key)
        if role not in _ROLES:
            raise _RecordError(f"the role {role!r} is unknown; expected {', '.join(_ROLES)}")
        turns.append(Turn(_ROLES[role], _text(message, text_key)))
    return turns


_FORMATS: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], list[Turn]]]] = {
    "question_answer": ("question", _question_answer),
    "alpaca": ("instruction", _alpaca),
    "chat": ("messages", _chat),
}


def read_records(path: Path, format: str = "auto") -> list[Conversation]:  # noqa: A002
    """Read every record of a ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file.

    ``format``: "question_answer" (``question``, ``answer``), "alpaca" (``instruction``, ``input``,
    ``output``), "chat" (``messages`` of ``role`` and ``content``, or ``conversations`` of ``from``
    and ``value``), or "auto", which tells by the keys of the first record.

    Raises:
        UserError: a file that is missing, empty or of another kind, or a record that does not fit;
            file and line are named, of parquet the row.
    """
    check_format(format)
    conversations: list[Conversation] = []
    for line, record in _objects(path):
        where = f"{path}:{line}"
        if format == "auto":
            format = detect_format(where, record)  # noqa: A001
        conversations.append(Conversation(read_turns(where, record, format), line))
    if not conversations:
        raise UserError(f"{path} holds no records.")
    return conversations


def check_format(format: str) -> None:  # noqa: A002
    """Refuse a format that there is not.

    >>> check_format("auto")
    """
    if format not in ("auto", *_FORMATS):
        raise UserError(f"format is {format!r}, but must be auto, {', '.join(_FORMATS)}.")


def read_turns(
    where: str,
    record: Mapping[str, Any],
    format: str,  # noqa: A002
) -> tuple[Turn, ...]:
    """Return the turns of one record, the last by the assistant.

    Raises:
        UserError: the record is not of that format; ``where`` is named.

    >>> read_turns("row 1", {"question": "2 + 2?", "answer": "4"}, "question_answer")[1]
    Turn(role='assistant', content='4')
    """
    try:
        turns = _FORMATS[format][1](record)
        if turns[-1].role != "assistant":
            raise _RecordError(f"the last turn is the {turns[-1].role}'s, not the assistant's")
    except _RecordError as error:
        raise UserError(f"{where}: {error} (read as {format}).") from error
    return tuple(turns)


def detect_format(where: str, record: Mapping[str, Any]) -> str:
    """Tell the format of a record by its keys.

    Raises:
        UserError: no format has them.
    """
    for name, (key, _) in _FORMATS.items():
        if key in record or (name == "chat" and "conversations" in record):
            return name
    raise UserError(
        f"{where}: no known format has the keys {', '.join(sorted(record)) or '(none)'}; "
        "expected question and answer, instruction and output, or messages."
    )


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.suffix == ".parquet":
        _refuse_missing(path)
        yield from read_parquet(path)
        return
    text = _read_text(path)
    if path.suffix == ".csv":
        yield from read_csv(path, text)
        return
    for line, value in _values(path, text):
        if not isinstance(value, dict):
            raise UserError(f"{path}:{line}: expected an object, got {type(value).__name__}.")
        yield line, value


def data_files(folder: Path) -> list[Path]:
    """Return the files of records in a folder, by name; of its subfolders none."""
    return sorted(path for path in folder.glob("*") if path.suffix in SUFFIXES)


def _refuse_missing(path: Path) -> None:
    if not path.is_file():
        folder = path.parent if path.parent.name else path.parent.absolute()
        there = [p.name for p in data_files(folder)] if folder.is_dir() else []
        what = f"{folder} has {', '.join(there)}" if there else f"no data file is in {folder}"
        raise UserError(f"{path} does not exist; {what}.")


def _read_text(path: Path) -> str:
    _refuse_missing(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 ({error.reason}); convert the file.") from error


def _values(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    if text.lstrip().startswith("["):
        yield from _array(path, text)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, _parse(path, line, number)


def _parse(path: Path, text: str, line: int = 1) -> Any:
    """Read JSON that begins at a line of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        raise UserError(f"{path}:{line}: not JSON: {error.msg}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}:{line}: not JSON: {error}.") from error


_BETWEEN = re.compile(r"[\s,]*")


def _array(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Read the elements of an array that is whole one by one, to know the line of each."""
    _parse(path, text)
    decoder = json.JSONDecoder()
    position, counted, line = text.index("[") + 1, 0, 1
    while True:
        position = _end_of(_BETWEEN, text, position)
        line += text.count("\n", counted, position)
        counted = position
        if text.startswith("]", position):
            return
        value, position = decoder.raw_decode(text, position)
        yield line, value


def _end_of(pattern: re.Pattern[str], text: str, position: int) -> int:
    match = pattern.match(text, position)
    return match.end() if match else position
