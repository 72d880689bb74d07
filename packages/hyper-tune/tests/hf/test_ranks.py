"""Two or four processes train as one: by Trainer and by accelerate, in DDP and in shards."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

WORKER = Path(__file__).parent / "trained_ranks.py"
LAUNCHER = ["-m", "torch.distributed.run", "--standalone"]
EXACT = [
    *("by hand, sharded", "accelerate, DDP", "accelerate, sharded"),
    *("Trainer, DDP", "Trainer, evaluated first", "Trainer, sharded", "Trainer, sharded, best"),
    "Trainer, sharded, smoothed",
]
ROUNDED = "Trainer, sharded, bf16"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process, two, and four with two copies of the base have written."""
    folder = tmp_path_factory.mktemp("trained")
    worker: dict[str, Any] = runpy.run_path(str(WORKER))
    assert [*EXACT, ROUNDED] == list(worker["KINDS"])
    worker["main"](folder)
    launch(2, str(folder))
    launch(4, str(folder), "by hand, sharded")
    return folder


def launch(ranks: int, *words: str) -> None:
    finished = subprocess.run(
        [sys.executable, *LAUNCHER, f"--nproc_per_node={ranks}", str(WORKER), *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stderr


def found(folder: Path, kind: str, rank: int, ranks: int) -> dict[str, Tensor]:
    """Losses, gradients and states of a rank."""
    return load_file(folder / f"{kind}-{rank}-of-{ranks}.safetensors")


@pytest.mark.parametrize("kind", EXACT)
def test_two_processes_train_as_one(folder: Path, kind: str) -> None:
    alone = found(folder, kind, 0, 1)
    first, second = (found(folder, kind, rank, 2) for rank in (0, 1))
    assert first.keys() == second.keys()
    assert list(alone) == [name for name in first if not name.startswith("resumed/")]
    gradients = [name for name in alone if name.startswith("gradient")]
    assert {name.partition("/")[0] for name in gradients} == {f"gradient {i}" for i in range(4)}
    has_head = kind != "Trainer, sharded, smoothed"
    assert any("classifier" in name for name in gradients) == has_head
    assert "state/hyper_tune.tensor.method/allocator/alive" in alone
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        bound = 1e-6 if name == "losses" else 1e-12  # Trainer adds its losses in single precision
        torch.testing.assert_close(first[name], value, rtol=1e-9, atol=bound, msg=name)


def test_four_processes_with_two_copies_of_the_base_train_as_one(folder: Path) -> None:
    kind = "by hand, sharded"
    alone = found(folder, kind, 0, 1)
    every = [found(folder, kind, rank, 4) for rank in range(4)]
    for name, value in alone.items():
        assert all(torch.equal(each[name], every[0][name]) for each in every), name
        torch.testing.assert_close(every[0][name], value, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("kind", EXACT)
def test_steps_of_two_processes_were_clipped_as_a_whole(folder: Path, kind: str) -> None:
    both = found(folder, kind, 0, 2)
    for step in range(4):
        parts = [value for name, value in both.items() if name.startswith(f"gradient {step}/")]
        assert torch.cat([part.flatten() for part in parts]).norm() == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("kind", [*EXACT[1:], ROUNDED])
def test_two_processes_go_on_bit_for_bit(folder: Path, kind: str) -> None:
    for rank in (0, 1):
        both = found(folder, kind, rank, 2)
        last = {name: value for name, value in both.items() if name.startswith("state/")}
        assert len(last) > 20
        for name, value in last.items():
            assert torch.equal(both[name.replace("state/", "resumed/", 1)], value), name


@pytest.mark.parametrize("kind", EXACT)
def test_two_processes_export_the_adapter_of_one(folder: Path, kind: str) -> None:
    alone, both = (folder / f"{kind} of {ranks}" / "adapter" for ranks in (1, 2))
    config = [json.loads((place / "adapter_config.json").read_text()) for place in (alone, both)]
    assert config[0] == config[1]
    left, right = (load_file(place / "adapter_model.safetensors") for place in (alone, both))
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, rtol=1e-9, atol=1e-12, msg=name)


def test_mixed_precision_holds_with_shards(folder: Path) -> None:
    alone, both = (found(folder, ROUNDED, 0, ranks)["losses"] for ranks in (1, 2))
    whole = found(folder, "Trainer, sharded", 0, 2)["losses"]
    torch.testing.assert_close(both, alone, rtol=1e-3, atol=0)
    assert (both - whole).abs().max() > 1e-5  # a loss in single precision is nearer than that
