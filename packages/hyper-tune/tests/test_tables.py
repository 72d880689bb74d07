"""CSV and parquet files, and folders of files, give the records that JSON lines give."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hyper_tune.errors import UserError
from hyper_tune.records import read_records
from hyper_tune.torchtune.components import build_tokenizer
from hyper_tune.torchtune.data import FileDataset

ROWS = [
    {"instruction": "Name, it", "input": "", "output": 'a "cat"'},
    {"instruction": "two\nlines", "input": "é", "output": "x"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(("suffix", "lines"), [("csv", [2, 4]), ("parquet", [1, 2])])
def test_a_table_gives_the_records_of_json_lines(
    tmp_path: Path, suffix: str, lines: list[int]
) -> None:
    expected = read_records(write(tmp_path / "rows.jsonl", ROWS))
    found = read_records(write(tmp_path / f"rows.{suffix}", ROWS))
    assert [record.turns for record in found] == [record.turns for record in expected]
    assert [record.line for record in found] == lines


def test_conversations_in_parquet_are_read(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "."}]
    (record,) = read_records(write(tmp_path / "chat.parquet", [{"conversations": turns}]))
    assert [(turn.role, turn.content) for turn in record.turns] == [
        ("user", "?"),
        ("assistant", "."),
    ]


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.tuples(*[st.text(st.characters(exclude_categories=("C",)), min_size=1)] * 2).filter(
            lambda pair: all(part.strip() for part in pair)
        ),
        min_size=1,
        max_size=4,
    )
)
def test_any_text_survives_csv(tmp_path: Path, pairs: list[tuple[str, str]]) -> None:
    rows = [{"question": question, "answer": answer} for question, answer in pairs]
    found = read_records(write(tmp_path / "any.csv", rows))
    assert [tuple(turn.content for turn in record.turns) for record in found] == pairs


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"question,answer\n1,2,3\n", ":2: 3 fields, but the first line names 2; put"),
        ("a.csv", b'question,answer\n"1,2\n', ":2: not CSV: unexpected end of data."),
        ("a.csv", b"question,answer\n1,\xe9\n", ":2: not UTF-8 (invalid continuation byte); co"),
        ("a.csv", b"question,answer\n\n1,\n", ":3: 'answer' is empty (read as question_answer)."),
        ("a.csv", b"question,answer\n", " holds no records."),
        ("a.csv", b"", " holds no records."),
        ("a.csv", b"a,b\n1,2\n", ":2: no known format has the keys a, b; expected question and"),
        ("a.parquet", b"", ": not a whole parquet file: Parquet file size is 0 bytes"),
        ("a.parquet", b"PAR1" * 9, ": not a whole parquet file: "),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_records(path)
    assert str(caught.value).startswith(f"{path}{message}")


def test_a_missing_table_lists_what_is_there(tmp_path: Path) -> None:
    write(tmp_path / "b.csv", ROWS)
    with pytest.raises(UserError) as caught:
        read_records(tmp_path / "a.parquet")
    assert str(caught.value) == f"{tmp_path}/a.parquet does not exist; {tmp_path} has b.csv."


def test_a_folder_is_its_files_by_name(tmp_path: Path, llama: dict[str, Any]) -> None:
    tokenizer = build_tokenizer(llama["tokenizer"])
    (tmp_path / "sub").mkdir()
    (tmp_path / "README.md").write_text("no data")
    write(tmp_path / "sub" / "rows.jsonl", ROWS)
    parts = {"b.csv": ROWS[:1], "a.jsonl": ROWS[1:], "c.parquet": ROWS, "d.json": ROWS}
    for name, rows in parts.items():
        write(tmp_path / name, rows)
    found = FileDataset(tokenizer, str(tmp_path))
    expected = [
        sample
        for name in sorted(parts)
        for sample in [*iter_samples(FileDataset(tokenizer, str(tmp_path / name)))]
    ]
    assert list(iter_samples(found)) == expected
    assert len(found) == 6
    assert [found.where(n).rpartition("/")[2] for n in range(3)] == [
        "a.jsonl:1",
        "b.csv:2",
        "c.parquet:1",
    ]


def iter_samples(data: FileDataset) -> list[Any]:
    return [data[index] for index in range(len(data))]


def test_a_folder_without_files_is_refused(tmp_path: Path, llama: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        FileDataset(build_tokenizer(llama["tokenizer"]), str(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path} is a folder without files of records (.jsonl, .json, .csv, .parquet)."
    )
