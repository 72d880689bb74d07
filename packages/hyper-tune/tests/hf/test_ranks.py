"""Two processes train as one: by Trainer in DistributedDataParallel, and with sharded bases."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).parent / "trained_ranks.py"
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process and two have written."""
    folder = tmp_path_factory.mktemp("trained")
    runpy.run_path(str(WORKER))["main"](folder)
    finished = subprocess.run(
        [sys.executable, *LAUNCHER, str(WORKER), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stderr
    return folder


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_as_one(folder: Path, kind: str) -> None:
    alone = load_file(folder / f"{kind}-0-of-1.safetensors")
    first, second = (load_file(folder / f"{kind}-{rank}-of-2.safetensors") for rank in (0, 1))
    assert list(alone) == list(first) == list(second)
    assert any(name.startswith("modules_to_save/classifier") for name in alone)
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-9, atol=1e-11, msg=name)
