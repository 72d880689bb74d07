"""What every low-rank layer has: a frozen base, a rank, a scaling, and factors that it declares."""

import math
from collections.abc import Callable, Container
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import _IncompatibleKeys

from lowrank_adapters.checks import check_dropout, check_positive
from lowrank_adapters.errors import AdapterError
from lowrank_adapters.factors import Factors
from lowrank_adapters.maps import EmbeddingMap, dense_matrix, map_of
from lowrank_adapters.starts import Components, Start, UnitRows, check_statistic

Rows = Callable[[Tensor], Tensor]


def as_they_are(rows: Tensor) -> Tensor:
    """Return the rows in their order."""
    return rows


class LowRankLinear(Factors):
    """y = base(x) + s · B A x, with ``base`` frozen and called as it is.

    The base is any linear map: a linear layer of any dtype or quantisation, a convolution, an
    embedding (see ``map``). It is neither read nor changed by a forward pass. A (k, in) and
    B (out, k) are `product`, of which each method says what they are; factors are cast to the
    dtype of x. ``dropout`` acts on what B A gets, in training.

    A layer declares its factors in ``roles``; each is seen from outside as tokens (rank, width),
    one row per rank component.

    ``scaling`` is s = alpha / rank, or alpha / √rank with ``rslora`` (arXiv 2312.03732), also after
    components were pruned. ``enabled``: False leaves the base alone. ``merged``: whether the base's
    weight contains the update already. ``waiting``: whether something of the layer can be computed
    only once the base has left the meta device (`materialise_`). Saved: what `owned` yields.

    ``start``: what the factors are at step 0; y is then exactly base(x), whatever they are. Where
    the start's product B₀ A₀ is not zero, it is kept in ``start_a`` and ``start_b`` (saved), and
    the update is s · (B A - B₀ A₀), written as s · `[B - B₀, B₀] [A; A - A₀]`, of twice the rank.

    Raises:
        AdapterError: the base is no linear map; the rank is below 1 or above what its matrix can
            have; the dropout is no probability, or the base has no activations to drop.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float,
        *,
        rslora: bool = False,
        dropout: float = 0.0,
        start: Start = UnitRows(),  # noqa: B008 - frozen
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.map = map_of(base)
        self.in_features, self.out_features = self.map.in_width, self.map.out_width
        check_positive("alpha", alpha)
        self._check(rank, dropout)
        self.base = base
        self.rank = rank
        self.alpha = alpha
        self.rslora = rslora
        self.scaling = alpha / math.sqrt(rank) if rslora else alpha / rank
        self.dropout = dropout
        self.enabled = True
        self.unmerged: Tensor | None = None
        self.waiting = False
        self._waiting_start: Start | None = None
        self.register_load_state_dict_post_hook(_read_what_was_loaded)  # type: ignore[no-untyped-call]
        self._make_factors(torch.device(device), dtype)
        self.start_(start)

    def _check(self, rank: int, dropout: float) -> None:
        limit = min(self.in_features, self.out_features)
        if type(rank) is not int or not 1 <= rank <= limit:
            raise AdapterError(
                f"rank is {rank!r}, but the matrix is {self.out_features} x {self.in_features}; "
                f"choose a rank of 1 to {limit}, or exclude the module."
            )
        check_dropout(dropout)
        if dropout and isinstance(self.map, EmbeddingMap):
            raise AdapterError(
                f"dropout is {dropout}, but an embedding takes indices, which cannot be dropped; "
                "set it to 0 or exclude the module."
            )

    def _make_factors(self, device: torch.device, dtype: torch.dtype) -> None:
        raise NotImplementedError

    def _place_(self, components: Components) -> None:
        """Set the factors, in place."""
        raise NotImplementedError

    def _read_base_(self) -> None:
        """Compute what the method derives from the base's weight and does not save; by default
        nothing. Called when the factors were set to a start, and when a base was loaded.
        """

    def _factored(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return A (rank, in) and B (out, rank), computed in ``dtype``, B weighed by the mask."""
        raise NotImplementedError

    def _component_weights(self, dtype: torch.dtype) -> Tensor | None:
        """Return what the mask weighs the components by (rank,), zero where masked; None: all 1."""
        return None

    @torch.no_grad()
    def start_(self, start: Start, statistic: Tensor | None = None) -> None:
        """Set the factors, in place, to a start.

        ``statistic``: what the start needs beside chance and the base's weight (out, in): the
        gradient of the loss with respect to that weight (out, in), or the second moment of the
        inputs (in, in).

        Raises:
            AdapterError: the statistic is missing, has another shape or is not finite; or the layer
                is merged.
        """
        self._refuse_merged()
        self._waiting_start = None
        if start.needs == "weight":
            if self._base_is_meta():
                self._waiting_start, self.waiting = start, True
                for _, factor in self.factors():
                    factor.zero_()
                return
            statistic = dense_matrix(self.map, self.base)
        place = (self.rank, self.out_features, self.in_features)
        check_statistic(start, statistic, *place[1:])
        self._place_(start.components(*place, statistic, self.scaling))
        self.start_a, self.start_b = (None, None) if start.is_zero else self._whole_product()
        self._read_base_()

    def _whole_product(self) -> tuple[Tensor, Tensor]:
        """Return copies of A and B as they are where no component is masked."""
        mask = self._buffers.get("rank_mask")
        if mask is not None:
            self.rank_mask = torch.ones_like(mask)
        a, b = self._factored(self.dtype)
        if mask is not None:
            self.rank_mask = mask  # the very tensor, which others may share
        return a.clone(), b.clone()

    @torch.no_grad()
    def materialise_(self) -> None:
        """Compute what depends on the base's weights: what waited for them, and DoRA's norms.

        Raises:
            AdapterError: the layer waits, and the base is still on the meta device; or it is
                merged.
        """
        self._refuse_merged()
        if self.waiting and self._base_is_meta():
            raise AdapterError(
                "the weights of the base are still on the meta device; load them first."
            )
        self.waiting = False
        if self._waiting_start is None:
            self._read_base_()
        else:
            self.start_(self._waiting_start)

    def expect_(self, keys: Container[str], prefix: str = "") -> None:
        """Make the layer ready for a state with these keys; factors in it are no longer awaited."""
        super().expect_(keys, prefix)
        if self._are_in(keys, prefix):
            self._waiting_start = None

    def _refuse_merged(self) -> None:
        if self.merged:
            raise AdapterError("it is merged, so that its base is not what it was; unmerge first.")

    def _base_is_meta(self) -> bool:
        return any(t.is_meta for t in chain(self.base.parameters(), self.base.buffers()))

    @property
    def merged(self) -> bool:
        """Whether the base's weight contains the update; ``unmerged`` is what it was before."""
        return self.unmerged is not None

    def product(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Return A (k, in) and B (out, k), by which the update is s · B A; differentiable.

        ``dtype``: of the computation; the factors' own where none is given.
        """
        dtype = dtype or self.dtype
        a, b = self._factored(dtype)
        if self.start_a is None or self.start_b is None:
            return a, b
        start_a, start_b = self.start_a.to(dtype), self.start_b.to(dtype)
        weights = self._component_weights(dtype)
        if weights is not None:
            start_b = start_b * weights
        # Differences first: at the start both are exactly zero, and nothing cancels later on.
        return torch.cat([a, a - start_a]), torch.cat([b - start_b, start_b], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., out) for x (..., in), or of the shapes that the base has."""
        if self.merged or not self.enabled:
            alone: Tensor = self.base(x)
            return alone
        if self.waiting:
            raise AdapterError(
                f"a {type(self).__name__} of rank {self.rank} waits for the weights of its base, "
                "which was on the meta device; load them and call materialise_(model)."
            )
        return self._adapted(self.base(x), self._dropped(x))

    def _adapted(self, y: Tensor, x: Tensor) -> Tensor:
        a, b = self.product()
        return self.map.update(y, x, a, b, self.scaling)

    def _dropped(self, x: Tensor) -> Tensor:
        if self.dropout and self.training:
            return functional.dropout(x, self.dropout)
        return x

    @torch.no_grad()
    def as_lora(self) -> tuple[Tensor, Tensor]:
        """Return A (k, in) and B (out, k) with update B A, exact; k counts live components.

        Masks, λ, scaling and start are in B; nothing is shared with the layer.
        """
        # A product of two narrow numbers needs the wider ones.
        dtype = torch.promote_types(self.dtype, torch.float32)
        a, b = self.product(dtype)
        weights = self._component_weights(dtype)
        if weights is None:
            return a.clone(), b * self.scaling
        live = weights.bool().repeat(len(a) // self.rank)
        return a[live], b[:, live] * self.scaling

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Return the update of the base's weight (out, in): the merged weight minus the base's.

        >>> from lowrank_adapters import LoRALinear
        >>> LoRALinear(nn.Linear(4, 3), rank=2, alpha=2.0).delta().abs().sum()
        tensor(0.)

        Raises:
            AdapterError: the layer is merged, so that there is no base's weight to compare with.
        """
        self._refuse_merged()
        a, b = self.as_lora()
        return b @ a

    def awaits_factors(self) -> bool:
        """Whether factors are still to be computed from the base, which is on the meta device."""
        return self.waiting

    @torch.no_grad()
    def merged_weight(self, weight: Tensor, turn: Rows = as_they_are) -> Tensor:
        """Return W with the update added for a weight W (out, in), such as one read from a file.

        The base is not looked at. ``turn``: reorders the rows of B, (out, k), and of whatever else
        has a row for each output, where W's rows are in another order than the base's.

        >>> from lowrank_adapters import LoRALinear
        >>> layer = LoRALinear(nn.Linear(4, 3), rank=2, alpha=2.0)
        >>> torch.equal(layer.merged_weight(torch.ones(3, 4)), torch.ones(3, 4))
        True
        """
        a, b = self.as_lora()
        return weight + (turn(b) @ a).to(weight.dtype)

    @property
    def weight(self) -> Tensor:
        """The base's weight, for models that look at it."""
        return self.base.get_parameter("weight")

    @property
    def bias(self) -> Tensor | None:
        """The base's bias, for models that look at it."""
        return getattr(self.base, "bias", None)

    def extra_repr(self) -> str:
        """Name rank and alpha in the module's text."""
        return f"rank={self.rank}, alpha={self.alpha}"


@torch.no_grad()
def _read_what_was_loaded(layer: LowRankLinear, _: _IncompatibleKeys) -> None:
    if layer._waiting_start is None and not layer.merged and not layer._base_is_meta():
        layer.materialise_()
