"""What the factors are at step 0: rank components, as pure functions of a matrix or of chance."""

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from lowrank_adapters.checks import check_positive
from lowrank_adapters.errors import AdapterError

Needs = Literal["nothing", "weight", "activations", "gradient"]


@dataclass(frozen=True)
class Components:
    """Σ_k columns_k · values_k · rows_k: columns (out, r), values (r,), rows (r, in)."""

    columns: Tensor
    values: Tensor
    rows: Tensor


class Start(Protocol):
    """What a layer asks of a start.

    ``needs``: the statistic it is computed from. ``is_zero``: whether all values are zero, so that
    the update is; a layer takes the product of any other start off again and is the base at step 0.
    """

    needs: ClassVar[Needs]
    is_zero: ClassVar[bool]

    def components(
        self, rank: int, out_width: int, in_width: int, statistic: Tensor | None, scaling: float
    ) -> Components:
        """Return the components, by which scaling · their sum is added to the weight."""


@dataclass(frozen=True)
class UnitRows:
    """Random directions of norm one, values of zero. Drawn by torch's global generator.

    Of an embedding, which reads one column of A at a time, the entries are then small, about
    1/√in; `Normal` with a deviation of 1 gives entries of one.
    """

    needs: ClassVar[Needs] = "nothing"
    is_zero: ClassVar[bool] = True

    def components(
        self, rank: int, out_width: int, in_width: int, statistic: Tensor | None, scaling: float
    ) -> Components:
        """Return columns and rows of norm one.

        >>> UnitRows().components(2, 3, 5, None, 1.0).rows.norm(dim=1).round()
        tensor([1., 1.])
        """
        columns = functional.normalize(_normal(rank, out_width), dim=1).T
        rows = functional.normalize(_normal(rank, in_width), dim=1)
        return Components(columns, _zeros(rank), rows)


@dataclass(frozen=True)
class Normal:
    """Normal numbers of deviation ``std``, values of zero, as AdaLoRA's (0.02)."""

    std: float = 0.02
    needs: ClassVar[Needs] = "nothing"
    is_zero: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive("std", self.std)

    def components(
        self, rank: int, out_width: int, in_width: int, statistic: Tensor | None, scaling: float
    ) -> Components:
        """Return columns and rows drawn from N(0, std²)."""
        columns = _normal(rank, out_width).T * self.std
        return Components(columns, _zeros(rank), _normal(rank, in_width) * self.std)


@dataclass(frozen=True)
class Orthonormal:
    """Random orthonormal columns and rows, values of zero: the orthogonality penalty is zero."""

    needs: ClassVar[Needs] = "nothing"
    is_zero: ClassVar[bool] = True

    def components(
        self, rank: int, out_width: int, in_width: int, statistic: Tensor | None, scaling: float
    ) -> Components:
        """Return columns and rows with columnsᵀ columns = rows rowsᵀ = I."""
        columns = torch.linalg.qr(_normal(out_width, rank)).Q
        return Components(columns, _zeros(rank), torch.linalg.qr(_normal(in_width, rank)).Q.T)


@dataclass(frozen=True)
class PrincipalWeights:
    """The largest singular components of the weight: W ≈ U_r Σ_r V_rᵀ, values Σ_r / s.

    Cost: a full singular value decomposition of each weight, in float32.
    Paper: PiSSA (arXiv 2404.02948). Deviation: the base's weight keeps its values; the layer takes
    the start's product off instead.
    """

    needs: ClassVar[Needs] = "weight"
    is_zero: ClassVar[bool] = False

    def components(
        self, rank: int, out_width: int, in_width: int, statistic: Tensor | None, scaling: float
    ) -> Components:
        """Return U_r, Σ_r / scaling and V_rᵀ of the weight ``statistic`` (out, in)."""
        assert statistic is not None
        u, sigma, rows = _singular(statistic, rank)
        return Components(u, sigma / scaling, rows)


@dataclass(frozen=True)
class PrincipalActivations:
    """Rows: the principal directions of the inputs. Columns are random, values zero.

    Cost: the moments are (in, in) in float32, so that a wide layer's are larger than its weight; an
    eigenvalue decomposition of each.
    Paper: EVA (arXiv 2410.07170), without its redistribution of ranks. The directions are the
    leading eigenvectors of Σ x xᵀ, not centred.
    """

    needs: ClassVar[Needs] = "activations"
    is_zero: ClassVar[bool] = True

    def components(
        self, rank: int, out_width: int, in_width: int, statistic: Tensor | None, scaling: float
    ) -> Components:
        """Return the leading eigenvectors of the second moment ``statistic`` (in, in) as rows."""
        assert statistic is not None
        rows = torch.linalg.eigh(_wide(statistic)).eigenvectors[:, -rank:].flip(1).T
        columns = functional.normalize(_normal(rank, out_width), dim=1).T
        return Components(columns.to(rows.device), _zeros(rank).to(rows.device), rows)


@dataclass(frozen=True)
class GradientStep:
    """A small step down the gradient G = U Σ Vᵀ: values -size · Σ_r / mean(Σ_r).

    Cost: a full singular value decomposition of each gradient, in float32.
    Paper: LoRA-One (arXiv 2502.01235). Deviation: the step is only where the factors start, not
    taken: the layer takes the start's product off, so that the model's output is the base's.
    """

    size: float = 0.003
    needs: ClassVar[Needs] = "gradient"
    is_zero: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_positive("size", self.size)

    def components(
        self, rank: int, out_width: int, in_width: int, statistic: Tensor | None, scaling: float
    ) -> Components:
        """Return U_r, the values and V_rᵀ of the gradient ``statistic`` (out, in)."""
        assert statistic is not None
        u, sigma, rows = _singular(statistic, rank)
        # A layer that got no gradient starts from zero values.
        tiny = torch.finfo(sigma.dtype).tiny
        return Components(u, -self.size * sigma / sigma.mean().clamp_min(tiny), rows)


@dataclass(frozen=True)
class GradientApproximation:
    """Rows V_1…r and columns U_r+1…2r of the gradient G = U Σ Vᵀ, values √out / gamma.

    The first step of LoRA is then the best approximation of rank 2r of one of full fine-tuning.
    Needs a rank of at most half of what the matrix can have.
    Cost: as `GradientStep`.
    Paper: LoRA-GA (arXiv 2407.05000), its stable scale; the product is taken off, as there.

    Raises:
        AdapterError: twice the rank is above what the gradient has.
    """

    gamma: float = 16.0
    needs: ClassVar[Needs] = "gradient"
    is_zero: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_positive("gamma", self.gamma)

    def components(
        self, rank: int, out_width: int, in_width: int, statistic: Tensor | None, scaling: float
    ) -> Components:
        """Return columns, values and rows from the gradient ``statistic`` (out, in)."""
        assert statistic is not None
        if 2 * rank > min(out_width, in_width):
            raise AdapterError(
                f"rank is {rank}, but GradientApproximation needs 2 · rank directions of a matrix "
                f"{out_width} x {in_width}; choose a rank of 1 to {min(out_width, in_width) // 2}."
            )
        u, _, rows = _singular(statistic, 2 * rank)
        values = torch.full((rank,), out_width**0.5 / self.gamma, device=u.device)
        return Components(u[:, rank:], values, rows[:rank])


def check_statistic(start: Start, statistic: Tensor | None, out_width: int, in_width: int) -> None:
    """Refuse a statistic that ``start`` cannot be computed from.

    Raises:
        AdapterError: it is missing, has another shape or is not finite.
    """
    if start.needs == "nothing":
        return
    name = type(start).__name__
    if statistic is None:
        raise AdapterError(
            f"{name} needs the {start.needs}; inject with another start, collect the statistics, "
            "and call start_factors_ with them."
        )
    expected = (in_width, in_width) if start.needs == "activations" else (out_width, in_width)
    if tuple(statistic.shape) != expected:
        raise AdapterError(
            f"{name} got {tuple(statistic.shape)} as the {start.needs}, expected {expected}; "
            "collect them on this model."
        )
    if not statistic.isfinite().all():
        raise AdapterError(
            f"{name} got numbers that are not finite as the {start.needs}; look for the batch that "
            "gave them."
        )


def _singular(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    u, sigma, rows = torch.linalg.svd(_wide(matrix), full_matrices=False)
    return u[:, :rank], sigma[:rank], rows[:rank]


def _wide(matrix: Tensor) -> Tensor:
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))


def _zeros(rank: int) -> Tensor:
    # Explicit, so that no surrounding default device or dtype changes it.
    return torch.zeros(rank, device="cpu", dtype=torch.float32)


def _normal(*size: int) -> Tensor:
    # Explicit, so that no surrounding default device or dtype changes the draw.
    return torch.randn(*size, device="cpu", dtype=torch.float32)
