"""How many bytes of tensors are alive, counted from the operations that make them."""

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def stored_parts(tensor: Tensor) -> list[Tensor]:
    """Return the tensors that hold a tensor's bytes: itself, or those that it is quantised into.

    >>> len(stored_parts(torch.ones(3)))
    1
    """
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return [tensor]
    return [part for name in flatten()[0] for part in stored_parts(getattr(tensor, name))]


class LiveMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes that operations allocate, while they are alive, by phase.

    A context manager, on any device: on the meta device it counts what a real one would hold. A
    storage counts once, whatever views it has, from the operation that returns it until its last
    tensor is gone, and belongs to the phase in which it was made.

    ``held``: tensors that were there before and do not count. ``phase``: set it as work goes on.
    ``peak``: bytes by phase at the moment when most were alive. ``bytes``: alive now.

    >>> with LiveMemory([]) as memory:
    ...     memory.phase = "kept"
    ...     kept = torch.ones(10)
    ...     memory.phase = "sum"
    ...     total = (kept + torch.ones(10)).sum()
    >>> memory.peak, memory.bytes
    ({'kept': 40, 'sum': 80}, 44)
    """

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        parts = (part for tensor in held for part in stored_parts(tensor))
        self._held = {part.untyped_storage()._cdata for part in parts}
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._bytes: Counter[str] = Counter()
        self._most = 0
        self.phase = ""
        self.peak: Mapping[str, int] = {}

    @property
    def bytes(self) -> int:
        """What is alive now."""
        return self._bytes.total()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and count the storages of what it returns."""
        returned = function(*args, **(kwargs or {}))
        for value in returned if isinstance(returned, tuple | list) else (returned,):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return returned

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._held or key in self._alive:
            return
        size, phase = storage.nbytes(), self.phase

        def forget(_: object) -> None:
            del self._alive[key]
            self._bytes[phase] -= size

        self._alive[key] = weakref.ref(storage, forget)
        self._bytes[phase] += size
        if self.bytes > self._most:
            self._most = self.bytes
            self.peak = {name: count for name, count in self._bytes.items() if count}
