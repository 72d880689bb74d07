"""AdaLoRA's layer: components with a scale of their own, which can be masked."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowrank_adapters.layer import LowRankLinear, unit_rows


class SVDLinear(LowRankLinear):
    """y = base(x) + s · x (P diag(mask · λ) Q)ᵀ, s = alpha / rank.

    Shapes: x (..., in), y (..., out), P (out, rank), λ and mask (rank,), Q (rank, in).
    Gradient: to p, lam, q and x; never to the base; none to masked components.
    Saved: p, lam, q and rank_mask (bool).
    Start: columns of P and rows of Q of unit norm, λ = 0, so that y = base(x).
    Paper: AdaLoRA (arXiv 2303.10512), section 3.1. Deviation: s stays alpha / initial rank when
    components are masked.

    Raises:
        AdapterError: the rank does not fit the base.

    >>> layer = SVDLinear(nn.Linear(4, 3), rank=2, alpha=2.0)
    >>> sorted(name for name, _ in layer.named_parameters())
    ['base.bias', 'base.weight', 'lam', 'p', 'q']
    """

    roles: ClassVar[tuple[str, ...]] = ("p", "lam", "q")
    rank_mask: Tensor

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
        p, q = unit_rows(rank, self.out_features), unit_rows(rank, self.in_features)
        self.p = nn.Parameter(p.to(device, dtype).T)
        self.lam = nn.Parameter(torch.zeros(rank, device=device, dtype=dtype))
        self.q = nn.Parameter(q.to(device, dtype))
        self.register_buffer("rank_mask", torch.ones(rank, dtype=torch.bool, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., out) for x (..., in)."""
        scale = self.lam * self.rank_mask * self.scaling
        hidden = functional.linear(x, self.q.to(x.dtype)) * scale.to(x.dtype)
        y: Tensor = self.base(x) + functional.linear(hidden, self.p.to(x.dtype))
        return y

    @torch.no_grad()
    def as_lora(self) -> tuple[Tensor, Tensor]:
        """Return Q (k, in) and P·diag(s·λ) (out, k) of the k components that are not masked."""
        live = self.rank_mask
        # A product of two narrow numbers needs the wider ones.
        wide = torch.promote_types(self.p.dtype, torch.float32)
        p, lam = self.p.detach()[:, live].to(wide), self.lam.detach()[live].to(wide)
        return self.q.detach()[live], p * (lam * self.scaling)


@dataclass(frozen=True)
class SVD:
    """Makes an `SVDLinear` of a linear layer; see there."""

    rank: int
    alpha: float

    def build(
        self, base: nn.Linear, *, device: torch.device | str, dtype: torch.dtype
    ) -> SVDLinear:
        """Return the layer around ``base``, with factors on ``device``."""
        return SVDLinear(base, self.rank, self.alpha, device=device, dtype=dtype)
