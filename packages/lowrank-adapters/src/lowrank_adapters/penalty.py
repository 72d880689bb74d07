"""AdaLoRA's orthogonality penalty, over all matrices of equal shape at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_adapters.stacked import FactorGroup


def orthogonality_penalty(
    stacks: Sequence[Tensor], matrices: int, *, squared: bool = True
) -> Tensor:
    """Return (1/matrices) Σ ‖A Aᵀ − I‖²_F over all A in the stacks; differentiable.

    Shapes: each stack (m, rank, width), its A being Pᵀ or Q; the result is 0-dim.
    ``matrices``: how many adapted matrices there are, each of which has a P and a Q.
    ``squared``: False gives the form of AdaLoRA's published code, the mean of ‖A Aᵀ − I‖_F over all
    P and Q, which is (1/(2 · matrices)) Σ.
    Paper: equation 7. Deviation: averaged over matrices, so that γ does not depend on depth.

    >>> orthogonality_penalty([torch.eye(3)[None, :2], torch.zeros(1, 2, 5)], matrices=1)
    tensor(2.)
    >>> orthogonality_penalty([torch.zeros(2, 4, 5)], matrices=1, squared=False)
    tensor(2.)
    """
    if squared:
        return torch.stack([_excess(stack).square().sum() for stack in stacks]).sum() / matrices
    norms = [torch.linalg.vector_norm(_excess(stack), dim=(1, 2)).sum() for stack in stacks]
    return torch.stack(norms).sum() / (2 * matrices)


def _excess(stack: Tensor) -> Tensor:
    identity = torch.eye(stack.shape[1], dtype=stack.dtype, device=stack.device)
    return stack @ stack.mT - identity


@torch.no_grad()
def accumulate_orthogonality_gradient_(
    groups: Sequence[FactorGroup], weight: float, *, squared: bool = True
) -> Tensor:
    """Add the gradient of ``weight`` times the penalty to the groups' gradients, in place.

    Closed form: ∂/∂A = (4 · weight / matrices)(A Aᵀ − I) A; not ``squared``:
    (weight / matrices)(A Aᵀ − I) A / ‖A Aᵀ − I‖_F, and zero where that norm is. ``groups``: those
    of the roles "p" and "q". Returns the penalty without the weight, 0-dim, on the device; nothing
    is read back.
    """
    matrices = sum(len(group.names) for group in groups if group.role == "p")
    total = torch.zeros((), dtype=groups[0].values.dtype, device=groups[0].values.device)
    for group in groups:
        excess = _excess(group.values)
        gradient = group.values.grad
        assert gradient is not None, "a FactorStack binds the gradients of its groups"
        if squared:
            total += excess.square().sum()
            gradient.baddbmm_(excess, group.values, alpha=4 * weight / matrices)
        else:
            norms = torch.linalg.vector_norm(excess, dim=(1, 2), keepdim=True)
            total += norms.sum() / 2
            excess /= norms.clamp_min(torch.finfo(norms.dtype).tiny)
            gradient.baddbmm_(excess, group.values, alpha=weight / matrices)
    return total / matrices
