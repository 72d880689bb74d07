"""Layers of several networks of one size, run in one batch; one network is the plain layer."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from hyper_core.init import centred_normal_, fan_in_normal_


class StackedLinear(nn.Module):
    """yₖ = xₖ Wₖᵀ + bₖ for each network k.

    Shapes: x (networks, matrices, tokens, fan-in), y the same with fan-out; weight (networks,
    fan-out, fan-in), bias (networks, fan-out). Gradient: to x, weight and bias. Saved: both.
    Start: weight as `fan_in_normal_`, or where x has been through an activation as
    `centred_normal_` with its ``activation_variance`` and ``parts``; bias 0.

    >>> StackedLinear(2, 3, 5)(torch.ones(2, 4, 6, 3)).shape
    torch.Size([2, 4, 6, 5])
    """

    def __init__(
        self,
        networks: int,
        fan_in: int,
        fan_out: int,
        *,
        bias: bool = True,
        activation_variance: float | None = None,
        parts: int = 1,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(networks, fan_out, fan_in))
        self.bias = nn.Parameter(torch.zeros(networks, fan_out)) if bias else None
        if activation_variance is None:
            fan_in_normal_(self.weight)
        else:
            centred_normal_(self.weight, activation_variance, parts)

    def forward(self, x: Tensor) -> Tensor:
        """Return y."""
        if self.weight.shape[0] == 1:
            bias = None if self.bias is None else self.bias.squeeze(0)
            return functional.linear(x, self.weight.squeeze(0), bias)
        rows, weight = x.flatten(1, 2), self.weight.mT
        if self.bias is None:
            y = torch.bmm(rows, weight)
        else:
            y = torch.baddbmm(self.bias.unsqueeze(1), rows, weight)
        return y.reshape(*x.shape[:3], -1)


class StackedLayerNorm(nn.Module):
    """yₖ = (x − mean) / √(variance + 1e-5) · wₖ + bₖ over the features, for each network k.

    Shapes: x and y (networks, matrices, tokens, features); weight and bias (networks, features).
    Gradient: to x, weight and bias. Saved: both. Start: the identity.

    >>> StackedLayerNorm(2, 3)(torch.ones(2, 4, 6, 3)).shape
    torch.Size([2, 4, 6, 3])
    """

    def __init__(self, networks: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(networks, features))
        self.bias = nn.Parameter(torch.zeros(networks, features))

    def forward(self, x: Tensor) -> Tensor:
        """Return y."""
        features = self.weight.shape[1:]
        if self.weight.shape[0] == 1:
            return functional.layer_norm(x, features, self.weight.squeeze(0), self.bias.squeeze(0))
        weight, bias = self.weight[:, None, None], self.bias[:, None, None]
        return torch.addcmul(bias, functional.layer_norm(x, features), weight)
