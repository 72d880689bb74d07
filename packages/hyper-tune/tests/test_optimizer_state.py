"""An optimizer's state goes by the names of its parameters."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from hyper_tune import UserError
from hyper_tune.optimizer_state import load_named_optimizer_state, named_optimizer_state

SHAPES = {"a": (2, 3), "b": (4,), "c": ()}


def parameters(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).requires_grad_()
        for name, shape in SHAPES.items()
    }


def adam(named: dict[str, Tensor], lr: float = 0.1) -> torch.optim.Optimizer:
    groups = [
        {"params": [named["c"], named["a"]], "weight_decay": 0.1},
        {"params": [named["b"]], "betas": (0.5, 0.9)},
    ]
    return torch.optim.AdamW(groups, lr=lr)


def train(named: dict[str, Tensor], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        sum((step + 1) * value.square().sum() for value in named.values()).backward()
        optimizer.step()


def test_the_state_is_named() -> None:
    named = parameters(0)
    optimizer = adam(named)
    train(named, optimizer, range(3))
    found = named_optimizer_state(optimizer, named.items())
    assert set(found) == {"state", "groups"}
    assert set(found["state"]) == set(SHAPES)
    for name, parameter in named.items():
        expected = optimizer.state[parameter]
        assert set(found["state"][name]) == set(expected) == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in expected.items():
            assert found["state"][name][key] is value
    for group, names, raw in zip(
        found["groups"], (["c", "a"], ["b"]), optimizer.state_dict()["param_groups"], strict=True
    ):
        assert group.pop("names") == names
        raw.pop("params")
        assert group == raw


def test_a_loaded_optimizer_goes_on_bit_for_bit() -> None:
    whole = parameters(0)
    optimizer = adam(whole)
    train(whole, optimizer, range(4))
    saved = copy.deepcopy(named_optimizer_state(optimizer, whole.items()))
    values = {name: value.detach().clone() for name, value in whole.items()}
    train(whole, optimizer, range(4, 8))

    named = parameters(1)
    other = adam(named, lr=0.7)
    train(named, other, range(2))
    with torch.no_grad():
        for name, value in values.items():
            named[name].copy_(value)
    backwards: list[tuple[str, Tensor]] = list(reversed(named.items()))
    load_named_optimizer_state(other, backwards, saved)
    train(named, other, range(4, 8))
    for name, value in whole.items():
        assert torch.equal(named[name], value)
        for key, moment in optimizer.state[value].items():
            assert torch.equal(other.state[named[name]][key], moment)
    assert (
        named_optimizer_state(other, named.items())["groups"]
        == (named_optimizer_state(optimizer, whole.items())["groups"])
    )


def test_an_optimizer_before_its_first_step() -> None:
    named = parameters(0)
    saved = named_optimizer_state(adam(named), named.items())
    assert saved["state"] == {}
    other = adam(named)
    load_named_optimizer_state(other, named.items(), saved)
    assert named_optimizer_state(other, named.items()) == saved


@pytest.mark.parametrize(
    ("change", "there"),
    [
        (lambda groups: groups[0]["names"].reverse(), [["a", "c"], ["b"]]),
        (lambda groups: groups[0]["names"].pop(), [["c"], ["b"]]),
        (lambda groups: groups.pop(), [["c", "a"]]),
        (lambda groups: groups[1].update(names=["d"]), [["c", "a"], ["d"]]),
        (lambda groups: groups.reverse(), [["b"], ["c", "a"]]),
    ],
)
def test_the_state_of_other_parameters_is_refused(change: Any, there: list[list[str]]) -> None:
    named = parameters(0)
    optimizer = adam(named)
    train(named, optimizer, range(2))
    saved = copy.deepcopy(named_optimizer_state(optimizer, named.items()))
    change(saved["groups"])
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(UserError) as caught:
        load_named_optimizer_state(optimizer, named.items(), saved)
    assert str(caught.value) == (
        f"the saved optimizer state is of the parameters {there}, but this run trains "
        "[['c', 'a'], ['b']]."
    )
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for position, entry in before["state"].items():
        for key, value in entry.items():
            assert torch.equal(after["state"][position][key], value)


def test_a_parameter_without_a_name_is_refused() -> None:
    named = parameters(0)
    optimizer = adam(named)
    saved = named_optimizer_state(optimizer, named.items())
    fewer = [(name, value) for name, value in named.items() if name != "b"]
    with pytest.raises(UserError) as saving:
        named_optimizer_state(optimizer, fewer)
    with pytest.raises(UserError) as loading:
        load_named_optimizer_state(optimizer, fewer, saved)
    assert (
        str(saving.value)
        == str(loading.value)
        == (
            "the optimizer has a parameter of the shape (4,) that is not one of a, c; give it the "
            "method's parameters alone."
        )
    )
