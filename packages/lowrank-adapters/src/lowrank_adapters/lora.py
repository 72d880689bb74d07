"""LoRA: a fixed number of components, learned as two matrices."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowrank_adapters.layer import LowRankLinear, unit_rows


class LoRALinear(LowRankLinear):
    """y = base(x) + s · x Aᵀ Bᵀ, s = alpha / rank.

    Shapes: x (..., in), y (..., out), A (rank, in), B (out, rank).
    Gradient: to a, b and x; never to the base. Saved: a and b.
    Start: rows of A of unit norm, B = 0, so that y = base(x).
    Paper: LoRA (arXiv 2106.09685), section 4.1.

    Raises:
        AdapterError: the rank does not fit the base.

    >>> LoRALinear(nn.Linear(4, 3), rank=2, alpha=2.0)(torch.ones(5, 4)).shape
    torch.Size([5, 3])
    """

    roles: ClassVar[tuple[str, ...]] = ("a", "b")

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(base, rank, alpha)
        a = unit_rows(rank, self.in_features)
        self.a = nn.Parameter(a.to(device, dtype))
        self.b = nn.Parameter(torch.zeros(self.out_features, rank, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., out) for x (..., in)."""
        hidden = functional.linear(x, self.a.to(x.dtype)) * self.scaling
        y: Tensor = self.base(x) + functional.linear(hidden, self.b.to(x.dtype))
        return y

    @torch.no_grad()
    def as_lora(self) -> tuple[Tensor, Tensor]:
        """Return A (rank, in) and s·B (out, rank)."""
        wide = torch.promote_types(self.b.dtype, torch.float32)
        return self.a.detach().clone(), self.b.detach().to(wide) * self.scaling


@dataclass(frozen=True)
class LoRA:
    """Makes a `LoRALinear` of a linear layer; see there."""

    rank: int
    alpha: float

    def build(
        self, base: nn.Linear, *, device: torch.device | str, dtype: torch.dtype
    ) -> LoRALinear:
        """Return the layer around ``base``, with factors on ``device``."""
        return LoRALinear(base, self.rank, self.alpha, device=device, dtype=dtype)
