"""Starting values: each map puts out unit variance from what it reads."""

import math

import torch
from torch import Tensor, nn

GELU_VARIANCE = 1 / 3 + 1 / (2 * math.pi * math.sqrt(3)) - 1 / (4 * math.pi)
RELU_VARIANCE = 1 / 2 - 1 / (2 * math.pi)


def fan_in_normal_(weight: Tensor) -> Tensor:
    """Fill ``weight`` (..., fan-in) with N(0, 1/fan-in), in place.

    The variance of Σⱼ wⱼ xⱼ over fan-in n is n·σ²·E[xⱼ²]: one, where E[xⱼ²] is 1, as after a
    LayerNorm.

    >>> weight = fan_in_normal_(torch.empty(400, 100))
    >>> bool(abs(weight.var() * 100 - 1) < 0.05)
    True
    """
    return nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)


@torch.no_grad()
def centred_normal_(weight: Tensor, variance: float, parts: int = 1) -> Tensor:
    """Fill ``weight`` (..., fan-in) with N(0, σ²) less its mean over the fan-in, in place.

    What ReLU and GELU put out has a mean above zero, which is common to all tokens: plain weights
    would pass it on to each of them alike. Without their mean, Σⱼ wⱼ xⱼ = Σⱼ uⱼ (xⱼ − x̄) for the
    drawn u, whose variance over fan-in n is σ²·(n − 1)·Var[xⱼ]: one, with σ² = 1/((n − 1)·
    ``variance``). After ReLU of N(0, 1) that is 1/2 − 1/(2π), of which 1/√(2π) is the mean. After
    GELU, which is u·Φ(u), by Stein's lemma the mean is E[φ] = 1/(2√π), and the second moment
    E[u·uΦ²] = E[Φ²] + 2·E[uΦφ] = 1/3 + 1/(2π√3).

    ``parts``: into which the fan-in is cut, each with its own mean, such as a convolution's taps.

    >>> weight = centred_normal_(torch.empty(5, 6), RELU_VARIANCE, parts=2)
    >>> bool(weight.view(5, 2, 3).sum(-1).abs().max() < 1e-6)
    True
    """
    cut = weight.view(*weight.shape[:-1], parts, -1)
    of_each = cut.shape[-1]
    cut.normal_(std=(parts * max(of_each - 1, 1) * variance) ** -0.5)
    cut.sub_(cut.mean(-1, keepdim=True))
    return weight
