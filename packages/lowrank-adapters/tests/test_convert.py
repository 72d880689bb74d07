"""Conversion to LoRA: the same update, in tensors of its own."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lowrank_adapters import (
    SVD,
    DoRA,
    DyLoRA,
    LoRA,
    LoRALinear,
    PrincipalWeights,
    convert_to_lora_,
    inject_adapters_,
    merge_,
    set_rank_,
)

MAKERS = [LoRA, SVD, DyLoRA, lambda rank, alpha: DoRA(rank, alpha, magnitude="scalar")]


def assert_left_alone(model, before):
    assert list(model.named_modules()) == before[0]
    torch.testing.assert_close(dict(model.state_dict()), before[1], rtol=0, atol=0, equal_nan=True)


def snapshot(model):
    return list(model.named_modules()), copy.deepcopy(dict(model.state_dict()))


def test_adalora_keeps_its_update_with_one_component_for_each_live_one(kit, twin):
    model, layers = kit.adapted(SVD(rank=3, alpha=4.5))
    layers["layers.0.q_proj"].rank_mask.copy_(torch.tensor([False, True, True]))
    layers["layers.1.q_proj"].rank_mask.fill_(False)
    tokens = torch.arange(11)
    expected = model(tokens)
    bases = {name: layer.base for name, layer in layers.items()}
    found = convert_to_lora_(model)
    assert list(found) == [name for name, layer in layers.items() if layer.rank_mask.any()]
    assert "layers.1.q_proj" not in found
    for name, layer in layers.items():
        place = model.get_submodule(name)
        if name not in found:
            assert place is bases[name]
            continue
        assert type(place) is LoRALinear
        assert place is found[name]
        assert place.base is bases[name]
        assert (place.rank, place.scaling) == (int(layer.rank_mask.sum()), 1.0)
        update = twin.update_matrix(layer.p, layer.lam, layer.q, layer.rank_mask, 1.5)
        product = place.b.double() @ place.a.double()
        torch.testing.assert_close(product, update, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_dylora_keeps_the_rank_that_it_is_at(kit, twin, rank):
    model, layers = kit.adapted(DyLoRA(rank=3, alpha=4.5))
    set_rank_(layers, rank)
    ones = torch.ones(rank)
    expected = {
        name: twin.update_matrix(layer.b[:, :rank], ones, layer.a[:rank], ones, 4.5 / rank)
        for name, layer in layers.items()
    }
    for name, layer in convert_to_lora_(model).items():
        assert layer.rank == rank
        product = layer.b.double() @ layer.a.double()
        torch.testing.assert_close(product, expected[name], rtol=1e-6, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_conversion_is_the_identity_of_the_update(data):
    draw = data.draw
    out_features, in_features = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    limit = min(out_features, in_features)
    rank = draw(st.integers(1, limit))
    make = draw(st.sampled_from(MAKERS))(rank, draw(st.floats(0.1, 50)))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    model = nn.Sequential(nn.Linear(in_features, out_features).double())
    layer = inject_adapters_(model, make, factor_dtype=dtype)["0"]
    with torch.no_grad():
        for _, factor in layer.factors():
            factor.normal_()
    if isinstance(make, SVD):
        layer.rank_mask.copy_(
            torch.tensor(draw(st.lists(st.booleans(), min_size=rank, max_size=rank)))
        )
    if isinstance(make, DyLoRA):
        set_rank_({"0": layer}, draw(st.integers(1, rank)))
    update = layer.delta()
    found = convert_to_lora_(model)
    if not found:
        assert isinstance(make, SVD)
        assert not layer.rank_mask.any()
        assert model[0] is layer.base
        return
    assert torch.equal(found["0"].delta(), update)
    assert convert_to_lora_(model)["0"].delta().equal(update)


def test_start_whose_product_is_not_zero(kit):
    model = kit.Decoder()
    layers = inject_adapters_(model, LoRA(rank=2, alpha=4.0, start=PrincipalWeights()), "q_proj")
    kit.shaken(model)
    updates = {name: layer.delta() for name, layer in layers.items()}
    for name, layer in convert_to_lora_(model).items():
        assert layer.rank == 4
        assert layer.start_a is None
        assert torch.equal(layer.delta(), updates[name])


def test_new_layers_are_like_the_old_ones(kit):
    model, layers = kit.adapted(SVD(rank=3, alpha=1.0, dropout=0.25), targets=["q_proj"])
    model.eval()
    first, second = layers.values()
    for layer in layers.values():
        layer.rank_mask.fill_(True)
    first.enabled = False
    second.train()
    found = convert_to_lora_(model)
    assert [(n.enabled, n.training, n.dropout) for n in found.values()] == [
        (False, False, 0.25),
        (True, True, 0.25),
    ]
    assert all(factor.requires_grad for layer in found.values() for _, factor in layer.factors())
    old = {factor.data_ptr() for layer in layers.values() for _, factor in layer.factors()}
    assert not old & {f.data_ptr() for layer in found.values() for _, f in layer.factors()}


def spoil_nan(model):
    model.layers[1].mlp["w1"].p.data.fill_(float("nan"))
    model.layers[1].mlp["w1"].rank_mask.fill_(True)


@pytest.mark.parametrize(
    ("make", "spoil", "text"),
    [
        (
            SVD(rank=3, alpha=1.0),
            spoil_nan,
            "layers.1.mlp.w1: it has factors that are not finite; load an earlier adapter.",
        ),
        (
            SVD(rank=3, alpha=1.0),
            merge_,
            "layers.0.q_proj is merged; call unmerge_(model) first.",
        ),
        (
            DoRA(rank=3, alpha=1.0),
            lambda _: None,
            "layers.0.q_proj: it is a DoRALinear, whose magnitudes are no low-rank update; export "
            "it as DoRA, or merge it.",
        ),
        (
            LoRA(rank=3, alpha=1.0, start=PrincipalWeights()),
            lambda _: None,
            "layers.0.q_proj: rank is 6, but the matrix is 5 x 5; choose a rank of 1 to 5, or "
            "exclude the module.",
        ),
    ],
)
def test_refusal_leaves_the_model_as_it_was(kit, make, spoil, text):
    model, _ = kit.adapted(make)
    spoil(model)
    before = snapshot(model)
    assert kit.error_text(convert_to_lora_, model) == text
    assert_left_alone(model, before)
