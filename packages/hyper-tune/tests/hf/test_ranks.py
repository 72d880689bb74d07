"""Two processes train as one: in DistributedDataParallel by Trainer, and with the base in shards."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).parent / "trained_ranks.py"
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def run(command: list[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=environment,
    )
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_as_one(tmp_path: Path, kind: str) -> None:
    for launcher in ([], LAUNCHER):
        run([*launcher, str(WORKER), kind, str(tmp_path)])
    alone = load_file(tmp_path / f"{kind}-0-of-1.safetensors")
    first, second = (load_file(tmp_path / f"{kind}-{rank}-of-2.safetensors") for rank in (0, 1))
    assert list(alone) == list(first) == list(second)
    assert any(name.startswith("modules_to_save/classifier") for name in alone)
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-9, atol=1e-11, msg=name)
