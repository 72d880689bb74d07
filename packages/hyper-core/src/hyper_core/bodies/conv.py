"""ResNet-18 in one dimension, over the tokens, as a body."""

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional

from hyper_core.bodies.config import check_size, check_sizes
from hyper_core.errors import HyperError
from hyper_core.init import RELU_VARIANCE
from hyper_core.stacked import StackedLayerNorm, StackedLinear


@dataclass(frozen=True)
class ConvConfig:
    """Stages of residual blocks of two convolutions over the tokens of one matrix.

    A block is y = x' + K₂ * ReLU(LN(K₁ * ReLU(LN(x)))), x' = x, or W·x where the width changes;
    K * x is Σₖ Kₖ x_{j+k} with zeros beyond the ends, so that the tokens stay as many as they
    are. After the last block comes LN(y). ``widths[i]``: features in stage i; ``blocks[i]``: its
    blocks; ``kernel``: tokens under a convolution, an odd number.

    The defaults have ResNet-18's eighteen layers: sixteen convolutions, and the hypernetwork's
    input and output projections for its first and its last layer, with the paper's 64, 128 and
    256 features (section 4.1.4). Deviations: one dimension in place of two, no stride; LayerNorm
    over the features in place of BatchNorm, whose output would depend on what else is in the batch;
    norm and ReLU before each convolution (ResNet v2), since a ReLU after each sum makes all tokens
    start alike.

    Start: biases 0; weights as `hyper_core.init.fan_in_normal_`, and those that read an
    activation as `hyper_core.init.centred_normal_`.

    Raises:
        HyperError: a size below one, an even kernel, ``blocks`` that are not one for each width.

    >>> import torch
    >>> body = ConvConfig(widths=(4, 8), blocks=(1, 1)).build(networks=1)
    >>> body(torch.ones(1, 5, 3, 4)).shape
    torch.Size([1, 5, 3, 8])
    """

    widths: tuple[int, ...] = (64, 128, 256)
    blocks: tuple[int, ...] = (2, 3, 3)
    kernel: int = 3

    def __post_init__(self) -> None:
        check_size(self, "kernel", self.kernel, 3)
        for field, default in (("widths", (64, 128, 256)), ("blocks", (2, 3, 3))):
            check_sizes(self, field, getattr(self, field), default)
        if self.kernel % 2 == 0:
            raise HyperError(
                f"ConvConfig.kernel is {self.kernel}, expected an odd number, which has a middle; "
                f"make it {self.kernel + 1}."
            )
        if not self.widths or len(self.widths) != len(self.blocks):
            raise HyperError(
                f"ConvConfig.blocks is {self.blocks}, expected one number for each of widths, "
                f"{self.widths}; give the blocks of each stage."
            )

    @property
    def input_width(self) -> int:
        """The first of ``widths``."""
        return self.widths[0]

    @property
    def output_width(self) -> int:
        """The last of ``widths``."""
        return self.widths[-1]

    def build(self, networks: int) -> nn.Module:
        """Return that many networks of this size, stacked."""
        widths = [
            width for width, count in zip(self.widths, self.blocks, strict=True)
            for _ in range(count)
        ]  # fmt: skip
        blocks = [
            ResidualBlock(networks, before, after, self.kernel)
            for before, after in pairwise([self.widths[0], *widths])
        ]
        return nn.Sequential(*blocks, StackedLayerNorm(networks, widths[-1]))

    def check_tokens(self, matrices: int, tokens: int) -> None:
        """Do nothing: the cost grows with the tokens, not with their square."""


class ResidualBlock(nn.Module):
    """One block of `ConvConfig`: (networks, matrices, tokens, before) to the same with after."""

    def __init__(self, networks: int, before: int, after: int, kernel: int) -> None:
        super().__init__()
        self.first_norm = StackedLayerNorm(networks, before)
        self.first = TokenConvolution(networks, before, after, kernel)
        self.second_norm = StackedLayerNorm(networks, after)
        self.second = TokenConvolution(networks, after, after, kernel)
        self.shortcut: nn.Module = nn.Identity()
        if before != after:
            self.shortcut = StackedLinear(networks, before, after, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return y for x."""
        inner = self.first(functional.relu(self.first_norm(x)))
        y: Tensor = self.shortcut(x) + self.second(functional.relu(self.second_norm(inner)))
        return y


class TokenConvolution(nn.Module):
    """K * x as one matrix product with each token's neighbourhood, offset by offset."""

    def __init__(self, networks: int, before: int, after: int, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.taps = StackedLinear(
            networks, kernel * before, after, activation_variance=RELU_VARIANCE, parts=kernel
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return K * x: (networks, matrices, tokens, before) to the same with after."""
        margin = self.kernel // 2
        padded = functional.pad(x, (0, 0, margin, margin))
        neighbourhoods = padded.unfold(2, self.kernel, 1).transpose(-1, -2).flatten(-2)
        y: Tensor = self.taps(neighbourhoods)
        return y
