"""Directly learned factors are the model's own, by role and position."""

import pytest
import torch
from torch import nn

from hyper_core import HyperError
from hyper_tune import HypernetworkSettings, MethodConfig, UserError, assemble
from hyper_tune.factors import LearnedFactors, PartlyGenerated
from lowrank_adapters import SVD, FactorStack, LoRA, inject_adapters_


def stack_of(make: LoRA | SVD) -> tuple[nn.Module, FactorStack]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4), nn.Linear(4, 3))
    return model, FactorStack(inject_adapters_(model, make))


def test_the_values_are_the_models_factors() -> None:
    model, stack = stack_of(SVD(rank=2, alpha=2.0))
    owner = LearnedFactors(stack.groups)
    named = dict(owner.named_parameters())
    assert {name: tuple(value.shape) for name, value in named.items()} == {
        "p.0": (2, 2, 3),
        "lam.0": (3, 2, 1),
        "q.0": (2, 2, 4),
        "p.1": (1, 2, 4),
        "q.1": (1, 2, 3),
    }
    with torch.no_grad():
        for position, value in enumerate(named.values()):
            value.fill_(float(position + 1))
    for index, (p, q) in enumerate([(1.0, 3.0), (4.0, 5.0), (1.0, 3.0)]):
        layer = model[index]
        assert torch.equal(layer.p, torch.full_like(layer.p, p))
        assert torch.equal(layer.lam, torch.full_like(layer.lam, 2.0))
        assert torch.equal(layer.q, torch.full_like(layer.q, q))


def test_refresh_backward_commit_and_discard_change_nothing() -> None:
    _, stack = stack_of(LoRA(rank=2, alpha=2.0))
    owner = LearnedFactors(stack.groups)
    stack.values.copy_(torch.randn_like(stack.values))
    stack.grads.copy_(torch.randn_like(stack.grads))
    values, grads = stack.values.clone(), stack.grads.clone()
    for call in (owner.refresh, owner.backward, owner.commit, owner.discard):
        call()
        assert torch.equal(stack.values, values)
        assert torch.equal(stack.grads, grads)


def test_state_round_trip_is_in_place() -> None:
    _, stack = stack_of(LoRA(rank=2, alpha=2.0))
    owner = LearnedFactors(stack.groups)
    saved = {name: torch.randn_like(value) for name, value in owner.state_dict().items()}
    live = owner.state_dict()
    address = stack.values.data_ptr()
    owner.load_state_dict(saved)
    assert stack.values.data_ptr() == address
    for name, value in saved.items():
        assert torch.equal(live[name], value)
    flat = torch.cat([saved[name].flatten() for name in live])
    assert torch.equal(stack.values, flat)


@pytest.mark.parametrize("change", ["name", "shape", "fewer", "more"])
def test_the_factors_of_another_model_are_refused(change: str) -> None:
    _, stack = stack_of(LoRA(rank=2, alpha=2.0))
    owner = LearnedFactors(stack.groups)
    saved = {name: torch.randn_like(value) for name, value in owner.state_dict().items()}
    before = stack.values.clone()
    if change == "name":
        saved["p.0"] = saved.pop("a.0")
    elif change == "shape":
        saved["a.0"] = saved["a.0"][:, :1]
    elif change == "fewer":
        saved.pop("a.0")
    else:
        saved["c.0"] = torch.zeros(1)
    shapes = {name: tuple(value.shape) for name, value in saved.items()}
    here = {"a.0": (2, 2, 4), "b.0": (2, 2, 3), "a.1": (1, 2, 3), "b.1": (1, 2, 4)}
    with pytest.raises(UserError) as caught:
        owner.load_state_dict(saved)
    assert str(caught.value) == f"the saved factors are {shapes}, but this model's are {here}."
    assert torch.equal(stack.values, before)


def test_what_is_partly_generated_is_discarded_and_committed_as_its_parts_are() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    settings = HypernetworkSettings(preset="mlp-small")
    config = MethodConfig("hyperdora", init_rank=2, hypernetwork=settings)
    method = assemble(model, config, total_steps=3)
    owner = method.owner
    assert isinstance(owner, PartlyGenerated)
    names = [name for name, _ in owner.named_parameters()]
    assert names[-1] == "magnitude.0"
    assert list(owner.state_dict())[-1] == "magnitude.0"
    assert all(name.startswith("hypernetworks.") for name in names[:-1])
    magnitude = torch.stack([layer.base.weight.norm(dim=1) for layer in model])
    torch.testing.assert_close(owner.state_dict()["magnitude.0"][:, 0], magnitude)

    owner.refresh()
    owner.discard()
    for call in (owner.backward, owner.commit):
        with pytest.raises(HyperError, match="without a pending refresh"):
            call()
    before = owner.state_dict()["state_a_0"].clone()
    owner.refresh()
    owner.commit()
    assert not torch.equal(owner.state_dict()["state_a_0"], before)

    saved = {name: value.clone() for name, value in owner.state_dict().items()}
    wrong = saved | {"magnitude.0": torch.zeros(1)}
    with pytest.raises(UserError, match=r"the saved factors are \{'magnitude.0': \(1,\)\}, but"):
        owner.load_state_dict(wrong)
    del saved["magnitude.0"]
    with pytest.raises(UserError, match=r"the saved factors are \{\}, but"):
        owner.load_state_dict(saved)
