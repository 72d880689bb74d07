"""How much may be alive after each step: pure functions of the step."""

import math
from dataclasses import dataclass, replace
from typing import Protocol

from rank_budget.errors import require, require_whole
from rank_budget.schedule_phases import Phased, first_multiple


class Schedule(Protocol):
    """A budget over time, in ranks or in what `RankAllocator` was told to count.

    ``initial``: alive at step 0, over all matrices. A schedule of your own may also have
    ``allocates(step)``, which regrowth asks for, ``final``, with which limits are compared, and
    ``end``, the step from which the budget is final.
    """

    @property
    def initial(self) -> int:
        """Return what is alive at the start, over all matrices."""

    def live_ranks(self, step: int) -> int:
        """Return how much may be alive after ``step`` optimizer steps."""


@dataclass(frozen=True)
class ConstantBudget:
    """No change: ``initial``, always.

    >>> ConstantBudget(12).live_ranks(1000)
    12
    """

    initial: int

    def __post_init__(self) -> None:
        require_whole("initial", self.initial)
        require(self.initial >= 1, "initial", self.initial, "must be at least 1")

    def times(self, matrices: int) -> "ConstantBudget":
        """Return this schedule, given as ranks per matrix on average, for so many matrices."""
        return replace(self, initial=self.initial * matrices)

    @property
    def final(self) -> int:
        """What is alive in the end."""
        return self.initial

    @property
    def end(self) -> int:
        """The step from which the budget is final."""
        return 0

    def allocates(self, step: int) -> bool:
        """Return whether the ranks are allocated anew after ``step``: never."""
        del step
        return False

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
        for field in ("initial", "budget", "count", "interval"):
            require_whole(field, getattr(self, field))
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

    def times(self, matrices: int) -> "FixedPruning":
        """Return this schedule, given as ranks per matrix on average, for so many matrices."""
        numbers = (self.initial, self.budget, self.count)
        initial, budget, count = (number * matrices for number in numbers)
        return replace(self, initial=initial, budget=budget, count=count)

    @property
    def final(self) -> int:
        """What is alive in the end, if the run is long enough."""
        return self.budget

    @property
    def end(self) -> int | None:
        """The step from which the budget is final; None where it never is."""
        if self.initial == self.budget:
            return 0
        if self.count == 0:
            return None
        return self.interval * math.ceil((self.initial - self.budget) / self.count)

    def allocates(self, step: int) -> bool:
        """Return whether the ranks are allocated anew after ``step``."""
        return 0 < step <= (self.end or 0) and step % self.interval == 0

    def live_ranks(self, step: int) -> int:
        """Return b(step)."""
        return max(self.budget, self.initial - self.count * (step // self.interval))


@dataclass(frozen=True)
class FixedGrowth(Phased):
    """``count`` more components every ``interval`` steps after the warm-up, up to ``final``.

    b(t) = min(final, initial + count · n(t)), n(t) being the multiples of ``interval`` in
    (warmup, t].

    Paper: IncreLoRA (arXiv 2308.12043), Algorithm 1.

    Raises:
        BudgetError: a value out of range; the field and the rule are named.

    >>> [FixedGrowth(4, 9, count=2, interval=10).live_ranks(t) for t in (9, 10, 20, 30)]
    [4, 6, 8, 9]
    """

    initial: int
    final: int
    count: int
    interval: int = 100
    warmup: int | float = 0
    total_steps: int | None = None
    _phases = ("warmup",)

    def __post_init__(self) -> None:
        self._check(grows=True)
        require_whole("count", self.count)
        require(self.count >= 0, "count", self.count, "must be 0 or more")

    def times(self, matrices: int) -> "FixedGrowth":
        """Return this schedule, given as ranks per matrix on average, for so many matrices."""
        return replace(super().times(matrices), count=self.count * matrices)

    @property
    def end(self) -> int | None:
        """The step from which the budget is final; None where it never is."""
        if self.initial == self.final:
            return 0
        if self.count == 0:
            return None
        times = math.ceil((self.final - self.initial) / self.count)
        return first_multiple(self.interval, self._steps("warmup")) + (times - 1) * self.interval

    def allocates(self, step: int) -> bool:
        """Return whether the ranks are allocated anew after ``step``."""
        return self.live_ranks(step) != self.live_ranks(step - 1)

    def live_ranks(self, step: int) -> int:
        """Return b(step)."""
        warmup = self._steps("warmup")
        times = max(0, step // self.interval - warmup // self.interval)
        return min(self.final, self.initial + self.count * times)


@dataclass(frozen=True)
class OneShot(Phased):
    """Everything at once: ``initial`` up to and without step ``at``, ``final`` from it.

    Raises:
        BudgetError: a value out of range; the field and the rule are named.

    >>> [OneShot(10, 4, at=0.5, total_steps=100).live_ranks(t) for t in (49, 50)]
    [10, 4]
    """

    initial: int
    final: int
    at: int | float
    total_steps: int | None = None
    interval = 1
    _phases = ("at",)

    def __post_init__(self) -> None:
        self._check()
        if not isinstance(self.at, float):
            require(self.at >= 1, "at", self.at, "must be at least step 1")

    @property
    def end(self) -> int:
        """The step from which the budget is final."""
        return max(1, self._steps("at"))

    def allocates(self, step: int) -> bool:
        """Return whether the ranks are allocated anew after ``step``."""
        return step == self.end

    def live_ranks(self, step: int) -> int:
        """Return b(step)."""
        return self.final if step >= self.end else self.initial


@dataclass(frozen=True)
class CubicBudget(Phased):
    """AdaLoRA's schedule: all during the warm-up, a cubic fall, the final budget at the end.

    For warmup < t ≤ total − cooldown, at multiples of ``interval``:
    b(t) = ⌊final + (initial − final)(1 − (t − warmup) / (total − cooldown − warmup))³⌋.

    ``warmup``, ``cooldown``: counts of steps, or fractions of the run below 1.0. ``total_steps``
    may be given late.
    Paper: AdaLoRA (arXiv 2303.10512), equation 12, in the form of its published code.

    Raises:
        BudgetError: a value out of range; the field and the rule are named.

    >>> cubic = CubicBudget(10, 2, total_steps=100, warmup=0.2, cooldown=40)
    >>> [cubic.live_ranks(t) for t in (20, 40, 60, 100)]
    [10, 3, 2, 2]
    """

    initial: int
    final: int
    total_steps: int | None = None
    warmup: int | float = 0
    cooldown: int | float = 0
    interval: int = 1
    _phases = ("warmup", "cooldown")

    def __post_init__(self) -> None:
        self._check()
        parts = [part for part in (self.warmup, self.cooldown) if isinstance(part, float)]
        rule = f"with warmup = {self.warmup} must be below 1.0"
        require(sum(parts) < 1, "cooldown", self.cooldown, rule)
        if self.total_steps is not None:
            phases = self._steps("warmup") + self._steps("cooldown")
            rule = f"must be above warmup + cooldown = {phases}"
            require(self.total_steps > phases, "total_steps", self.total_steps, rule)

    @property
    def end(self) -> int:
        """The step from which the budget is final."""
        return self._total() - self._steps("cooldown")

    def allocates(self, step: int) -> bool:
        """Return whether the ranks are allocated anew after ``step``."""
        due = self._steps("warmup") < step < self.end and step % self.interval == 0
        return due or step == self.end

    def live_ranks(self, step: int) -> int:
        """Return b(step)."""
        end, warmup = self.end, self._steps("warmup")
        if step >= end:
            return self.final
        step -= step % self.interval
        if step <= warmup:
            return self.initial
        # Whole numbers, since a rounded cube just below one would lose a component.
        left, span = end - step, end - warmup
        return self.final + (self.initial - self.final) * left**3 // span**3
