"""AdaLoRA's score: sensitivity and uncertainty of every number, averaged over the steps."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rank_budget.errors import require
from rank_budget.record import check_same
from rank_budget.scores import check_keys
from rank_budget.stacks import Block, Gather, arenas_of


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
        self._gather = Gather(blocks, order)
        self._arenas = arenas_of(blocks)
        self._sensitivity = [arena.zeros() for arena in self._arenas]
        self._uncertainty = [arena.zeros() for arena in self._arenas]
        self._parts = [
            (block, part)
            for arena in self._arenas
            for block, part in zip(arena.blocks, arena.split(arena.products), strict=True)
        ]
        self._read: list[tuple[Tensor, set[str]]] = []
        self._checked = False
        self._moves = [(1 - betas).to(arena.device, arena.dtype) for arena in self._arenas]
        self._present: tuple[set[str], list[Tensor]] = (set(), [])

    def read(self, grad_scale: Tensor | None = None) -> set[str]:
        """Take |w·∇w| of everything; return the matrices that had no gradient."""
        self._checked = False
        self._read = [arena.read_products() for arena in self._arenas]
        if grad_scale is not None:
            for products, _ in self._read:
                products.div_(grad_scale.to(products.device))
        return set().union(*(missing for _, missing in self._read))

    def is_finite(self) -> bool:
        """Return whether all that was read is finite; this reads the device."""
        finite = bool(self._finite())
        self._checked = finite
        return finite

    def _finite(self) -> Tensor:
        # The largest, unlike a sum, is finite whenever all are; NaN is not below infinity.
        flags = [
            (products.amax() < torch.inf).to(self._gather.device)
            for products, _ in self._read
            if products.numel()
        ]
        if not flags:
            finite = torch.ones((), dtype=torch.bool, device=self._gather.device)
        else:
            finite = flags[0] if len(flags) == 1 else torch.stack(flags).all()
        return self._gather.agree(finite)

    def commit(self) -> None:
        """Move the averages towards what was read, unless it is not finite."""
        finite = None if self._checked else self._finite()
        everything = zip(
            self._arenas, self._read, self._sensitivity, self._uncertainty, strict=True
        )
        for place, (arena, (products, missing), mean, spread) in enumerate(everything):
            moves = self._moves[place]
            if finite is not None:
                # A weight of zero keeps an average only from what is finite.
                products.nan_to_num_(nan=0, posinf=0)
                moves = moves * finite.to(arena.device)
            move1, move2 = moves.unbind()
            if missing:
                present = self._weights(missing)[place]
                move1, move2 = move1 * present, move2 * present
            mean.lerp_(products, move1)
            spread.lerp_(_distance_(products, mean), move2)
        self._read = []

    def _weights(self, missing: set[str]) -> list[Tensor]:
        """Return 1 for what has a gradient, else 0, flat; kept, since it is mostly the same."""
        if self._present[0] != missing:
            self._present = missing, [arena.present(missing) for arena in self._arenas]
        return self._present[1]

    def scores(self) -> Tensor:
        """Return the score of every component."""
        for arena, mean, spread in zip(
            self._arenas, self._sensitivity, self._uncertainty, strict=True
        ):
            torch.mul(mean, spread, out=arena.products)
        return self._gather([_over_width(block, part) for block, part in self._parts])

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
        check_same(list(state["of"]), self._contents(), "(role, names, shape, start)")
        for field, flats in (
            ("sensitivity", self._sensitivity),
            ("uncertainty", self._uncertainty),
        ):
            for flat, value in zip(flats, state[field], strict=True):
                flat.copy_(value)
        self._read = []

    def _contents(self) -> list[list[Any]]:
        return [block.contents for arena in self._arenas for block in arena.blocks]


def _distance_(values: Tensor, others: Tensor) -> Tensor:
    """Return |values − others|, in ``values``.

    As a loss that is smooth below the smallest number only: one pass over memory, where a
    difference and its magnitude are two, and memory is what a step waits for.
    """
    smallest = math.ulp(0.0)
    torch.ops.aten.smooth_l1_loss.out(values, others, 0, smallest, out=values)
    return values


def _over_width(block: Block, values: Tensor) -> Tensor:
    """Return the mean over the width held, (matrices, rows)."""
    if block.role == "lam":
        return values
    width = -1 if block.last else -2
    # Of a shard without a part of the width the sum is zero, but the mean is not a number.
    return values.mean(width) if block.held else values.sum(width)
