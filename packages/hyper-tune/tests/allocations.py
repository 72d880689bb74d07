"""Bytes as torch's allocator counts them, apart from the operations that the package counts."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def allocated_at_most(step: Callable[[], Any]) -> int:
    """By how many bytes a step's allocations exceed what was there before, at most."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    highest = now = 0
    for event in _walk(profiled.profiler.kineto_results.experimental_event_tree()):
        if event.name == "[memory]":
            now += event.typed[1].alloc_size
            highest = max(highest, now)
    return highest


def _walk(events: Iterable[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _walk(event.children)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of the tensors' memory, each storage counted once."""
    unique = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in unique.values())
