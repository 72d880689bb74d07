"""DyLoRA: nested ranks, of which a step trains one and any can be used afterwards."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_adapters.errors import AdapterError
from lowrank_adapters.layer import LowRankLinear
from lowrank_adapters.lora import LoRALinear
from lowrank_adapters.maker import LowRankMaker


class DyLoRALinear(LoRALinear):
    """y = base(x) + (alpha / b) · x A[:b]ᵀ B[:, :b]ᵀ for a rank b of 1 to ``rank``.

    Shapes: as `LoRALinear`; ``rank_mask`` (rank,) is True for the first b components.
    Gradient: to the first b rows of A and columns of B, and x; never to the base. With ``frozen``
    only to those of component b: the others are read, and do not learn (an optimizer's momentum
    or weight decay still moves them). Saved: a, b and rank_mask.
    Start: as `LoRALinear`, b = ``rank``. The rank is a mask, so that a compiled layer serves all.
    Paper: DyLoRA (arXiv 2210.07558), section 4.1. Ranks count from 1; the scaling is alpha / b, or
    alpha / √b with ``rslora``. See `LowRankLinear` for the rest, `set_rank_` and `RankSampler`.

    Raises:
        AdapterError: the base is no linear map, or the rank does not fit it.

    >>> layer = DyLoRALinear(nn.Linear(4, 3), rank=2, alpha=2.0)
    >>> set_rank_({"layer": layer}, 1)
    >>> [tuple(factor.shape) for factor in layer.as_lora()]
    [(1, 4), (3, 1)]
    """

    rank_mask: Tensor
    frozen: bool = False

    def __init__(
        self, base: nn.Module, rank: int, alpha: float, *, frozen: bool = False, **options: Any
    ) -> None:
        super().__init__(base, rank, alpha, **options)
        self.frozen = frozen

    def _make_factors(self, device: torch.device, dtype: torch.dtype) -> None:
        super()._make_factors(device, dtype)
        mask = torch.ones(self.rank, dtype=torch.bool, device=device)
        self.register_buffer("rank_mask", mask)

    def _factored(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        a, b = super()._factored(dtype)
        if self.frozen:
            last = self._last()
            a = torch.where(last[:, None], a, a.detach())
            b = torch.where(last, b, b.detach())
        return a, b * self._component_weights(dtype)

    def _component_weights(self, dtype: torch.dtype) -> Tensor:
        # alpha / rank times rank / b is alpha / b, and the same with roots.
        ratio = self.rank / self.rank_mask.sum(dtype=dtype)
        return self.rank_mask * (ratio.sqrt() if self.rslora else ratio)

    def _last(self) -> Tensor:
        following = torch.cat([self.rank_mask[1:], self.rank_mask.new_zeros(1)])
        return self.rank_mask & ~following


def set_rank_(layers: Mapping[str, LowRankLinear], rank: int) -> None:
    """Let every DyLoRA layer use its first ``rank`` components, in training or inference.

    A layer that has fewer uses all of its own; other layers stay as they are.

    Raises:
        AdapterError: no layer is a `DyLoRALinear`, or the rank is not from 1 to the largest.
    """
    nested = [layer for layer in layers.values() if isinstance(layer, DyLoRALinear)]
    if not nested:
        raise AdapterError("no layer has nested ranks; inject DyLoRA first.")
    largest = max(layer.rank for layer in nested)
    if not 1 <= rank <= largest:
        raise AdapterError(f"rank is {rank}, expected 1 to {largest}, the largest of the layers.")
    masks = {id(layer.rank_mask): layer.rank_mask for layer in nested}
    for mask in masks.values():
        mask.zero_()
        mask[:rank].fill_(True)


class RankSampler:
    """Draws the ranks b of a step, uniform over ``lowest`` to ``highest``.

    ``shared``: one rank for all layers, or one for each. A rank is a function of ``seed`` and the
    step, and of the layer's name where it is not shared: equal on all processes of a job, and after
    a resumption. A layer that has fewer components uses all of its own. The masks of the layers of
    one rank are one tensor from here on, so that a draw is a few tensor operations for each
    distinct rank, and no read of the device.

    Saved: seed, bounds, and whether the draw is shared. The current rank is in the layers' masks.
    Paper: DyLoRA, section 4.1, where one b is drawn uniformly for all.

    Raises:
        AdapterError: no layer is a `DyLoRALinear`, or the bounds are not 1 <= lowest <= highest.

    >>> layers = {"layer": DyLoRALinear(nn.Linear(4, 3), rank=3, alpha=3.0)}
    >>> sampler = RankSampler(layers, seed=0)
    >>> sorted({sampler.rank_at(step) for step in range(50)})
    [1, 2, 3]
    """

    def __init__(
        self,
        layers: Mapping[str, LowRankLinear],
        *,
        seed: int,
        lowest: int = 1,
        highest: int | None = None,
        shared: bool = True,
    ) -> None:
        nested = {n: layer for n, layer in layers.items() if isinstance(layer, DyLoRALinear)}
        self.layers = nested
        self._set(seed, lowest, self._largest() if highest is None else highest, shared)
        groups: dict[tuple[int, torch.device], list[str]] = {}
        for name, layer in nested.items():
            groups.setdefault((layer.rank, layer.rank_mask.device), []).append(name)
        self._masks = [
            _Masks.over({name: nested[name] for name in names}, shared) for names in groups.values()
        ]

    def _largest(self) -> int:
        return max((layer.rank for layer in self.layers.values()), default=0)

    def _set(self, seed: int, lowest: int, highest: int, shared: bool) -> None:
        if type(seed) is not int:
            raise AdapterError(f"seed is {seed!r}, expected a whole number.")
        if type(shared) is not bool:
            raise AdapterError(f"shared is {shared!r}, expected True or False.")
        largest = self._largest()
        whole = type(lowest) is type(highest) is int
        if not whole or not 1 <= lowest <= highest <= largest:
            raise AdapterError(
                f"ranks are drawn from {lowest!r} to {highest!r}, expected bounds from 1 to "
                f"{largest}, the largest rank of the DyLoRA layers."
            )
        self.seed, self.lowest, self.highest, self.shared = seed, lowest, highest, shared

    def rank_at(self, step: int, name: str | None = None) -> int:
        """Return the rank of a step; ``name``: of the layer, where the draw is not shared."""
        # A hash, so that neither a torch version nor a platform changes a resumed run.
        text = f"{self.seed} {step}" if self.shared else f"{self.seed} {step} {name}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return self.lowest + int.from_bytes(digest, "big") % (self.highest - self.lowest + 1)

    def draw_(self, step: int) -> None:
        """Let each layer use its rank of a step. Call it before the forward pass."""
        shared = self.rank_at(step) if self.shared else None
        for masks in self._masks:
            masks.use_(shared or [self.rank_at(step, name) for name in masks.names])

    def use_(self, rank: int) -> None:
        """Let every layer use its first ``rank`` components, or all where it has fewer."""
        for masks in self._masks:
            masks.use_(rank)

    def state_dict(self) -> dict[str, int]:
        """Return everything that changes the ranks of later steps."""
        return {
            "seed": self.seed,
            "lowest": self.lowest,
            "highest": self.highest,
            "shared": self.shared,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            AdapterError: it has other keys, bounds that the layers do not have, or another draw
                than the masks were made for; nothing changes.
        """
        if state.keys() != self.state_dict().keys():
            raise AdapterError(
                f"the state of the RankSampler has {sorted(state) or 'nothing'}, expected "
                f"{sorted(self.state_dict())}; give what its state_dict returned."
            )
        if state["shared"] is not self.shared:
            raise AdapterError(
                f"the state of the RankSampler has shared {state['shared']!r}, expected "
                f"{self.shared}; make the sampler as that run did."
            )
        self._set(**state)


@dataclass(frozen=True)
class _Masks:
    """The masks of the layers of one rank: one (rank,) for all of them, or (layers, rank)."""

    names: tuple[str, ...]
    mask: Tensor

    @classmethod
    def over(cls, layers: Mapping[str, DyLoRALinear], shared: bool) -> "_Masks":
        """Make one tensor of the layers' masks, and give each its view."""
        own = [layer.rank_mask for layer in layers.values()]
        mask = own[0] if shared else torch.stack(own)
        for layer, view in zip(
            layers.values(), [mask] * len(own) if shared else mask.unbind(), strict=True
        ):
            layer.rank_mask = view
        return cls(tuple(layers), mask)

    def use_(self, rank: int | list[int]) -> None:
        """Let each layer use its first components; ``rank``: of all, or by layer."""
        if isinstance(rank, int):
            self.mask.zero_()
            self.mask.narrow(-1, 0, min(rank, self.mask.shape[-1])).fill_(True)
            return
        ranks = torch.tensor(rank).to(self.mask.device, non_blocking=True)
        places = torch.arange(self.mask.shape[-1], device=self.mask.device)
        torch.lt(places, ranks[:, None], out=self.mask)


@dataclass(frozen=True)
class DyLoRA(LowRankMaker):
    """Makes a `DyLoRALinear` of a linear map; see there."""

    frozen: bool = False

    def build(
        self, base: nn.Module, *, device: torch.device | str, dtype: torch.dtype
    ) -> DyLoRALinear:
        """Return the layer around ``base``, with factors of ``dtype`` on ``device``."""
        return DyLoRALinear(base, frozen=self.frozen, **self.common(), device=device, dtype=dtype)
