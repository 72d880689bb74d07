"""Properties of the layers over shapes, ranks, masks, dtypes and starts."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lowrank_adapters import (
    SVD,
    DoRA,
    DyLoRA,
    GradientStep,
    LoRA,
    LowRankLinear,
    Orthonormal,
    PrincipalWeights,
    UnitRows,
)

WIDE = torch.float64
MAKERS = (
    LoRA,
    SVD,
    DyLoRA,
    DoRA,
    lambda *args, **options: DoRA(*args, magnitude="scalar", **options),
)
quickly = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def layers(draw, makers=MAKERS, dtypes=(WIDE,)):
    """A layer of any method off its start, its masks drawn, and its batch shape."""
    torch.manual_seed(draw(st.integers(0, 99)))
    width_in, width_out = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    rank = draw(st.integers(1, min(width_in, width_out)))
    dtype = draw(st.sampled_from(dtypes))
    make = draw(st.sampled_from(makers))(
        rank,
        draw(st.floats(0.1, 30)),
        rslora=draw(st.booleans()),
        start=draw(st.sampled_from([UnitRows(), Orthonormal(), PrincipalWeights()])),
    )
    base = nn.Linear(width_in, width_out, bias=draw(st.booleans()), dtype=dtype)
    layer = make.build(base, device="cpu", dtype=dtype)
    if draw(st.booleans()):
        layer.start_(GradientStep(0.1), torch.randn(width_out, width_in, dtype=dtype))
    with torch.no_grad():
        for _, factor in layer.factors():
            factor.add_(0.5 * torch.randn_like(factor))
        if type(layer).__name__ == "SVDLinear":
            alive = draw(st.lists(st.booleans(), min_size=rank, max_size=rank))
            layer.rank_mask.copy_(torch.tensor(alive))
        if type(layer).__name__ == "DyLoRALinear":
            layer.rank_mask[draw(st.integers(1, rank)) :] = False
    x = torch.randn(*draw(st.lists(st.integers(0, 3), max_size=3)), width_in, dtype=dtype)
    return layer, x


@given(layers())
@quickly
def test_delta_in_the_weight_gives_the_layers_output(drawn):
    layer, x = drawn
    with torch.no_grad():
        found = layer(x)
        layer.map.add_(layer.base, layer.delta())
        torch.testing.assert_close(layer.base(x), found, rtol=1e-9, atol=1e-9)


@given(layers(makers=MAKERS[:3] + MAKERS[4:]))
@quickly
def test_lora_of_the_layer_is_its_delta(drawn):
    layer, _ = drawn
    a, b = layer.as_lora()
    torch.testing.assert_close(b @ a, layer.delta(), rtol=1e-10, atol=1e-10)
    mask = getattr(layer, "rank_mask", torch.ones(layer.rank, dtype=torch.bool))
    assert len(a) == int(mask.sum()) * (1 if layer.start_a is None else 2)


@given(layers(dtypes=(WIDE, torch.float32, torch.bfloat16)))
@quickly
def test_state_and_tokens_are_the_layer(drawn):
    layer, x = drawn
    expected = layer(x)
    owned = {name: tensor.detach().clone() for name, tensor in layer.owned()}
    tokens = {role: layer.tokens(role).clone() for role in layer.roles}
    with torch.no_grad():
        for _, tensor in layer.owned():
            tensor.zero_()
        for name, tensor in layer.owned():
            tensor.copy_(owned[name])
    assert torch.equal(layer(x), expected)
    for role in layer.roles:
        assert torch.equal(LowRankLinear.from_tokens(role, tokens[role]), owned[role]), role
        assert tokens[role].dim() == 2


@given(layers(dtypes=(WIDE, torch.float32, torch.bfloat16)))
@quickly
def test_switched_off_it_is_the_base(drawn):
    layer, x = drawn
    layer.enabled = False
    assert torch.equal(layer(x), layer.base(x))


@given(layers(makers=(SVD,)), st.data())
@quickly
def test_masking_takes_exactly_one_components_update_away(drawn, data):
    layer, _ = drawn
    component = data.draw(st.integers(0, layer.rank - 1))
    layer.rank_mask[component] = True
    whole = layer.delta()
    layer.rank_mask[component] = False
    others = layer.delta()
    alone = layer.scaling * layer.lam[component] * torch.outer(
        layer.p[:, component], layer.q[component]
    )  # fmt: skip
    if layer.start_a is not None:
        start = torch.outer(layer.start_b[:, component], layer.start_a[component])
        alone = alone - layer.scaling * start
    torch.testing.assert_close(whole - others, alone.detach(), rtol=1e-9, atol=1e-9)
