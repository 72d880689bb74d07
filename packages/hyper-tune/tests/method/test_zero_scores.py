"""A pruning before anything was learned is by position alone, which is said once."""

import warnings

import pytest
import torch
from torch import nn

from hyper_tune import Assembly, MethodConfig, assemble
from hyper_tune.method import PruningSettings


def method_on(model: nn.Module, name: str, interval: int, importance: str) -> Assembly:
    pruning = PruningSettings(interval=interval, importance=importance, count=1)
    config = MethodConfig(name, init_rank=4, budget=2, pruning=pruning)
    return assemble(model, config, total_steps=30)


def train(method: Assembly, model: nn.Module, rates: list[float]) -> list[str]:
    """Take a step of each learning rate; return what was said of zero scores."""
    optimizer = torch.optim.Adam(method.parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for rate in rates:
            optimizer.param_groups[0]["lr"] = rate
            with method.step(optimizer) as step:
                step.backward(model(torch.randn(3, 6)).square().sum(), tokens=3)
    said = [warning for warning in caught if "the first pruning" in str(warning.message)]
    assert all(warning.filename == __file__ for warning in said)
    return [str(warning.message) for warning in said]


@pytest.mark.parametrize("importance", ["sensitivity", "magnitude"])
@pytest.mark.parametrize("name", ["adalora", "hyperadalora"])
@pytest.mark.parametrize(
    ("interval", "rates", "tied_at"),
    [
        (1, [0.1] * 3, 1),  # λ is zero before the first update
        (2, [0.0, 0.1, 0.1, 0.1], 2),  # and is still after one of rate 0, as a warm-up has it
        (2, [0.1] * 4, None),
        (3, [0.0, 0.1, 0.1], None),
        (3, [0.0] * 6, 3),
    ],
)
def test_a_pruning_by_position_alone_is_said_once(
    name: str, importance: str, interval: int, rates: list[float], tied_at: int | None
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 6))
    method = method_on(model, name, interval, importance)
    said = train(method, model, rates)
    if tied_at is None:
        assert said == []
        assert float(method.allocator.history[0].threshold) > 0
        return
    assert said == [
        f"the first pruning, after step {tied_at}, was by the components' positions alone: nothing "
        "had been learned by then, so that the importance of all was 0; raise "
        "method.pruning.interval above the steps whose learning rate is 0, and above 1."
    ]
    first = method.allocator.history[0]
    assert first.step == tied_at
    # The literal twin: of equal scores, those of the first matrix fall, in their order.
    assert first.pruned_components == {"0": list(range(first.pruned))}
    assert first.threshold == 0
