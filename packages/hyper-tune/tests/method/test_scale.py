"""What a step does outside the model grows with the factors, in operations not at all."""

from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hyper_tune import Assembly, MethodConfig, assemble, split
from hyper_tune.method import HypernetworkSettings, PruningSettings
from hyper_tune.split import GenerationCost, SharedGeneration

SMALL = {"layers": 4, "width": 32, "rank": 4}


class Written(TorchDispatchMode):
    """Counts tensor operations, and the bytes of what they return that is no view."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        returned = function(*args, **(kwargs or {}))
        self.operations[function.overloadpacket.__name__] += 1
        if not function.is_view:
            for value in returned if isinstance(returned, tuple | list) else (returned,):
                self.bytes += value.nbytes if isinstance(value, torch.Tensor) else 0
        return returned


class Cost(NamedTuple):
    """Of a step's own work: refresh, score, penalty, pulling back, clipping, update, commit."""

    operations: Counter[str]
    bytes: int
    products: int


def method_of(layers: int, width: int, rank: int) -> Assembly:
    """A method on square matrices without memory."""
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])
    config = MethodConfig(
        "hyperadalora",
        init_rank=rank,
        budget=rank / 2,
        hypernetwork=HypernetworkSettings(preset="attention-tiny"),
        pruning=PruningSettings(interval=2, importance="sensitivity"),
    )
    return assemble(model, config, total_steps=100)


def cost_of(method: Assembly) -> Cost:
    """Count what the second step does, which prunes."""
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1, foreach=False)
    for _ in range(2):
        step, products = method.step(optimizer, 1.0), FlopCounterMode(display=False)
        with Written() as written, products, step:
            method.stack.grads.add_(0.1)
    return Cost(written.operations, written.bytes, products.get_total_flops())


@pytest.mark.parametrize("axis", SMALL)
def test_cost_is_proportional_to_layers_width_and_rank_at_most(axis: str) -> None:
    few = cost_of(method_of(**SMALL))
    many = cost_of(method_of(**{**SMALL, axis: 4 * SMALL[axis]}))
    assert few.operations == many.operations
    assert few.bytes < many.bytes <= 4 * few.bytes
    # Attention compares each rank with each, which is little beside what is done to each.
    assert few.products < many.products <= (4.4 if axis == "rank" else 4) * few.products


def generation_cost(method: Assembly) -> Cost:
    """Count a refresh and its backward pass."""
    with Written() as written, FlopCounterMode(display=False) as products:
        method.owner.refresh()
        method.owner.backward()
    return Cost(written.operations, written.bytes, products.get_total_flops())


def cost_of_share(layers: int, rank: int, ranks: int, monkeypatch: pytest.MonkeyPatch) -> Cost:
    """Count what one of several ranks generates, with its own values in place of the others'."""
    monkeypatch.setattr(split, "rank", lambda: rank)
    monkeypatch.setattr(split, "world_size", lambda: ranks)
    monkeypatch.setattr(split, "gather_over_ranks", lambda x: x.expand(ranks, -1))
    method = method_of(layers, 32, 4)
    assert isinstance(method.owner, SharedGeneration)
    method.owner.share_(True)
    assert method.owner.shared
    return generation_cost(method)


def test_a_share_costs_its_part_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = generation_cost(method_of(8, 32, 4))
    shares = [cost_of_share(8, rank, 4, monkeypatch) for rank in range(4)]
    assert [share.products for share in shares] == [whole.products // 4] * 4
    more = cost_of_share(32, 0, 4, monkeypatch)
    assert more.operations == shares[0].operations
    assert more.products == whole.products


@pytest.mark.parametrize("layers", [2, 8])
def test_the_plans_count_of_products_is_what_is_done(layers: int) -> None:
    method = method_of(layers, 64, 4)
    counted = generation_cost(method).products
    assert isinstance(method.owner, SharedGeneration)
    planned = GenerationCost.of(method.owner).operations
    # The state needs no gradient, and biases, norms and scores are not counted alike.
    assert counted == pytest.approx(planned, rel=0.1)
