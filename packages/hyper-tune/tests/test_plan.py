"""The memory plan, against what real steps allocate and what real shards pass around."""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from hyper_tune.errors import UserError
from hyper_tune.plan import gpu_bytes
from hyper_tune.torchtune.recipe import FineTuning
from hyper_tune.torchtune.rehearsal import rehearse
from hyper_tune.torchtune.settings import RecipeSettings

# Shared with a script that torchrun starts; test modules cannot import each other.
ALLOCATIONS = runpy.run_path(str(Path(__file__).with_name("allocations.py")))
BATCH = 4
CONSTANT = ("factors", "factor gradients", "hypernetworks and their state")


@pytest.fixture
def even_records(tmp_path: Path) -> Path:
    """Samples of one length, so that every batch has it."""
    path = tmp_path / "even.jsonl"
    rows = [{"question": f"What is {n:03d}?", "answer": "x" * 150} for n in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize(
    ("name", "family", "dtype", "checkpointing"),
    [
        ("lora", "llama", "fp32", True),
        ("adalora", "tied_qwen", "bf16", False),
        ("hyperlora", "llama3_2", "fp32", False),
        ("hyperadalora", "llama", "fp32", False),
        ("hyperadalora", "qwen", "bf16", True),
    ],
)
def test_the_plan_is_within_a_fiftieth_of_what_a_real_step_takes(
    make_config: Callable[..., Path],
    even_records: Path,
    request: pytest.FixtureRequest,
    name: str,
    family: str,
    dtype: str,
    checkpointing: bool,
) -> None:
    method: dict[str, Any] = {"name": name, "init_rank": 4}
    if name.startswith("hyper"):
        method["hypernetwork"] = {"preset": "attention-small"}
    if "ada" in name:
        method["pruning"] = {"interval": 3}
    config = make_config(
        **request.getfixturevalue(family),
        method=method,
        dtype=dtype,
        batch_size=BATCH,
        dataset={
            "_component_": "hyper_tune.torchtune.data.file_dataset",
            "path": str(even_records),
        },
        enable_activation_checkpointing=checkpointing,
    )
    settings = RecipeSettings.from_config(OmegaConf.load(config))
    with FineTuning(settings) as run:
        length = {len(run.data[index]["tokens"]) for index in range(len(run.data))}
        assert len(length) == 1
        run._optimize()
        run.step += 1
        optimizer_state = [
            value for entry in run.optimizer.state.values() for value in entry.values()
        ]
        there = [
            *run.model.parameters(),
            *run.model.buffers(),
            *run.method.owner.state_dict().values(),
            *optimizer_state,
            run.method.stack.values,
            run.method.stack.grads,
        ]
        held = ALLOCATIONS["storage_bytes"](there)
        measured = held + ALLOCATIONS["allocated_at_most"](run._optimize)
    planned = rehearse(settings, length.pop()).memory(processes=1)
    assert sum(planned.values()) == pytest.approx(measured, rel=0.02)
    constant = ("base weights", "base buffers", *CONSTANT, "optimizer")
    assert sum(planned[part] for part in constant) == held
    assert planned["optimizer"] > 0
    assert (planned["hypernetworks and their state"] > 0) == name.startswith("hyper")


def test_what_two_ranks_hold_gather_and_sum_is_as_planned(
    tmp_path: Path, make_config: Callable[..., Path], even_records: Path
) -> None:
    config = make_config(
        batch_size=BATCH,
        gradient_accumulation_steps=3,
        max_steps=3,
        dataset={
            "_component_": "hyper_tune.torchtune.data.file_dataset",
            "path": str(even_records),
        },
    )
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    worker = Path(__file__).parent / "plan_ranks.py"
    finished = subprocess.run(
        [sys.executable, *launcher, str(worker), str(config), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stderr
    settings = RecipeSettings.from_config(OmegaConf.load(config))
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    planned = rehearse(settings, seen[0]["length"])
    memory, received = planned.memory(2), planned.communication(2, micro_batches=3)
    # Rows that the ranks do not divide are padded, so that the first rank's share is the largest.
    assert [rank["base"] <= memory["base weights"] for rank in seen] == [True, True]
    assert seen[0]["base"] == memory["base weights"]
    constant = sum(memory[part] for part in (*CONSTANT, "optimizer", "base weights"))
    working = sum(memory.values()) - constant - memory["base buffers"]
    for rank in seen:
        gathered, summed = (rank["filled"][name] for name in ("_allgather_base_", "allreduce_"))
        assert gathered / 2 == pytest.approx(received["gathering the base"], rel=0.01)
        # The sums of losses and tokens are two numbers more.
        assert summed - 2 * 8 == received["summing gradients"]
        assert rank["working"] == pytest.approx(working, rel=0.02)


def test_a_gpu_is_named_with_its_memory() -> None:
    assert gpu_bytes("a100-40") == 40 * 10**9
    for name in ("h100", "80", "h100-80gb", ""):
        with pytest.raises(UserError, match="must end in the memory in GB, such as h100-80"):
            gpu_bytes(name)
