"""AdaLoRA's score: sensitivity and uncertainty of every number, averaged over the steps."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rank_budget.arena import Arena, Run, arenas_of
from rank_budget.errors import require
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
    untouched, as do matrices without a gradient.
    Saved: Ī and Ū of all numbers that the process holds: sharded factors have a state per process.
    Paper: AdaLoRA (arXiv 2303.10512), equations 8 to 11 and Algorithm 1.

    Raises:
        BudgetError: β outside [0, 1).

    >>> SmoothedSensitivity(beta1=0.9)
    SmoothedSensitivity(beta1=0.9, beta2=0.85)
    """

    beta1: float = 0.85
    beta2: float = 0.85
    roles: ClassVar[tuple[str, ...]] = ("lam", "p", "q")

    def __post_init__(self) -> None:
        for field in ("beta1", "beta2"):
            value = getattr(self, field)
            require(0 <= value < 1, field, value, "must be 0 or more and below 1")

    def start(self, blocks: Sequence[Block], order: Mapping[str, int]) -> "Averages":
        """Return the averages, at zero; ``order``: the rank of each matrix, in order."""
        return Averages(self, blocks, order)


class Averages:
    """Ī and Ū of all numbers, flat: what a step adds is a few operations for all matrices."""

    every_step = True

    def __init__(
        self, config: SmoothedSensitivity, blocks: Sequence[Block], order: Mapping[str, int]
    ) -> None:
        betas = torch.tensor([config.beta1, config.beta2], dtype=torch.float64)
        self._arenas = arenas_of(blocks)
        self._gather = Gather([block for arena in self._arenas for block in arena.blocks], order)
        self._sensitivity = [arena.zeros() for arena in self._arenas]
        self._uncertainty = [arena.zeros() for arena in self._arenas]
        self._largest: list[Tensor] = []
        self._missing: set[str] = set()
        self._checked = False
        self._scores: Tensor | None = None
        self._moves = [(1 - betas).to(arena.device, arena.dtype) for arena in self._arenas]
        self._present: tuple[set[str], list[Tensor]] = (set(), [])

    def read(self, grad_scale: Tensor | None = None) -> set[str]:
        """Take |w·∇w| of everything; return the matrices that had no gradient."""
        self._checked, self._scores = False, None
        found = [arena.read_products(grad_scale) for arena in self._arenas]
        self._largest = [largest.to(self._gather.device) for largest, _ in found]
        self._missing = set().union(*(missing for _, missing in found))
        return self._missing

    def is_finite(self) -> bool:
        """Return whether all that was read is finite; this reads the device."""
        finite = bool(self._finite())
        self._checked = finite
        return finite

    def _finite(self) -> Tensor:
        largest = self._largest[0] if len(self._largest) == 1 else torch.cat(self._largest)
        most = largest.amax() if len(largest) > 1 else largest[0]
        return self._gather.agree(most < torch.inf)  # NaN is not

    def commit(self, *, choosing: bool = False) -> None:
        """Move the averages towards what was read, unless it is not finite."""
        finite = None if self._checked else self._finite()
        parts: list[Tensor] = []
        for place, arena in enumerate(self._arenas):
            moves = self._moves[place]
            if finite is not None:
                # A weight of zero keeps an average.
                moves = moves * finite.to(arena.device)
            flats = [arena.products, self._sensitivity[place], self._uncertainty[place]]
            if self._missing:
                flats.append(self._weights(self._missing)[place])
            for run, *views in zip(arena.runs, *map(arena.by_run, flats), strict=True):
                products, mean, spread, *present = views
                move1, move2 = (move * present[0] if present else move for move in moves.unbind())
                mean.lerp_(products, move1)
                spread.lerp_(_distance(products, mean, arena.scratch[: mean.numel()]), move2)
                if choosing:
                    parts += _scores_of(arena, run, mean, spread)
        self._scores = self._gather(parts) if choosing else None

    def _weights(self, missing: set[str]) -> list[Tensor]:
        """Return 1 for what has a gradient, else 0, flat; kept, since it is mostly the same."""
        if self._present[0] != missing:
            self._present = missing, [arena.present(missing) for arena in self._arenas]
        return self._present[1]

    def scores(self) -> Tensor:
        """Return the score of every component."""
        if self._scores is not None:
            return self._scores
        parts: list[Tensor] = []
        for arena, *flats in zip(self._arenas, self._sensitivity, self._uncertainty, strict=True):
            for run, mean, spread in zip(arena.runs, *map(arena.by_run, flats), strict=True):
                parts += _scores_of(arena, run, mean, spread)
        return self._gather(parts)

    def by_matrix(self) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
        """Return live views of Ī and Ū by matrix and role, in the shape of the factor held."""
        found: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        for arena, *flats in zip(self._arenas, self._sensitivity, self._uncertainty, strict=True):
            for block, *views in zip(arena.blocks, *map(arena.split, flats), strict=True):
                pairs = zip(*(view.unbind() for view in views), strict=True)
                for name, pair in zip(block.names, pairs, strict=True):
                    found.setdefault(name, {})[block.role] = pair
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return Ī and Ū of each device, flat, and what they are of."""
        return {
            "of": self._contents(),
            "sensitivity": list(self._sensitivity),
            "uncertainty": list(self._uncertainty),
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
        for field in ("sensitivity", "uncertainty"):
            flats = self.state_dict()[field]
            check_list(field, state[field], len(flats))
            for flat, value in zip(flats, state[field], strict=True):
                check_tensor(field, value, flat.shape, flat.dtype)
                pairs.append((flat, value))
        for flat, value in pairs:
            flat.copy_(value)
        self._largest, self._scores = [], None

    def _contents(self) -> list[list[Any]]:
        return [block.contents for arena in self._arenas for block in arena.blocks]


def _distance(values: Tensor, others: Tensor, place: Tensor) -> Tensor:
    """Return |values − others|, in ``place``.

    As a loss that is smooth below the smallest number only: one pass over memory, where a
    difference and its magnitude are two, and memory is what a step waits for.
    """
    smallest = math.ulp(0.0)
    torch.ops.aten.smooth_l1_loss.out(values, others, 0, smallest, out=place)
    return place


def _scores_of(arena: Arena, run: Run, mean: Tensor, spread: Tensor) -> list[Tensor]:
    """Return means over the width held, (matrices, rows), of each piece."""
    scores = torch.mul(mean, spread, out=arena.scratch[: mean.numel()])
    found = []
    for piece, part in zip(run.pieces, run.split(scores), strict=True):
        width = -1 if piece.block.last else -2
        if piece.block.role == "lam":
            # The next run overwrites it.
            found.append(part.clone() if len(arena.runs) > 1 else part)
        elif piece.block.held:
            found.append(part.mean(width))
        else:
            # A shard without a part of the width: the mean of nothing is not a number.
            found.append(part.sum(width))
    return found
