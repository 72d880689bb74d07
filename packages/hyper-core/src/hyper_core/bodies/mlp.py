"""A deep MLP on each token as a body."""

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional

from hyper_core.bodies.config import check_size, check_sizes
from hyper_core.init import GELU_VARIANCE
from hyper_core.stacked import StackedLayerNorm, StackedLinear


@dataclass(frozen=True)
class MLPConfig:
    """y = LN(x + f_n(… f_1(x))), each token by itself: ``hidden`` features, ``widths`` within.

    The first layer is f(x) = W·x + b; the others are f(h) = W·GELU(LN(h)) + b, and
    h + W·GELU(LN(h)) + b where the width stays the same. ``widths``: features between the layers,
    of which there is one more.

    The defaults have fifteen layers of 256, 512 and 1024 features (paper, section 4.1.4): these
    thirteen, and the hypernetwork's input and output projections; see the documentation for the
    parameter count. Deviations: the normalisation and the residual connections, without which
    the tokens of such a depth start nearly equal.

    Start: biases 0; weights as `hyper_core.init.fan_in_normal_`, and those that read an
    activation as `hyper_core.init.centred_normal_`.

    Raises:
        HyperError: a size below one.

    >>> import torch
    >>> body = MLPConfig(hidden=8, widths=(16,)).build(networks=2)
    >>> body(torch.ones(2, 5, 3, 8)).shape
    torch.Size([2, 5, 3, 8])
    """

    hidden: int = 256
    widths: tuple[int, ...] = (512, *(1024,) * 11)

    def __post_init__(self) -> None:
        check_size(self, "hidden", self.hidden, 256)
        check_sizes(self, "widths", self.widths, "512 and eleven times 1024")

    @property
    def input_width(self) -> int:
        """``hidden``."""
        return self.hidden

    @property
    def output_width(self) -> int:
        """``hidden``."""
        return self.hidden

    def build(self, networks: int) -> nn.Module:
        """Return that many networks of this size, stacked."""
        return TokenMLP(networks, [self.hidden, *self.widths, self.hidden])

    def check_tokens(self, matrices: int, tokens: int) -> None:
        """Do nothing: each token is by itself."""


class TokenMLP(nn.Module):
    """The body of `MLPConfig`: (networks, matrices, tokens, hidden) in and out."""

    def __init__(self, networks: int, widths: list[int]) -> None:
        super().__init__()
        self.first = StackedLinear(networks, widths[0], widths[1])
        self.layers = nn.Sequential(
            *(NormedLayer(networks, before, after) for before, after in pairwise(widths[1:]))
        )
        self.norm = StackedLayerNorm(networks, widths[-1])

    def forward(self, x: Tensor) -> Tensor:
        """Return y for x."""
        y: Tensor = self.norm(x + self.layers(self.first(x)))
        return y


class NormedLayer(nn.Module):
    """W·GELU(LN(h)) + b, added to h where both are equally wide."""

    def __init__(self, networks: int, before: int, after: int) -> None:
        super().__init__()
        self.norm = StackedLayerNorm(networks, before)
        self.linear = StackedLinear(networks, before, after, activation_variance=GELU_VARIANCE)
        self.residual = before == after

    def forward(self, h: Tensor) -> Tensor:
        """Return the layer's output."""
        change: Tensor = self.linear(functional.gelu(self.norm(h)))
        return h + change if self.residual else change
