"""What lives before the first step, and by what the groups share the budget."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rank_budget.budget_plan import Direction, Plan, check_schedule
from rank_budget.errors import BudgetError
from rank_budget.roster import Roster
from rank_budget.schedules import Schedule
from rank_budget.selection import Layout, grow_to_budget, per_group


@dataclass(frozen=True)
class Start:
    """``alive``: bool, (components,). ``parts``: of the groups. ``resume``: why not to step yet.

    Masks with less alive than the schedule starts with are those of a run that goes on: a state
    must be loaded first, else ``resume`` is the text of the error.
    """

    alive: Tensor
    parts: Sequence[int]
    resume: str | None = None


def start_of(roster: Roster, layout: Layout, schedule: Schedule, direction: Direction) -> Start:
    """Return how an allocation begins.

    Raises:
        BudgetError: the schedule starts with another budget than the masks.
    """
    check_schedule(schedule)
    alive = roster.alive.clone()
    whole: list[int] = per_group(layout.cost, layout).tolist()
    if direction == "grow":
        shares = Plan(schedule, direction, whole, alive.device).shares(schedule.initial)
        scores = torch.zeros_like(alive, dtype=torch.float32)
        return Start(grow_to_budget(scores, torch.zeros_like(alive), layout, shares), whole)
    parts: list[int] = per_group(layout.cost * alive, layout).tolist()
    if schedule.initial == sum(parts):
        return Start(alive, parts)
    unit = "components" if layout.even else "of their cost"
    text = (
        f"the schedule starts with {schedule.initial} {unit}, but the masks have {sum(parts)}; "
        f"build it with initial={sum(parts)}"
    )
    matrices = len(roster.ranks)
    if matrices > 1 and schedule.initial * matrices == sum(parts):
        text += f", or, if {schedule.initial} is meant for each matrix, add .times({matrices})"
    if schedule.initial == sum(whole):
        return Start(alive, whole, f"{text}, or, to go on with a run, load its state first.")
    pruned = ", or, to go on with a run, build the allocator before the masks are loaded"
    raise BudgetError(f"{text}{pruned if sum(parts) < sum(whole) else ''}.")
