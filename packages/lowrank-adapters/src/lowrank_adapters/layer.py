"""What every low-rank layer has: a frozen base, a rank, a scaling, and factors that it declares."""

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowrank_adapters.errors import AdapterError


class LowRankLinear(nn.Module):
    """y = base(x) + low-rank update of x, with ``base`` frozen and called as it is.

    The base may have any dtype or quantisation: it is neither read nor changed here. Factors are
    cast to the dtype of x. A layer declares its factors in ``roles``; each is seen from outside as
    tokens (rank, width), one row per rank component.

    ``scaling`` is alpha / rank, also after components were pruned.

    Raises:
        AdapterError: the rank is below 1 or above what the base's matrix can have.
    """

    roles: ClassVar[tuple[str, ...]] = ()

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        limit = min(base.in_features, base.out_features)
        if not 1 <= rank <= limit:
            raise AdapterError(
                f"rank is {rank}, but the matrix is {base.out_features} x {base.in_features}; "
                f"choose a rank of 1 to {limit}, or exclude the module."
            )
        self.base = base
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.rank = rank
        self.alpha = alpha
        self.scaling = alpha / rank

    def factors(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield each role and its parameter, in the order of ``roles``."""
        for role in self.roles:
            yield role, self.get_parameter(role)

    @staticmethod
    def as_tokens(role: str, factor: Tensor) -> Tensor:
        """Return the view (rank, width) of one factor.

        >>> LowRankLinear.as_tokens("p", torch.zeros(5, 2)).shape
        torch.Size([2, 5])
        """
        if role in ("p", "b"):
            return factor.T
        return factor.unsqueeze(-1) if role == "lam" else factor

    @staticmethod
    def from_tokens(role: str, tokens: Tensor) -> Tensor:
        """Return the factor's own shape as a view of (rank, width) tokens."""
        if role in ("p", "b"):
            return tokens.T
        return tokens.squeeze(-1) if role == "lam" else tokens

    def tokens(self, role: str) -> Tensor:
        """Return the live view (rank, width) of one factor's values."""
        return self.as_tokens(role, self.get_parameter(role).detach())

    def as_lora(self) -> tuple[Tensor, Tensor]:
        """Return A (k, in) and B (out, k) with update B A, exact; k counts live components."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Name rank and alpha in the module's text."""
        return f"rank={self.rank}, alpha={self.alpha}"


def unit_rows(rank: int, width: int) -> Tensor:
    """Return ``rank`` random directions, rows of norm one, drawn by torch's global generator.

    >>> unit_rows(2, 5).norm(dim=1)
    tensor([1., 1.])
    """
    # Explicit, so that no surrounding default device or dtype changes the draw.
    normal = torch.randn(rank, width, device="cpu", dtype=torch.float32)
    return functional.normalize(normal, dim=1)
