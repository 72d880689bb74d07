"""Bases whose weight is quantised: called as they are, and never touched."""

import warnings

import pytest
import torch
from torch import nn

from lowrank_adapters import (
    SVD,
    DoRA,
    DyLoRA,
    LoRA,
    PrincipalWeights,
    collect_gradients,
    inject_adapters_,
    start_factors_,
)
from lowrank_adapters.maps import map_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torchao = pytest.importorskip("torchao")
    from torchao.dtypes.nf4tensor import to_nf4
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

MAKERS = {
    "lora": LoRA(rank=3, alpha=4.5),
    "svd": SVD(rank=3, alpha=4.5),
    "dora": DoRA(rank=3, alpha=4.5),
    "dora-attached": DoRA(rank=3, alpha=4.5, detach_norm=False),
    "dylora": DyLoRA(rank=3, alpha=4.5),
}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchao.*")


def nf4(dtype):
    layer = nn.Linear(128, 64, dtype=dtype)
    weight = nn.Parameter(to_nf4(layer.weight.detach(), 64, 4), requires_grad=False)
    layer.weight = weight
    return layer, weight.get_original_weight()


def int8(dtype):
    layer = nn.Linear(128, 64, dtype=dtype)
    quantize_(layer, Int8WeightOnlyConfig())
    layer.weight.requires_grad_(False)
    return layer, layer.weight.dequantize()


KINDS = {"nf4": nf4, "int8": int8}


def parts(weight):
    """The tensors that a quantised one is made of, copied."""
    names, _ = weight.__tensor_flatten__()
    found = {}
    for name in names:
        part = getattr(weight, name)
        found |= (
            {name: part.clone()}
            if type(part) is torch.Tensor
            else {f"{name}.{key}": value for key, value in parts(part).items()}
        )
    return found


def pair(kind, method, dtype):
    """The layer on the quantised base, and the same on one of its dequantised numbers."""
    base, weight = KINDS[kind](dtype)
    plain = nn.Linear(128, 64, dtype=dtype)
    with torch.no_grad():
        plain.weight.copy_(weight)
        plain.bias.copy_(base.bias)
    layers = []
    for one in (base, plain):
        torch.manual_seed(5)
        layer = MAKERS[method].build(one, device="cpu", dtype=torch.float32)
        with torch.no_grad():
            for role, factor in layer.factors():
                factor.mul_(1.1) if role == "magnitude" else factor.normal_().mul_(0.3)
        layers.append(layer)
    return layers


@pytest.mark.parametrize("method", MAKERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_layer_computes_what_it_does_on_the_dequantised_base(kind, method, dtype, tolerance):
    quantised, plain = pair(kind, method, dtype)
    weight, before = quantised.base.weight, parts(quantised.base.weight)
    results = []
    x = torch.randn(7, 128, dtype=dtype)
    cotangent = torch.randn(7, 64, dtype=dtype)
    for layer in (quantised, plain):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        factors = [factor for _, factor in layer.factors()]
        results.append([y, *torch.autograd.grad(y, [leaf, *factors], cotangent)])
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        scale = expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale)
    assert quantised.base.weight is weight
    for name, part in parts(weight).items():
        assert torch.equal(part, before[name]), name


@pytest.mark.parametrize("method", MAKERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_start_is_exactly_the_quantised_base(kind, method, dtype):
    base, _ = KINDS[kind](dtype)
    layer = MAKERS[method].build(base, device="cpu", dtype=torch.float32)
    x = torch.randn(7, 128, dtype=dtype)
    assert torch.equal(layer(x), base(x))
    layer.start_(PrincipalWeights())
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("kind", KINDS)
def test_principal_weights_are_those_of_the_dequantised_weight(kind):
    quantised, plain = pair(kind, "svd", torch.float32)
    for layer in (quantised, plain):
        layer.start_(PrincipalWeights())
    torch.testing.assert_close(quantised.lam, plain.lam, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        quantised.p @ torch.diag(quantised.lam) @ quantised.q,
        plain.p @ torch.diag(plain.lam) @ plain.q,
        rtol=1e-3,
        atol=1e-3,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_a_quantised_weight_is_collected(kind):
    base, weight = KINDS[kind](torch.float32)
    plain = nn.Linear(128, 64)
    plain.weight = nn.Parameter(weight.clone())
    plain.bias = base.bias
    x = torch.randn(7, 128)
    (expected,) = torch.autograd.grad(plain(x).square().mean(), plain.weight)
    model = nn.Sequential(base)
    layers = inject_adapters_(model, LoRA(rank=3, alpha=1.0), ["0"])
    found = collect_gradients(model, layers, lambda batch: model(batch).square().mean(), [x])
    torch.testing.assert_close(found["0"], expected, rtol=1e-4, atol=1e-5)
    start_factors_(layers, PrincipalWeights())


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_weight_is_not_changed_by_merging(kit, kind):
    base, _ = KINDS[kind](torch.float32)
    name = type(base.weight.data).__name__
    assert kit.error_text(map_of(base).add_, base, torch.ones(64, 128)) == (
        f"the weight of the Linear is {name}, expected a whole floating-point tensor; its values "
        "are not changed or read: dequantise or gather the base first."
    )
