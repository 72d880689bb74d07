"""When to allocate, and to how much: the schedule, in whole shares for each group."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from rank_budget.costs import Cost, ranks
from rank_budget.errors import BudgetError, refuse_class, require_whole
from rank_budget.layout import Limits, shares
from rank_budget.roster import Roster
from rank_budget.schedules import Schedule
from rank_budget.selection import Layout, grow_to_budget, prune_to_budget
from rank_budget.step_count import StepCount

Direction = Literal["prune", "regrow", "grow"]
DIRECTIONS = ("prune", "regrow", "grow")


class Plan:
    """A schedule in a direction. ``parts``: by which the budget is shared among the groups."""

    def __init__(
        self, schedule: Schedule, direction: Direction, parts: Sequence[int], device: torch.device
    ) -> None:
        if direction not in DIRECTIONS:
            raise BudgetError(f"direction is {direction!r}, expected {' or '.join(DIRECTIONS)}.")
        if direction == "regrow" and not hasattr(schedule, "allocates"):
            raise BudgetError(
                f"{type(schedule).__name__} has no allocates(step), which regrowth asks for when "
                "to choose anew; add it, or use direction='prune'."
            )
        self.schedule = schedule
        self.direction = direction
        self._parts = list(parts)
        self._device = device

    @property
    def end(self) -> int | None:
        """The step from which the budget is final, where the schedule says so."""
        end: int | None = getattr(self.schedule, "end", None)
        return end

    def due(self, step: int, budget: int) -> bool:
        """Return whether to allocate after ``step``, where ``budget`` was met before."""
        if self.direction == "regrow":
            allocates: Callable[[int], bool] = self.schedule.allocates  # type: ignore[attr-defined]
            return allocates(step)
        now = self.schedule.live_ranks(step)
        return bool(now > budget if self.direction == "grow" else now < budget)

    def learns(self, step: int) -> bool:
        """Return whether averages still change at ``step``.

        AdaLoRA's code, which regrowth follows, takes the last choice from the averages before it.
        """
        if self.end is None:
            return True
        return step < self.end if self.direction == "regrow" else step <= self.end

    def next_step(self, count: StepCount, budget: int) -> int:
        """Return the number of the step to come, exact from where anything depends on it.

        So no step is passed over at which something is due: all before it are not.
        """
        step = count.most + 1
        exact = self.due(step, budget) or not self.learns(step)
        return count.taken + 1 if exact else step

    def is_final(self, step: int) -> bool:
        """Return whether nothing changes any more after ``step``."""
        return self.end is not None and step >= self.end

    def shares(self, budget: int) -> Tensor | int:
        """Return the budget of each group, (groups,), or of the only one."""
        if len(self._parts) == 1:
            return budget
        return torch.tensor(shares(budget, self._parts), device=self._device)

    def choose(
        self, scores: Tensor, before: Tensor, layout: Layout, budget: int, spared: Tensor | None
    ) -> Tensor:
        """Return what lives of (components,) when the budget is met anew; see `prune_to_budget`."""
        shares = self.shares(budget)
        if self.direction == "grow":
            return grow_to_budget(scores, before, layout, shares)
        pool = layout.everything if self.direction == "regrow" else before
        return prune_to_budget(scores, pool, layout, shares, spared)

    def set_total_steps(self, total_steps: int) -> None:
        """Tell a schedule the length of the training, and check that it ends within it.

        Raises:
            BudgetError: it was made for another length, or does not end in time.
        """
        require_whole("total_steps", total_steps)
        if hasattr(self.schedule, "with_total_steps"):
            self.schedule = self.schedule.with_total_steps(total_steps)
        end = self.end
        if end is None or end > total_steps:
            when = "never" if end is None else f"only at step {end}"
            raise BudgetError(
                f"{self.schedule} meets its final budget {when}, but the training has "
                f"{total_steps} steps; shorten the schedule."
            )

    def check_limits(self, roster: Roster, limits: Limits, costs: Sequence[int]) -> None:
        """Refuse a final budget that floors or ceilings cannot meet, in any group."""
        final = getattr(self.schedule, "final", None)
        if final is None or not (limits.floors or limits.ceilings):
            return
        numbers = sorted({limits.group(name) for name in roster.ranks})
        for number, budget in zip(numbers, shares(final, self._parts), strict=True):
            least = most = 0
            for (name, rank), cost in zip(roster.ranks.items(), costs, strict=True):
                if limits.group(name) == number:
                    floor, ceiling = limits.bounds(name, rank)
                    if floor > ceiling:
                        raise BudgetError(
                            f"{name} has the floor {floor} above its ceiling {ceiling}."
                        )
                    least, most = least + floor * cost, most + ceiling * cost
            if not least <= budget <= most:
                raise BudgetError(
                    f"the final budget of group {number} is {budget}, but its floors add up to "
                    f"{least} and its ceilings to {most}; change the limits or the budget."
                )


def check_schedule(schedule: Any) -> None:
    """Refuse what is no schedule."""
    refuse_class("schedule", schedule)
    if not hasattr(schedule, "live_ranks") or not hasattr(schedule, "initial"):
        raise BudgetError(
            f"schedule is {schedule!r}, expected an object with initial and live_ranks(step), such "
            "as CubicBudget(...)."
        )


def costs_of(roster: Roster, cost: Cost) -> list[int]:
    """Return the cost of one component of each matrix.

    Raises:
        BudgetError: a matrix whose widths are not known, or a cost below one.
    """
    if cost is ranks:
        return [1] * len(roster.ranks)
    found = []
    for name in roster.ranks:
        if name not in roster.widths:
            raise BudgetError(
                f"the cost of {name} depends on its widths, which are not known; give its stacks "
                "of P and Q in factors."
            )
        one = cost(*roster.widths[name])
        if one < 1:
            raise BudgetError(f"the cost of {name} is {one}, but must be a whole number above 0.")
        found.append(one)
    return found
