"""Which steps counted, where only the device knows it of the last ones."""

import torch
from torch import Tensor

# Flags that are kept before they are read, in a long training before the first allocation.
_MOST_OPEN = 1000


class StepCount:
    """Optimizer steps that count, and those that are left out."""

    def __init__(self) -> None:
        self._taken, self._skipped = 0, 0
        self._open: list[Tensor] = []

    @property
    def most(self) -> int:
        """Steps that count if all do of which it is not known yet."""
        return self._taken + len(self._open)

    @property
    def seen(self) -> int:
        """Steps that count or were left out."""
        return self.most + self._skipped

    @property
    def taken(self) -> int:
        """Steps that count; this reads the device, where it is not known of all."""
        self._settle()
        return self._taken

    @property
    def skipped(self) -> int:
        """Steps that were left out; as ``taken``."""
        self._settle()
        return self._skipped

    def add(self, counts: Tensor | None = None) -> None:
        """Count a step; ``counts``: whether it does, bool, (), on the device."""
        if counts is None:
            self._taken += 1
        else:
            self._open.append(counts)
        if len(self._open) > _MOST_OPEN:
            self._settle()

    def skip(self) -> None:
        """Leave a step out."""
        self._skipped += 1

    def set(self, taken: int, skipped: int) -> None:
        """Start from other numbers."""
        self._taken, self._skipped, self._open = taken, skipped, []

    def _settle(self) -> None:
        if self._open:
            counted = int(torch.stack(self._open).sum())
            self.set(self._taken + counted, self.seen - self._taken - counted)
