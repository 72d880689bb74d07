"""What an allocation did, kept on the device until someone asks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from rank_budget.errors import BudgetError

STATS = 4


@dataclass(frozen=True, eq=False)
class Allocation:
    """One allocation: after which step, to which budget, and what it did.

    ``step``, ``budget``: known at once. ``pruned``, ``grown``, ``live``: numbers of components,
    and ``threshold``: the highest score that fell, −inf where none did; these four are read from
    the device, together, when the first of them is asked for.
    """

    step: int
    budget: int
    stats: Tensor = field(repr=False)

    @cached_property
    def _read(self) -> list[float]:
        numbers: list[float] = self.stats.tolist()
        # As in the choice, NaN counts as the highest.
        return [math.inf if math.isnan(number) else number for number in numbers]

    @property
    def pruned(self) -> int:
        """Components that fell."""
        return int(self._read[1])

    @property
    def grown(self) -> int:
        """Components that woke up."""
        return int(self._read[0] - self._read[1])

    @property
    def live(self) -> int:
        """Components alive afterwards."""
        return int(self._read[2])

    @property
    def threshold(self) -> float:
        """The highest score that fell."""
        return self._read[3]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Allocation):
            return NotImplemented
        mine = (self.step, self.budget, self._read)
        return mine == (other.step, other.budget, other._read)

    def __hash__(self) -> int:
        return hash((self.step, self.budget))

    def __repr__(self) -> str:
        return (
            f"Allocation(step={self.step}, budget={self.budget}, pruned={self.pruned}, "
            f"grown={self.grown}, live={self.live}, threshold={self.threshold:.3g})"
        )


def stats_of(
    scores: Tensor, changes: Tensor, fell: Tensor, alive: Tensor, lowest: Tensor
) -> Tensor:
    """Return changes, pruned, live and threshold, (4,), without a read.

    ``changes``: what fell or woke up. ``lowest``: −inf, on the device.
    """
    threshold = torch.where(fell, scores, lowest).amax()
    counts = torch.stack([changes, fell, alive]).sum(1)
    return torch.cat([counts, threshold.view(1)])


def history_state(history: Sequence[Allocation]) -> dict[str, Any]:
    """Return a history as plain numbers and one small tensor."""
    stats = [allocation.stats for allocation in history]
    return {
        "steps": [allocation.step for allocation in history],
        "budgets": [allocation.budget for allocation in history],
        "stats": torch.stack(stats) if stats else torch.zeros(0, STATS),
    }


def history_from(state: Mapping[str, Any], device: torch.device) -> list[Allocation]:
    """Return the history that `history_state` wrote."""
    stats = state["stats"].to(device).clone().unbind()
    rows = zip(state["steps"], state["budgets"], stats, strict=True)
    return [Allocation(int(step), int(budget), numbers) for step, budget, numbers in rows]


def check_same(saved: Sequence[Sequence[Any]], here: Sequence[Sequence[Any]], what: str) -> None:
    """Refuse a state of other matrices, by the first that differs."""
    for before, now in zip_longest(saved, here):
        if before is None or now is None or list(before) != list(now):
            raise BudgetError(
                f"the saved state has {what} {before}, but here is {now}; load it into the model "
                "that it was saved from."
            )


def check_alive(saved: Tensor, here: Tensor, expected: int | None) -> None:
    """Refuse masks of another size than here, or with another number alive than ``expected``."""
    if len(saved) != len(here):
        raise BudgetError(
            f"the saved masks have {len(saved)} components, but the matrices have {len(here)}; "
            "the state is damaged."
        )
    live = int(saved.sum())
    if expected is not None and live != expected:
        raise BudgetError(
            f"the saved masks have {live} live components, but the budget was {expected}; the "
            "state is damaged."
        )
