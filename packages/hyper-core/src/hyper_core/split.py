"""A share of the matrices, for processes that generate them together."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyper_core.errors import HyperError


@dataclass(frozen=True)
class Split:
    """This process generates share ``index`` of ``count`` of each group's matrices.

    Of n matrices it is those from ⌊n·index/count⌋ to below ⌊n·(index + 1)/count⌋; a share may be
    empty. ``gather`` takes a vector of this share's values and returns those of all shares,
    (count, numbers), in the order of their index: `torch.distributed.all_gather_into_tensor`, for
    one. Vectors are padded to equal length. It is called once in each split `refresh`, by all
    shares or by none. Each matrix must go through the body by itself, as `BodyConfig` asks.

    Raises:
        HyperError: no such share.

    >>> [Split(i, 3, torch.atleast_2d).bounds(8) for i in range(3)]
    [(0, 2), (2, 5), (5, 8)]
    """

    index: int
    count: int
    gather: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.index < self.count:
            raise HyperError(
                f"Split has index {self.index!r} of count {self.count!r}, expected a whole number "
                "from 0 to below count; give the process's rank and how many there are."
            )

    def bounds(self, matrices: int, index: int | None = None) -> tuple[int, int]:
        """Return the first matrix of a share, this one's by default, and the first after it."""
        index = self.index if index is None else index
        return matrices * index // self.count, matrices * (index + 1) // self.count

    def own(self, stacks: Sequence[Tensor]) -> list[Tensor]:
        """Return this share of each of ``stacks``, as views."""
        bounds = [self.bounds(len(stack)) for stack in stacks]
        return [stack[start:end] for stack, (start, end) in zip(stacks, bounds, strict=True)]

    @torch.no_grad()
    def exchange(self, parts: Sequence[Tensor], matrices: Sequence[int]) -> list[Tensor]:
        """Return whole stacks for this share's ``parts``; ``matrices`` of each whole.

        Raises:
            HyperError: what was gathered is not one vector for each share.
        """
        sizes = [self._sizes(parts, matrices, index) for index in range(self.count)]
        length = max(map(sum, sizes))
        mine = torch.cat([part.flatten() for part in parts])
        gathered = self.gather(torch.nn.functional.pad(mine, (0, length - len(mine))))
        if tuple(gathered.shape) != (self.count, length):
            raise HyperError(
                f"Split.gather returned the shape {tuple(gathered.shape)}, expected "
                f"{(self.count, length)}; return the vector of each share as a row."
            )
        rows = [
            torch.split(row, [*own, length - sum(own)])[:-1]
            for row, own in zip(gathered.unbind(), sizes, strict=True)
        ]
        return [
            torch.cat(pieces).view(count, *part.shape[1:])
            for pieces, part, count in zip(zip(*rows, strict=True), parts, matrices, strict=True)
        ]

    def _sizes(self, parts: Sequence[Tensor], matrices: Sequence[int], index: int) -> list[int]:
        """Return how many numbers of each stack the share ``index`` has."""
        bounds = [self.bounds(count, index) for count in matrices]
        return [
            (end - start) * part.shape[1] * part.shape[2]
            for (start, end), part in zip(bounds, parts, strict=True)
        ]


def fill_gradients_(weights: Iterable[Tensor]) -> None:
    """Give zeros to the weights that have no gradient, so that all processes sum the same ones."""
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
