"""A run that is saved and loaded continues bit for bit."""

import pytest
import torch
from torch import nn

from hyper_core import AttentionConfig, GeneratedParameters

CONFIG = AttentionConfig(hidden=8, heads=2, feed_forward=8)


class Run:
    """A small network with two generated stacks, and all that its training needs."""

    def __init__(self, seed, state, normalisation, sharing="all"):
        torch.manual_seed(seed)
        self.p = nn.Parameter(torch.randn(2, 3, 5))
        self.lam = nn.Parameter(torch.zeros(2, 3, 1))
        self.generated = GeneratedParameters(
            {"p": [self.p], "lam": [self.lam]},
            config=CONFIG,
            state=state,
            sharing=sharing,
            outputs={"p": "unit_rows"},
            zero_start={"lam"},
            gradient_normalisation=normalisation,
        )
        self.optimizer = torch.optim.Adam(self.generated.parameters(), lr=1e-2)

    def train(self, steps):
        losses = []
        for step in steps:
            self.generated.refresh()
            x = torch.randn(5, generator=torch.Generator().manual_seed(step))
            loss = ((self.p @ x) * self.lam[..., 0]).sum() + (self.lam.sum() - 1).square()
            loss.backward()
            self.generated.backward()
            self.optimizer.step()
            self.generated.commit()
            self.p.grad = self.lam.grad = None
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses


@pytest.mark.parametrize("state", ["recurrent", "static", "damped"])
@pytest.mark.parametrize("normalisation", ["none", "token_rms"])
@pytest.mark.parametrize("sharing", ["all", "each", ["x", "y"]])
def test_loaded_run_equals_the_uninterrupted_one_bit_for_bit(
    tmp_path, state, normalisation, sharing
):
    whole = Run(0, state, normalisation, sharing)
    expected = whole.train(range(8))

    first = Run(0, state, normalisation, sharing)
    losses = first.train(range(5))
    saved = {
        "generated": first.generated.state_dict(),
        "optimizer": first.optimizer.state_dict(),
    }
    torch.save(saved, tmp_path / "state.pt")

    second = Run(
        1, state, normalisation, sharing
    )  # other weights, other start: all must be replaced
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    second.generated.load_state_dict(loaded["generated"])
    second.optimizer.load_state_dict(loaded["optimizer"])
    losses += second.train(range(5, 8))

    assert losses == expected
    found, wanted = second.generated.state_dict(), whole.generated.state_dict()
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    assert torch.equal(second.p, whole.p)
    assert torch.equal(second.lam, whole.lam)


def test_the_state_dict_names_state_and_averages():
    generated = Run(0, "recurrent", "token_rms").generated
    saved = {name: v for name, v in generated.state_dict().items() if name.startswith("s")}
    assert {name for name in generated.state_dict() if "hypernetworks." not in name} == set(saved)
    assert {name: tuple(value.shape) for name, value in saved.items()} == {
        "state_p_0": (2, 3, 5),
        "state_lam_0": (2, 3, 1),
        "square_p_0": (2, 3, 1),
        "square_lam_0": (2, 3, 1),
        "square_weight": (),
    }
