"""DoRA against its twin, its norm without the matrix B A, and the scalar form."""

import pytest
import torch
from torch import nn

from lowrank_adapters import (
    SVD,
    DoRA,
    DoRALinear,
    DyLoRA,
    FactorStack,
    LoRA,
    PrincipalWeights,
    ScaledLoRALinear,
    export_peft,
    freeze_base_,
    inject_adapters_,
    materialise_,
)
from lowrank_adapters.maps import map_of

WIDE = {"dtype": torch.float64}
NORMS = pytest.mark.parametrize("detach_norm", [True, False])


def make(detach_norm=True, *, bias=True, start=None):
    base = nn.Linear(6, 5, bias=bias, **WIDE)
    options = {} if start is None else {"start": start}
    layer = DoRALinear(base, rank=3, alpha=4.5, detach_norm=detach_norm, **options, **WIDE)
    with torch.no_grad():
        for _, factor in layer.factors():
            factor.normal_()
    return layer


@NORMS
@pytest.mark.parametrize("bias", [True, False])
def test_dora_equals_the_twin_in_values_and_all_gradients(twin, detach_norm, bias):
    layer = make(detach_norm, bias=bias)
    base, x = layer.base, torch.randn(2, 3, 6, **WIDE, requires_grad=True)
    factors = [layer.a, layer.b, layer.magnitude]
    zeros = torch.zeros(5, **WIDE)

    found = layer(x)
    rows = [
        twin.dora_linear(
            row, base.weight, zeros if base.bias is None else base.bias, *factors, 1.5,
            detach_norm=detach_norm,
        )
        for row in x.flatten(0, 1)
    ]  # fmt: skip
    expected = torch.stack(rows).view(2, 3, 5)

    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn(2, 3, 5, **WIDE)
    wanted = [x, *factors, *([base.bias] if bias else [])]
    torch.testing.assert_close(
        torch.autograd.grad(found, wanted, cotangent),
        torch.autograd.grad(expected, wanted, cotangent),
        rtol=1e-11,
        atol=1e-11,
    )


def test_norm_is_detached_by_default():
    x = torch.randn(7, 6, **WIDE)
    gradients = []
    for options in ({}, {"detach_norm": True}, {"detach_norm": False}):
        torch.manual_seed(1)
        layer = DoRALinear(nn.Linear(6, 5, **WIDE), 3, 4.5, **options, **WIDE)
        nn.init.normal_(layer.b)
        gradients.append(torch.autograd.grad(layer(x).square().sum(), layer.a)[0])
    assert torch.equal(gradients[0], gradients[1])
    assert (gradients[0] - gradients[2]).abs().max() > 1e-3


@NORMS
def test_delta_is_what_the_layer_adds_to_the_weight(detach_norm):
    layer, x = make(detach_norm), torch.randn(7, 6, **WIDE)
    with torch.no_grad():
        found = layer(x)
        map_of(layer.base).add_(layer.base, layer.delta())
        torch.testing.assert_close(layer.base(x), found, rtol=1e-12, atol=1e-12)


def test_as_lora_is_the_direction():
    layer = make()
    a, b = layer.as_lora()
    torch.testing.assert_close(b @ a, 1.5 * layer.b.detach() @ layer.a.detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor_dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_start_is_exactly_the_base(dtype, factor_dtype, bias):
    base = nn.Linear(60, 50, bias=bias, dtype=dtype)
    layer = DoRALinear(base, rank=4, alpha=3.0, dtype=factor_dtype)
    x = torch.randn(7, 60, dtype=dtype)
    assert torch.equal(layer(x), base(x))
    norms = base.weight.detach().double().norm(dim=1)
    torch.testing.assert_close(layer.magnitude.detach(), norms.to(factor_dtype))
    layer.to(torch.bfloat16)
    assert torch.equal(layer(x.bfloat16()), base(x.bfloat16()))


def test_norms_of_narrow_factors_are_computed_in_wide_numbers():
    layer = DoRALinear(nn.Linear(60, 50), rank=4, alpha=3.0, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.b.normal_()
    a, b = layer.a.double(), layer.b.double()
    expected = (layer.base.weight.double() + 0.75 * b @ a).norm(dim=1)
    found = layer._norms(*layer.product(), torch.float32).double()
    torch.testing.assert_close(found, expected, rtol=2**-9, atol=0)  # as row_norms is rounded


def test_small_change_of_a_magnitude_is_felt_in_a_narrow_dtype():
    base = nn.Linear(6, 5, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(base.weight)
    layer = DoRALinear(base, rank=2, alpha=2.0)
    x = torch.zeros(1, 6, dtype=torch.bfloat16)
    x[0, 0] = 1.5
    with torch.no_grad():
        layer.magnitude.mul_(1 + 0.4 * 2**-7)
    gain = layer.magnitude / layer.row_norms
    assert (gain.bfloat16() == 1).all()
    assert torch.equal(layer(x), torch.full_like(layer(x), 1.5 + 2**-7))


def test_row_of_zeros_stays_finite_and_may_learn():
    base = nn.Linear(6, 5)
    nn.init.zeros_(base.weight)
    layer = DoRALinear(base, rank=2, alpha=2.0)
    x = torch.randn(7, 6)
    assert torch.equal(layer(x), base(x))
    layer(x).square().sum().backward()
    assert all(factor.grad.isfinite().all() for _, factor in layer.factors())
    assert not layer.delta().any()
    nn.init.ones_(layer.b)
    assert layer(x).isfinite().all()
    assert layer.delta().isfinite().all()


def squares_of_rows(weight, a, b, scaling):
    """‖W + s B A‖²; ‖W‖² + s Σ_k |B (2 W Aᵀ + s B A Aᵀ)|; and that of each number's size."""
    squares, sizes, largest = [], [], []
    for o in range(len(weight)):
        row = weight[o]
        for k in range(len(a)):
            row = row + scaling * b[o, k] * a[k]
        squares.append((row * row).sum())
        size = large = (weight[o] * weight[o]).sum()
        for k in range(len(a)):
            terms = [2 * (weight[o] * a[k]).sum()]
            terms += [scaling * b[o, j] * (a[j] * a[k]).sum() for j in range(len(a))]
            size = size + scaling * (b[o, k] * sum(terms)).abs()
            large = large + scaling * sum((b[o, k] * term).abs() for term in terms)
        sizes.append(size)
        largest.append(large)
    return torch.stack(squares), torch.stack(sizes), torch.stack(largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("left", [1.0, 0.5, 0.03, 1e-3, 1e-6, 0.0, -1e-3, -1.0])
def test_norm_of_what_the_update_takes_away_is_exact_but_for_rounding(dtype, factor_dtype, left):
    base = nn.Linear(96, 64, dtype=dtype)
    with torch.no_grad():
        base.weight.copy_(torch.randn(64, 2) @ torch.randn(2, 96))
        base.weight[5].zero_()
    layer = DoRALinear(base, rank=2, alpha=3.0, dtype=factor_dtype)
    u, sigma, rows = torch.linalg.svd(base.weight.detach().float(), full_matrices=False)
    with torch.no_grad():
        layer.a.copy_(rows[:2])
        layer.b.copy_(u[:, :2] * sigma[:2] * (left - 1) / 1.5)
    factors = layer.a.to(dtype).double(), layer.b.double()
    exact, sizes, largest = squares_of_rows(base.weight.detach().double(), *factors, 1.5)
    epsilon = max(torch.finfo(dtype).eps, torch.finfo(factor_dtype).eps)
    least = 2 * epsilon * sizes

    found = layer._norms(*layer.product(), dtype).detach()
    assert found.dtype == torch.float32
    alive = torch.arange(64) != 5
    error = (found.double().square() - exact.maximum(least)).abs()
    assert (error <= 2 * epsilon * largest)[alive].all()
    gain = layer._gain(*layer.product(), dtype)
    assert (gain.double() <= (1 + 2 * epsilon) * sizes.rsqrt() * layer.magnitude
            / (2 * epsilon) ** 0.5)[alive].all()  # fmt: skip
    assert gain[5] == 0
    y = layer(torch.randn(7, 96, dtype=dtype))
    assert y.isfinite().all()
    assert torch.equal(y[:, 5], base.bias[5].expand(7))
    if left == 1:
        assert torch.equal(gain[alive], torch.ones(63))


def test_a_norm_of_which_rounding_is_left_is_a_constant():
    gradients = []
    for detach_norm in (True, False):
        torch.manual_seed(0)
        layer = make(detach_norm)
        with torch.no_grad():
            u, sigma, rows = torch.linalg.svd(layer.base.weight, full_matrices=False)
            layer.base.weight.copy_((u[:, :3] * sigma[:3]) @ rows[:3])
            layer.a.copy_(rows[:3])
            layer.b.copy_((1e-9 - 1) * u[:, :3] * sigma[:3] / 1.5)
        materialise_(layer)
        loss = layer(torch.randn(7, 6, **WIDE)).square().sum()
        gradients.append(torch.autograd.grad(loss, [layer.a, layer.b, layer.magnitude]))
        assert all(gradient.isfinite().all() for gradient in gradients[-1])
    assert gradients[0][0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_large_norms_of_a_layer_cast_to_float16_do_not_overflow():
    base = nn.Linear(60, 50)
    with torch.no_grad():
        base.weight.mul_(1000)
    layer = DoRALinear(base, rank=4, alpha=3.0).to(torch.float16)
    assert layer.row_norms.min() > 256  # whose square float16 does not hold
    x = torch.randn(7, 60, dtype=torch.float16) / 100
    assert torch.equal(layer(x), base(x))
    assert layer(x).isfinite().all()


def test_magnitude_of_a_row_of_zeros_may_be_anything():
    base = nn.Linear(6, 5, dtype=torch.float16)
    nn.init.zeros_(base.weight)
    layer = DoRALinear(base, rank=2, alpha=2.0)
    nn.init.ones_(layer.magnitude)
    x = torch.randn(7, 6, dtype=torch.float16)
    assert torch.equal(layer(x), base(x))
    assert not layer.delta().any()


def test_norms_of_the_base_are_not_saved():
    layer = make()
    assert {name for name, _ in layer.owned()} == {"a", "b", "magnitude"}
    assert "row_norms" not in layer.state_dict()


def test_no_tensor_of_the_size_of_the_weight_is_made(kit):
    layer = DoRALinear(nn.Linear(64, 48), rank=2, alpha=2.0)
    freeze_base_(nn.Sequential(layer))
    sizes = set()

    class Sizes(kit.Counted):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = super().__torch_dispatch__(function, types, args, kwargs)
            # Transposing makes a view; all else makes numbers.
            if isinstance(made, torch.Tensor) and function.overloadpacket.__name__ != "t":
                sizes.add(made.numel())
            return made

    with Sizes() as mode:
        layer(torch.randn(3, 64)).sum().backward()
    assert max(sizes) == 3 * 64
    assert mode.operations["addmm"] == 3  # base, update, norm


def test_norms_are_of_the_factors_when_stacked_too(kit):
    model, layers = kit.adapted(DoRA(rank=3, alpha=4.5))
    freeze_base_(model)
    tokens = torch.tensor([[1, 4, 7]])
    with torch.no_grad():
        for layer in layers.values():
            layer.magnitude.normal_()
    expected = model(tokens)
    expected.square().sum().backward()
    gradients = {
        f"{n}.{r}": factor.grad for n, layer in layers.items() for r, factor in layer.factors()
    }
    stack = FactorStack(layers)
    found = model(tokens)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.square().sum().backward()
    for group in stack.groups:
        for index, name in enumerate(group.names):
            token_gradients = layers[name].as_tokens(group.role, gradients[f"{name}.{group.role}"])
            torch.testing.assert_close(
                group.values.grad[index], token_gradients, rtol=1e-3, atol=1e-4
            )
    magnitudes = [g for g in stack.groups if g.role == "magnitude"]
    assert {tuple(g.values.shape) for g in magnitudes} == {(4, 1, 5), (2, 1, 3), (2, 1, 7)}


@pytest.mark.parametrize("start", [None, PrincipalWeights()])
def test_base_on_meta_waits_for_its_weights(kit, start):
    options = {} if start is None else {"start": start}
    make_dora = DoRA(rank=2, alpha=2.0, **options)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 5))
    layers = inject_adapters_(model, make_dora)
    stack = FactorStack(layers)
    x = torch.randn(7, 6)
    text = (
        "a DoRALinear of rank 2 waits for the weights of its base, which was on the meta device; "
        "load them and call materialise_(model)."
    )
    assert kit.error_text(model, x) == text
    assert kit.error_text(materialise_, model) == (
        "0: the weights of the base are still on the meta device; load them first."
    )
    base = nn.Linear(6, 5)
    model[0].base.load_state_dict(base.state_dict(), assign=True)
    materialise_(model)
    assert torch.equal(model(x), base(x))
    torch.testing.assert_close(model[0].magnitude, base.weight.norm(dim=1))
    stack.check_bound()
    with torch.no_grad():
        model[0].magnitude.mul_(2)
    materialise_(model)  # what a user has trained stays
    torch.testing.assert_close(model[0].magnitude, 2 * base.weight.norm(dim=1))


def test_dropout_acts_on_the_updates_input():
    layer = make()
    layer.dropout = 0.25
    x = torch.randn(7, 6, **WIDE)
    torch.manual_seed(2)
    found = layer(x)
    torch.manual_seed(2)
    dropped = nn.functional.dropout(x, 0.25)
    weight, update = layer.base.weight, 1.5 * layer.b @ layer.a
    gain = layer.magnitude / (weight + update).norm(dim=1)
    expected = layer.base.bias + gain * (x @ weight.T + dropped @ update.T)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    layer.eval()
    expected = layer.base.bias + gain * (x @ (weight + update).T)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_other_bases_are_refused(kit):
    for base in (nn.Conv2d(4, 4, 3), nn.Embedding(5, 4)):
        assert kit.error_text(DoRALinear, base, 2, 1.0) == (
            f"DoRA is for linear layers, but this is a {type(base).__name__}; exclude it or give "
            "it LoRA."
        )


def test_maker_of_both_forms(kit):
    layers = [
        DoRA(2, 3.0, magnitude=form, detach_norm=False).build(
            nn.Linear(6, 5), device="cpu", dtype=torch.float32
        )
        for form in ("rows", "scalar")
    ]
    assert [type(layer) for layer in layers] == [DoRALinear, ScaledLoRALinear]
    assert layers[0].detach_norm is False
    assert kit.error_text(DoRA, 2, 3.0, magnitude="columns") == (
        "magnitude is 'columns', expected 'rows' or 'scalar'."
    )


def test_scalar_form_equals_the_twin_in_values_and_all_gradients(twin):
    layer = ScaledLoRALinear(nn.Linear(6, 5, **WIDE), rank=3, alpha=4.5, **WIDE)
    assert layer.scale.item() == 1
    x = torch.randn(7, 6, **WIDE)
    assert torch.equal(layer(x), layer.base(x))
    with torch.no_grad():
        for _, factor in layer.factors():
            factor.normal_()
    found = layer(x)
    expected = torch.stack(
        [
            twin.lora_linear(
                row, layer.base.weight, layer.base.bias, layer.a, layer.b, 1.5 * layer.scale[0]
            )
            for row in x
        ]
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    wanted, cotangent = [layer.a, layer.b, layer.scale], torch.randn_like(found)
    torch.testing.assert_close(
        torch.autograd.grad(found, wanted, cotangent),
        torch.autograd.grad(expected, wanted, cotangent),
        rtol=1e-12,
        atol=1e-12,
    )
    stack = FactorStack({"layer": layer})
    assert [(g.role, tuple(g.values.shape)) for g in stack.groups][2] == ("scale", (1, 1, 1))
    torch.testing.assert_close(layer(x), found)


def test_magnitude_that_is_known_is_exported_without_the_base(tmp_path):
    whole = nn.Sequential(nn.Linear(6, 5))
    trained = inject_adapters_(whole, DoRA(rank=2, alpha=2.0))
    with torch.no_grad():
        for _, factor in trained["0"].factors():
            factor.normal_()
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 5))
    layers = inject_adapters_(model, DoRA(rank=2, alpha=2.0))
    assert layers["0"].awaits_factors()
    with torch.no_grad():
        for role, factor in trained["0"].factors():
            layers["0"].get_parameter(role).copy_(factor)
    assert layers["0"].waiting
    assert not layers["0"].awaits_factors()
    files = [
        export_peft(each, tmp_path / name) / "adapter_model.safetensors"
        for name, each in (("trained", trained), ("there", layers))
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    "make",
    [LoRA(2, 3.0), SVD(2, 3.0), DyLoRA(2, 3.0), DoRA(2, 3.0)],
    ids=lambda m: type(m).__name__,
)
def test_weight_from_elsewhere_is_merged_in_its_order_of_rows(make):
    layer = make.build(nn.Linear(6, 5, **WIDE), device="cpu", dtype=torch.float64)
    with torch.no_grad():
        for _, factor in layer.factors():
            factor.normal_()
    weight = layer.base.weight.detach()
    order = torch.tensor([3, 0, 4, 1, 2])
    merged = layer.merged_weight(weight[order], lambda rows: rows[order])
    torch.testing.assert_close(merged, (weight + layer.delta())[order], rtol=1e-12, atol=1e-12)
    assert (merged - weight[order]).abs().max() > 0.1
