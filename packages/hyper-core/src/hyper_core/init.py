"""Starting values: each map puts out unit variance from what it reads."""

import math

from torch import Tensor, nn

GELU_SECOND_MOMENT = 1 / 3 + 1 / (2 * math.pi * math.sqrt(3))
RELU_SECOND_MOMENT = 1 / 2


def fan_in_normal_(weight: Tensor, second_moment: float = 1.0) -> Tensor:
    """Fill ``weight`` (..., fan-in) with N(0, σ²), σ² = 1/(fan-in · ``second_moment``), in place.

    The variance of Σⱼ wⱼ xⱼ over fan-in n is n·σ²·E[xⱼ²]: one, where E[xⱼ²] is
    ``second_moment``. That is 1 after a LayerNorm; 1/2 after ReLU of N(0, 1), by symmetry; and
    after GELU, which is u·Φ(u), by Stein's lemma E[u·uΦ²] = E[Φ²] + 2·E[uΦφ] = 1/3 + 1/(2π√3),
    about 0.425.

    >>> import torch
    >>> weight = fan_in_normal_(torch.empty(400, 100))
    >>> bool(abs(weight.var() * 100 - 1) < 0.05)
    True
    """
    return nn.init.normal_(weight, std=(weight.shape[-1] * second_moment) ** -0.5)
