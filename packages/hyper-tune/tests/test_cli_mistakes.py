"""What a person sees who gets the command `hyper-tune` wrong: one line, status 2."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


def test_a_wrong_command_line_is_one_line(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "Did you mean llama3_1_8b?" in refused("cp", "lama3_1_8b", "x")
    assert "Did you mean hyper-tune/hyperdora_full?" in refused("cp", "hyperdora_ful", "x")
    assert "lama3_1_8b" in refused("plan", "--config", "lama3_1_8b")
    assert refused() == (
        "a verb is missing; there are ls, cp, plan, ranks, compare, export, generate, evaluate."
    )
    assert "No such command" in refused("train")
    assert "No such option" in refused("ls", "--all")
    assert refused("ranks", tmp_path) == f"{tmp_path} is not a run folder: it has no config.yaml."
    assert refused("compare", tmp_path / "no") == f"{tmp_path / 'no'} does not exist."
    assert "such as h100-80" in refused("plan", "--config", "tiny_llama", "--gpu", "h100")
    assert refused("plan", "--config", "tiny_llama", "batch_sise=2").startswith(
        "configuration has no key 'batch_sise'; did you mean 'batch_size'?"
    )
    assert refused("plan", "--config", "tiny_llama", "--method", "dorra").startswith(
        "--method is 'dorra', but must be one of lora, adalora, "
    )
    assert "overrides are written key=value, or ~key" in refused(
        "plan", "--config", "tiny_llama", "batch"
    )
    assert refused("plan", "--config", "tiny_llama", "--length", 257) == (
        "samples of 257 tokens are planned, but the model reads 256; give a --length up to that."
    )
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "metrics.jsonl").write_text("{}\nno\n")
    assert refused("compare", tmp_path).startswith(f"the figures in {tmp_path} are not JSON: ")


@pytest.mark.parametrize(
    ("missing", "extra", "command"),
    [
        ("torchtune", "torchtune", ["plan", "--config", "tiny_llama"]),
        ("matplotlib", "plot", ["compare", "{run}", "--png", "x.png"]),
    ],
)
def test_a_missing_extra_is_named(
    tmp_path: Path, missing: str, extra: str, command: list[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("seed: 0\n")
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from hyper_tune.cli.main import main\n"
        f"sys.exit(main({[word.format(run=run) for word in command]!r}))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert finished.returncode == 2
    last = finished.stderr.splitlines()[-1]
    assert last == f"error: this needs {missing}; pip install 'hyper-tune[{extra}]'."


@pytest.fixture
def finished_run(tmp_path: Path) -> Path:
    """A run folder that the verbs which draw can read."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("seed: 0\n")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "live_ranks": 3}\n')
    summary = {"ranks": {"layers.0.q_proj": 3}, "initial_rank": 4, "before": {}, "after": {}}
    totals = dict.fromkeys(("total_ranks", "trainable_parameters", "factor_parameters"), 4)
    (run / "summary.json").write_text(json.dumps(summary | totals))
    return run


@pytest.mark.parametrize("verb", ["ranks", "compare"])
def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_is_read(
    refused: Callable[..., str], tmp_path: Path, verb: str
) -> None:
    unread = tmp_path / "no run"
    for name in ("x.abc", "x.raw", "x", ".png", "png"):
        assert refused(verb, unread, "--png", tmp_path / name) == (
            f"--png is '{tmp_path / name}', but must end in one of .pdf, .png, .svg; choose one."
        )
    nowhere = tmp_path / "no" / "x.png"
    assert refused(verb, unread, "--png", nowhere) == (
        f"--png is '{nowhere}', but {nowhere.parent} is not a folder; name a file in one that "
        "exists."
    )
    folder = tmp_path / "folder.png"
    folder.mkdir()
    assert refused(verb, unread, "--png", folder) == (
        f"--png is '{folder}', but {folder} is a folder; name a file in one that exists."
    )


@pytest.mark.parametrize("verb", ["ranks", "compare"])
@pytest.mark.parametrize(
    ("ending", "begins"),
    [(".pdf", b"%PDF"), (".png", b"\x89PNG"), (".PNG", b"\x89PNG"), (".svg", b"<?xml")],
)
def test_a_picture_is_of_the_kind_that_its_name_says(
    said: Callable[..., str],
    finished_run: Path,
    tmp_path: Path,
    verb: str,
    ending: str,
    begins: bytes,
) -> None:
    picture = tmp_path / f"x{ending}"
    assert f"drawn: {picture}" in said(verb, finished_run, "--png", picture)
    assert picture.read_bytes().startswith(begins)
