"""The allocator: scores all components, and lets exactly the scheduled number live."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from rank_budget.errors import BudgetError
from rank_budget.schedules import Schedule
from rank_budget.scores import SCORES, Score


@dataclass(frozen=True)
class RankedMatrices:
    """Matrices of equal rank, as live views that the allocator reads and masks.

    ``values``, ``gradients``: σ and ∇σ, (matrices, rank). ``rank_mask``: bool, (matrices, rank),
    changed in place. ``names``: one per matrix, unique over all groups.
    """

    names: tuple[str, ...]
    values: Tensor
    gradients: Tensor
    rank_mask: Tensor

    def __post_init__(self) -> None:
        rows = len(self.names)
        for field in ("values", "gradients", "rank_mask"):
            shape = tuple(getattr(self, field).shape)
            if len(shape) != 2 or shape != (rows, *self.values.shape[1:]):
                raise BudgetError(
                    f"{field} has the shape {shape}, expected ({rows}, rank) for the {rows} names."
                )
        if self.rank_mask.dtype != torch.bool:
            raise BudgetError(f"rank_mask is {self.rank_mask.dtype}, expected torch.bool.")


@dataclass(frozen=True)
class Allocation:
    """One pruning: after which step, how many components fell, how many live."""

    step: int
    pruned: int
    live: int


class RankAllocator:
    """Prunes the components of least score, over all matrices, to a schedule's budget.

    Each optimizer step: `score` reads values and gradients before the optimizer changes them, and
    `step` counts the step after it and prunes if the schedule says so. Exactly the scheduled
    number survives; among equal scores the later matrix by name, and within it the later
    component, survives, so that every process of a job prunes the same. A pruned component never
    returns. A score that is NaN counts as the highest: pruning it would hide the fault.

    Everything stays on the device: `ranks` alone reads it back. The number of tensor operations
    depends on the number of groups, not of matrices.

    Saved: steps, live count, history, masks.
    Paper: section 3.2 and Appendix D.

    Raises:
        BudgetError: no matrix, a name given twice, an unknown score, or a schedule that starts
            with another number of components than the masks.

    >>> from rank_budget import FixedPruning
    >>> sigma = torch.tensor([[3.0, 0.1], [2.0, 1.0]])
    >>> mask = torch.ones(2, 2, dtype=torch.bool)
    >>> matrices = RankedMatrices(("first", "second"), sigma, torch.ones(2, 2), mask)
    >>> schedule = FixedPruning(initial=4, budget=3, count=1, interval=1)
    >>> allocator = RankAllocator([matrices], schedule)
    >>> allocator.score()
    >>> allocator.step()
    Allocation(step=1, pruned=1, live=3)
    >>> allocator.ranks()
    {'first': 1, 'second': 2}
    """

    def __init__(
        self,
        matrices: Sequence[RankedMatrices],
        schedule: Schedule,
        *,
        score: str | Score = "sensitivity",
    ) -> None:
        names = [name for group in matrices for name in group.names]
        if not names or len(set(names)) != len(names):
            raise BudgetError(f"matrices must have unique names, got {names}.")
        if isinstance(score, str) and score not in SCORES:
            raise BudgetError(f"score is {score!r}, expected {' or '.join(SCORES)}, or a function.")
        self._matrices = list(matrices)
        self._score = SCORES[score] if isinstance(score, str) else score
        self._schedule = schedule
        self._scores: Tensor | None = None
        self._order = _order_by_name(self._matrices)
        self.steps = 0
        self.history: list[Allocation] = []
        self.total_ranks = sum(group.rank_mask.numel() for group in matrices)
        self.live_ranks = sum(int(group.rank_mask.sum()) for group in matrices)
        if schedule.initial != self.live_ranks:
            raise BudgetError(
                f"the schedule starts with {schedule.initial} components, but the masks have "
                f"{self.live_ranks}; build it with initial={self.live_ranks}."
            )

    @torch.no_grad()
    def score(self) -> None:
        """Read the scores of this step, if it will prune."""
        self._scores = None
        if self._surplus(self.steps + 1) > 0:
            scores = [self._score(group.values, group.gradients) for group in self._matrices]
            self._scores = torch.cat([part.flatten() for part in scores])

    def _surplus(self, step: int) -> int:
        return self.live_ranks - self._schedule.live_ranks(step)

    @torch.no_grad()
    def step(self) -> Allocation | None:
        """Count an optimizer step; prune if the schedule says so, and return what was done.

        Raises:
            BudgetError: this step prunes, and `score` was not called before it.
        """
        surplus = self._surplus(self.steps + 1)
        if surplus > 0 and self._scores is None:
            raise BudgetError(
                f"step {self.steps + 1} prunes {surplus} components, but score() was not called; "
                "call it after the backward pass and before the optimizer's step."
            )
        self.steps += 1
        if surplus <= 0:
            return None
        assert self._scores is not None
        self._prune(self._scores, surplus)
        self._scores = None
        self.live_ranks -= surplus
        allocation = Allocation(self.steps, surplus, self.live_ranks)
        self.history.append(allocation)
        return allocation

    def _prune(self, scores: Tensor, count: int) -> None:
        masks = [group.rank_mask for group in self._matrices]
        alive = torch.cat([mask.flatten() for mask in masks])
        pruned = prune_lowest(scores[self._order], alive[self._order], count)
        alive[self._order] = pruned
        for mask, part in zip(
            masks, torch.split(alive, [mask.numel() for mask in masks]), strict=True
        ):
            mask.copy_(part.view_as(mask))

    def ranks(self) -> dict[str, int]:
        """Return the live components of each matrix; the one read from the device."""
        counts = torch.cat([group.rank_mask.sum(1) for group in self._matrices]).tolist()
        names = [name for group in self._matrices for name in group.names]
        return dict(zip(names, counts, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return steps, live count, history and live masks, as plain values and tensors."""
        return {
            "steps": self.steps,
            "live_ranks": self.live_ranks,
            "history": [asdict(allocation) for allocation in self.history],
            "masks": [group.rank_mask for group in self._matrices],
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; masks are changed in place.

        Raises:
            BudgetError: the state is of other matrices, or contradicts itself.
        """
        masks = [group.rank_mask for group in self._matrices]
        here = [tuple(mask.shape) for mask in masks]
        saved = [tuple(mask.shape) for mask in state["masks"]]
        if saved != here:
            raise BudgetError(f"the saved masks have the shapes {saved}, but the matrices {here}.")
        live = sum(int(mask.sum()) for mask in state["masks"])
        if live != state["live_ranks"]:
            raise BudgetError(
                f"the saved masks have {live} live components, but live_ranks is "
                f"{state['live_ranks']}; the state is damaged."
            )
        for mask, value in zip(masks, state["masks"], strict=True):
            mask.copy_(value)
        self._scores = None
        self.steps = int(state["steps"])
        self.live_ranks = live
        self.history = [Allocation(**entry) for entry in state["history"]]


def prune_lowest(scores: Tensor, alive: Tensor, count: int) -> Tensor:
    """Return ``alive`` without its ``count`` components of least score; ties fall from the front.

    Shapes: scores, alive and the result (components,). A NaN score counts as the highest.

    >>> scores = torch.tensor([1.0, 0.5, 0.5, 9.0])
    >>> prune_lowest(scores, torch.tensor([True, True, True, False]), 1)
    tensor([ True, False,  True, False])
    """
    worth = scores.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    # Live components come first in the order, whatever their score; the sorts keep ties in place.
    by_score = worth.argsort(stable=True)
    order = by_score[alive[by_score].logical_not().to(torch.uint8).argsort(stable=True)]
    survivors = alive.clone()
    survivors[order[:count]] = False
    return survivors


def _order_by_name(matrices: Sequence[RankedMatrices]) -> Tensor:
    """Return the positions of all components, flattened group by group, in the order of names."""
    places: list[tuple[str, int, int]] = []
    start = 0
    for group in matrices:
        rank = group.values.shape[1]
        for name in group.names:
            places.append((name, start, rank))
            start += rank
    order = [index for _, first, rank in sorted(places) for index in range(first, first + rank)]
    return torch.tensor(order, device=matrices[0].rank_mask.device)
