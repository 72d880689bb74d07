"""The command of a start, as it is recorded, starts the same again when it is pasted."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hyper_tune.provenance import start_record

SCRIPT = """
import json, os, sys
import torch
from hyper_tune.provenance import start_record

if os.environ.get("RANK", "0") == "0":
    said = [start_record(torch.device("cpu"))["command"], sys.argv, os.environ.get("WORLD_SIZE")]
    print(json.dumps(said))
"""
WORDS = ["--config", "a file.yaml", "model.name='it''s'", "seed=$HOME", "method.exclude=[a, b*]"]


def pasted(command: str, folder: Path) -> list[object]:
    """What a start by that line of a shell records."""
    done = subprocess.run(
        ["/bin/sh", "-c", command],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    recorded: list[object] = json.loads(done.stdout)
    return recorded


def test_the_command_of_a_start_pastes(tmp_path: Path) -> None:
    (tmp_path / "my recipe.py").write_text(SCRIPT)
    first = pasted(shlex.join([sys.executable, "my recipe.py", *WORDS]), tmp_path)
    command, arguments, world = first
    assert arguments == ["my recipe.py", *WORDS]
    assert world is None
    assert pasted(str(command), tmp_path) == first


def test_the_command_of_a_job_pastes(tmp_path: Path) -> None:
    """It starts a module, which as a script would find no other of its package."""
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "__init__.py").touch()
    (tmp_path / "recipe" / "run.py").write_text(f"from . import __name__ as _\n{SCRIPT}")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [sys.executable, *launcher, "-m", "recipe.run", *WORDS]
    first = pasted(shlex.join(words), tmp_path)
    command, arguments, world = first
    assert arguments == [str(tmp_path / "recipe" / "run.py"), *WORDS]
    assert world == "2"
    assert pasted(str(command), tmp_path) == first


def test_the_command_is_that_of_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    words = ["/venv/bin/python", "/venv/bin/tune", "run", "hyper-tune/lora_full", *WORDS]
    monkeypatch.setattr(sys, "orig_argv", words)
    monkeypatch.setattr(sys, "argv", ["/recipes/lora_full.py", *WORDS])
    assert shlex.split(start_record(torch.device("cpu"))["command"]) == words


def test_a_job_of_several_machines_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RUN_ID": "none", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}" if name == "RUN_ID" else name, value)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "recipe.py", "--config", "x"])
    assert shlex.split(start_record(torch.device("cpu"))["command"]) == [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"),
        *("--nproc_per_node", "4", "--no-python", "python", "-u", "recipe.py", "--config", "x"),
    ]
