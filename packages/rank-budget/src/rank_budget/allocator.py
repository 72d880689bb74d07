"""The allocator: scores all components, and lets as many live as the budget says."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from rank_budget.budget_plan import Direction, Plan, costs_of
from rank_budget.costs import Cost, cost_named
from rank_budget.errors import BudgetError
from rank_budget.layers import RankedFactors, RankedLayer, RankedMatrices
from rank_budget.layout import Limits, layout_of, limits_given
from rank_budget.record import Allocation, allocation_of, history_from, history_state
from rank_budget.roster import roster_of
from rank_budget.saved import check_state, described, made_with
from rank_budget.schedules import Schedule
from rank_budget.scores import Score, ScoreMethod, score_named, without_gradient
from rank_budget.selection import by_matrix
from rank_budget.start import start_of
from rank_budget.step_count import StepCount

_ATTACHED = (
    "the allocator is attached to an optimizer, which steps it; leave out this call, or remove the "
    "Attachment."
)


class RankAllocator:
    """Lets the components of best score live, over all matrices, within a schedule's budget.

    ``layers``: `RankedLayer` by name, such as `ranked_layers` finds, or live stacks of λ, with
    stacks of P and Q as ``factors`` if the score reads them. ``score``: "sensitivity",
    "magnitude", a function of λ and ∇λ, or an object such as `SmoothedSensitivity`. ``cost``: what
    the budget counts: "ranks", "parameters", "bytes", or a function of output and input width.
    ``limits``: floors, ceilings, groups. ``direction``: "prune", for good; "regrow", as AdaLoRA,
    where λ of what falls is put to zero, goes on learning, and all are chosen from anew until the
    budget is final; "grow", from a small start: what sleeps is masked, or its λ put to zero at the
    first `score`. ``missing``: "refuse" matrices without a gradient, or "skip" them: they keep
    their averages, and fall last. ``total_steps``: checks that the schedule ends in time, and tells
    it where it is late to know.

    Each optimizer step: `score` reads values and gradients before the optimizer changes them, and
    `step` counts the step after it, and allocates if the schedule says so. Gradients are those of
    the whole step: accumulated over micro-batches, unscaled, reduced over processes. `step` alone
    does both, and leaves out a step that is not finite, for which it reads flags from the device
    where it may allocate.

    Exactly the scheduled number of ranks survives; of other costs, as much as fits. Among equal
    scores the later matrix by name, and within it the later component, survives, so that every
    process of a job prunes the same. A score that is NaN counts as the highest: pruning it would
    hide the fault. The number of tensor operations depends on the number of different shapes, not
    of matrices.

    Saved: steps, masks, averages, the scores of the last allocation, history; where factors are
    sharded, each process saves and loads its own.
    Paper: section 3.2 and Appendix D; AdaLoRA (arXiv 2303.10512), Algorithm 1.

    Raises:
        BudgetError: no matrix, a name given twice, a wrong choice, a schedule that starts with
            another budget than the masks, or limits that its end cannot meet.

    >>> from rank_budget import FixedPruning
    >>> sigma = torch.tensor([[3.0, 0.1], [2.0, 1.0]])
    >>> mask = torch.ones(2, 2, dtype=torch.bool)
    >>> matrices = RankedMatrices(("first", "second"), sigma, torch.ones(2, 2), mask)
    >>> schedule = FixedPruning(initial=4, budget=3, count=1, interval=1)
    >>> allocator = RankAllocator([matrices], schedule)
    >>> allocator.score()
    >>> allocator.step()
    Allocation(step=1, budget=3, pruned=1, grown=0, live=3, threshold=0.1)
    >>> allocator.ranks()
    {'first': 1, 'second': 2}
    """

    @torch.no_grad()
    def __init__(
        self,
        layers: Mapping[str, RankedLayer] | Sequence[RankedMatrices],
        schedule: Schedule,
        *,
        factors: Sequence[RankedFactors] = (),
        score: str | Score | ScoreMethod = "sensitivity",
        cost: str | Cost = "ranks",
        limits: Limits | None = None,
        direction: Direction = "prune",
        missing: Literal["refuse", "skip"] = "refuse",
        total_steps: int | None = None,
    ) -> None:
        if missing not in ("refuse", "skip"):
            raise BudgetError(f"missing is {missing!r}, expected refuse or skip.")
        method, limits = score_named(score), limits_given(limits)
        roster = roster_of(layers, factors, method.roles, limits)
        limits.check(list(roster.ranks))
        costs = costs_of(roster, cost_named(cost))
        self._made_with = made_with(
            getattr(method, "function", method), cost_named(cost), limits, direction
        )
        self._roster = roster
        where = roster.alive.device
        self._layout = layout_of(roster.ranks, costs=costs, limits=limits, device=where)
        self._missing = missing
        self._scorer = method.start(roster.blocks, roster.ranks)
        self._pending: set[str] | None = None
        self._scored = False
        self._importance = torch.zeros_like(roster.alive, dtype=torch.float32)
        self.count = StepCount()
        self.attached = False
        self.history: list[Allocation] = []
        start = start_of(roster, self._layout, schedule, direction)
        self._alive, self._resume = start.alive, start.resume
        self._plan = Plan(schedule, direction, start.parts, where)
        self._budget = schedule.initial
        self._live: int | None = int(self._alive.sum())
        if total_steps is not None:
            self.set_total_steps(total_steps)
        self._plan.check_limits(roster, limits, costs)
        if direction == "grow":
            self._roster.write(self._alive)

    def set_total_steps(self, total_steps: int) -> None:
        """Tell the schedule the length of the training, before the first step; see the class."""
        self._plan.set_total_steps(total_steps)

    @property
    def layers(self) -> Mapping[str, RankedLayer]:
        """The layers by name; none where live stacks were given."""
        return self._roster.layers

    @property
    def steps(self) -> int:
        """Optimizer steps that count; this may read the device, as does ``skipped``."""
        return self.count.taken

    @steps.setter
    def steps(self, steps: int) -> None:
        self.count.set(steps, self.skipped)

    @property
    def skipped(self) -> int:
        """Steps that were left out."""
        return self.count.skipped

    @property
    def total_ranks(self) -> int:
        """Components of all matrices, dead or alive."""
        return self._alive.numel()

    @property
    def live_ranks(self) -> int:
        """Components alive; where the budget counts ranks, known without a read of the device."""
        if self._live is None:
            self._live = self.history[-1].live
        return self._live

    @property
    def schedule(self) -> Schedule:
        """The schedule, with what it was told."""
        return self._plan.schedule

    def dead_stay_dead(self) -> bool:
        """Return whether what is dead can no longer return."""
        return self._plan.direction == "prune" or self._plan.is_final(self.count.most)

    @torch.no_grad()
    def score(self, *, grad_scale: Tensor | None = None) -> None:
        """Read this step's values and gradients, if the score or an allocation needs them.

        What was read counts when `step` is called; a step that is not taken leaves no trace.
        ``grad_scale``: a number on the device by which the gradients are still multiplied.

        Raises:
            BudgetError: a matrix has no gradient, and ``missing`` is "refuse"; or masks of a run
                that goes on, of which no state was loaded.
        """
        if self._resume is not None:
            raise BudgetError(self._resume)
        if self._plan.direction == "grow" and self.count.most == 0:
            self._roster.silence(self._alive)
        step = self._plan.next_step(self.count, self._budget)
        self._scored, self._pending = True, None
        due = self._plan.due(step, self._budget)
        if not (self._plan.learns(step) if self._scorer.every_step else due):
            return
        missing = self._scorer.read(grad_scale)
        if missing and self._missing == "refuse":
            raise without_gradient(missing, self.steps + 1)
        self._pending = missing

    def is_finite(self) -> bool:
        """Return whether what `score` has read is finite; this reads one flag from the device."""
        return self._pending is None or self._scorer.is_finite()

    def skip(self) -> None:
        """Forget what `score` has read: the step was not taken."""
        self._scored, self._pending = False, None
        self.count.skip()

    @torch.no_grad()
    def step(self) -> Allocation | None:
        """Count an optimizer step; allocate if the schedule says so, and return what was done.

        Without `score` before it, it scores what is there, and skips a step that is not finite.
        After `score`, which read no flag, such a step counts, but leaves the averages untouched.
        """
        alone = not self._scored
        if alone:
            if self.attached:
                raise BudgetError(_ATTACHED)
            self.score()
        due = self._plan.due(self._plan.next_step(self.count, self._budget), self._budget)
        if alone and due and not self.is_finite():
            self.skip()
            return None
        counts = None
        if self._pending is not None:
            counts = self._scorer.finite() if alone and not due else None
            self._scorer.commit(choosing=due)
        self.count.add(counts)
        allocation = self._allocate() if due else None
        if self._masks_apply():
            if allocation is not None:
                self._roster.write(self._alive)
            self._roster.silence(self._alive)
        elif allocation is not None:
            self._roster.zero(self._alive)
        self._scored, self._pending = False, None
        return allocation

    def _allocate(self) -> Allocation:
        budget = self._plan.schedule.live_ranks(self.steps)
        scores, before = self._scorer.scores(), self._alive
        spared = self._roster.components_of(self._pending) if self._pending else None
        self._alive = self._plan.choose(scores, before, self._layout, budget, spared)
        masks = before, self._alive
        allocation = allocation_of(self.steps, budget, scores, *masks, self._roster.ranks)
        self._importance, self._budget = scores, budget
        self._live = budget if self._layout.even else None
        self.history.append(allocation)
        return allocation

    def _masks_apply(self) -> bool:
        """Return whether what is dead is kept so between allocations; in regrowth it learns."""
        return self._plan.direction != "regrow" or self._plan.is_final(self.count.most)

    def ranks(self) -> dict[str, int]:
        """Return the live components of each matrix; the one read from the device."""
        counts = by_matrix(self._alive, self._layout).tolist()
        return dict(zip(self._roster.ranks, counts, strict=True))

    def masks(self) -> dict[str, Tensor]:
        """Return what is alive of each matrix, bool, (rank,), by name."""
        return self._roster.by_matrix(self._alive.clone())

    def importance(self) -> dict[str, Tensor]:
        """Return the scores of the last allocation, (rank,), by name; zero before the first."""
        return self._roster.by_matrix(self._importance)

    def state_dict(self) -> dict[str, Any]:
        """Return steps, masks, averages and history, as plain values and tensors; some are live."""
        return {
            "steps": self.steps,
            "skipped": self.skipped,
            "budget": self._budget,
            "matrices": [[name, rank] for name, rank in self._roster.ranks.items()],
            "made_with": {**self._made_with, "schedule": described(self.schedule)},
            "alive": self._alive,
            "importance": self._importance,
            "score": self._scorer.state_dict(),
            "history": history_state(self.history),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; masks are changed in place.

        The model's own state may be loaded before or after; both before the first step.

        Raises:
            BudgetError: the state is of other matrices, of an allocator made otherwise, incomplete
                or damaged, or layers are compacted. Nothing has been changed then.
        """
        for block in self._roster.blocks:
            block.check(block.read()[0])  # before anything is changed
        check_state(state, self.state_dict(), ranks=self._layout.even)
        device = self._alive.device
        alive = state["alive"].to(device).clone()
        exact = self._layout.even or self._plan.direction != "grow"
        start = self._layout.cost, self.schedule.initial if exact else None
        history = history_from(state["history"], alive, self._roster.ranks, *start)
        self._scorer.load_state_dict(state["score"])
        self.history, self._alive = history, alive
        self._importance, self._budget = state["importance"].to(device).clone(), state["budget"]
        self.count.set(state["steps"], state["skipped"])
        self._live = int(self._alive.sum())
        self._scored, self._pending, self._resume = False, None, None
        # In regrowth λ of what fell has learned on, and is the model's to restore.
        if self._masks_apply():
            self._roster.write(self._alive)
            self._roster.silence(self._alive)
