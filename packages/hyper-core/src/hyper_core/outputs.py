"""What is done to the generated matrices: nothing, unit norms, or orthonormality."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Output = Literal["free", "unit_rows", "unit_columns", "orthonormal"]
OUTPUTS: tuple[Output, ...] = ("free", "unit_rows", "unit_columns", "orthonormal")
_ITERATIONS = 24
_SHIFT = 8  # of the dtype's epsilon: above the rounding of a Gram matrix of unit norm


def constrain(stacks: Sequence[Tensor], output: Output) -> list[Tensor]:
    """Return the stacks (matrices, rows, columns) with the constraint ``output`` on each matrix.

    >>> bool((constrain([torch.randn(2, 3, 4)], "unit_rows")[0].norm(dim=-1) - 1 < 1e-6).all())
    True
    """
    if output == "unit_rows":
        return [unit_vectors(stack, -1) for stack in stacks]
    if output == "unit_columns":
        return [unit_vectors(stack, -2) for stack in stacks]
    return polar_factors(stacks) if output == "orthonormal" else list(stacks)


def unit_vectors(stack: Tensor, dim: int) -> Tensor:
    """Divide by the norm along ``dim``; a vector of zeros stays zero, with gradient zero.

    >>> unit_vectors(torch.tensor([[[3.0, 4.0]]]), -1).tolist()
    [[[0.6000000238418579, 0.800000011920929]]]
    """
    unit: Tensor = _UnitVectors.apply(stack, dim)[0]  # type: ignore[no-untyped-call]
    return unit


class _UnitVectors(torch.autograd.Function):
    """y = x / ‖x‖ and 1 / ‖x‖; the gradient (g − y·⟨y, g⟩) / ‖x‖ in few passes over the numbers."""

    @staticmethod
    def forward(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
        has_norm = norm > torch.finfo(x.dtype).tiny ** 0.5
        inverse = torch.where(has_norm, norm.reciprocal(), 0.0)  # no gradient goes through this
        return x * inverse, inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, Tensor]) -> None:
        ctx.dim = inputs[1]
        ctx.save_for_backward(*output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None]:
        unit, inverse = ctx.saved_tensors
        along = torch.linalg.vecdot(unit, gradient, dim=ctx.dim).unsqueeze(ctx.dim)
        return torch.addcmul(gradient, unit, along, value=-1).mul_(inverse), None


def polar_factors(stacks: Sequence[Tensor]) -> list[Tensor]:
    """Return (X Xᵀ)^(-1/2) X for each X, or X (Xᵀ X)^(-1/2) where X has more rows than columns.

    It is the matrix with orthonormal rows (or columns) that is nearest to X, and does not depend
    on X's scale. The inverse root comes from matrix products alone, which do not make a device
    wait, of the small Gram matrices of all stacks at once: Newton's coupled iteration
    (Higham, Functions of Matrices, section 6.7) on A = G / ‖G‖_F, from Y = A and Z = I,
    T = (3I − Z Y) / 2, Y ← Y T, Z ← T Z, where Z → A^(-1/2), quadratically, each small eigenvalue
    first growing 2.25 times a step.

    A has 8ε I added, ε the dtype's: rounding would else make the least eigenvalues of nearly
    dependent rows negative, which the iteration drives to infinity. A singular value σ of X comes
    out as 1/√(1 + 8ε‖G‖_F/σ²), in float32 short of 1 by up to 5e-3 at σ a hundredth of ‖X‖_F, 6e-2
    at 3e-3 and 0.3 at 1e-3 of it; none comes out above 1, but for rounding. A matrix of zeros
    stays zero, with gradient zero.

    Shapes: each (matrices, rows, columns), equal in the lesser of rows and columns where they are
    to share one batch. Gradient: through the iteration.

    >>> (x,) = polar_factors([torch.tensor([[[3.0, 0.0, 0.0], [4.0, 5.0, 0.0]]])])
    >>> torch.allclose(x @ x.mT, torch.eye(2), atol=1e-5)
    True
    """
    wide = [stack if stack.shape[1] <= stack.shape[2] else stack.mT for stack in stacks]
    done: list[Tensor] = list(wide)
    for rank in sorted({stack.shape[1] for stack in wide}):
        members = [i for i, stack in enumerate(wide) if stack.shape[1] == rank]
        roots = _inverse_roots(torch.cat([wide[i] @ wide[i].mT for i in members]))
        for i, root in zip(
            members, torch.split(roots, [len(wide[i]) for i in members]), strict=True
        ):
            done[i] = root @ wide[i]
    return [
        factor if stack.shape[1] <= stack.shape[2] else factor.mT
        for factor, stack in zip(done, stacks, strict=True)
    ]


def _inverse_roots(gram: Tensor) -> Tensor:
    """Return G^(-1/2) of each G of (matrices, rank, rank)."""
    square = gram.square().sum((-2, -1), keepdim=True)
    has_norm = square > torch.finfo(gram.dtype).tiny
    norm = torch.where(has_norm, square, 1.0).sqrt()
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    y, z = gram / norm + _SHIFT * torch.finfo(gram.dtype).eps * identity, identity
    for _ in range(_ITERATIONS):
        step = torch.baddbmm(identity, z, y, beta=1.5, alpha=-0.5)
        y, z = y @ step, step @ z
    return z * torch.where(has_norm, norm.rsqrt(), 0.0)
