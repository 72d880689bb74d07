"""Gradients divided by the running root mean square of each token."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hyper_core.checks import is_number
from hyper_core.errors import HyperError

_EPSILON = 1e-12


def normalise_tokens(
    gradients: Sequence[Tensor], averages: Sequence[Tensor], decay: float, scale: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Return g / √(v̂ of g/scale) for each stack of tokens, and the averages advanced.

    vₜ = decay·vₜ₋₁ + (1 − decay)·mean((g/scale)²) over the token; v̂ = v / w, where the last of
    ``averages`` is w, the same average of ones. ``scale`` is a loss scale that g has and the
    averages are not to see: what is returned has it still.

    >>> (g,), averages = normalise_tokens([torch.full((1, 1, 4), 3.0)], [torch.zeros(1, 1, 1),
    ...     torch.zeros(())], decay=0.5, scale=1.0)
    >>> g.flatten().tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    squares = [(gradient / scale).square().mean(-1, keepdim=True) for gradient in gradients]
    advanced = [
        torch.lerp(average, square, 1 - decay)
        for average, square in zip(averages, [*squares, torch.ones_like(averages[-1])], strict=True)
    ]
    weight = advanced[-1]
    normalised = [
        gradient / ((average / weight).sqrt() + _EPSILON)
        for gradient, average in zip(gradients, advanced[:-1], strict=True)
    ]
    return normalised, advanced


def check_decay(decay: float) -> None:
    """Raise a `HyperError` unless ``decay`` weighs an average.

    >>> check_decay(0.99)
    """
    if not is_number(decay) or not 0 <= decay < 1:
        raise HyperError(
            f"gradient_decay is {decay!r}, expected 0 or more and below 1; 0.99 averages about the "
            "last 100 steps."
        )
