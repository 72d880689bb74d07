"""Layers inside a model that FSDP2 shards: the factors whole, the base not."""

import copy

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lowrank_adapters import (
    SVD,
    DoRA,
    DyLoRA,
    FactorStack,
    LoRA,
    PrincipalWeights,
    freeze_base_,
    inject_adapters_,
    materialise_,
)
from lowrank_adapters.maps import dense_matrix, map_of

MAKERS = {
    "lora": LoRA(rank=2, alpha=3.0),
    "svd-principal": SVD(rank=2, alpha=3.0, start=PrincipalWeights()),
    "dora": DoRA(rank=2, alpha=3.0),
    "dora-attached": DoRA(rank=2, alpha=3.0, detach_norm=False),
    "dylora": DyLoRA(rank=2, alpha=3.0),
}


@pytest.fixture(scope="module", autouse=True)
def _process():
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def shaken(model, layers):
    torch.manual_seed(3)
    with torch.no_grad():
        for layer in layers.values():
            for _, factor in layer.factors():
                factor.add_(0.3 * torch.randn(factor.shape))
    freeze_base_(model)


def results(model, layers, x):
    factors = [factor for layer in layers.values() for _, factor in layer.factors()]
    y = model(x)
    return [y, *torch.autograd.grad(y.square().sum(), factors)]


@pytest.mark.parametrize("method", MAKERS)
def test_sharded_base_that_was_on_meta_gives_the_whole_ones_numbers(method):
    plain = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5))
    x = torch.randn(9, 6)
    expected_model = copy.deepcopy(plain)
    torch.manual_seed(1)
    expected_layers = inject_adapters_(expected_model, MAKERS[method])

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5))
    torch.manual_seed(1)
    layers = inject_adapters_(model, MAKERS[method])
    stack = FactorStack(layers)
    leaves = set(stack.leaf_parameters())
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(model, mesh=mesh, ignored_params=leaves)
    for layer, whole in zip(layers.values(), (plain[0], plain[2]), strict=True):
        weights = {
            name: torch.distributed.tensor.distribute_tensor(value, mesh, parameter.placements)
            for (name, parameter), value in zip(
                layer.base.named_parameters(), whole.state_dict().values(), strict=True
            )
        }
        layer.base.load_state_dict(weights, assign=True)
    materialise_(model)

    assert torch.equal(model(x), plain(x))
    shaken(expected_model, expected_layers)
    shaken(model, layers)
    torch.testing.assert_close(
        results(model, layers, x),
        results(expected_model, expected_layers, x),
        rtol=1e-4,
        atol=1e-5,
    )
    stack.check_bound()


def test_a_sharded_weight_is_gathered_to_be_read_and_not_changed(kit):
    base = nn.Linear(6, 5)
    whole = base.weight.detach().clone()
    fully_shard(base, mesh=init_device_mesh("cpu", (1,)))
    assert type(base.weight.data).__name__ == "DTensor"
    assert torch.equal(dense_matrix(map_of(base), base), whole)
    assert kit.error_text(map_of(base).add_, base, whole) == (
        f"the weight of the {type(base).__name__} is DTensor, expected a whole floating-point "
        "tensor; its values are not changed or read: dequantise or gather the base first."
    )
