"""The memory plan, against what real steps allocate and what real shards pass around."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from hyper_tune.torchtune.recipe import FineTuning
from hyper_tune.torchtune.rehearsal import rehearse
from hyper_tune.torchtune.settings import RecipeSettings

BATCH = 4
CONSTANT = ("factors", "factor gradients", "hypernetworks and their state")


@pytest.fixture
def even_records(tmp_path: Path) -> Path:
    """Samples of one length, so that every batch has it."""
    path = tmp_path / "even.jsonl"
    rows = [{"question": f"What is {n:03d}?", "answer": "x" * 150} for n in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def allocated_at_most(step: Callable[[], Any]) -> int:
    """Return by how many bytes a step's allocations exceed what was there before, at most.

    Counted by torch's profiler from the allocator's own events, not from operations.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    changes = [
        event.typed[1].alloc_size
        for event in profiled.profiler.kineto_results.experimental_event_tree()
        for event in walk(event)
        if event.name == "[memory]"
    ]
    highest = now = 0
    for change in changes:
        now += change
        highest = max(highest, now)
    return highest


def walk(event: Any) -> Any:
    yield event
    for child in event.children:
        yield from walk(child)


def storages(tensors: list[Tensor]) -> int:
    unique = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in unique.values())


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize(
    ("name", "family", "dtype", "checkpointing"),
    [
        ("lora", "llama", "fp32", True),
        ("adalora", "tied_qwen", "bf16", False),
        ("hyperlora", "tied_llama", "fp32", False),
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
        held = storages(there)
        measured = held + allocated_at_most(run._optimize)
    planned = rehearse(settings, length.pop()).memory(processes=1)
    assert sum(planned.values()) == pytest.approx(measured, rel=0.02)
    constant = ("base weights", "base buffers", *CONSTANT, "optimizer")
    assert sum(planned[part] for part in constant) == held
    assert planned["optimizer"] > 0
    assert (planned["hypernetworks and their state"] > 0) == name.startswith("hyper")
