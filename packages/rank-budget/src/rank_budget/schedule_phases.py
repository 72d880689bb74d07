"""The phases of a schedule: in steps, or in fractions of a run whose length may be given late."""

import math
from dataclasses import replace
from typing import ClassVar, Self

from rank_budget.errors import BudgetError, require, require_whole


class Phased:
    """What the schedules here share: fields, phases in steps or fractions, and when they allocate.

    A phase is a count of steps, or a fraction of ``total_steps`` as a float below one. The number
    of steps may be given late, by `with_total_steps`.
    """

    initial: int
    final: int
    total_steps: int | None
    interval: int
    _phases: ClassVar[tuple[str, ...]] = ()

    def _check(self, *, grows: bool = False) -> None:
        for name in ("initial", "final", "interval"):
            require_whole(name, getattr(self, name))
        if self.total_steps is not None:
            require_whole("total_steps", self.total_steps)
        require(self.initial >= int(not grows), "initial", self.initial, "must be at least 1")
        if grows:
            rule = f"must be at least initial = {self.initial}"
            require(self.final >= self.initial, "final", self.final, rule)
        else:
            rule = f"must be 0 to initial = {self.initial}"
            require(0 <= self.final <= self.initial, "final", self.final, rule)
        require(self.interval >= 1, "interval", self.interval, "must be at least 1 step")
        total = self.total_steps
        require(total is None or total >= 1, "total_steps", total, "must be at least 1")
        for field in self._phases:
            value = getattr(self, field)
            if isinstance(value, float):
                require(0 <= value < 1, field, value, "a fraction must be 0.0 or more and below 1")
            else:
                require_whole(field, value)
                require(value >= 0, field, value, "must be 0 or more steps")

    def _steps(self, field: str) -> int:
        """Return a phase in steps; a fraction is rounded down."""
        value = getattr(self, field)
        return math.floor(value * self._total()) if isinstance(value, float) else int(value)

    def _total(self) -> int:
        if self.total_steps is None:
            raise BudgetError(
                f"{type(self).__name__} does not know the number of steps; give it total_steps, or "
                "call the allocator's set_total_steps before the first step."
            )
        return self.total_steps

    def with_total_steps(self, total_steps: int) -> Self:
        """Return this schedule for a run of ``total_steps`` optimizer steps.

        Raises:
            BudgetError: it has another number of steps already, or its phases do not fit.
        """
        known = self.total_steps
        rule = f"the schedule was made for {known}; make it with the length of the training"
        require(known in (None, total_steps), "total_steps", total_steps, rule)
        return replace(self, total_steps=total_steps)  # type: ignore[type-var]

    def times(self, matrices: int) -> Self:
        """Return this schedule, given as ranks per matrix on average, for so many matrices."""
        changed = {"initial": self.initial * matrices, "final": self.final * matrices}
        return replace(self, **changed)  # type: ignore[type-var]


def first_multiple(interval: int, above: int) -> int:
    """Return the first multiple of ``interval`` above ``above``."""
    return (above // interval + 1) * interval
