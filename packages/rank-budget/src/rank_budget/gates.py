"""Gates that learn which components live, of SoRA and SaLoRA: pure functions of tensors."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["expected_l0", "l0_gate", "proximal_gate_"]

_BETA, _GAMMA, _ZETA = 2 / 3, -0.1, 1.1


@torch.no_grad()
def proximal_gate_(gates: Sequence[Tensor], threshold: float) -> None:
    """Shrink gates towards zero, in place, after the optimizer's step: SoRA's proximal step.

    g ← sign(g) · max(|g| − threshold, 0); with threshold = learning rate · η it is a step on
    η‖g‖₁. λ of a `RankedLayer` serves as the gate; what is exactly zero has no component.

    Paper: Ding et al., SoRA (arXiv 2311.11696).

    >>> gate = torch.tensor([2.0, -0.5, 0.1])
    >>> proximal_gate_([gate], 0.25)
    >>> gate
    tensor([ 1.7500, -0.2500,  0.0000])
    """
    for gate in gates:
        gate.copy_(functional.softshrink(gate, threshold))


def l0_gate(log_alpha: Tensor, noise: Tensor | None = None) -> Tensor:
    """Return hard concrete gates in [0, 1], as SaLoRA multiplies λ by.

    z = clamp((ζ − γ) σ((log u − log(1 − u) + log α) / β) + γ, 0, 1), with β = 2/3, γ = −0.1 and
    ζ = 1.1. Without noise, for evaluation: z = clamp((ζ − γ) σ(log α) + γ, 0, 1).

    Where log α takes the place of λ, an allocator needs a layer with a ``rank_mask``, by which the
    gate is multiplied: log α of what is pruned would else be put to zero, a gate of 0.5.

    Shapes: log_alpha, noise and the result alike. ``noise``: u, uniform in (0, 1); draw it anew
    each step, the same on every process. Gradient: to log_alpha, where the clamp does not cut.
    Paper: Hu et al., SaLoRA (Mathematics 11(20), 2023); Louizos et al. (arXiv 1712.01312).

    >>> l0_gate(torch.tensor([-9.0, 0.0, 9.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    logits = log_alpha if noise is None else (noise.logit() + log_alpha) / _BETA
    return ((_ZETA - _GAMMA) * logits.sigmoid() + _GAMMA).clamp(0, 1)


def expected_l0(log_alpha: Tensor) -> Tensor:
    """Return the probability that each gate is not zero; its sum is the expected rank.

    σ(log α − β log(−γ / ζ)). Add a multiple of its sum over the budget to the loss; as the score of
    a `RankAllocator` it makes the last cut exact: ``score=lambda log_alpha, _: expected_l0(...)``,
    on layers with a ``rank_mask``, see `l0_gate`.

    Paper: Louizos et al. (arXiv 1712.01312).

    >>> expected_l0(torch.zeros(1))
    tensor([0.8318])
    """
    return (log_alpha - _BETA * math.log(-_GAMMA / _ZETA)).sigmoid()
