"""Leaves on several devices, and moves of the hypernetworks."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hyper_core import AttentionConfig, GeneratedParameters
from hyper_core.leaves import LeafGroup

CONFIG = AttentionConfig(hidden=4, heads=2, feed_forward=5)


class Crossings(TorchDispatchMode):
    """The devices that tensors are copied to from another."""

    def __init__(self):
        super().__init__()
        self.devices = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ == "_to_copy" and result.device != args[0].device:
            self.devices.append(str(result.device))
        return result


def test_values_and_gradients_cross_between_accelerators(monkeypatch):
    """Devices that this machine need not have: shapes and devices alone are followed."""
    # Fake tensors cannot be moved by Module.to; the hypernetworks are already where they belong.
    monkeypatch.setattr(GeneratedParameters, "to", lambda self, *_: self)
    monkeypatch.setattr(LeafGroup, "check_finite", lambda self: None)  # they have no values
    with FakeTensorMode():
        devices = ("cpu", "cuda:0", "cuda:1", "cuda:1", "cuda:1")
        leaves = [nn.Parameter(torch.randn(3, 4, device=device)) for device in devices]
        generated = GeneratedParameters({"p": leaves}, config=CONFIG)
        assert [str(g.device) for g in generated.groups] == ["cpu", "cuda:0", "cuda:1"]
        assert [g.positions for g in generated.groups] == [(0,), (1,), (2, 3, 4)]
        with Crossings() as crossed:
            generated.refresh()
        assert crossed.devices == ["cuda:0", "cuda:1"]  # once each, however many leaves
        for leaf in leaves:
            leaf.grad = torch.ones_like(leaf)
        generated.backward()
        generated.commit()
        assert {p.grad.device.type for p in generated.parameters()} == {"cpu"}
        assert {b.device.type for b in generated.buffers()} == {"cpu"}


@pytest.mark.parametrize("output", ["free", "unit_rows", "orthonormal"])
def test_stacks_of_several_roles_live_on_their_devices_and_the_networks_on_the_first(
    monkeypatch, output
):
    """Equal shapes on two devices are two groups of one network; averages stay with the state."""
    monkeypatch.setattr(GeneratedParameters, "to", lambda self, *_: self)
    monkeypatch.setattr(LeafGroup, "check_finite", lambda self: None)
    with FakeTensorMode():
        leaves = {
            "p": [nn.Parameter(torch.randn(2, 3, 4, device=d)) for d in ("cpu", "cuda:1")],
            "lam": [nn.Parameter(torch.randn(2, 3, device=d)) for d in ("cuda:1", "cpu")],
        }
        generated = GeneratedParameters(
            leaves,
            config=CONFIG,
            tokens={"lam": "scalars"},
            outputs={"p": output},
            gradient_normalisation="token_rms",
        )
        assert [(g.label, str(g.device)) for g in generated.groups] == [
            ("p_0", "cpu"),
            ("p_1", "cuda:1"),
            ("lam_0", "cuda:1"),
            ("lam_1", "cpu"),
        ]
        assert generated.hypernetworks["p"].shapes == [(2, 3, 4), (2, 3, 4)]
        with Crossings() as out:
            generated.refresh()
        for leaf in (leaf for tensors in leaves.values() for leaf in tensors):
            leaf.grad = torch.ones_like(leaf)
        with Crossings() as back:
            generated.backward()
        generated.commit()
        assert out.devices == ["cuda:1"] * 2
        assert back.devices == ["cpu"] * 2
        assert {b.device.type for b in generated.buffers()} == {"cpu"}
        assert {p.grad.device.type for p in generated.parameters()} == {"cpu"}
        assert {str(leaf.device) for leaf in leaves["p"]} == {"cpu", "cuda:1"}


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
