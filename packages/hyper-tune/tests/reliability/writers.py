"""Processes that write without end until they are killed, each time with another content."""

import itertools
import os
from pathlib import Path

import torch
from safetensors.torch import save

from hyper_tune import MethodConfig, assemble
from hyper_tune.checkpoint import read_newest, write_checkpoint


def state(step: int) -> dict[str, object]:
    """What is saved at a step: every tensor says which."""
    tensors = {name: torch.full((size,), float(step)) for name, size in (("p", 20_000), ("q", 7))}
    return {"step": step, "tensors": tensors, "history": list(range(step % 50))}


def _announce(folder: Path, number: int) -> None:
    # One write that the kernel has taken is there, whatever happens to this process.
    file = os.open(folder.parent / "announced", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, f"{number}\n".encode())
    os.close(file)


def save_forever(folder: str) -> None:
    """Save step after step, and announce each that is saved."""
    path = Path(folder)
    first = read_newest(path)[0] + 1 if path.exists() else 1
    for step in itertools.count(first):
        write_checkpoint(path, step, state(step), keep=1)
        _announce(path, step)


def save_in_place_forever(folder: str) -> None:
    """Do the same as one would without care: over the only copy, which the test must notice."""
    path = Path(folder) / "state.safetensors"
    path.parent.mkdir(exist_ok=True)
    for step in itertools.count(1):
        path.write_bytes(save(state(step)["tensors"]))
        _announce(Path(folder), step)


def export_forever(folder: str) -> None:
    """Export an adapter over the one before; every number of it says which it is."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    method = assemble(model, MethodConfig("lora", init_rank=4), total_steps=1)
    for number in itertools.count(1):
        with torch.no_grad():
            method.stack.values.fill_(float(number))
        method.export(folder)
        _announce(Path(folder), number)
