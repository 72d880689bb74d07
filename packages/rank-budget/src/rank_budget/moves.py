"""AdaLoRA's averages on one device: moved pass by pass in runs, or compiled to a single pass."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache

import torch
from torch import Tensor

from rank_budget.arena import Arena, Run
from rank_budget.errors import BudgetError


class Moving:
    """Ī and Ū of an arena, flat, and what moves them. ``betas``: β₁ and β₂."""

    def __init__(self, arena: Arena, betas: Sequence[float], *, compiled: bool) -> None:
        self.arena = arena
        self.mean, self.spread = arena.zeros(), arena.zeros()
        weights = 1 - torch.tensor(betas, dtype=torch.float64)
        self._weights = weights.to(arena.device, arena.dtype)
        flats = map(arena.by_run, (self.mean, self.spread))
        self._parts = list(zip(arena.runs, *flats, strict=True))
        self._move_at_once_ = _compiled() if compiled else None
        if self._move_at_once_ is not None:
            self._compile(self._move_at_once_)

    def _compile(self, move_at_once_: Callable[..., None]) -> None:
        """Compile for these averages, which are zero, and stay so."""
        try:
            move_at_once_(self.arena.products, self.mean, self.spread, *self._weights.unbind())
        except RuntimeError as error:
            first = str(error).strip().partition("\n")[0]
            raise BudgetError(
                f"compile is True, but nothing can be compiled for {self.arena.device} here "
                f"({first}); install a C++ compiler such as g++, or leave compile out."
            ) from error

    def move_(
        self, *, finite: Tensor | None, present: Tensor | None, choosing: bool
    ) -> list[Tensor]:
        """Move towards the arena's products; if ``choosing``, return what `scores` does.

        ``finite``: whether the products are, if that is not known on the host; otherwise they are.
        ``present``: 1 for the numbers that move, else 0, flat; None for all.
        """
        weights = self._weights
        if finite is not None:
            weights = weights * finite.to(self.arena.device)
        move1, move2 = weights.unbind()
        if self._move_at_once_ is not None:
            if present is not None:
                move1, move2 = move1 * present, move2 * present
            self._move_at_once_(self.arena.products, self.mean, self.spread, move1, move2)
            return self.scores() if choosing else []
        if finite is not None:
            # A weight of zero keeps an average, if what it weighs is a number.
            self.arena.products.nan_to_num_(nan=0, posinf=0)
        found: list[Tensor] = []
        parts: Iterable[Tensor | None] = (
            [None] * len(self._parts) if present is None else self.arena.by_run(present)
        )
        for (run, mean, spread), here in zip(self._parts, parts, strict=True):
            pair = (move1, move2) if here is None else (move1 * here, move2 * here)
            _move_(run.products, mean, spread, pair, run.room)
            if choosing:
                found += self._scores_of(run, mean, spread)
        return found

    def scores(self) -> list[Tensor]:
        """Return the means of Ī · Ū over the width held, (matrices, rows), of each piece."""
        return [score for part in self._parts for score in self._scores_of(*part)]

    def _scores_of(self, run: Run, mean: Tensor, spread: Tensor) -> list[Tensor]:
        products = torch.mul(mean, spread, out=run.room)
        found = []
        for piece, part in zip(run.pieces, run.split(products), strict=True):
            block = piece.block
            if block.role == "lam":
                # The next run overwrites it.
                found.append(part.clone() if len(self._parts) > 1 else part)
            else:
                # A shard without a part of the width: the mean of nothing is not a number.
                average = torch.mean if part.numel() else torch.sum
                found.append(average(part, -1 if block.last else -2))
        return found


def _move_(
    products: Tensor, mean: Tensor, spread: Tensor, moves: tuple[Tensor, Tensor], room: Tensor
) -> None:
    """Do Ī ← Ī + m₁ (I − Ī), then Ū ← Ū + m₂ (|I − Ī| − Ū); ``room`` is overwritten."""
    mean.lerp_(products, moves[0])
    # |I − Ī| as a loss that is smooth below the smallest number only: one pass over memory, where
    # a difference and its magnitude are two, and memory is what a step waits for.
    torch.ops.aten.smooth_l1_loss.out(products, mean, 0, math.ulp(0.0), out=room)
    spread.lerp_(room, moves[1])


@cache
def _compiled() -> Callable[..., None]:
    """Return `_move_at_once_` to be compiled, once for all allocators of a kind."""
    return torch.compile(_move_at_once_)


def _move_at_once_(
    products: Tensor, mean: Tensor, spread: Tensor, move1: Tensor, move2: Tensor
) -> None:
    """Do as `_move_`; a product that is not finite counts as zero."""
    products = torch.where(products < torch.inf, products, 0)  # NaN is not
    mean.lerp_(products, move1)
    spread.lerp_((products - mean).abs(), move2)
