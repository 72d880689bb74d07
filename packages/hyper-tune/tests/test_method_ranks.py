"""The recipe of DoRA gives on two processes what it gives on one."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file


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
