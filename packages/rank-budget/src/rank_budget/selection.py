"""Which components live: pure functions of flat tensors, without a read from the device."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """What never changes about the components, which stand by group, then matrix, then place.

    Shapes: ``matrix``, ``cost``, ``group``, ``from_end``, ``floor`` and ``ceiling`` (components,),
    int64; ``group_start`` (groups,), where each group begins; ``padded`` (matrices, largest rank),
    the components of each matrix, beyond its rank the number of components. ``from_end`` counts
    the components that follow within the matrix. ``everything``: all true, bool, (components,).
    ``even``: every cost is one.
    """

    matrix: Tensor
    cost: Tensor
    group: Tensor
    from_end: Tensor
    group_start: Tensor
    padded: Tensor
    everything: Tensor
    even: bool
    floor: Tensor | None = None
    ceiling: Tensor | None = None


def prune_to_budget(
    scores: Tensor,
    alive: Tensor,
    layout: Layout,
    budgets: Tensor | int,
    spared: Tensor | None = None,
) -> Tensor:
    """Return what of ``alive`` survives when each group is cut to its budget.

    Of each group the live components of least score per cost fall, as few as meet the budget;
    among equal ones the first. Those above their matrix's ceiling fall before all others, those
    within its floor, and ``spared`` ones, after all others. A score that is NaN counts as the
    highest: pruning it would hide the fault.

    Shapes: scores, alive, spared and the result (components,); budgets (groups,), int64.

    >>> from rank_budget.layout import layout_of
    >>> layout = layout_of({"a": 2, "b": 2})
    >>> scores = torch.tensor([1.0, 0.5, 0.5, 9.0])
    >>> prune_to_budget(scores, torch.tensor([True, True, True, False]), layout, 2)
    tensor([ True, False,  True, False])
    """
    by_worth = _worth(scores, layout).argsort(stable=True)
    best_first = by_worth.flip(0)
    rank = _ranking(by_worth, alive, layout, spared)
    if rank is not None:
        best_first = best_first[rank[best_first].argsort(stable=True)]
    living = alive if alive is layout.everything else alive[best_first]
    # What is dead costs nothing, wherever it stands.
    spent = living if layout.even else layout.cost[best_first] * living
    fits = _spent(spent, layout) <= _of_group(budgets, layout)
    return fits.scatter(0, best_first, living & fits)


def grow_to_budget(scores: Tensor, alive: Tensor, layout: Layout, budgets: Tensor | int) -> Tensor:
    """Return ``alive`` and the components that wake up when each group is raised to its budget.

    A matrix is worth the mean score of its live components, per cost. The best matrix of each
    group wakes its next component, then the second best, and so on; only when each has had one
    does any get another. Among equal ones the first by name comes first. No matrix exceeds its
    ceiling.

    Shapes: as in `prune_to_budget`.

    >>> from rank_budget.layout import layout_of
    >>> layout = layout_of({"a": 2, "b": 2})
    >>> scores = torch.tensor([1.0, 0.0, 2.0, 0.0])
    >>> grow_to_budget(scores, torch.tensor([True, False] * 2), layout, 3)
    tensor([ True, False,  True,  True])
    """
    lives, sums = by_matrix(alive.long(), layout), by_matrix(scores * alive, layout)
    mean = _worth((sums / lives.clamp(min=1))[layout.matrix], layout)
    dead = alive.logical_not().long()
    before = dead.cumsum(0) - dead
    turn = before - before[layout.padded[:, 0][layout.matrix]]
    candidates = dead.bool()
    if layout.ceiling is not None:
        candidates &= lives[layout.matrix] + turn < layout.ceiling
    best_first = mean.argsort(stable=True, descending=True)
    turns = layout.padded.shape[1] + 1
    rank = layout.group * turns + turn
    order = best_first[rank[best_first].argsort(stable=True)]
    woken = candidates[order]
    room = budgets - per_group(layout.cost * alive, layout)
    fits = _spent(layout.cost[order] * woken, layout) <= _of_group(room, layout)
    return alive.scatter(0, order, alive[order] | (woken & fits))


def _worth(scores: Tensor, layout: Layout) -> Tensor:
    worth = scores.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    return worth if layout.even else worth / layout.cost


def _ranking(
    by_worth: Tensor, alive: Tensor, layout: Layout, spared: Tensor | None
) -> Tensor | None:
    """Return what is looked at before the worth, the best being least: the group, then the tier.

    None where there is one group and one tier.
    """
    if layout.group_start.numel() == 1 and layout.floor is None and spared is None:
        return None
    last = torch.ones_like(layout.group)
    if layout.floor is not None and layout.ceiling is not None:
        # Sorted by matrix, dead ones first, then by worth: from_end says how many are better.
        key = layout.matrix * 2 + alive
        order = by_worth[key[by_worth].argsort(stable=True)]
        better = torch.empty_like(layout.from_end)
        better[order] = layout.from_end
        last = 1 - (better < layout.floor).long() + (better >= layout.ceiling).long()
    if spared is not None:
        last = torch.where(spared, 0, last)
    return layout.group * 3 + last


def per_group(cost: Tensor, layout: Layout) -> Tensor:
    """Return the cost of each group: exact, since whole numbers have no rounding."""
    return torch.zeros_like(layout.group_start).index_add_(0, layout.group, cost)


def by_matrix(values: Tensor, layout: Layout) -> Tensor:
    """Return the sum over each matrix, in one order on every device."""
    return torch.cat([values, values.new_zeros(1)])[layout.padded].sum(1)


def _spent(cost: Tensor, layout: Layout) -> Tensor:
    """Return the cost up to each component, itself included, within its group."""
    spent = cost.cumsum(0)
    if layout.group_start.numel() == 1:
        return spent
    return spent - (spent - cost.long())[layout.group_start][layout.group]


def _of_group(budgets: Tensor | int, layout: Layout) -> Tensor | int:
    """Return each component's group's budget, or the one budget."""
    if isinstance(budgets, int) or layout.group_start.numel() == 1:
        return budgets
    return budgets[layout.group]
