"""BERT's encoder layer, as the body of a hypernetwork."""

import math

from torch import Tensor, nn
from torch.nn import functional

from hyper_core.presets import AttentionConfig


class EncoderLayer(nn.Module):
    """x₁ = LN(x + W_O·Attention(x)); y = LN(x₁ + W₂·GELU(W₁·x₁)): one post-norm BERT layer.

    Attention is softmax(q kᵀ / √(hidden / heads)) v within one matrix (paper, equation 8), in
    ``heads`` heads. There is no dropout: the output is a function of weights and input alone.

    Shapes: x and y (matrices, tokens, hidden).
    Gradient: to all weights and to x. Saved: all weights.

    Start: every linear map has weights N(0, 1/fan-in) and no bias, so that it keeps the variance
    of its input; W₂ has N(0, 2/fan-in), since GELU halves the second moment of a unit normal to
    within a few per cent. LayerNorm fixes the variance between the two parts.

    >>> import torch
    >>> EncoderLayer(AttentionConfig(hidden=8, heads=2, feed_forward=16))(torch.ones(5, 3, 8)).shape
    torch.Size([5, 3, 8])
    """

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query_key_value = nn.Linear(config.hidden, 3 * config.hidden)
        self.attention_output = nn.Linear(config.hidden, config.hidden)
        self.attention_norm = nn.LayerNorm(config.hidden)
        self.up = nn.Linear(config.hidden, config.feed_forward)
        self.down = nn.Linear(config.feed_forward, config.hidden)
        self.output_norm = nn.LayerNorm(config.hidden)
        for linear in (self.query_key_value, self.attention_output, self.up, self.down):
            gain = 2.0 if linear is self.down else 1.0
            nn.init.normal_(linear.weight, std=math.sqrt(gain / linear.in_features))
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return y for x, both (matrices, tokens, hidden)."""
        heads = self.query_key_value(x).unflatten(-1, (3, self.heads, -1)).movedim(2, 0)
        query, key, value = heads.transpose(2, 3).unbind(0)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        x = self.attention_norm(x + self.attention_output(mixed.transpose(1, 2).flatten(2)))
        y: Tensor = self.output_norm(x + self.down(functional.gelu(self.up(x))))
        return y
