"""AdaLoRA's layer: components with a scale of their own, which can be masked."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lowrank_adapters.layer import LowRankLinear
from lowrank_adapters.maker import LowRankMaker
from lowrank_adapters.starts import Components


class SVDLinear(LowRankLinear):
    """y = base(x) + s · x (P diag(mask · λ) Q)ᵀ, s = alpha / rank.

    Shapes: x (..., in), y (..., out), P (out, rank), λ and mask (rank,), Q (rank, in).
    Gradient: to p, lam, q and x; never to the base; none to masked components.
    Saved: p, lam, q and rank_mask (bool).
    Start: columns of P and rows of Q of unit norm, λ = 0, so that y = base(x). The product of
    another start is masked with its component, so that a masked one contributes nothing.
    Paper: AdaLoRA (arXiv 2303.10512), section 3.1. Deviation: s stays alpha / initial rank when
    components are masked. See `LowRankLinear` for the rest.

    Raises:
        AdapterError: the base is no linear map, or the rank does not fit it.

    >>> layer = SVDLinear(nn.Linear(4, 3), rank=2, alpha=2.0)
    >>> sorted(name for name, _ in layer.named_parameters())
    ['base.bias', 'base.weight', 'lam', 'p', 'q']
    """

    roles: ClassVar[tuple[str, ...]] = ("p", "lam", "q")
    rank_mask: Tensor

    def _make_factors(self, device: torch.device, dtype: torch.dtype) -> None:
        self.p = nn.Parameter(
            torch.empty(self.rank, self.out_features, device=device, dtype=dtype).T
        )
        self.lam = nn.Parameter(torch.empty(self.rank, device=device, dtype=dtype))
        self.q = nn.Parameter(torch.empty(self.rank, self.in_features, device=device, dtype=dtype))
        mask = torch.ones(self.rank, dtype=torch.bool, device=device)
        self.register_buffer("rank_mask", mask)

    def _place_(self, components: Components) -> None:
        self.p.copy_(components.columns)
        self.lam.copy_(components.values)
        self.q.copy_(components.rows)

    def _factored(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.q.to(dtype), self.p.to(dtype) * (self.lam.to(dtype) * self.rank_mask)

    def _component_weights(self, dtype: torch.dtype) -> Tensor:
        return self.rank_mask


@dataclass(frozen=True)
class SVD(LowRankMaker):
    """Makes a `SVDLinear` of a linear map; see there."""

    def build(
        self, base: nn.Module, *, device: torch.device | str, dtype: torch.dtype
    ) -> SVDLinear:
        """Return the layer around ``base``, with factors of ``dtype`` on ``device``."""
        return SVDLinear(base, **self.common(), device=device, dtype=dtype)
