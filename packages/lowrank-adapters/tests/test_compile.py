"""A compiled layer is one graph, and stays the one when ranks are pruned or drawn."""

import pytest
import torch
from torch import nn

from lowrank_adapters import (
    SVD,
    DoRA,
    DyLoRA,
    FactorStack,
    LoRA,
    PrincipalWeights,
    RankSampler,
    inject_adapters_,
)

MAKERS = {
    "lora": LoRA(rank=3, alpha=4.5),
    "lora-dropout": LoRA(rank=3, alpha=4.5, dropout=0.1),
    "svd": SVD(rank=3, alpha=4.5),
    "svd-principal": SVD(rank=3, alpha=4.5, start=PrincipalWeights()),
    "dora": DoRA(rank=3, alpha=4.5),
    "dora-attached": DoRA(rank=3, alpha=4.5, detach_norm=False),
    "dora-scalar": DoRA(rank=3, alpha=4.5, magnitude="scalar"),
    "dylora": DyLoRA(rank=3, alpha=4.5),
    "dylora-frozen": DyLoRA(rank=3, alpha=4.5, frozen=True),
}
X = torch.randn(7, 6)


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def shaken(make, base=None):
    model = nn.Sequential(base or nn.Linear(6, 5))
    layers = inject_adapters_(model, make)
    with torch.no_grad():
        for _, factor in layers["0"].factors():
            factor.add_(0.3 * torch.randn_like(factor))
    return layers


def values_and_gradients(call, layer, x):
    y = call(x)
    factors = [factor for _, factor in layer.factors()]
    return [y, *torch.autograd.grad(y.square().sum(), factors)]


@pytest.mark.parametrize("method", MAKERS)
def test_layer_is_one_graph_that_computes_the_same(method):
    layer = shaken(MAKERS[method])["0"]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.manual_seed(1)
    expected = values_and_gradients(layer, layer, X)
    torch.manual_seed(1)
    found = values_and_gradients(compiled, layer, X)
    if "dropout" not in method:  # whose numbers are drawn in another order
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", [nn.Conv2d(2, 4, 3, padding=1), nn.Embedding(7, 4)])
def test_other_bases_are_one_graph(base):
    x = torch.randint(7, (3,)) if isinstance(base, nn.Embedding) else torch.randn(2, 2, 5, 5)
    layer = SVD(rank=2, alpha=1.0).build(base, device="cpu", dtype=torch.float32)
    nn.init.ones_(layer.lam)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["svd", "svd-principal"])
def test_pruning_compiles_nothing_anew(method):
    layers = shaken(MAKERS[method])
    stack, layer = FactorStack(layers), layers["0"]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    values_and_gradients(compiled, layer, X)
    (mask,) = [group.rank_mask for group in stack.groups if group.rank_mask is not None]
    with torch.compiler.set_stance("fail_on_recompile"):
        for dead in range(3):
            mask[0, dead] = False
            found = values_and_gradients(compiled, layer, X)
            torch.testing.assert_close(
                found, values_and_gradients(layer, layer, X), rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("method", ["dylora", "dylora-frozen"])
def test_drawing_a_rank_compiles_nothing_anew(method):
    layers = shaken(MAKERS[method])
    sampler, layer = RankSampler(layers, seed=0), layers["0"]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    values_and_gradients(compiled, layer, X)
    seen = set()
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(12):
            sampler.draw_(step)
            seen.add(sampler.rank_at(step))
            torch.testing.assert_close(
                values_and_gradients(compiled, layer, X),
                values_and_gradients(layer, layer, X),
                rtol=1e-5,
                atol=1e-5,
            )
    assert seen == {1, 2, 3}


def test_the_check_sees_what_is_compiled_anew():
    layer = shaken(MAKERS["lora"])["0"]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compiled(X)
    layer.enabled = False
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError):
        compiled(X)
