"""Small methods of every kind, their whole state, and a way to train them."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hyper_tune import Assembly, MethodConfig, StepReport, assemble
from hyper_tune.method import (
    METHODS,
    HypernetworkSettings,
    MagnitudeSettings,
    PruningSettings,
    SamplingSettings,
)
from hyper_tune.tree import flatten

CASES = [
    "lora",
    "adalora",
    "dora",
    "dylora each",
    "hyperlora recurrent none",
    "hyperlora static token_rms",
    "hyperadalora recurrent token_rms",
    "hyperadalora static none",
    "hyperdora recurrent none",
    "hyperdylora static token_rms",
]
RANK, BUDGET, INTERVAL, STEPS = 3, 1.5, 3, 12


class Block(nn.Module):
    """Two linear layers of two widths."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 7)
        self.down = nn.Linear(7, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Recorder(torch.optim.SGD):
    """An optimizer that keeps the gradients it is given and changes nothing."""

    def step(self, closure: None = None) -> None:
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def configure(case: str, **pruning: Any) -> MethodConfig:
    """The configuration of a case: the method's name, its state, its normalisation, its form."""
    name, *choices = case.split()
    method = METHODS[name]
    hypernetwork = None
    if method.generated:
        state, normalisation, *choices = choices
        hypernetwork = HypernetworkSettings(
            preset="attention-small", state=state, gradient_normalisation=normalisation
        )
    return MethodConfig(
        name,
        init_rank=RANK,
        alpha=4.0,
        budget=BUDGET if method.prunes else None,
        orthogonality=0.1 if method.layer == "svd" else None,
        hypernetwork=hypernetwork,
        pruning=PruningSettings(**{"interval": INTERVAL, **pruning}) if method.prunes else None,
        magnitude=MagnitudeSettings(form="scalar") if "scalar" in choices else None,
        sampling=SamplingSettings(draw="each") if "each" in choices else None,
    )


@dataclass
class Run:
    """A model with a method on it and the optimizer of its parameters."""

    model: nn.Module
    method: Assembly
    optimizer: torch.optim.Optimizer

    def loss_sum(self, x: Tensor) -> Tensor:
        """A loss per sample, summed."""
        return (self.model(x) - x.flip(-1)).square().sum()

    def step(self, batches: Iterable[Tensor], max_grad_norm: float | None = 1.0) -> StepReport:
        """One optimizer step over micro-batches."""
        with self.method.step(self.optimizer, max_grad_norm) as step:
            for x in batches:
                step.backward(self.loss_sum(x), tokens=len(x))
        return step.report

    def state(self) -> tuple[dict[str, Tensor], Any]:
        """A copy of everything that changes the next step, and of the live factors' masks."""
        tensors, plain = flatten(self.method.state_dict(self.optimizer))
        return {key: value.clone() for key, value in tensors.items()}, copy.deepcopy(plain)


def build(
    case: str,
    *,
    blocks: int = 2,
    seed: int = 0,
    optimizer: type[torch.optim.Optimizer] = torch.optim.Adam,
    lr: float = 0.01,
    **pruning: Any,
) -> Run:
    """A run in float64 whose factors are away from their start; ``seed`` is of the factors."""
    torch.manual_seed(11)
    model = nn.Sequential(*[Block() for _ in range(blocks)]).double()
    torch.manual_seed(seed)
    config = configure(case, **pruning)
    method = assemble(model, config, total_steps=STEPS, dtype=torch.float64)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return Run(model, method, optimizer(method.parameters(), lr=lr))


def batches(step: int, sizes: Iterable[int] = (2, 1)) -> list[Tensor]:
    """The micro-batches of a step."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(sum(sizes), 5, generator=generator, dtype=torch.float64)
    return list(x.split(list(sizes)))


def assert_same_state(
    found: tuple[dict[str, Tensor], Any], expected: tuple[dict[str, Tensor], Any]
) -> None:
    """Compare all tensors bit for bit, and all plain values."""
    assert list(found[0]) == list(expected[0])
    for name, value in expected[0].items():
        assert torch.equal(found[0][name], value), name
    assert found[1] == expected[1]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    """The name of a method, with the choices of its hypernetworks."""
    return str(request.param)


@pytest.fixture(scope="session")
def small() -> SimpleNamespace:
    """What the tests of methods share."""
    return SimpleNamespace(
        Recorder=Recorder,
        assert_same_state=assert_same_state,
        batches=batches,
        build=build,
        configure=configure,
    )


Make = Callable[..., Run]
