"""LoRA: a fixed number of components, learned as two matrices."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lowrank_adapters.layer import LowRankLinear
from lowrank_adapters.maker import LowRankMaker
from lowrank_adapters.starts import Components


class LoRALinear(LowRankLinear):
    """y = base(x) + s · x Aᵀ Bᵀ, s = alpha / rank.

    Shapes: x (..., in), y (..., out), A (rank, in), B (out, rank).
    Gradient: to a, b and x; never to the base. Saved: a and b.
    Start: rows of A of unit norm, B = 0, so that y = base(x).
    Paper: LoRA (arXiv 2106.09685), section 4.1. See `LowRankLinear` for the rest.

    Raises:
        AdapterError: the base is no linear map, or the rank does not fit it.

    >>> LoRALinear(nn.Linear(4, 3), rank=2, alpha=2.0)(torch.ones(5, 4)).shape
    torch.Size([5, 3])
    """

    roles: ClassVar[tuple[str, ...]] = ("a", "b")

    def _make_factors(self, device: torch.device, dtype: torch.dtype) -> None:
        self.a = nn.Parameter(torch.empty(self.rank, self.in_features, device=device, dtype=dtype))
        self.b = nn.Parameter(
            torch.empty(self.rank, self.out_features, device=device, dtype=dtype).T
        )

    def _place_(self, components: Components) -> None:
        values = components.values
        root = torch.where(values == 0, 1, values.abs().sqrt())
        self.a.copy_(components.rows * root[:, None])
        self.b.copy_(components.columns * (values / root))

    def _factored(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.a.to(dtype), self.b.to(dtype)


@dataclass(frozen=True)
class LoRA(LowRankMaker):
    """Makes a `LoRALinear` of a linear map; see there."""

    def build(
        self, base: nn.Module, *, device: torch.device | str, dtype: torch.dtype
    ) -> LoRALinear:
        """Return the layer around ``base``, with factors of ``dtype`` on ``device``."""
        return LoRALinear(base, **self.common(), device=device, dtype=dtype)
