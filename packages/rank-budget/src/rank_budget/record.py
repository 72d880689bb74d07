"""What an allocation did, kept on the device until someone asks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rank_budget.saved import check_list, check_tensor, check_whole, damaged

STATS = 4


@dataclass(frozen=True, eq=False)
class Allocation:
    """One allocation: after which step, to which budget, and what it did.

    ``step``, ``budget``: known at once. ``pruned``, ``grown``, ``live``: numbers of components,
    and ``threshold``: the highest score that fell, −inf where none did; these four are read from
    the device, together, when the first of them is asked for. ``pruned_components`` and
    ``grown_components`` say which they were; until then, and in the history, they are one or two
    masks, bool, (components,), on the device.
    """

    step: int
    budget: int
    stats: Tensor = field(repr=False)
    changes: Tensor | None = field(default=None, repr=False)
    fell: Tensor | None = field(default=None, repr=False)
    ranks: Mapping[str, int] = field(default_factory=dict, repr=False)

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

    @cached_property
    def pruned_components(self) -> dict[str, list[int]]:
        """The components that fell, by matrix."""
        return self._by_matrix(self.fell)

    @cached_property
    def grown_components(self) -> dict[str, list[int]]:
        """The components that woke up, by matrix."""
        if self.changes is None or self.fell is None or self.changes is self.fell:
            return {}
        return self._by_matrix(self.changes & self.fell.logical_not())

    def _by_matrix(self, mask: Tensor | None) -> dict[str, list[int]]:
        """Return the places of a mask; matrices without any are left out."""
        if mask is None:
            return {}
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
    """Return a history as plain numbers and small tensors.

    ``pruned`` and ``grown``: int32, (changes, 2), which allocation and which component.
    """
    stats = [allocation.stats for allocation in history]
    pruned = [done.fell for done in history if done.fell is not None]
    changed = [done.changes for done in history if done.changes is not None]
    none = torch.zeros(0, 1, dtype=torch.bool)
    fell, changes = (torch.stack(masks) if masks else none for masks in (pruned, changed))
    return {
        "steps": [allocation.step for allocation in history],
        "budgets": [allocation.budget for allocation in history],
        "stats": torch.stack(stats) if stats else torch.zeros(0, STATS),
        "pruned": fell.nonzero().int(),
        "grown": (changes & fell.logical_not()).nonzero().int(),
    }


def history_from(
    state: Mapping[str, Any], ranks: Mapping[str, int], device: torch.device
) -> list[Allocation]:
    """Return the history that `history_state` wrote, of matrices of these ranks.

    Raises:
        BudgetError: its parts do not fit.
    """
    keys = ("steps", "budgets", "stats", "pruned", "grown")
    if not isinstance(state, Mapping) or state.keys() != set(keys):
        raise damaged("history", state, f"a mapping of {', '.join(keys)}")
    check_list("steps", state["steps"])
    count, components = len(state["steps"]), sum(ranks.values())
    check_list("budgets", state["budgets"], count)
    for number in (*state["steps"], *state["budgets"]):
        check_whole("history", number)
    check_tensor("stats", state["stats"], (count, STATS))
    masks = []
    for key in ("pruned", "grown"):
        pairs = state[key]
        length = len(pairs) if isinstance(pairs, Tensor) and pairs.dim() else 0
        check_tensor(key, pairs, (length, 2), torch.int32)
        inside = (pairs >= 0) & (pairs.cpu() < torch.tensor([count, components])).to(pairs.device)
        if not inside.all():
            raise damaged(key, pairs, f"places in {count} allocations of {components} components")
        mask = torch.zeros(count, components, dtype=torch.bool, device=device)
        mask[tuple(pairs.to(device).long().T)] = True
        masks.append(mask)
    fell, grown = masks
    changes = (fell | grown).unbind() if grown.any() else fell.unbind()
    stats = state["stats"].to(device).clone().unbind()
    rows = zip(state["steps"], state["budgets"], stats, changes, fell.unbind(), strict=True)
    return [Allocation(*row, ranks) for row in rows]
