"""The share of a component in its matrix's update: a score without gradients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rank_budget.errors import BudgetError, require
from rank_budget.saved import check_tensor
from rank_budget.scores import check_keys, wide
from rank_budget.stacks import Block, Gather


@dataclass(frozen=True)
class NormShare:
    """The norm of a component over that of the whole update, averaged over the steps.

    s_i = ‖λ_i p_i q_iᵀ‖_F / ‖P diag(λ) Q‖_F, S ← β S + (1 − β) s. Where the update is zero, so is
    s. The norms come from Gram matrices (rank, rank); the update itself is never formed.
    Saved: S of all components.
    Paper: Mao et al., DoRA (arXiv 2405.17357).

    Raises:
        BudgetError: β outside [0, 1), or factors that are sharded.

    >>> NormShare().beta
    0.9
    """

    beta: float = 0.9
    roles: ClassVar[tuple[str, ...]] = ("lam", "p", "q")

    def __post_init__(self) -> None:
        require(0 <= self.beta < 1, "beta", self.beta, "must be 0 or more and below 1")

    def start(self, blocks: Sequence[Block], order: Mapping[str, int]) -> "Shares":
        """Return the average, at zero; ``order``: the rank of each matrix, in order."""
        if any(block.shard is not None for block in blocks):
            raise BudgetError(
                "NormShare needs whole factors, but these are sharded; leave the factors out of "
                "the sharding (ignored_params), or use SmoothedSensitivity."
            )
        return Shares(self, blocks, order)


class Shares:
    """S of all components: (components,), in the order of all components."""

    every_step = True

    def __init__(
        self, config: NormShare, blocks: Sequence[Block], order: Mapping[str, int]
    ) -> None:
        self._beta = config.beta
        self._blocks = blocks
        self._lam = [block for block in blocks if block.role == "lam"]
        self._gather = Gather(self._lam, order)
        self._order = [
            (self._rows_of("p", block), self._rows_of("q", block)) for block in self._lam
        ]
        dtype = torch.promote_types(blocks[0].dtype, torch.float32)
        self._mean = torch.zeros(sum(order.values()), dtype=dtype, device=self._gather.device)
        self._now = self._mean

    def _rows_of(self, role: str, lam: Block) -> tuple[list[int], Tensor]:
        """Return the blocks of ``role`` and rank, and where in them the matrices of ``lam`` are."""
        chosen = [
            index
            for index, block in enumerate(self._blocks)
            if (block.role, block.rows, block.device) == (role, lam.rows, lam.device)
        ]
        names = [name for index in chosen for name in self._blocks[index].names]
        place = {name: row for row, name in enumerate(names)}
        rows = torch.tensor([place[name] for name in lam.names], device=lam.device)
        return chosen, rows

    def read(self, grad_scale: Tensor | None = None) -> set[str]:
        """Take the shares of this step; gradients are not looked at."""
        del grad_scale
        grams: dict[int, Tensor] = {}
        for index, block in enumerate(self._blocks):
            if block.role != "lam":
                factor = block.per_component(wide(block.stack(block.read()[0])))
                grams[index] = factor @ factor.mT
        parts = []
        for block, orders in zip(self._lam, self._order, strict=True):
            lam = block.per_component(wide(block.stack(block.read()[0])))
            gram = lam * lam.mT
            for chosen, rows in orders:
                gram = gram * torch.cat([grams[index] for index in chosen])[rows]
            whole = gram.sum((-2, -1)).clamp(min=0).sqrt().unsqueeze(-1)
            norms = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
            parts.append(torch.where(whole == 0, 0, norms / whole))
        self._now = self._gather(parts)
        return set()

    def finite(self) -> Tensor:
        """Return whether all that was read is finite, bool, ()."""
        return self._now.isfinite().all()

    def is_finite(self) -> bool:
        """Return it; this reads the device."""
        return bool(self.finite())

    def commit(self, *, choosing: bool = False) -> None:
        """Move the average towards what was read, unless it is not finite."""
        del choosing
        moved = self._mean.lerp(self._now, 1 - self._beta)
        self._mean.copy_(torch.where(self.finite(), moved, self._mean))

    def scores(self) -> Tensor:
        """Return S."""
        return self._mean.clone()

    def state_dict(self) -> dict[str, Any]:
        """Return S, live."""
        return {"share": self._mean}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            BudgetError: it is of another score.
        """
        check_keys(state, self.state_dict())
        check_tensor("share", state["share"], self._mean.shape, self._mean.dtype)
        self._mean.copy_(state["share"])
