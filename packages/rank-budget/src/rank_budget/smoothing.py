"""AdaLoRA's score: sensitivity and uncertainty of every number, averaged over the steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from rank_budget import products
from rank_budget.arena import arenas_of
from rank_budget.errors import require
from rank_budget.moves import Moving
from rank_budget.saved import check_list, check_same, check_tensor
from rank_budget.scores import check_keys
from rank_budget.stacks import Block, Gather


@dataclass(frozen=True)
class SmoothedSensitivity:
    """AdaLoRA's score of a whole triplet, from averages over the steps.

    For every number w of P, λ and Q, with I = |w·∇w| of the step:
    Ī ← β₁ Ī + (1 − β₁) I, then Ū ← β₂ Ū + (1 − β₂) |I − Ī|, then s(w) = Ī · Ū.
    A component scores s(λ) + the mean of s over its column of P + the mean over its row of Q.

    Averages are float32, or wider where the factors are. Steps that are not finite leave them
    untouched, as do matrices without a gradient. ``compile``: they move in one pass over memory,
    compiled when the allocator is made; of their bits the last may differ.
    Saved: Ī and Ū of all numbers that the process holds: sharded factors have a state per process.
    Paper: AdaLoRA (arXiv 2303.10512), equations 8 to 11 and Algorithm 1.

    Raises:
        BudgetError: β outside [0, 1); or, when the allocator is made, nothing can be compiled here.

    >>> SmoothedSensitivity(beta1=0.9)
    SmoothedSensitivity(beta1=0.9, beta2=0.85)
    """

    beta1: float = 0.85
    beta2: float = 0.85
    # No part of what is saved: a state fits with and without it.
    compile: bool = field(default=False, repr=False, compare=False)
    roles: ClassVar[tuple[str, ...]] = ("lam", "p", "q")

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, name, value, "must be 0 or more and below 1")

    def start(self, blocks: Sequence[Block], order: Mapping[str, int]) -> "Averages":
        """Return the averages, at zero; ``order``: the rank of each matrix, in order."""
        return Averages(self, blocks, order)


class Averages:
    """Ī and Ū of all numbers, flat: what a step adds is a few operations for all matrices."""

    every_step = True

    def __init__(
        self, config: SmoothedSensitivity, blocks: Sequence[Block], order: Mapping[str, int]
    ) -> None:
        betas = (config.beta1, config.beta2)
        self._moving = [
            Moving(arena, betas, compiled=config.compile) for arena in arenas_of(blocks)
        ]
        self._arenas = [moving.arena for moving in self._moving]
        self._gather = Gather([block for arena in self._arenas for block in arena.blocks], order)
        # A CPU does not wait for a flag, and to read it spares a pass over all.
        on_cpu = all(arena.device.type == "cpu" for arena in self._arenas)
        self._at_hand = on_cpu and sum(arena.numel for arena in self._arenas) >= products.LARGE
        self._largest: list[Tensor] = []
        self._missing: set[str] = set()
        self._checked = False
        self._flag: Tensor | None = None
        self._scores: Tensor | None = None
        self._present: tuple[set[str], list[Tensor]] = (set(), [])

    def read(self, grad_scale: Tensor | None = None) -> set[str]:
        """Take |w·∇w| of everything; return the matrices that had no gradient."""
        self._checked, self._flag, self._scores = False, None, None
        found = [arena.read_products(grad_scale) for arena in self._arenas]
        self._largest = [largest.to(self._gather.device) for largest, _ in found]
        self._missing = set().union(*(missing for _, missing in found))
        return self._missing

    def is_finite(self) -> bool:
        """Return whether all that was read is finite; this reads the device."""
        finite = bool(self.finite())
        self._checked = finite
        return finite

    def finite(self) -> Tensor:
        """Return whether all that was read is finite, bool, (), without a read."""
        if self._flag is None:
            self._flag = self._gather.agree(self._found_finite())
        return self._flag

    def _found_finite(self) -> Tensor:
        largest = self._largest[0] if len(self._largest) == 1 else torch.cat(self._largest)
        most = largest.amax() if len(largest) > 1 else largest[0]
        return most < torch.inf  # NaN is not

    def commit(self, *, choosing: bool = False) -> None:
        """Move the averages towards what was read, unless it is not finite."""
        self._scores = None
        if not self._checked and self._at_hand and not self.is_finite():
            return
        finite = None if self._checked else self.finite()
        weights = self._weights(self._missing) if self._missing else [None] * len(self._moving)
        parts: list[Tensor] = []
        for moving, present in zip(self._moving, weights, strict=True):
            parts += moving.move_(finite=finite, present=present, choosing=choosing)
        if choosing:
            self._scores = self._gather(parts)

    def _weights(self, missing: set[str]) -> list[Tensor]:
        """Return 1 for what has a gradient, else 0, flat; kept, since it is mostly the same."""
        if self._present[0] != missing:
            self._present = missing, [arena.present(missing) for arena in self._arenas]
        return self._present[1]

    def scores(self) -> Tensor:
        """Return the score of every component."""
        if self._scores is not None:
            return self._scores
        return self._gather([part for moving in self._moving for part in moving.scores()])

    def by_matrix(self) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
        """Return live views of Ī and Ū by matrix and role, in the shape of the factor held."""
        found: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        for moving in self._moving:
            arena, flats = moving.arena, (moving.mean, moving.spread)
            for block, *views in zip(arena.blocks, *map(arena.split, flats), strict=True):
                pairs = zip(*(view.unbind() for view in views), strict=True)
                for name, pair in zip(block.names, pairs, strict=True):
                    found.setdefault(name, {})[block.role] = pair
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return Ī and Ū of each device, flat, and what they are of."""
        return {
            "of": self._contents(),
            "sensitivity": [moving.mean for moving in self._moving],
            "uncertainty": [moving.spread for moving in self._moving],
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            BudgetError: it is of other factors or another process's part, or of another score.
        """
        check_keys(state, self.state_dict())
        check_same(state["of"], self._contents(), "(role, names, shape, start)")
        pairs = []
        for key in ("sensitivity", "uncertainty"):
            flats = self.state_dict()[key]
            check_list(key, state[key], len(flats))
            for flat, value in zip(flats, state[key], strict=True):
                check_tensor(key, value, flat.shape, flat.dtype)
                pairs.append((flat, value))
        for flat, value in pairs:
            flat.copy_(value)
        self._largest, self._scores = [], None

    def _contents(self) -> list[list[Any]]:
        return [block.contents for arena in self._arenas for block in arena.blocks]
