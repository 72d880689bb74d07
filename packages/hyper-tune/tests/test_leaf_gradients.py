"""The leaf boundary gives end-to-end autograd's gradients, however the step is arranged."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).parent / "leaf_gradients.py"
ARRANGEMENTS = list(itertools.product(("recurrent", "static"), (False, True), (1, 2), (1, 2)))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("gradients")
    launchers = {
        1: [sys.executable],
        2: [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    }
    found = {}
    for ranks, launcher in launchers.items():
        output = folder / f"{ranks}.safetensors"
        finished = subprocess.run(
            [*launcher, str(WORKER), str(output)], capture_output=True, text=True, check=False
        )
        assert finished.returncode == 0, finished.stderr
        found[ranks] = load_file(output)
    return found


@pytest.mark.parametrize(("state", "checkpointing", "accumulation", "ranks"), ARRANGEMENTS)
def test_leaf_gradients_equal_end_to_end_autograd(
    results: dict[int, dict[str, torch.Tensor]],
    state: str,
    checkpointing: bool,
    accumulation: int,
    ranks: int,
) -> None:
    twin = {
        key.removeprefix(f"{state}|end-to-end|"): value
        for key, value in results[1].items()
        if key.startswith(f"{state}|end-to-end|")
    }
    prefix = f"{state}|{checkpointing}|{accumulation}|"
    found = {
        key.removeprefix(prefix): value
        for key, value in results[ranks].items()
        if key.startswith(prefix)
    }
    assert found.keys() == twin.keys()
    assert len(twin) > 10
    for name, expected in twin.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=1e-13, msg=name)
    assert max(value.abs().max() for key, value in twin.items() if "." in key) > 1e-2
