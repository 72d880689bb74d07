"""Each deviation from the papers, where the paper leaves a choice or is not followed."""

import torch
from torch import nn

from lowrank_adapters import SVDLinear


def test_scaling_stays_alpha_over_the_initial_rank():
    layer = SVDLinear(nn.Linear(6, 5, bias=False), rank=4, alpha=3.0, dtype=torch.float64)
    nn.init.zeros_(layer.base.weight)
    layer.base.double()
    with torch.no_grad():
        layer.lam.copy_(torch.tensor([1.0, -2.0, 3.0, 4.0]))
    x = torch.randn(7, 6, dtype=torch.float64)
    parts = torch.stack(
        [3.0 / 4 * layer.lam[k] * (x @ layer.q[k])[:, None] * layer.p[:, k] for k in range(4)]
    )
    torch.testing.assert_close(layer(x), parts.sum(0), rtol=1e-12, atol=1e-12)
    for alive in ([True, False, True, True], [False, False, False, True]):
        layer.rank_mask.copy_(torch.tensor(alive))
        torch.testing.assert_close(layer(x), parts[alive].sum(0), rtol=1e-12, atol=1e-12)
        assert layer.scaling == 0.75
