"""Rows of figures read back exactly, whatever happened to the process that wrote them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyper_tune.metrics import Metrics

ROWS = [
    {"step": step, "loss": 1 / (3 + step), "lr": 1e-3 * 0.1**step, "skipped": False, "note": "é\n"}
    for step in range(1, 6)
]


@pytest.fixture
def metrics(tmp_path: Path) -> Metrics:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    for row in ROWS:
        metrics.append(row)
    return metrics


def test_rows_come_back_in_order(metrics: Metrics, tmp_path: Path) -> None:
    assert metrics.rows() == ROWS
    assert Metrics(tmp_path / "metrics.jsonl").rows() == ROWS
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == ROWS


def test_a_row_is_handed_over_before_append_returns(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    for count, row in enumerate(ROWS, 1):
        metrics.append(row)
        assert Metrics(tmp_path / "metrics.jsonl").rows() == ROWS[:count]


@settings(deadline=None)
@given(number=st.floats(allow_nan=False, allow_infinity=False))
def test_floats_read_back_exactly(tmp_path_factory: pytest.TempPathFactory, number: float) -> None:
    metrics = Metrics(tmp_path_factory.mktemp("run") / "metrics.jsonl")
    metrics.append({"step": 1, "loss": number})
    metrics.truncate_after(1)
    (row,) = metrics.rows()
    assert row["loss"].hex() == number.hex()


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_refused_and_not_written(
    metrics: Metrics, number: float
) -> None:
    with pytest.raises(ValueError, match="Out of range float values"):
        metrics.append({"step": 6, "loss": number})
    assert metrics.rows() == ROWS


def test_a_row_torn_at_any_byte_is_left_out(metrics: Metrics, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for length in range(last, len(whole)):
        path.write_bytes(whole[:length])
        assert metrics.rows() == ROWS[:-1]
    path.write_bytes(whole)
    assert metrics.rows() == ROWS


@pytest.mark.parametrize("step", range(7))
def test_rows_after_a_step_are_cut(metrics: Metrics, tmp_path: Path, step: int) -> None:
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    metrics.truncate_after(step)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(lines[:step])
    assert metrics.rows() == ROWS[:step]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_torn_row_is_gone_after_cutting(metrics: Metrics, tmp_path: Path) -> None:
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    metrics.truncate_after(6)
    row: dict[str, Any] = {"step": 6, "loss": 0.5}
    metrics.append(row)
    assert metrics.rows() == [*ROWS, row]


def test_no_file_is_no_rows(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    assert metrics.rows() == []
    metrics.truncate_after(3)
    assert list(tmp_path.iterdir()) == []
