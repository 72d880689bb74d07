"""Leaves on several devices, and moves of the hypernetworks."""

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from hyper_core import AttentionConfig, GeneratedParameters

CONFIG = AttentionConfig(hidden=4, heads=2, feed_forward=5)


def test_values_and_gradients_cross_between_accelerators(monkeypatch):
    """Devices that this machine need not have: shapes and devices alone are followed."""
    # Fake tensors cannot be moved by Module.to; the hypernetworks are already where they belong.
    monkeypatch.setattr(GeneratedParameters, "to", lambda self, *_: self)
    with FakeTensorMode():
        leaves = [nn.Parameter(torch.randn(3, 4, device=d)) for d in ("cpu", "cuda:0", "cuda:1")]
        generated = GeneratedParameters({"p": leaves}, config=CONFIG)
        assert [str(g.device) for g in generated.groups] == ["cpu", "cuda:0", "cuda:1"]
        assert [g.positions for g in generated.groups] == [(0,), (1,), (2,)]
        generated.refresh()
        for leaf in leaves:
            leaf.grad = torch.ones_like(leaf)
        generated.backward()
        generated.commit()
        assert {p.grad.device.type for p in generated.parameters()} == {"cpu"}
        assert {b.device.type for b in generated.buffers()} == {"cpu"}


def test_moving_to_another_dtype_moves_weights_and_state_and_not_the_leaves():
    leaf = nn.Parameter(torch.randn(3, 4))
    generated = GeneratedParameters({"p": [leaf]}, config=CONFIG, sharing=["x"]).double()
    generated.refresh()
    leaf.grad = torch.ones_like(leaf)
    generated.backward()
    generated.commit()
    assert leaf.dtype == torch.float32
    assert generated.state_p_0.dtype == torch.float64
    assert {p.grad.dtype for p in generated.parameters()} == {torch.float64}
