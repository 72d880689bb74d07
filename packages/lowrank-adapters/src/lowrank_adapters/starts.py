"""What the factors are at step 0: rank components, as pure functions of a matrix or of chance."""

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

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
    """Random directions of norm one, values of zero. Drawn by torch's global generator."""

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
        return Components(columns, torch.zeros(rank, device="cpu"), rows)


def _normal(*size: int) -> Tensor:
    # Explicit, so that no surrounding default device or dtype changes the draw.
    return torch.randn(*size, device="cpu", dtype=torch.float32)
