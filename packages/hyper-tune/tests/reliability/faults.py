"""Faults that strike one process of a job at a named place, each of which leaves a mark.

A fault is a plain dict: ``stage`` and ``step`` say where, ``kind`` says what, ``mark`` is the file
that proves that it struck.
"""

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hyper_tune import checkpoint
from hyper_tune.errors import UserError
from hyper_tune.metrics import Metrics
from hyper_tune.torchtune import recipe
from hyper_tune.torchtune.data import FileDataset
from hyper_tune.torchtune.recipe import FineTuning
from hyper_tune.torchtune.streaming import StreamedDataset
from rank_budget import RankAllocator

RUNS: list[FineTuning] = []


def wrap(owner: Any, name: str, before: Callable[..., None]) -> None:
    """Call ``before`` with the arguments of each call of ``owner.name``."""
    function = getattr(owner, name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        before(*arguments, **options)
        return function(*arguments, **options)

    setattr(owner, name, wrapped)


def strike(fault: dict[str, Any]) -> None:
    """Leave the mark, and do what the fault's kind says, once."""
    if Path(fault["mark"]).exists():
        return
    Path(fault["mark"]).write_text(f"{fault['kind']} in {fault['stage']} at {RUNS[-1].step}")
    if fault["kind"].startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, fault["kind"]))
    elif fault["kind"] in errno.errorcode.values():
        number = getattr(errno, fault["kind"])
        raise OSError(number, os.strerror(number))
    elif fault["kind"] == "mistake":
        raise UserError(f"the stream broke off at step {fault['step']}.")
    elif fault["kind"] == "poison":
        RUNS[-1].before["poison"] = object()
    elif fault["kind"] == "flip":
        flip_a_bit(RUNS[-1], fault["part"])
    elif fault["kind"] == "forget":
        forget(RUNS[-1], fault["part"])
    else:
        raise AssertionError(fault["kind"])


def flip_a_bit(run: FineTuning, part: str) -> None:
    """Change the lowest bit of one number of the run's state."""
    method = run.method
    masks = [g.rank_mask for g in method.stack.groups if g.rank_mask is not None]
    tensor = {
        "factors": lambda: method.stack.values,
        "mask": lambda: masks[0],
        "score": lambda: method.allocator.state_dict()["importance"],
        "hypernetwork": lambda: method.parameters()[3],
    }[part]()
    with torch.no_grad():
        tensor.view(-1)[-1:].view(torch.uint8)[:1].bitwise_xor_(1)


def forget(run: FineTuning, part: str) -> None:
    """Lose a part of a state that was restored, as a resume would that did not know of it."""
    if part == "moments":
        run.optimizer.state.clear()
    elif part == "learning rate":
        run.optimizer.param_groups[0]["lr"] *= 1.001
    elif part == "allocator":
        run.method.allocator.steps -= 1
    elif part == "position":
        run.step -= 1
    else:
        raise AssertionError(part)


def _in_forward(fault: dict[str, Any], *, backward: bool) -> None:
    def register(run: FineTuning) -> None:
        if run.step == fault["step"]:
            run.model.layers[1].register_forward_hook(hook)

    def hook(module: Any, inputs: Any, output: torch.Tensor) -> None:
        if backward:
            output.register_hook(lambda _: strike(fault))
        else:
            strike(fault)

    wrap(FineTuning, "_optimize", register)


def install(fault: dict[str, Any]) -> None:
    """Put the fault in its place."""
    wrap(FineTuning, "_build", lambda run: RUNS.append(run))

    def at_step(*_: Any, **__: Any) -> None:
        if RUNS[-1].step == fault["step"]:
            strike(fault)

    stage = fault["stage"]
    if stage in ("forward", "backward"):
        _in_forward(fault, backward=stage == "backward")
        return
    places = {
        "allocation": (RankAllocator, "_allocate"),
        "collect": (recipe, "state_of"),
        "write": (checkpoint, "commit"),
        "draw": (StreamedDataset, "sample"),
        "row": (Metrics, "append"),
        "restore": (recipe, "restore_"),
        "step": (FineTuning, "_train_step"),
        "compare": (recipe, "replicated_tensors"),
    }
    wrap(*places[stage], at_step)


def log_samples(path: Path) -> None:
    """Write a line for each step that begins, its number, and for each sample, null and its own."""

    def write(*line: int | None) -> None:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def begin(run: FineTuning) -> None:
        write(run.step, None)

    def log(data: FileDataset | StreamedDataset, index: int, *_: Any) -> None:
        write(None, index)

    wrap(FineTuning, "_optimize", begin)
    wrap(FileDataset, "__getitem__", log)
    wrap(StreamedDataset, "sample", log)
