"""Run folders whose files are not what a run writes: one line that names the file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hyper_tune.cli.main import main

ROW = {"step": 1, "loss": 2.0, "seconds": 0.1, "live_ranks": 2}
SUMMARY: dict[str, Any] = {
    **{"before": {}, "after": {}, "ranks": {"layers.0.q": 2}, "initial_rank": 2, "total_ranks": 2},
    **{"trainable_parameters": 10, "factor_parameters": 10},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder without a model."""
    (tmp_path / "config.yaml").write_text("method: {name: adalora}\n")
    (tmp_path / "metrics.jsonl").write_text(json.dumps(ROW) + "\n")
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    return tmp_path


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Return what runs a command line, and returns its status and what it says of a mistake."""

    def run(*words: object) -> tuple[int, str]:
        status = main([str(word) for word in words])
        return status, capsys.readouterr().err

    return run


def test_the_folder_itself_is_read(says: Callable[..., tuple[int, str]], folder: Path) -> None:
    assert says("ranks", folder) == (0, "")
    assert says("compare", folder) == (0, "")


@pytest.mark.parametrize("verb", ["ranks", "compare"])
@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.yaml", "a: [", "config.yaml is not a readable YAML file: while parsing a flow no"),
        ("metrics.jsonl", "{}\n", "metrics.jsonl:1 is no row of a run's figures."),
        ("metrics.jsonl", '{"step": 1}\n5\n', "metrics.jsonl:2 is no row of a run's figures."),
        ("summary.json", "[]", "summary.json is not of a run: it lacks 'before'."),
        (
            "summary.json",
            json.dumps({**SUMMARY, "ranks": [2]}),
            "summary.json is not of a run: it lacks 'ranks'.",
        ),
    ],
)
def test_a_file_that_no_run_wrote_is_named(
    says: Callable[..., tuple[int, str]],
    folder: Path,
    verb: str,
    file: str,
    text: str,
    message: str,
) -> None:
    (folder / file).write_text(text)
    status, said = says(verb, folder)
    assert status == 2
    assert said.startswith(f"error: {folder}/{message}")
    assert said.count("\n") == 1
