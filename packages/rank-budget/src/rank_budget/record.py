"""What an allocation did, kept on the device until someone asks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rank_budget.saved import check_list, check_tensor, check_whole, damaged


@dataclass(frozen=True, eq=False)
class Allocation:
    """One allocation: after which step, to which budget, and what it did.

    ``step``, ``budget``: known at once. ``pruned``, ``grown``, ``live``: numbers of components,
    and ``threshold``: the highest score that fell, −inf where none did; these four are read from
    the device, together, when the first of them is asked for. ``pruned_components`` and
    ``grown_components`` say which they were. Until then, and in the history, they are what lived
    ``before`` and what is ``alive`` after, masks, bool, (components,), on the device, of which the
    allocation before holds the first.
    """

    step: int
    budget: int
    highest: Tensor = field(repr=False)
    before: Tensor = field(repr=False)
    alive: Tensor = field(repr=False)
    ranks: Mapping[str, int] = field(repr=False)

    @cached_property
    def _read(self) -> list[float]:
        counts = torch.stack([self.fell, self.woke, self.alive]).sum(1)
        numbers: list[float] = torch.cat([counts, self.highest.view(1)]).tolist()
        # As in the choice, NaN counts as the highest.
        return [math.inf if math.isnan(number) else number for number in numbers]

    @property
    def fell(self) -> Tensor:
        """Which components fell, bool, (components,)."""
        return self.before > self.alive

    @property
    def woke(self) -> Tensor:
        """Which components woke up, bool, (components,)."""
        return self.alive > self.before

    @property
    def pruned(self) -> int:
        """Components that fell."""
        return int(self._read[0])

    @property
    def grown(self) -> int:
        """Components that woke up."""
        return int(self._read[1])

    @property
    def live(self) -> int:
        """Components alive afterwards."""
        return int(self._read[2])

    @property
    def threshold(self) -> float:
        """The highest score that fell."""
        return self._read[3]

    @cached_property
    def pruned_components(self) -> dict[str, list[int]]:
        """The components that fell, by matrix."""
        return self._by_matrix(self.fell)

    @cached_property
    def grown_components(self) -> dict[str, list[int]]:
        """The components that woke up, by matrix."""
        return self._by_matrix(self.woke)

    def _by_matrix(self, mask: Tensor) -> dict[str, list[int]]:
        """Return the places of a mask; matrices without any are left out."""
        parts = torch.split(mask.cpu(), list(self.ranks.values()))
        found = zip(self.ranks, (part.nonzero()[:, 0].tolist() for part in parts), strict=True)
        return {name: places for name, places in found if places}

    def _content(self) -> tuple[Any, ...]:
        components = self.pruned_components, self.grown_components
        return self.step, self.budget, self._read, *components

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Allocation):
            return NotImplemented
        return self._content() == other._content()

    def __hash__(self) -> int:
        return hash((self.step, self.budget))

    def __repr__(self) -> str:
        return (
            f"Allocation(step={self.step}, budget={self.budget}, pruned={self.pruned}, "
            f"grown={self.grown}, live={self.live}, threshold={self.threshold:.3g})"
        )


def allocation_of(
    step: int, budget: int, scores: Tensor, before: Tensor, alive: Tensor, ranks: Mapping[str, int]
) -> Allocation:
    """Return what an allocation by ``scores``, (components,), did, without a read."""
    highest = scores.masked_fill(before <= alive, -torch.inf).amax()
    return Allocation(step, budget, highest, before, alive, ranks)


def history_state(history: Sequence[Allocation]) -> dict[str, Any]:
    """Return a history as plain numbers and small tensors.

    ``thresholds``: (allocations,). ``pruned`` and ``grown``: int32, (changes, 2), which allocation
    and which component.
    """
    none = torch.zeros(0, 1, dtype=torch.bool)
    before, alive = none, none
    if history:
        before = torch.stack([done.before for done in history])
        alive = torch.stack([done.alive for done in history])
    thresholds = [done.highest for done in history]
    return {
        "steps": [done.step for done in history],
        "budgets": [done.budget for done in history],
        "thresholds": torch.stack(thresholds) if thresholds else torch.zeros(0),
        "pruned": (before > alive).nonzero().int(),
        "grown": (alive > before).nonzero().int(),
    }


def history_from(
    state: Mapping[str, Any],
    alive: Tensor,
    ranks: Mapping[str, int],
    cost: Tensor,
    initial: int | None,
) -> list[Allocation]:
    """Return the history that `history_state` wrote, of matrices of these ranks.

    ``alive``: what lives after the last allocation, bool, (components,). ``cost``: of each
    component. ``initial``: what lived before the first cost, None where that is not known.

    Raises:
        BudgetError: its parts do not fit.
    """
    keys = ("steps", "budgets", "thresholds", "pruned", "grown")
    if not isinstance(state, Mapping) or state.keys() != set(keys):
        raise damaged("history", state, f"a mapping of {', '.join(keys)}")
    check_list("steps", state["steps"])
    count, components = len(state["steps"]), sum(ranks.values())
    check_list("budgets", state["budgets"], count)
    for number in (*state["steps"], *state["budgets"]):
        check_whole("history", number)
    check_tensor("thresholds", state["thresholds"], (count,))
    changes = torch.zeros(count, components, dtype=torch.bool, device=alive.device)
    for key in ("pruned", "grown"):
        pairs = state[key]
        length = len(pairs) if isinstance(pairs, Tensor) and pairs.dim() else 0
        check_tensor(key, pairs, (length, 2), torch.int32)
        inside = (pairs >= 0) & (pairs.cpu() < torch.tensor([count, components])).to(pairs.device)
        if not inside.all():
            raise damaged(key, pairs, f"places in {count} allocations of {components} components")
        changes[tuple(pairs.to(alive.device).long().T)] = True
    masks = [alive]
    for change in reversed(changes.unbind()):
        masks.append(masks[-1] ^ change)
    masks.reverse()
    highest = state["thresholds"].to(alive.device).clone().unbind()
    rows = zip(state["steps"], state["budgets"], highest, masks[:-1], masks[1:], strict=True)
    found = [Allocation(*row, ranks) for row in rows]
    for key, pairs in history_state(found).items():
        if key in ("pruned", "grown") and not torch.equal(pairs.cpu(), state[key].cpu()):
            raise damaged(key, state[key], "the changes that led to the masks")
    if found and initial not in (None, int((cost * masks[0]).sum())):
        raise damaged("pruned", state["pruned"], f"the changes from a start of {initial}")
    return found
