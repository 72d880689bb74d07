"""A step's operations do not grow with the matrices, and it reads the device once."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READ_OPERATIONS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "unique"}
READ_METHODS = {"tolist", "item", "numpy", "cpu", "nonzero", "equal"} | {
    f"__{name}__" for name in ("bool", "int", "float", "index", "contains", "array")
}


class Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.operations[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Lists the methods by which Python reads a tensor's values."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if getattr(function, "__name__", "") in READ_METHODS:
            self.seen.append(function.__name__)
        return function(*args, **(kwargs or {}))


def operations(small: SimpleNamespace, case: str, blocks: int, steps: int) -> list[Counter[str]]:
    """Count what each step does outside the model."""
    run = small.build(case, blocks=blocks, optimizer=torch.optim.SGD)
    for group in run.optimizer.param_groups:
        group["foreach"] = False
    counted = []
    for number in range(steps):
        step = run.method.step(run.optimizer, 1.0)
        with Counted() as mode:
            step.__enter__()
        for x in small.batches(number):
            step.backward(run.loss_sum(x), tokens=len(x))
        with mode:
            step.__exit__(None, None, None)
        counted.append(mode.operations)
    return counted


def test_operations_do_not_grow_with_the_matrices(small: SimpleNamespace, case: str) -> None:
    few, many = (operations(small, case, blocks, steps=4) for blocks in (1, 8))
    assert few == many
    assert min(sum(counter.values()) for counter in few) > 10
    if "ada" in case:
        assert few[2] != few[1]


def test_a_step_reads_the_device_once_and_after_the_backward_pass(
    small: SimpleNamespace, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small.build(case, optimizer=torch.optim.SGD)
    reads = Reads()
    pull_back = run.method.owner.backward

    def recorded() -> None:
        pull_back()
        reads.seen.append("backward")

    monkeypatch.setattr(run.method.owner, "backward", recorded)
    for number in range(4):
        reads.seen.clear()
        with Counted() as mode, reads:
            report = run.step(small.batches(number))
        assert reads.seen == ["backward", "tolist"]
        assert not READ_OPERATIONS & mode.operations.keys()
    assert report.live_ranks == run.method.live_ranks


@pytest.mark.parametrize("read", ["item", "tolist", "bool", "float"])
def test_the_counters_see_a_read(read: str) -> None:
    value = torch.ones(())
    with Reads() as reads, Counted() as mode:
        {"item": value.item, "tolist": value.tolist, "bool": lambda: bool(value),
         "float": lambda: float(value)}[read]()  # fmt: skip
    assert len(reads.seen) == 1
    assert READ_OPERATIONS & mode.operations.keys() or read == "tolist"
