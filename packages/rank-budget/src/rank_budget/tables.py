"""Ranks and schedules as text, and as numbers for a logger."""

import re
from collections.abc import Mapping

from rank_budget.allocator import RankAllocator
from rank_budget.errors import require, require_whole
from rank_budget.schedule_phases import Phased
from rank_budget.schedules import Schedule

__all__ = ["rank_table", "scalars", "schedule_table"]

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


def grid_of(ranks: Mapping[str, int]) -> tuple[list[str], list[str], dict[tuple[str, str], int]]:
    """Return layers, modules and the rank at each pair; a name without a number has layer ""."""
    found = {name: _LAYER.search(name) for name in ranks}
    # Two towers, such as an encoder and a decoder, have modules of the same name at a layer.
    towers = {name[: match.start()] for name, match in found.items() if match}
    cells: dict[tuple[str, str], int] = {}
    for name, match in found.items():
        layer, tower, module = "", "", name
        if match:
            layer, tower, module = match[1], name[: match.start()], name[match.end() :]
        prefix = f"{tower}." if tower and len(towers) > 1 else ""
        cells[layer, prefix + module] = ranks[name]
    layers = sorted({layer for layer, _ in cells}, key=lambda text: int(text or -1))
    modules = list(dict.fromkeys(module for _, module in cells))
    return layers, modules, cells


def rank_table(ranks: Mapping[str, int], initial: int) -> str:
    """Return the live ranks as lines of text, layers by modules.

    ``ranks``: live components by module name, the layer being the first number in it.
    ``initial``: components per matrix at the start.

    >>> print(rank_table({"layers.0.q_proj": 3, "layers.0.v_proj": 1, "layers.1.q_proj": 0}, 4))
    layer  q_proj  v_proj
    0           3       1
    1           0       -
    4 of 12 ranks
    """
    layers, modules, cells = grid_of(ranks)
    widths = [max(6, len(module)) for module in modules]
    lines = ["  ".join(["layer", *(f"{m:>{w}}" for m, w in zip(modules, widths, strict=True))])]
    for layer in layers:
        row = [str(cells.get((layer, module), "-")) for module in modules]
        padded = (f"{text:>{width}}" for text, width in zip(row, widths, strict=True))
        lines.append("  ".join([f"{layer:<5}", *padded]))
    lines.append(f"{sum(ranks.values())} of {initial * len(ranks)} ranks")
    return "\n".join(lines)


def changes_of(schedule: Schedule, total_steps: int) -> list[tuple[int, int]]:
    """Return the step and the budget of the start and of each change of the budget.

    A schedule in fractions of a run whose length it was not told is taken for ``total_steps``.
    """
    if isinstance(schedule, Phased) and schedule.total_steps is None:
        schedule = schedule.with_total_steps(total_steps)
    changes = [(0, schedule.live_ranks(0))]
    for step in range(1, total_steps + 1):
        budget = schedule.live_ranks(step)
        if budget != changes[-1][1]:
            changes.append((step, budget))
    return changes


def schedule_table(schedule: Schedule, total_steps: int, rows: int = 12) -> str:
    """Return a schedule as lines of text: the steps at which the budget changes.

    ``rows``: the most lines; of more changes, some in the middle are left out.

    Raises:
        BudgetError: fewer than two rows.

    >>> from rank_budget import FixedPruning
    >>> print(schedule_table(FixedPruning(initial=8, budget=4, count=2, interval=100), 1000))
      step  budget
         0       8
       100       6
       200       4
      1000       4
    """
    require_whole("rows", rows)
    require(rows >= 2, "rows", rows, "must be at least 2, for the start and the end")
    changes = changes_of(schedule, total_steps)
    if changes[-1][0] != total_steps:
        changes.append((total_steps, changes[-1][1]))
    if len(changes) > rows:
        last = len(changes) - 1
        chosen = sorted({round(i * last / (rows - 1)) for i in range(rows)})
        changes = [changes[index] for index in chosen]
    lines = [f"{step:>6}  {budget:>6}" for step, budget in changes]
    return "\n".join([f"{'step':>6}  {'budget':>6}", *lines])


def scalars(allocator: RankAllocator, prefix: str = "rank_budget/") -> dict[str, float]:
    """Return numbers by name for any logger: budget, live ranks, threshold, ranks by matrix.

    The threshold is that of the last allocation, and is left out before the first and where
    nothing fell. This reads the device.

    >>> from rank_budget import ConstantBudget, Triplet
    >>> import torch
    >>> triplet = Triplet(torch.ones(4, 2), torch.ones(2), torch.ones(2, 3))
    >>> scalars(RankAllocator({"w": triplet}, ConstantBudget(2)), prefix="")
    {'step': 0.0, 'skipped': 0.0, 'budget': 2.0, 'live_ranks': 2.0, 'ranks/w': 2.0}
    """
    values: dict[str, float] = {
        "step": allocator.steps,
        "skipped": allocator.skipped,
        "budget": allocator.schedule.live_ranks(allocator.steps),
        "live_ranks": allocator.live_ranks,
    }
    if allocator.history and allocator.history[-1].threshold > -float("inf"):
        values["threshold"] = allocator.history[-1].threshold
    values |= {f"ranks/{name}": rank for name, rank in allocator.ranks().items()}
    return {prefix + name: float(value) for name, value in values.items()}
