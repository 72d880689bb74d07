"""BERT's encoder layer, as the body of a hypernetwork."""

import math

from torch import Tensor, nn
from torch.nn import functional

from hyper_core.errors import HyperError
from hyper_core.presets import AttentionConfig

_GELU_SECOND_MOMENT = 1 / 3 + 1 / (2 * math.pi * math.sqrt(3))


class EncoderLayer(nn.Module):
    """x₁ = LN(x + W_O·Attention(x)); y = LN(x₁ + W₂·GELU(W₁·x₁)): one post-norm BERT layer.

    Attention is softmax(q kᵀ / √(hidden / heads)) v within one matrix (paper, equation 8), in
    ``heads`` heads. There is no dropout: the output is a function of weights and input alone.

    Shapes: x and y (matrices, tokens, hidden).
    Gradient: to all weights and to x. Saved: all weights.
    Paper: section 3.3; section 4.1.4 for the size. Deviation: attention is among the rank
    components of a matrix, not among its single numbers, whose scores would not fit in memory.

    Start: biases 0, weights N(0, σ²) with σ² so that each map puts out unit variance. A LayerNorm
    gives x unit variance, and the variance of Σⱼ wⱼ xⱼ over fan-in n is n·σ²·E[xⱼ²], so that
    σ² = 1/n; for W₂, which reads GELU(u) of u ~ N(0, 1), σ² = 1/(n·E[GELU(u)²]), where by Stein's
    lemma, E[u·uΦ²] = E[Φ²] + 2·E[uΦφ] = 1/3 + 1/(2π√3) = 0.425.

    Raises:
        HyperError: x is not (matrices, tokens, hidden).

    >>> import torch
    >>> EncoderLayer(AttentionConfig(hidden=8, heads=2, feed_forward=16))(torch.ones(5, 3, 8)).shape
    torch.Size([5, 3, 8])
    """

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.hidden, self.heads = config.hidden, config.heads
        self.query_key_value = nn.Linear(config.hidden, 3 * config.hidden)
        self.attention_output = nn.Linear(config.hidden, config.hidden)
        self.attention_norm = nn.LayerNorm(config.hidden)
        self.up = nn.Linear(config.hidden, config.feed_forward)
        self.down = nn.Linear(config.feed_forward, config.hidden)
        self.output_norm = nn.LayerNorm(config.hidden)
        for linear in (self.query_key_value, self.attention_output, self.up, self.down):
            second_moment = _GELU_SECOND_MOMENT if linear is self.down else 1.0
            nn.init.normal_(linear.weight, std=(linear.in_features * second_moment) ** -0.5)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return y for x, both (matrices, tokens, hidden).

        Raises:
            HyperError: x has another shape.
        """
        if x.ndim != 3 or x.shape[-1] != self.hidden:
            raise HyperError(
                f"the encoder layer got the shape {tuple(x.shape)}, expected (matrices, tokens, "
                f"{self.hidden}); project the tokens to {self.hidden} features."
            )
        heads = self.query_key_value(x).unflatten(-1, (3, self.heads, -1)).movedim(2, 0)
        query, key, value = heads.transpose(2, 3).unbind(0)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        x = self.attention_norm(x + self.attention_output(mixed.transpose(1, 2).flatten(2)))
        y: Tensor = self.output_norm(x + self.down(functional.gelu(self.up(x))))
        return y
