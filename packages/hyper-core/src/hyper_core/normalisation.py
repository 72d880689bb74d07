"""Gradients divided by the running root mean square of each token."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Self

import torch
from torch import Tensor, nn

from hyper_core.checks import is_number
from hyper_core.errors import HyperError
from hyper_core.tokens import Tokens, from_tokens, to_tokens, token_shape

Normalisation = Literal["none", "token_rms"]
_EPSILON = 1e-12


class TokenRms(nn.Module):
    """Divides each token's gradient by its running root mean square, as `normalise_tokens`.

    ``groups``: by name, the shape (matrices, rows, columns) of a stack and what its tokens are.
    Saved: the averages. They are float32 or wider whatever `to` says: bfloat16 would lose all
    that (1 − decay) adds, and float16 has no room for squares.

    >>> rms = TokenRms({"p_0": ((2, 3, 4), "rows")}, decay=0.99).half()
    >>> {name: value.dtype for name, value in rms.state_dict().items()}
    {'square_p_0': torch.float32, 'square_weight': torch.float32}
    """

    _advanced: list[Tensor]

    def __init__(
        self, groups: Mapping[str, tuple[tuple[int, int, int], Tokens]], decay: float
    ) -> None:
        super().__init__()
        self._decay = decay
        self._tokens = [tokens for _, tokens in groups.values()]
        for name, (shape, tokens) in groups.items():
            self.register_buffer(f"square_{name}", torch.zeros(*token_shape(shape, tokens)[:2], 1))
        self.register_buffer("square_weight", torch.zeros(()))
        self.forget()

    def normalise(self, gradients: Sequence[Tensor], scale: float) -> list[Tensor]:
        """Return the gradients of the stacks, normalised; the averages wait for `commit`."""
        cut = [to_tokens(g, kind) for g, kind in zip(gradients, self._tokens, strict=True)]
        cut, self._advanced = normalise_tokens(cut, list(self.buffers()), self._decay, scale)
        return [
            from_tokens(part, kind, gradient.shape[1])
            for part, kind, gradient in zip(cut, self._tokens, gradients, strict=True)
        ]

    @torch.no_grad()
    def commit(self) -> None:
        """Keep the averages of the last `normalise`, if there was one since."""
        if self._advanced:
            torch._foreach_copy_(list(self.buffers()), self._advanced)
        self.forget()

    def forget(self) -> None:
        """Keep the averages as they were before the last `normalise`."""
        self._advanced = []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for name, average in self.named_buffers():
            moved = fn(average)
            if moved.dtype != average.dtype:
                wide = torch.promote_types(moved.dtype, torch.float32)
                moved = average.to(moved.device, wide)
            self._buffers[name] = moved
        return self


def normalise_tokens(
    gradients: Sequence[Tensor], averages: Sequence[Tensor], decay: float, scale: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Return g / √(v̂ of g/scale) for each stack of tokens, and the averages advanced.

    vₜ = decay·vₜ₋₁ + (1 − decay)·mean((g/scale)²) over the token; v̂ = v / w, where the last of
    ``averages`` is w, the same average of ones. ``scale`` is a loss scale that g has and the
    averages are not to see: what is returned has it still, and the gradient's dtype; the averages
    keep theirs.

    >>> (g,), averages = normalise_tokens([torch.full((1, 1, 4), 3.0)], [torch.zeros(1, 1, 1),
    ...     torch.zeros(())], decay=0.5, scale=1.0)
    >>> g.flatten().tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    wide = [gradient.to(averages[-1].dtype) for gradient in gradients]
    squares = [(gradient / scale).square().mean(-1, keepdim=True) for gradient in wide]
    advanced = [
        torch.lerp(average, square, 1 - decay)
        for average, square in zip(averages, [*squares, torch.ones_like(averages[-1])], strict=True)
    ]
    weight = advanced[-1]
    normalised = [
        (gradient / ((average / weight).sqrt() + _EPSILON)).to(narrow.dtype)
        for gradient, narrow, average in zip(wide, gradients, advanced[:-1], strict=True)
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
