"""How many components may be alive after each step: pure functions of the step."""

import math
from dataclasses import dataclass
from typing import Protocol

from rank_budget.errors import require


class Schedule(Protocol):
    """A budget over time: ``initial`` components at step 0, and never more than before."""

    @property
    def initial(self) -> int:
        """Return the components alive at the start, over all matrices."""

    def live_ranks(self, step: int) -> int:
        """Return how many may be alive after ``step`` optimizer steps."""


@dataclass(frozen=True)
class ConstantBudget:
    """No pruning: ``initial`` components, always.

    >>> ConstantBudget(12).live_ranks(1000)
    12
    """

    initial: int

    def __post_init__(self) -> None:
        require(self.initial >= 1, "initial", self.initial, "must be at least 1")

    def live_ranks(self, step: int) -> int:
        """Return ``initial``."""
        del step
        return self.initial


@dataclass(frozen=True)
class FixedPruning:
    """The ``count`` least important components every ``interval`` steps, down to ``budget``.

    b(t) = max(budget, initial − count · ⌊t / interval⌋).

    Paper: Appendix D (k fixed) and Appendix E (ΔT = 100). Deviation: it stops at the budget.

    Raises:
        BudgetError: a value out of range; the field and the rule are named.

    >>> [FixedPruning(initial=10, budget=5, count=3).live_ranks(t) for t in (99, 100, 200, 300)]
    [10, 7, 5, 5]
    """

    initial: int
    budget: int
    count: int
    interval: int = 100

    def __post_init__(self) -> None:
        require(self.initial >= 1, "initial", self.initial, "must be at least 1")
        rule = f"must be 0 to initial = {self.initial}"
        require(0 <= self.budget <= self.initial, "budget", self.budget, rule)
        require(self.count >= 0, "count", self.count, "must be 0 or more")
        require(self.interval >= 1, "interval", self.interval, "must be at least 1 step")

    @classmethod
    def over(
        cls,
        *,
        initial: int,
        budget: int,
        interval: int,
        total_steps: int,
        finish_by: float = 0.7,
    ) -> "FixedPruning":
        """Return the schedule of least ``count`` that meets the budget by ``finish_by`` of the run.

        Where not even one interval ends by then, it prunes everything at the first.

        >>> FixedPruning.over(initial=10, budget=4, interval=10, total_steps=50).count
        2
        """
        require(total_steps >= 1, "total_steps", total_steps, "must be at least 1")
        require(interval >= 1, "interval", interval, "must be at least 1 step")
        require(0 < finish_by <= 1, "finish_by", finish_by, "must be above 0 and at most 1")
        times = max(1, math.floor(total_steps * finish_by) // interval)
        count = math.ceil((initial - budget) / times)
        return cls(initial=initial, budget=budget, count=max(0, count), interval=interval)

    def live_ranks(self, step: int) -> int:
        """Return b(step)."""
        return max(self.budget, self.initial - self.count * (step // self.interval))


@dataclass(frozen=True)
class CubicBudget:
    """AdaLoRA's schedule: all during the warm-up, a cubic fall, the final budget at the end.

    For warmup < t ≤ total − cooldown, at multiples of ``interval``:
    b(t) = ⌊final + (initial − final)(1 − (t − warmup) / (total − cooldown − warmup))³⌋.

    Paper: AdaLoRA (arXiv 2303.10512), equation 12, in the form of its published code.

    Raises:
        BudgetError: a value out of range; the field and the rule are named.

    >>> cubic = CubicBudget(10, 2, total_steps=100, warmup_steps=20, cooldown_steps=40)
    >>> [cubic.live_ranks(t) for t in (20, 40, 60, 100)]
    [10, 3, 2, 2]
    """

    initial: int
    final: int
    total_steps: int
    warmup_steps: int
    cooldown_steps: int
    interval: int = 1

    def __post_init__(self) -> None:
        require(self.initial >= 1, "initial", self.initial, "must be at least 1")
        rule = f"must be 0 to initial = {self.initial}"
        require(0 <= self.final <= self.initial, "final", self.final, rule)
        require(self.interval >= 1, "interval", self.interval, "must be at least 1 step")
        require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "must be 0 or more")
        require(
            self.cooldown_steps >= 0, "cooldown_steps", self.cooldown_steps, "must be 0 or more"
        )
        phases = self.warmup_steps + self.cooldown_steps
        rule = f"must be above warmup_steps + cooldown_steps = {phases}"
        require(self.total_steps > phases, "total_steps", self.total_steps, rule)

    def live_ranks(self, step: int) -> int:
        """Return b(step)."""
        end = self.total_steps - self.cooldown_steps
        if step >= end:
            return self.final
        step -= step % self.interval
        if step <= self.warmup_steps:
            return self.initial
        # Whole numbers, since a rounded cube just below one would lose a component.
        left, span = end - step, end - self.warmup_steps
        return self.final + (self.initial - self.final) * left**3 // span**3
