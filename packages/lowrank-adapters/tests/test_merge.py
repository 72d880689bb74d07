"""Merging: the model computes the same, and its weights come back bit by bit."""

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
    PrincipalWeights,
    UnitRows,
    disable_adapters,
    inject_adapters_,
    load_adapter_state_dict_,
    materialise_,
    merge_,
    merged,
    remove_adapters_,
    set_rank_,
    start_factors_,
    unmerge_,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# A product of the sums in another order, and one rounding of the weight.
TOLERANCE = {
    torch.float64: 1e-5,  # of float32 factors
    torch.float32: 1e-5,
    torch.bfloat16: 0.1,
    torch.float16: 0.02,
}


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model, expected):
    torch.testing.assert_close(dict(model.state_dict()), expected, rtol=0, atol=0, equal_nan=True)


class TransposedLinear(nn.Module):
    """What transformers' Conv1D is: a linear layer that keeps its weight transposed."""

    def __init__(self, nx, nf):
        super().__init__()
        self.nf, self.weight = nf, nn.Parameter(torch.randn(nx, nf))

    def forward(self, x):
        return x @ self.weight


TransposedLinear.__name__ = "Conv1D"


def every_kind(dtype=torch.float32):
    return nn.ModuleDict(
        {
            "linear": nn.Linear(6, 5),
            "conv1d": TransposedLinear(6, 5),
            "line": nn.Conv1d(3, 5, 2),
            "plane": nn.Conv2d(2, 5, (3, 2)).to(memory_format=torch.channels_last),
            "embedding": nn.Embedding(6, 5, padding_idx=1),
        }
    ).to(dtype)


def inputs(dtype=torch.float32):
    shapes = {"linear": (2, 6), "conv1d": (2, 6), "line": (2, 3, 7), "plane": (1, 2, 4, 5)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()} | {
        "embedding": torch.tensor([[0, 1], [5, 5]])
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [LoRA(rank=3, alpha=1.5), SVD(rank=3, alpha=1.5)])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "line", "plane", "embedding"])
def test_merged_layer_of_every_kind_computes_the_same(kit, dtype, make, kind):
    model, x = every_kind(dtype), inputs(dtype)[kind]
    layer = inject_adapters_(model, make, [kind])[kind]
    kit.shaken(model)
    if isinstance(make, SVD):
        layer.rank_mask.copy_(torch.tensor([True, False, True]))
    strides = layer.base.weight.stride()
    before, plain, expected = bits(model), layer.base(x), layer(x)
    address = layer.base.weight.data_ptr()
    with merged(model):
        found = layer(x)
        assert torch.equal(found, layer.base(x))
        assert layer.base.weight.data_ptr() == address
        assert layer.base.weight.stride() == strides
    assert (expected - plain).abs().max() > 0.5
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert_same(model, before)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "make",
    [
        DoRA(rank=3, alpha=1.5),
        DoRA(rank=3, alpha=1.5, magnitude="scalar"),
        DyLoRA(rank=3, alpha=1.5),
        LoRA(rank=3, alpha=1.5, start=PrincipalWeights()),
        SVD(rank=3, alpha=1.5, start=PrincipalWeights()),
    ],
)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_merged_layer_of_every_method_computes_the_same(kit, dtype, make, kind):
    model, x = every_kind(dtype), inputs(dtype)[kind]
    layer = inject_adapters_(model, make, [kind])[kind]
    kit.shaken(model)
    with torch.no_grad():
        for role, factor in layer.factors():
            if role == "magnitude":
                factor.mul_(torch.rand(factor.shape) + 0.5)
    if isinstance(make, DyLoRA):
        set_rank_({kind: layer}, 2)
    before, plain, expected = bits(model), layer.base(x), layer(x)
    with merged(model):
        found = layer(x)
    assert (expected - plain).abs().max() > 0.1
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert_same(model, before)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("make", [LoRA(rank=3, alpha=1.5), SVD(rank=3, alpha=1.5)])
def test_merged_weight_is_the_sum_of_weight_and_update(kit, twin, make):
    model, layers = kit.adapted(make)
    before = bits(model)
    merge_(model)
    for name, layer in layers.items():
        if isinstance(make, SVD):
            update = twin.update_matrix(layer.p, layer.lam, layer.q, layer.rank_mask, 0.5)
        else:
            everything = torch.ones(3)
            update = twin.update_matrix(layer.b, everything, layer.a, everything, 0.5)
        expected = before[f"{name}.base.weight"].double() + update
        torch.testing.assert_close(layer.base.weight.double(), expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(layer.base.bias, before[f"{name}.base.bias"])
    unmerge_(model)
    assert_same(model, before)


def test_update_is_rounded_once(kit):
    model = nn.Sequential(nn.Linear(6, 5)).to(torch.bfloat16)
    layer = inject_adapters_(model, SVD(rank=3, alpha=1.5))["0"]
    kit.shaken(model)
    weight = layer.base.weight
    expected = (weight.float() + layer.delta()).to(torch.bfloat16)
    in_two = weight + layer.delta().to(torch.bfloat16)
    merge_(model)
    assert torch.equal(layer.base.weight, expected)
    assert not torch.equal(expected, in_two)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_merging_and_unmerging_is_the_identity(data):
    draw = data.draw
    widths = st.integers(1, 7)
    out_features, in_features = draw(widths), draw(widths)
    rank = draw(st.integers(1, min(out_features, in_features)))
    dtype = draw(st.sampled_from(DTYPES))
    factor_dtype = draw(st.sampled_from(DTYPES))
    method = draw(st.sampled_from([LoRA, SVD, DoRA, DyLoRA]))
    make = method(rank, draw(st.floats(0.1, 100)))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    model = nn.Sequential(nn.Linear(in_features, out_features, bias=draw(st.booleans())))
    model.to(dtype)
    layer = inject_adapters_(model, make, factor_dtype=factor_dtype)["0"]
    with torch.no_grad():
        for _, factor in layer.factors():
            factor.normal_()
        if isinstance(make, SVD):
            mask = draw(st.lists(st.booleans(), min_size=rank, max_size=rank))
            layer.rank_mask.copy_(torch.tensor(mask))
    before = bits(model)
    for _ in range(2):
        merge_(model)
        unmerge_(model)
    assert_same(model, before)


def test_layers_that_are_merged_take_part_in_no_gradient(kit):
    model, layers = kit.adapted()
    with merged(model):
        model(torch.arange(11)).sum().backward()
    assert all(factor.grad is None for layer in layers.values() for _, factor in layer.factors())


def test_copy_of_a_merged_model_can_be_unmerged_alone(kit):
    model, _ = kit.adapted()
    before = bits(model)
    merge_(model)
    after = bits(model)
    other = copy.deepcopy(model)
    unmerge_(other)
    assert_same(other, before)
    assert_same(model, after)


def test_weights_come_back_when_the_block_fails(kit):
    model, layers = kit.adapted()
    before = bits(model)
    seen = []

    def fail():
        with merged(model):
            seen.extend(layer.merged for layer in layers.values())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == [True] * len(layers)
    assert_same(model, before)
    assert not any(layer.merged for layer in layers.values())


def spoil_nan(model):
    model.layers[1].mlp["w1"].p.data.fill_(float("nan"))
    model.layers[1].mlp["w1"].rank_mask.fill_(True)


def spoil_overflow(model):
    model.half()
    model.layers[1].mlp["w1"].lam.data.fill_(60000)
    model.layers[1].mlp["w1"].rank_mask.fill_(True)


def spoil_quantised(model):
    base = model.layers[1].mlp["w1"].base
    base.weight = nn.Parameter(base.weight.to(torch.int8), requires_grad=False)


def spoil_meta(model):
    model.layers[1].mlp["w1"].base.to("meta")


NOT_FINITE = (
    "its merged weight would not be finite; load an earlier adapter, or a base with a wider dtype."
)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (spoil_nan, NOT_FINITE),
        (spoil_overflow, NOT_FINITE),
        (
            spoil_quantised,
            "the weight of the Linear is torch.int8 numbers, expected a whole floating-point "
            "tensor; its values are not changed or read: dequantise or gather the base first.",
        ),
        (spoil_meta, "its weight is on the meta device; load the model before merging."),
    ],
)
@pytest.mark.parametrize("block", [True, False])
def test_refusal_leaves_the_model_as_it_was(kit, spoil, text, block):
    model, layers = kit.adapted()
    spoil(model)
    before = {n: t for n, t in bits(model).items() if not t.is_meta}
    if block:
        found = kit.error_text(lambda: merged(model).__enter__())
    else:
        found = kit.error_text(merge_, model)
    assert found == f"layers.1.mlp.w1: {text}"
    now = {n: t for n, t in bits(model).items() if not t.is_meta}
    torch.testing.assert_close(now, before, rtol=0, atol=0, equal_nan=True)
    assert not any(layer.merged for layer in layers.values())


def test_merging_twice_and_unmerging_twice(kit):
    model, _ = kit.adapted()
    assert kit.error_text(unmerge_, model) == "no layer is merged; call merge_ first."
    merge_(model)
    after = bits(model)
    merged_already = "layers.0.q_proj is merged; call unmerge_(model) first."
    assert kit.error_text(merge_, model) == merged_already
    assert kit.error_text(lambda: disable_adapters(model).__enter__()) == merged_already
    state = {name: tensor for name, tensor in after.items() if ".base." not in name}
    assert kit.error_text(load_adapter_state_dict_, model, state) == merged_already
    assert_same(model, after)


@pytest.mark.parametrize("make", [LoRA(3, 4.5), DoRA(3, 4.5)], ids=str)
def test_what_reads_the_base_is_refused_while_it_is_merged(kit, make):
    model, layers = kit.adapted(make)
    merge_(model)
    after, text = bits(model), "it is merged, so that its base is not what it was; unmerge first."
    first = next(iter(layers.values()))
    assert kit.error_text(first.delta) == text
    assert kit.error_text(first.start_, PrincipalWeights()) == text
    for call in (lambda: start_factors_(layers, UnitRows()), lambda: materialise_(model)):
        assert kit.error_text(call) == f"layers.0.q_proj: {text}"
    assert_same(model, after)
    unmerge_(model)
    assert first.delta().any()


def test_state_loaded_into_a_merged_model_leaves_the_norms_of_its_base(kit):
    model, _ = kit.adapted(DoRA(3, 4.5))
    expected = model(torch.arange(11))
    merge_(model)
    model.load_state_dict(bits(model))
    unmerge_(model)
    assert torch.equal(model(torch.arange(11)), expected)


def test_disabled_adapters_leave_the_plain_model(kit):
    model, layers = kit.adapted()
    plain = kit.Decoder()
    state = {name.replace(".base.", "."): value for name, value in model.state_dict().items()}
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    tokens = torch.arange(11)
    expected = model(tokens)
    first = next(iter(layers.values()))
    first.enabled = False
    partly = model(tokens)
    seen = []

    def fail():
        with disable_adapters(model):
            seen.append(model(tokens))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(seen[0], plain(tokens))
    assert torch.equal(model(tokens), partly)
    assert not torch.equal(partly, expected)
    first.enabled = True
    assert torch.equal(model(tokens), expected)


@pytest.mark.parametrize("keep", [True, False])
def test_removed_adapters_leave_the_bases_merged_or_not(kit, keep):
    model, layers = kit.adapted()
    tokens = torch.arange(11)
    bases = {name: layer.base for name, layer in layers.items()}
    with disable_adapters(model):
        expected = model(tokens)
    if keep:
        merge_(model)
        expected = model(tokens)
    remove_adapters_(model)
    assert torch.equal(model(tokens), expected)
    assert all(model.get_submodule(name) is base for name, base in bases.items())
    assert set(model.state_dict()) == set(kit.Decoder().state_dict())
