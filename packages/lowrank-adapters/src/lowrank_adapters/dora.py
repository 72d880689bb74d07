"""DoRA: magnitudes of a matrix' rows learned apart from their directions."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lowrank_adapters.errors import AdapterError
from lowrank_adapters.layer import LowRankLinear, Rows, as_they_are
from lowrank_adapters.lora import LoRALinear
from lowrank_adapters.maker import LowRankMaker
from lowrank_adapters.maps import LinearMap, dense_matrix
from lowrank_adapters.starts import Components

_ROUNDINGS = 2


class DoRALinear(LoRALinear):
    """y = bias + g ∘ (W x + s · B A x), g = magnitude / ‖W + s · B A‖, row by row.

    Shapes: x (..., in), y (..., out), A (rank, in), B (out, rank), magnitude and norms (out,).
    Gradient: to a, b, magnitude and x; never to the base. Through the norm only where
    ``detach_norm`` is False. Saved: a, b and magnitude.
    Start: rows of A of unit norm, B = 0, magnitude = ‖W‖, so that y = base(x).
    Cost: the norms are had from ‖W‖², W Aᵀ and r x r products; the matrix B A is never made. W Aᵀ
    is a product of ``base`` with k more rows. ‖W‖ is computed when a base is there or is loaded by
    ``load_state_dict`` of a module around the layer; call `materialise_` where a base's weight was
    changed in another way. A magnitude that was not trained or loaded then follows it.
    Limit: where s · B A takes most of W away, ‖W + s · B A‖² is the difference of large numbers. It
    is then taken as at least 2 ε (‖W‖² + Σ_k |its terms|), ε of the coarser of x's dtype and the
    magnitude's: a row of norm below about 2 √ε ‖W‖ gets less gain than by its exact norm, which
    `delta` takes.
    Paper: DoRA (arXiv 2402.09353), equation 5 and, for the detached norm, section 4.3. Deviation:
    ``dropout`` acts on what B A gets, not on W's part of g ∘ W x. See `LowRankLinear` for the rest.

    Raises:
        AdapterError: the base is no linear layer, or the rank does not fit it.

    >>> layer = DoRALinear(nn.Linear(4, 3), rank=2, alpha=2.0)
    >>> [name for name, _ in layer.factors()]
    ['a', 'b', 'magnitude']
    """

    roles: ClassVar[tuple[str, ...]] = ("a", "b", "magnitude")
    map: LinearMap
    row_norms: Tensor

    def __init__(
        self, base: nn.Module, rank: int, alpha: float, *, detach_norm: bool = True, **options: Any
    ) -> None:
        super().__init__(base, rank, alpha, **options)
        self.detach_norm = detach_norm

    def _make_factors(self, device: torch.device, dtype: torch.dtype) -> None:
        if not isinstance(self.map, LinearMap):
            raise AdapterError(
                f"DoRA is for linear layers, but this is a {type(self.base).__name__}; exclude it "
                "or give it LoRA."
            )
        super()._make_factors(device, dtype)
        self.magnitude = nn.Parameter(torch.zeros(self.out_features, device=device, dtype=dtype))
        wide = torch.promote_types(dtype, torch.float32)
        norms = torch.zeros(self.out_features, device=device, dtype=wide)
        self.register_buffer("row_norms", norms, persistent=False)

    def _place_(self, components: Components) -> None:
        super()._place_(components)
        self.magnitude.copy_(self.row_norms)

    def _read_base_(self) -> None:
        if self._base_is_meta():
            self.waiting = True
            return
        # Rounded alike, so that their ratio is exactly one at the start.
        norms = dense_matrix(self.map, self.base).norm(dim=1).to(self.magnitude.dtype)
        # One that still is what the norms were is at its start; any other was trained or loaded.
        if (self.magnitude == self.row_norms).all():
            self.magnitude.copy_(norms)
        self.row_norms.copy_(norms)

    def _adapted(self, y: Tensor, x: Tensor) -> Tensor:
        a, b = self.product()
        z = self.map.update(y, x, a, b, self.scaling)
        # g - 1, not g, is rounded to the dtype of y.
        excess = (self._gain(a, b, x.dtype) - 1).to(y.dtype)
        scaled = torch.addcmul(z, z, excess)
        return scaled if self.bias is None else scaled - excess * self.bias.to(y.dtype)

    def _gain(self, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach_norm):
            norms = self._norms(a, b, dtype)
        return self.magnitude / norms

    def _norms(self, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        """‖W + s B A‖ by row: ‖W‖² + s Σ_k B ∘ (2 W Aᵀ + s B A Aᵀ)."""
        crossed = self.map.multiply(self.base, a.to(dtype)).T
        coarsest = max(torch.finfo(found).eps for found in (crossed.dtype, self.magnitude.dtype))
        # Squares of numbers as narrow as the buffer may be would overflow.
        wide = torch.promote_types(self.row_norms.dtype, torch.float32)
        a, b, whole = a.to(dtype).to(wide), b.to(wide), self.row_norms.to(wide).square()
        mixed = torch.addmm(crossed.to(wide), b, a @ a.T, beta=2, alpha=self.scaling)
        parts = self.scaling * (b * mixed)
        with torch.no_grad():
            # What is below is the rounding of what was summed.
            least = _ROUNDINGS * coarsest * (whole + parts.abs().sum(1))
            # A row of zeros has a norm that can be divided by, and stays zero.
            least = torch.where(least > 0, least, 1)
        return torch.maximum(whole + parts.sum(1), least).sqrt()

    def awaits_factors(self) -> bool:
        """Whether factors are still to be computed from the base, such as the start's magnitude."""
        unknown = self._waiting_start is not None or bool((self.magnitude == self.row_norms).all())
        return self.waiting and unknown

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Return g ∘ (W + s · B A) - W, (out, in).

        Raises:
            AdapterError: the layer is merged.
        """
        self._refuse_merged()
        weight = dense_matrix(self.map, self.base)
        return self.merged_weight(weight) - weight

    @torch.no_grad()
    def merged_weight(self, weight: Tensor, turn: Rows = as_they_are) -> Tensor:
        """Return g ∘ (W + s · B A) for a weight W (out, in); see `LowRankLinear`."""
        turned = super().merged_weight(weight, turn)
        norms = turned.norm(dim=1, keepdim=True)
        merged: Tensor = turned * (turn(self.magnitude[:, None]) / torch.where(norms > 0, norms, 1))
        return merged


class ScaledLoRALinear(LoRALinear):
    """y = base(x) + s · scale · x Aᵀ Bᵀ, with one learned number for the matrix.

    Shapes, start and saved: as `LoRALinear`, and ``scale`` (1,), which starts at 1.
    Gradient: to a, b, scale and x; never to the base.
    Paper: what HyperAdaLoRA's Appendix B describes as DoRA, ΔW = s · B_dir A_dir with a scalar s.
    See `LowRankLinear` for the rest.

    Raises:
        AdapterError: the base is no linear map, or the rank does not fit it.

    >>> layer = ScaledLoRALinear(nn.Linear(4, 3), rank=2, alpha=2.0)
    >>> layer.scale.detach()
    tensor([1.])
    """

    roles: ClassVar[tuple[str, ...]] = ("a", "b", "scale")

    def _make_factors(self, device: torch.device, dtype: torch.dtype) -> None:
        super()._make_factors(device, dtype)
        self.scale = nn.Parameter(torch.empty(1, device=device, dtype=dtype))

    def _place_(self, components: Components) -> None:
        super()._place_(components)
        self.scale.fill_(1)

    def _factored(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        a, b = super()._factored(dtype)
        return a, b * self.scale.to(dtype)


@dataclass(frozen=True)
class DoRA(LowRankMaker):
    """Makes a `DoRALinear` of a linear layer, or a `ScaledLoRALinear` where asked for.

    ``magnitude``: "rows", one for each output, as in the DoRA paper; or "scalar", one for the
    matrix, as in HyperAdaLoRA's Appendix B. ``detach_norm``: see `DoRALinear`.

    Raises:
        AdapterError: a value that no layer can have.
    """

    magnitude: Literal["rows", "scalar"] = "rows"
    detach_norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.magnitude not in ("rows", "scalar"):
            raise AdapterError(f"magnitude is {self.magnitude!r}, expected 'rows' or 'scalar'.")

    def build(
        self, base: nn.Module, *, device: torch.device | str, dtype: torch.dtype
    ) -> LowRankLinear:
        """Return the layer around ``base``, with factors of ``dtype`` on ``device``."""
        options = {**self.common(), "device": device, "dtype": dtype}
        if self.magnitude == "scalar":
            return ScaledLoRALinear(base, **options)
        return DoRALinear(base, detach_norm=self.detach_norm, **options)
