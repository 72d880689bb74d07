"""DoRA and DyLoRA give on two processes what they give on one, and the processes agree."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).parent / "method_ranks.py"
Results = dict[int, list[dict[str, torch.Tensor]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each of one and of two processes over gloo ended with."""
    found: Results = {}
    for ranks in (1, 2):
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        finished = subprocess.run(
            [sys.executable, *(launcher if ranks > 1 else []), str(WORKER), str(folder)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert finished.returncode == 0, finished.stderr
        found[ranks] = [load_file(folder / f"{rank}.safetensors") for rank in range(ranks)]
    return found


@pytest.mark.parametrize("name", ["dora", "hyperdora", "dylora", "hyperdylora"])
def test_two_processes_train_as_one(results: Results, name: str) -> None:
    (one,), (first, second) = results[1], results[2]
    of_method = [key for key in one if key.startswith(f"{name}|")]
    assert len(of_method) > 3
    assert any("magnitude" in key for key in of_method) == name.endswith("dora")
    for key in of_method:
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], one[key], rtol=1e-11, atol=1e-12, msg=key)
    losses = one[f"{name}|losses"]
    assert len(set(losses.tolist())) == len(losses)


def test_a_sharded_base_gives_magnitudes_and_an_adapter_as_a_whole_one(
    tmp_path: Path, make_config: Callable[..., Path], run: Callable[..., None]
) -> None:
    config = make_config(
        method={"name": "hyperdora", "hypernetwork": {"preset": "attention-tiny"}},
        optimizer={"_component_": "torch.optim.SGD", "lr": 0.05},
        max_steps=3,
        batch_size=2,
        gradient_accumulation_steps=1,
    )
    whole, split = tmp_path / "whole", tmp_path / "split"
    run(config, f"output_dir={whole}", "batch_size=4")
    command = ["run", "--nproc_per_node", "2", "hyper-tune/hyperdora_full", "--config"]
    finished = subprocess.run(
        [Path(sys.executable).with_name("tune"), *command, config, f"output_dir={split}"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stderr
    expected, found = (
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (whole, split)
    )
    assert found.keys() == expected.keys()
    assert any("magnitude" in name for name in found)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
