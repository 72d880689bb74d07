"""BERT's encoder layers as a body."""

from dataclasses import dataclass, field, fields
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from hyper_core.bodies.config import check_size
from hyper_core.errors import HyperError
from hyper_core.init import GELU_VARIANCE
from hyper_core.stacked import StackedLayerNorm, StackedLinear


@dataclass(frozen=True)
class AttentionConfig:
    """``layers`` encoder layers over tokens ``hidden`` wide, with ``heads`` heads.

    ``norm`` "post", as BERT's: x₁ = LN(x + W_O·Attention(x)); y = LN(x₁ + W₂·GELU(W₁·x₁)).
    ``norm`` "pre": x₁ = x + W_O·Attention(LN(x)); y = x₁ + W₂·GELU(W₁·LN(x₁)), and after the last
    layer LN(y). Attention is softmax(q kᵀ / √(hidden / heads)) v within one matrix. There is no
    dropout: the output is a function of weights and input alone.

    ``max_score_bytes``: the attention scores of a batch, matrices · heads · tokens² · 4 bytes, may
    take this much; more is refused. Fused kernels need not hold them, but must compute them.

    The defaults are one layer of TinyBERT (paper, section 4.1.4): 312 wide, 12 heads; its
    feed-forward part, which the paper does not state, is TinyBERT's 1200.
    Paper: section 3.3 and equation 8. Deviations: no dropout; the start.

    Start: biases 0; weights as `hyper_core.init.fan_in_normal_`, and those that read an
    activation as `hyper_core.init.centred_normal_`.

    Raises:
        HyperError: a size below one, ``hidden`` that ``heads`` does not divide, an unknown norm.

    >>> import torch
    >>> body = AttentionConfig(hidden=8, heads=2, feed_forward=16).build(networks=1)
    >>> body(torch.ones(1, 5, 3, 8)).shape
    torch.Size([1, 5, 3, 8])
    """

    hidden: int = 312
    heads: int = 12
    feed_forward: int = 1200
    layers: int = 1
    norm: Literal["post", "pre"] = "post"
    max_score_bytes: int = field(default=2**32, compare=False)  # a limit, not a size

    def __post_init__(self) -> None:
        for size in fields(self):
            if size.name != "norm":
                check_size(self, size.name, getattr(self, size.name), size.default)
        if self.hidden % self.heads:
            above = self.hidden + self.heads - self.hidden % self.heads
            raise HyperError(
                f"AttentionConfig.hidden is {self.hidden}, expected a multiple of heads, "
                f"{self.heads}; make it {above}."
            )
        if self.norm not in ("post", "pre"):
            raise HyperError(
                f"AttentionConfig.norm is {self.norm!r}, expected one of post, pre; choose one."
            )

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
        body = nn.Sequential(*(EncoderLayer(networks, self) for _ in range(self.layers)))
        if self.norm == "pre":
            body.append(StackedLayerNorm(networks, self.hidden))
        return body

    def check_tokens(self, matrices: int, tokens: int) -> None:
        """Refuse more attention scores than ``max_score_bytes``.

        Raises:
            HyperError: the scores' size, the limit and what to do.
        """
        size = 4 * matrices * self.heads * tokens**2
        if size > self.max_score_bytes:
            raise HyperError(
                f"attention among {tokens} tokens in each of {matrices} matrices has {size} bytes "
                f"of scores, expected at most AttentionConfig.max_score_bytes, "
                f"{self.max_score_bytes}; cut larger tokens (rows or columns along the shorter "
                "side), take ConvConfig or MLPConfig, or raise the limit."
            )


class EncoderLayer(nn.Module):
    """One layer of `AttentionConfig`: (networks, matrices, tokens, hidden) in and out."""

    def __init__(self, networks: int, config: AttentionConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.heads, self.pre_norm = config.heads, config.norm == "pre"
        self.query_key_value = StackedLinear(networks, hidden, 3 * hidden)
        self.attention_output = StackedLinear(networks, hidden, hidden)
        self.attention_norm = StackedLayerNorm(networks, hidden)
        self.up = StackedLinear(networks, hidden, config.feed_forward)
        self.down = StackedLinear(
            networks, config.feed_forward, hidden, activation_variance=GELU_VARIANCE
        )
        self.output_norm = StackedLayerNorm(networks, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Return y for x."""
        if self.pre_norm:
            x = x + self._attend(self.attention_norm(x))
            return x + self._feed_forward(self.output_norm(x))
        x = self.attention_norm(x + self._attend(x))
        y: Tensor = self.output_norm(x + self._feed_forward(x))
        return y

    def _attend(self, x: Tensor) -> Tensor:
        heads = self.query_key_value(x).flatten(0, 1).unflatten(-1, (3, self.heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        y: Tensor = self.attention_output(mixed.transpose(1, 2).flatten(2).view(x.shape))
        return y

    def _feed_forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(functional.gelu(self.up(x)))
        return y
