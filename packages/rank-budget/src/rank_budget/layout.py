"""The order of all components, and their costs, limits and groups, from names and patterns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from fractions import Fraction

import torch
from torch import Tensor

from rank_budget.errors import BudgetError, require, require_whole
from rank_budget.selection import Layout


@dataclass(frozen=True)
class Limits:
    """Bounds for matrices by pattern of name, and groups that share a budget.

    ``floors`` and ``ceilings``: the least and the most ranks of each matrix whose name matches;
    of several patterns the last that matches counts. ``groups``: patterns; matrices that match the
    same pattern, the first that fits, compete among themselves, and those that match none form one
    more group. Each group's part of the budget is its part of the start.

    Raises:
        BudgetError: a bound below zero.

    >>> Limits(floors={"*.q_proj": 1}, ceilings={"*": 4}).bounds("layers.0.q_proj", rank=3)
    (1, 3)
    """

    floors: Mapping[str, int] = field(default_factory=dict)
    ceilings: Mapping[str, int] = field(default_factory=dict)
    groups: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("floors", "ceilings"):
            for pattern, ranks in getattr(self, name).items():
                field_name = f"{name}[{pattern!r}]"
                require_whole(field_name, ranks)
                require(ranks >= 0, field_name, ranks, "must be 0 or more")

    def bounds(self, name: str, rank: int) -> tuple[int, int]:
        """Return the floor and the ceiling of a matrix; a floor above its rank is its rank."""
        floor = [ranks for pattern, ranks in self.floors.items() if fnmatchcase(name, pattern)]
        ceiling = [ranks for pattern, ranks in self.ceilings.items() if fnmatchcase(name, pattern)]
        return min(rank, [0, *floor][-1]), min(rank, [rank, *ceiling][-1])

    def group(self, name: str) -> int:
        """Return the number of a matrix's group."""
        fits = (number for number, p in enumerate(self.groups) if fnmatchcase(name, p))
        return next(fits, len(self.groups))

    def check(self, names: Sequence[str]) -> None:
        """Refuse patterns that match nothing, and a floor above its ceiling."""
        for field_name in ("floors", "ceilings", "groups"):
            for pattern in getattr(self, field_name):
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise BudgetError(
                        f"{field_name} has the pattern {pattern!r}, which matches none of the "
                        f"{len(names)} matrices, such as {names[0]!r}; mend or remove it."
                    )


def limits_given(limits: Limits | None) -> Limits:
    """Return the limits, none if there are none."""
    if not isinstance(limits, Limits | None):
        raise BudgetError(
            f"limits is a {type(limits).__name__}, expected Limits(floors=..., ceilings=..., "
            "groups=...)."
        )
    return limits or Limits()


def order_of(names: Sequence[str], limits: Limits) -> list[str]:
    """Return the names by group and then by name: the order of everything flat."""
    return sorted(names, key=lambda name: (limits.group(name), name))


def layout_of(
    order: Mapping[str, int],
    *,
    costs: Sequence[int] | None = None,
    limits: Limits | None = None,
    device: torch.device | str = "cpu",
) -> Layout:
    """Return the `Layout` of matrices.

    ``order``: the rank of each, in the order of `order_of`. ``costs``: of one component of each;
    one where not given.

    >>> layout_of({"a": 2, "b": 1}).matrix
    tensor([0, 0, 1])
    """
    limits, costs = limits or Limits(), costs or [1] * len(order)
    names, ranks = list(order), list(order.values())

    def spread(values: Sequence[int]) -> Tensor:
        each = [value for value, rank in zip(values, ranks, strict=True) for _ in range(rank)]
        return torch.tensor(each, dtype=torch.long, device=device)

    groups = [limits.group(name) for name in names]
    present = sorted(set(groups))
    group = spread([present.index(number) for number in groups])
    bounds = [limits.bounds(name, rank) for name, rank in zip(names, ranks, strict=True)]
    limited = bool(limits.floors or limits.ceilings)
    padded, start = [], 0
    for rank in ranks:
        row = list(range(start, start + rank))
        padded.append(row + [sum(ranks)] * (max(ranks) - rank))
        start += rank
    from_end = [rank - 1 - place for rank in ranks for place in range(rank)]
    listed = group.tolist()
    starts = [listed.index(number) if number in listed else 0 for number in range(len(present))]
    return Layout(
        matrix=spread(range(len(names))),
        cost=spread(costs),
        group=group,
        from_end=torch.tensor(from_end, dtype=torch.long, device=device),
        group_start=torch.tensor(starts, dtype=torch.long, device=device),
        padded=torch.tensor(padded, dtype=torch.long, device=device),
        everything=torch.ones(sum(ranks), dtype=torch.bool, device=device),
        even=set(costs) <= {1},
        floor=spread([floor for floor, _ in bounds]) if limited else None,
        ceiling=spread([ceiling for _, ceiling in bounds]) if limited else None,
    )


def shares(budget: int, parts: Sequence[int]) -> list[int]:
    """Return ``budget`` in whole shares, in proportion to ``parts``, by the method of D'Hondt.

    Of the usual methods it is one by which no share grows when the budget falls.

    >>> shares(5, [6, 3, 3])
    [3, 1, 1]
    """
    total = max(1, sum(parts))
    found = [budget * part // total for part in parts]
    for _ in range(budget - sum(found)):
        best = max(range(len(parts)), key=lambda i: (Fraction(parts[i], found[i] + 1), -i))
        found[best] += 1
    return found
