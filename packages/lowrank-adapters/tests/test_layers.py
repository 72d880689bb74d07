"""Both layers against their twins in values and all gradients; what the base must not notice."""

import pytest
import torch
from torch import nn

from lowrank_adapters import (
    SVD,
    AdapterError,
    DoRA,
    DyLoRA,
    LoRA,
    LoRALinear,
    LowRankLinear,
    SVDLinear,
)

MASK = torch.tensor([True, False, True, True])


def make(kind, *, dtype=torch.float64):
    """A layer 6 -> 5 of rank 4, its factors off their start, one component masked."""
    layer = kind(nn.Linear(6, 5, dtype=dtype), rank=4, alpha=3.0, dtype=dtype)
    with torch.no_grad():
        for _, factor in layer.factors():
            factor.normal_()
    if kind is SVDLinear:
        layer.rank_mask.copy_(MASK)
    return layer


def test_lora_equals_the_twin_in_values_and_all_gradients(twin):
    layer = make(LoRALinear)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, 3, 5, dtype=torch.float64)

    found = layer(x)
    base = layer.base
    rows = [
        twin.lora_linear(row, base.weight, base.bias, layer.a, layer.b, 3.0 / 4)
        for row in x.flatten(0, 1)
    ]
    expected = torch.stack(rows).view(2, 3, 5)

    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    wanted = [x, layer.a, layer.b, base.weight, base.bias]
    torch.testing.assert_close(
        torch.autograd.grad(found, wanted, cotangent),
        torch.autograd.grad(expected, wanted, cotangent),
        rtol=1e-12,
        atol=1e-12,
    )


def test_svd_equals_the_twin_in_values_and_all_gradients(twin):
    layer = make(SVDLinear)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, 3, 5, dtype=torch.float64)

    found = layer(x)
    base = layer.base
    rows = [
        twin.svd_linear(row, base.weight, base.bias, layer.p, layer.lam, layer.q, MASK, 3.0 / 4)
        for row in x.flatten(0, 1)
    ]
    expected = torch.stack(rows).view(2, 3, 5)

    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    wanted = [x, layer.p, layer.lam, layer.q, base.weight, base.bias]
    torch.testing.assert_close(
        torch.autograd.grad(found, wanted, cotangent),
        torch.autograd.grad(expected, wanted, cotangent),
        rtol=1e-12,
        atol=1e-12,
    )


def test_masked_components_get_exactly_no_gradient_and_the_others_do():
    layer = make(SVDLinear)
    layer(torch.randn(7, 6, dtype=torch.float64)).square().sum().backward()
    for role, factor in layer.factors():
        largest = LowRankLinear.as_tokens(role, factor.grad).abs().amax(1)
        assert torch.equal(largest > 0, MASK), role


@pytest.mark.parametrize("kind", [LoRALinear, SVDLinear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_start_is_exactly_the_base_and_learns(kind, dtype):
    base = nn.Linear(6, 5, dtype=dtype)
    layer = kind(base, rank=4, alpha=3.0)
    x = torch.randn(7, 6, dtype=dtype)
    y = layer(x)
    assert torch.equal(y, base(x))
    y.float().square().sum().backward()
    learns = {role: bool(factor.grad.abs().max() > 0) for role, factor in layer.factors()}
    assert learns == {LoRALinear: {"a": False, "b": True}}.get(
        kind, {"p": False, "lam": True, "q": False}
    )


@pytest.mark.parametrize(("kind", "roles"), [(LoRALinear, "a"), (SVDLinear, "pq")])
def test_random_factors_start_with_tokens_of_unit_norm(kind, roles):
    layer = kind(nn.Linear(60, 50), rank=8, alpha=1.0)
    for role in roles:
        tokens = layer.tokens(role)
        torch.testing.assert_close(tokens.norm(dim=1), torch.ones(8))
        assert torch.linalg.matrix_rank(tokens) == 8


@pytest.mark.parametrize("kind", [LoRALinear, SVDLinear])
def test_start_does_not_depend_on_surrounding_defaults(kind):
    base = nn.Linear(6, 5)
    torch.manual_seed(3)
    expected = dict(kind(base, rank=4, alpha=1.0).factors())
    torch.manual_seed(3)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = dict(kind(base, rank=4, alpha=1.0).factors())
    finally:
        torch.set_default_dtype(torch.float32)
    for role, factor in expected.items():
        assert found[role].dtype == torch.float32
        assert torch.equal(found[role], factor), role


@pytest.mark.parametrize("kind", [LoRALinear, SVDLinear])
def test_narrow_base_is_called_as_it_is_and_gets_no_gradient_when_frozen(kind):
    base = nn.Linear(6, 5, dtype=torch.bfloat16).requires_grad_(requires_grad=False)
    weight, before = base.weight, base.weight.clone()
    layer = kind(base, rank=4, alpha=3.0)
    seen = []
    base.register_forward_hook(lambda _, x, y: seen.append((x[0], y.dtype)))
    with torch.no_grad():
        for _, factor in layer.factors():
            factor.normal_()
    x = torch.randn(7, 6, dtype=torch.bfloat16)

    y = layer(x)
    y.float().sum().backward()

    assert y.dtype == torch.bfloat16
    assert seen[0][0] is x
    assert seen[0][1] == torch.bfloat16
    assert layer.base.weight is weight
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, before)
    assert weight.grad is None
    assert {factor.grad.dtype for _, factor in layer.factors()} == {torch.float32}


@pytest.mark.parametrize("kind", [LoRALinear, SVDLinear])
def test_base_may_be_any_layer_with_features(kind):
    class Doubling(nn.Linear):
        """A layer whose weight is not what a product is taken with."""

        def forward(self, x):
            return torch.cat([x[..., :4], x[..., :1]], -1) * 2

    layer = make(kind, dtype=torch.float32)
    layer.base = Doubling(6, 5)
    x = torch.randn(7, 6)
    a, b = layer.as_lora()
    torch.testing.assert_close(layer(x), layer.base(x) + x @ a.T @ b.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_as_lora_of_svd_is_its_update_of_the_live_components(twin, dtype):
    layer = make(SVDLinear, dtype=dtype)
    a, b = layer.as_lora()
    assert (a.shape, b.shape) == ((3, 6), (5, 3))
    expected = twin.update_matrix(layer.p, layer.lam, layer.q, MASK, 3.0 / 4)
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(b.double() @ a.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_as_lora_of_lora_is_its_update(twin, dtype):
    layer = make(LoRALinear, dtype=dtype)
    layer.scaling = 1 / 3  # not a power of two: a narrow B would round
    a, b = layer.as_lora()
    expected = twin.update_matrix(
        layer.b, torch.ones(4), layer.a, torch.ones(4, dtype=torch.bool), 1 / 3
    )
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(b.double() @ a.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", [LoRALinear, SVDLinear])
def test_as_lora_shares_no_memory_with_the_layer(kind):
    layer = make(kind)
    before = [factor.detach().clone() for _, factor in layer.factors()]
    for matrix in layer.as_lora():
        matrix.zero_()
    for (role, factor), expected in zip(layer.factors(), before, strict=True):
        assert torch.equal(factor, expected), role


def test_tokens_are_live_views_with_a_row_per_component():
    for kind, widths in [(SVDLinear, {"p": 5, "lam": 1, "q": 6}), (LoRALinear, {"a": 6, "b": 5})]:
        layer = make(kind)
        assert [role for role, _ in layer.factors()] == list(widths)
        for role, width in widths.items():
            tokens = layer.tokens(role)
            assert tokens.shape == (4, width)
            tokens[1] = 7
            factor = layer.get_parameter(role)
            component = factor[:, 1] if role in "pb" else factor[1]
            assert torch.equal(component, torch.full_like(component, 7)), role
            assert torch.equal(LowRankLinear.from_tokens(role, tokens), factor)


def test_makers_build_the_layer_that_they_name():
    base = nn.Linear(6, 5)
    for maker, kind in [(LoRA(2, 3.0), LoRALinear), (SVD(2, 3.0), SVDLinear)]:
        layer = maker.build(base, device="meta", dtype=torch.float64)
        assert type(layer) is kind
        assert (layer.rank, layer.alpha, layer.scaling) == (2, 3.0, 1.5)
        assert layer.base is base
        places = {(f.device.type, f.dtype) for _, f in layer.factors()}
        assert places == {("meta", torch.float64)}
        assert "rank=2, alpha=3.0" in repr(layer)


@pytest.mark.parametrize("rank", [0, 6, 2.5, "4", True])
@pytest.mark.parametrize("kind", [LoRALinear, SVDLinear])
def test_rank_that_does_not_fit(kind, rank):
    with pytest.raises(AdapterError) as caught:
        kind(nn.Linear(6, 5), rank=rank, alpha=1.0)
    assert str(caught.value) == (
        f"rank is {rank!r}, but the matrix is 5 x 6; choose a rank of 1 to 5, or exclude the "
        "module."
    )


def test_adapter_error_is_a_value_error():
    assert issubclass(AdapterError, ValueError)


def test_rslora_scales_by_the_root_of_the_rank(twin):
    for make, kind in ((LoRA, LoRALinear), (SVD, SVDLinear)):
        layer = make(4, 3.0, rslora=True).build(nn.Linear(6, 5), device="cpu", dtype=torch.float64)
        assert type(layer) is kind
        assert layer.scaling == 1.5
        with torch.no_grad():
            for _, factor in layer.factors():
                factor.normal_()
        every = torch.ones(4, dtype=torch.bool)
        factors = (
            (layer.b, torch.ones(4), layer.a) if make is LoRA else (layer.p, layer.lam, layer.q)
        )
        expected = twin.update_matrix(*factors, every, 3.0 / 4**0.5)
        torch.testing.assert_close(layer.delta(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [LoRALinear, SVDLinear])
def test_dropout_acts_on_the_updates_input_in_training_alone(kind):
    base = nn.Linear(6, 5, dtype=torch.float64)
    layer = kind(base, rank=4, alpha=3.0, dropout=0.25, dtype=torch.float64)
    with torch.no_grad():
        for _, factor in layer.factors():
            factor.normal_()
    x = torch.randn(7, 6, dtype=torch.float64)
    torch.manual_seed(2)
    found = layer(x)
    torch.manual_seed(2)
    dropped = nn.functional.dropout(x, 0.25)
    assert (dropped == 0).any()
    torch.testing.assert_close(found, base(x) + dropped @ layer.delta().T, rtol=1e-12, atol=1e-12)
    layer.eval()
    torch.testing.assert_close(layer(x), base(x) + x @ layer.delta().T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [LoRALinear, SVDLinear])
def test_switched_off_it_is_the_base(kind):
    layer = make(kind)
    x = torch.randn(7, 6, dtype=torch.float64)
    layer.enabled = False
    assert torch.equal(layer(x), layer.base(x))
    layer.enabled = True
    assert not torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("kind", [LoRALinear, SVDLinear])
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_the_bases_dtype(kind, factor_dtype):
    layer = make(kind, dtype=torch.float32)
    for role, factor in layer.factors():
        setattr(layer, role, nn.Parameter(factor.detach().to(factor_dtype)))
    x = torch.randn(7, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert y.dtype == layer.base(x).dtype == torch.bfloat16
    y.float().sum().backward()
    torch.testing.assert_close(y.float(), layer.base(x) + x @ layer.delta().T, rtol=5e-2, atol=5e-1)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": 0}, "rank is 0, expected a whole number of at least 1."),
        ({"rank": "4"}, "rank is '4', expected a whole number of at least 1."),
        ({"rank": 2.5}, "rank is 2.5, expected a whole number of at least 1."),
        ({"rank": True}, "rank is True, expected a whole number of at least 1."),
        ({"alpha": "4"}, "alpha is '4', expected a finite number above 0."),
        ({"alpha": True}, "alpha is True, expected a finite number above 0."),
        ({"dropout": None}, "dropout is None, expected a probability from 0 to below 1."),
        ({"rslora": 1}, "rslora is 1, expected True or False."),
        ({"start": "pissa"}, "start is 'pissa', expected a start such as UnitRows()."),
        ({"alpha": 0.0}, "alpha is 0.0, expected a finite number above 0."),
        ({"alpha": float("nan")}, "alpha is nan, expected a finite number above 0."),
        ({"dropout": 1.0}, "dropout is 1.0, expected a probability from 0 to below 1."),
    ],
)
@pytest.mark.parametrize("maker", [LoRA, SVD, DoRA, DyLoRA])
def test_maker_refuses_what_no_layer_can_have(kit, maker, options, text):
    assert kit.error_text(maker, **{"rank": 2, "alpha": 1.0, **options}) == text


def test_update_is_added_by_the_product_itself(kit):
    """One tensor as wide as y for the update, none for its scaling or its sum with the base."""
    layer = LoRALinear(nn.Linear(64, 48), rank=2, alpha=1.0)
    layer.base.requires_grad_(False)
    with kit.Counted() as mode:
        layer(torch.randn(3, 64))
    assert (mode.operations["addmm"], mode.operations["mm"]) == (2, 1)
    assert not mode.operations.keys() & {"mul", "add", "clone", "copy_"}


@pytest.mark.parametrize("kind", [LoRALinear, SVDLinear])
def test_other_tensors_may_stand_in_the_factors_places(kind):
    layer = make(kind)
    x = torch.randn(7, 6, dtype=torch.float64)
    others = {role: 2 * factor for role, factor in layer.factors()}
    found = torch.func.functional_call(layer, others, (x,))
    torch.autograd.grad(found.sum(), [factor for _, factor in layer.factors()])
    with torch.no_grad():
        for _, factor in layer.factors():
            factor.mul_(2)
    assert torch.equal(layer(x), found)


def test_a_factor_may_be_a_plain_tensor():
    layer = make(LoRALinear)
    x, expected = torch.randn(7, 6, dtype=torch.float64), layer.a.detach().clone()
    y = layer(x)
    del layer.a
    layer.a = expected
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("kind", [LoRALinear, SVDLinear])
@pytest.mark.parametrize("size", [(6,), (7, 6), (2, 7, 6), (2, 3, 7, 6)])
def test_output_is_a_tensor_of_its_own_and_may_be_changed_in_place(kind, size):
    layer = make(kind)
    x = torch.randn(size, dtype=torch.float64)
    factors = [factor for _, factor in layer.factors()]
    expected = torch.autograd.grad(layer(x).relu().square().sum(), factors)
    y = layer(x)
    assert not y._is_view()
    found = torch.autograd.grad(y.relu_().square().sum(), factors)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
