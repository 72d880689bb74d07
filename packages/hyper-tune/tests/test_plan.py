"""The memory plan, against what real steps allocate and what real shards pass around."""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from hyper_tune.errors import UserError
from hyper_tune.layout import BaseLayout
from hyper_tune.plan import gpu_bytes
from hyper_tune.split import GenerationCost
from hyper_tune.torchtune.recipe import FineTuning
from hyper_tune.torchtune.rehearsal import rehearse
from hyper_tune.torchtune.settings import RecipeSettings

# Shared with a script that torchrun starts; test modules cannot import each other.
ALLOCATIONS = runpy.run_path(str(Path(__file__).with_name("allocations.py")))
BATCH = 4
ConfigMaker = Callable[..., Path]
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
        ("dora", "qwen", "bf16", False),
        ("dylora", "llama", "fp32", True),
        ("hyperdora", "llama", "fp32", True),
        ("hyperdylora", "tied_qwen", "fp32", False),
    ],
)
def test_the_plan_is_within_a_fiftieth_of_what_a_real_step_takes(
    make_config: ConfigMaker,
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
        length = {len(run.data.order.samples[index]["tokens"]) for index in range(run.data.size)}
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
    planned = rehearse(settings, length.pop()).memory(BaseLayout(1, 1))
    assert sum(planned.values()) == pytest.approx(measured, rel=0.02)
    constant = ("base weights", "base buffers", *CONSTANT, "optimizer")
    assert sum(planned[part] for part in constant) == held
    assert planned["optimizer"] > 0
    assert (planned["hypernetworks and their state"] > 0) == name.startswith("hyper")


def seen_by(ranks: int, config: Path, folder: Path) -> list[dict[str, Any]]:
    """What each of several processes saw of a step."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    worker = Path(__file__).parent / "plan_ranks.py"
    finished = subprocess.run(
        [sys.executable, *launcher, str(worker), str(config), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def test_what_two_ranks_hold_gather_and_sum_is_as_planned(
    tmp_path: Path, make_config: ConfigMaker
) -> None:
    # Short samples and no hypernetworks, so that the gathered weights are most of the memory.
    records = tmp_path / "short.jsonl"
    rows = [{"question": f"{n:02d}", "answer": "yes"} for n in range(24)]
    records.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(
        method={"name": "lora", "init_rank": 1},
        batch_size=1,
        gradient_accumulation_steps=3,
        max_steps=3,
        dataset={"_component_": "hyper_tune.torchtune.data.file_dataset", "path": str(records)},
    )
    seen = seen_by(2, config, tmp_path)
    settings = RecipeSettings.from_config(OmegaConf.load(config))
    planned = rehearse(settings, seen[0]["length"])
    layout = BaseLayout(shard=2, replicate=1)
    memory, received = planned.memory(layout), planned.communication(layout, micro_batches=3)
    # Rows that the ranks do not divide are padded, so that the first rank's share is the largest.
    assert seen[0]["base"] == memory["base weights"] >= seen[1]["base"]
    constant = ("base weights", "base buffers", *CONSTANT, "optimizer")
    working = sum(memory.values()) - sum(memory[part] for part in constant)
    block, root = (sum(t.nbytes for t in group) for group in (planned.blocks[0], planned.root))
    assert memory["gathered base weights"] == root + 3 * block
    for rank in seen:
        gathered, summed = (rank["filled"][name] for name in ("_allgather_base_", "allreduce_"))
        assert gathered / 2 == pytest.approx(received["gathering the base"], rel=0.01)
        # The sums of losses, tokens and wishes to stop are three numbers more.
        assert summed - 3 * 8 == received["summing gradients"]
        # gloo may hold the buffers that the root and a block were gathered into until its work is
        # forgotten, and may not yet hold a block when the most is in use.
        assert working - 3 * block <= rank["working"] <= working + root + block


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_what_four_ranks_pass_around_in_two_copies_and_shares_is_as_planned(
    tmp_path: Path, make_config: ConfigMaker
) -> None:
    config = make_config(
        batch_size=1,
        gradient_accumulation_steps=1,
        data_parallel_replicate_dim=2,
        split_generation=True,
        dtype="bf16",
        enable_activation_checkpointing=True,
    )
    seen = seen_by(4, config, tmp_path)
    settings = RecipeSettings.from_config(OmegaConf.load(config))
    same = replace(
        settings,
        data_parallel_replicate_dim=1,
        split_generation=False,
        gradient_accumulation_steps=4,
    )
    alone = []
    with FineTuning(replace(same, output_dir=tmp_path / "alone")) as run:
        for run.step in range(2):
            alone.append(run._optimize().loss)
    planned = rehearse(settings, seen[0]["length"])
    layout = BaseLayout(shard=2, replicate=2)
    received = planned.communication(layout, micro_batches=1)
    assert seen[0]["base"] == planned.memory(layout)["base weights"]
    assert planned.generation is not None
    values, weights = planned.generation.values, planned.generation.weights
    for rank in seen:
        filled = rank["filled"]
        gathered = filled["_allgather_base_"] / 2
        assert gathered == pytest.approx(received["gathering the base"], rel=0.01)
        # The sums of losses, tokens and wishes to stop are three numbers more.
        assert filled["allreduce_"] - 3 * 8 == planned.held["factor gradients"] + weights
        # Shares are padded to the largest.
        assert values <= filled["allgather_"] <= 1.35 * values
        assert received["generating in shares"] == (values + 2 * weights) * 3 // 4
        assert rank["losses"] == pytest.approx(alone, rel=1e-6)
        assert rank["state"] == seen[0]["state"]


def test_shares_pay_where_there_is_much_to_generate() -> None:
    cost = GenerationCost(operations=10**12, values=10**8, weights=10**8)
    assert cost.received(4) == 3 * 10**8 * 3 // 4
    assert cost.split_pays(4)
    assert not replace(cost, operations=10**10).split_pays(4)
    assert not replace(cost, weights=10**11).split_pays(4)


def test_a_gpu_is_named_with_its_memory() -> None:
    assert gpu_bytes("a100-40") == 40 * 10**9
    for name in ("h100", "80", "h100-80gb", ""):
        with pytest.raises(UserError, match="must end in the memory in GB, such as h100-80"):
            gpu_bytes(name)


def test_a_budget_that_leaves_no_rank_is_refused_as_a_run_does(
    fails: Callable[..., str], refused: Callable[..., str], make_config: ConfigMaker
) -> None:
    message = fails("method.budget=0.01")
    assert message == "method.budget is 0.01, but leaves none of the 56 ranks; raise it."
    assert refused("plan", "--config", make_config(), "method.budget=0.01") == message
