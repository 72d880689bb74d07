"""What one component of a matrix costs: a rank, its numbers, or its bytes in the export."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from rank_budget.errors import BudgetError, refuse_class

__all__ = ["COSTS", "ExportedBytes", "total_cost"]

Cost = Callable[[int, int], int]


def ranks(out_width: int, in_width: int) -> int:
    """Return 1: a rank is a rank (the paper).

    >>> ranks(4096, 1024)
    1
    """
    del out_width, in_width
    return 1


def parameters(out_width: int, in_width: int) -> int:
    """Return out + in, the numbers of a component in the exported adapter; λ is folded in.

    >>> parameters(4096, 1024)
    5120
    """
    return out_width + in_width


@dataclass(frozen=True)
class ExportedBytes:
    """The bytes of a component in a compact export in ``dtype``: each matrix of its own rank.

    An export that fills all matrices up to one rank is larger.

    >>> ExportedBytes(torch.bfloat16)(4096, 1024)
    10240
    """

    dtype: torch.dtype = torch.float32

    def __call__(self, out_width: int, in_width: int) -> int:
        """Return (out + in) times the size of one number."""
        return parameters(out_width, in_width) * self.dtype.itemsize


COSTS: Mapping[str, Cost] = {
    "ranks": ranks,
    "parameters": parameters,
    "bytes": ExportedBytes(torch.float32),
}


def cost_named(cost: str | Cost) -> Cost:
    """Return a cost by name, or the function itself."""
    refuse_class("cost", cost)
    known = cost in COSTS if isinstance(cost, str) else callable(cost)
    if not known:
        raise BudgetError(f"cost is {cost!r}, expected {', '.join(COSTS)}, or a function.")
    return COSTS[cost] if isinstance(cost, str) else cost


def total_cost(widths: Sequence[tuple[int, int, int]], cost: str | Cost) -> int:
    """Return the cost of matrices, each given by its rank, output and input width.

    >>> total_cost([(2, 10, 5), (1, 3, 3)], "parameters")
    36
    """
    one = cost_named(cost)
    return sum(rank * one(out_width, in_width) for rank, out_width, in_width in widths)
