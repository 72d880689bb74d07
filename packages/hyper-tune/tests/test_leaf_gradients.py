"""The leaf boundary gives end-to-end autograd's gradients, however the step is arranged."""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).parent / "leaf_gradients.py"
# A script that torchrun starts; test modules cannot import each other.
ARRANGEMENTS: dict[int, list[Any]] = runpy.run_path(str(WORKER))["ARRANGEMENTS"]
Results = dict[int, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What one, two and four processes over gloo have written."""
    folder = tmp_path_factory.mktemp("gradients")
    found = {}
    for ranks in ARRANGEMENTS:
        output = folder / f"{ranks}.safetensors"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        finished = subprocess.run(
            [sys.executable, *(launcher if ranks > 1 else []), str(WORKER), str(output)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert finished.returncode == 0, finished.stderr
        found[ranks] = load_file(output)
    return found


def below(results: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """What was written under a prefix, without it."""
    return {
        key.removeprefix(prefix): value
        for key, value in results.items()
        if key.startswith(prefix) and "|" not in key.removeprefix(prefix)
    }


@pytest.mark.parametrize(
    ("ranks", "arrangement"),
    [(ranks, arrangement) for ranks, all_of in ARRANGEMENTS.items() for arrangement in all_of],
)
def test_leaf_gradients_equal_end_to_end_autograd(
    results: Results, ranks: int, arrangement: Any
) -> None:
    twin = below(results[1], f"{arrangement.state}|end-to-end|")
    found = below(results[ranks], f"{arrangement}|")
    assert found.keys() == twin.keys()
    assert len(twin) > 10
    for name, expected in twin.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=1e-13, msg=name)
    assert max(value.abs().max() for key, value in twin.items() if "." in key) > 1e-2


@pytest.mark.parametrize(
    ("ranks", "arrangement"),
    [
        (ranks, arrangement)
        for ranks in (2, 4)
        for arrangement in ARRANGEMENTS[ranks]
        if arrangement.checkpointing and arrangement.accumulation == 2
    ],
)
def test_masks_state_and_export_equal_one_process(
    results: Results, ranks: int, arrangement: Any
) -> None:
    alone = below(
        results[1], f"{arrangement._replace(copies=1, split=False, compiled=False)}|trained|"
    )
    found = below(results[ranks], f"{arrangement}|trained|")
    assert found.keys() == alone.keys()
    masks = [name for name in alone if name.startswith("mask.")]
    assert sum(int((~alone[name]).sum()) for name in masks) > 0
    for name, expected in alone.items():
        if expected.dtype == torch.bool:
            assert torch.equal(found[name], expected), name
        else:
            # The export is in float32.
            precision = 1e-12 if expected.dtype == torch.float64 else 1e-6
            torch.testing.assert_close(
                found[name], expected, rtol=precision, atol=precision, msg=name
            )
    assert any(name.startswith("exported.") for name in alone)
