"""The flat buffers: what shares memory, where gradients go, and what is refused."""

import pytest
import torch
from torch import nn

from lowrank_adapters import SVD, DoRA, DyLoRA, FactorStack, LoRA, SVDLinear, freeze_base_

MAKERS = [make(rank=3, alpha=4.5) for make in (LoRA, SVD, DoRA, DyLoRA)]
TOKENS = torch.tensor([[1, 4, 7], [10, 0, 2]])


def factors_of(layers):
    return {f"{n}.{r}": factor for n, layer in layers.items() for r, factor in layer.factors()}


def copies_of(layers):
    return {name: factor.detach().clone() for name, factor in factors_of(layers).items()}


def gradients_of(model, layers):
    """The gradient of a loss with respect to every factor, by autograd alone."""
    factors = factors_of(layers)
    found = torch.autograd.grad(model(TOKENS).square().sum(), list(factors.values()))
    return dict(zip(factors, found, strict=True))


def test_groups_are_by_role_rank_and_width_in_model_order(kit):
    _, layers = kit.adapted()
    groups = FactorStack(layers).groups
    found = [
        (g.role, tuple(g.values.shape), [n[len("layers.") :] for n in g.names]) for g in groups
    ]
    wide = ["0.q_proj", "0.mlp.w2", "1.q_proj", "1.mlp.w2"]
    every = [f"{i}.{n}" for i in (0, 1) for n in ("q_proj", "v_proj", "mlp.w1", "mlp.w2")]
    w1, w2 = ["0.mlp.w1", "1.mlp.w1"], ["0.mlp.w2", "1.mlp.w2"]
    v_proj = ["0.v_proj", "1.v_proj"]
    assert found == [
        ("p", (4, 3, 5), wide),
        ("lam", (8, 3, 1), every),
        ("q", (6, 3, 5), [name for name in every if name not in w2]),
        ("p", (2, 3, 3), v_proj),
        ("p", (2, 3, 7), w1),
        ("q", (2, 3, 7), w2),
    ]


def test_ranks_are_kept_apart():
    layers = {
        str(rank): SVD(rank, 1.0).build(nn.Linear(4, 4), device="cpu", dtype=torch.float32)
        for rank in (2, 3, 2)
    }
    shapes = {(g.role, tuple(g.values.shape), g.names) for g in FactorStack(layers).groups}
    assert {(role, shape) for role, shape, _ in shapes} == {
        (role, (1, rank, width))
        for rank in (2, 3)
        for role, width in zip("pq", (4, 4), strict=True)
    } | {("lam", (1, rank, 1)) for rank in (2, 3)}
    for _, shape, names in shapes:
        assert names == (str(shape[1]),)


@pytest.mark.parametrize("make", MAKERS)
def test_stacking_changes_no_number(kit, make):
    model, layers = kit.adapted(make)
    values, output = copies_of(layers), model(TOKENS).detach()
    gradients = gradients_of(model, layers)
    stack = FactorStack(layers)
    torch.testing.assert_close(copies_of(layers), values, rtol=0, atol=0)
    # A view with other strides may be summed in another order.
    torch.testing.assert_close(model(TOKENS), output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients_of(model, layers), gradients, rtol=1e-4, atol=1e-4)
    assert stack.values.numel() == sum(value.numel() for value in values.values())


@pytest.mark.parametrize("make", MAKERS)
def test_flat_buffers_groups_and_parameters_are_one_memory(kit, make):
    _, layers = kit.adapted(make)
    stack = FactorStack(layers)
    with torch.no_grad():
        stack.values.copy_(torch.arange(stack.values.numel()))
        stack.grads.copy_(-stack.values)
    start = 0
    for group in stack.groups:
        for index, name in enumerate(group.names):
            size = group.values[index].numel()
            rows = torch.arange(start, start + size).view(group.values[index].shape).float()
            start += size
            assert torch.equal(group.values[index], rows)
            assert torch.equal(group.values.grad[index], -rows)
            layer = layers[name]
            parameter = layer.get_parameter(group.role)
            assert torch.equal(layer.tokens(group.role), rows)
            assert torch.equal(layer.as_tokens(group.role, parameter.grad), -rows)
            with torch.no_grad():
                parameter.fill_(-1)
                parameter.grad.fill_(-2)
            assert (group.values[index] == -1).all()
            assert (group.values.grad[index] == -2).all()
    assert start == stack.values.numel()
    assert torch.equal(stack.values, torch.full_like(stack.values, -1))
    assert torch.equal(stack.grads, torch.full_like(stack.grads, -2))


def test_masks_of_group_and_layers_are_one_memory(kit):
    _, layers = kit.adapted()
    before = {name: layer.rank_mask.clone() for name, layer in layers.items()}
    stack = FactorStack(layers)
    assert [g.role for g in stack.groups if g.rank_mask is not None] == ["lam"]
    group = next(g for g in stack.groups if g.role == "lam")
    for index, name in enumerate(group.names):
        assert torch.equal(group.rank_mask[index], before[name])
    group.rank_mask.logical_not_()
    for name, layer in layers.items():
        assert torch.equal(layer.rank_mask, before[name].logical_not())
        assert "rank_mask" in dict(layer.named_buffers())


@pytest.mark.parametrize("make", MAKERS)
def test_backward_passes_add_up_in_the_flat_gradient(kit, make):
    model, layers = kit.adapted(make)
    stack = FactorStack(layers)
    freeze_base_(model)
    expected = gradients_of(model, layers)
    grads = stack.grads
    for _ in range(3):
        model(TOKENS).square().sum().backward()
    assert stack.grads is grads
    for group in stack.groups:
        for index, name in enumerate(group.names):
            tokens = layers[name].as_tokens(group.role, expected[f"{name}.{group.role}"])
            torch.testing.assert_close(group.values.grad[index], 3 * tokens, rtol=1e-4, atol=1e-4)
    assert stack.grads.abs().max() > 0
    stack.check_bound()
    stack.zero_grads_()
    assert torch.equal(grads, torch.zeros_like(grads))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_may_set_to_none_when_gradients_are_bound_again(kit, set_to_none):
    model, layers = kit.adapted()
    stack = FactorStack(layers)
    model(TOKENS).square().sum().backward()
    expected = stack.grads.clone()

    model.zero_grad(set_to_none=set_to_none)
    stack.bind_grads_()

    assert torch.equal(stack.grads, torch.zeros_like(expected))
    stack.check_bound()
    model(TOKENS).square().sum().backward()
    torch.testing.assert_close(stack.grads, expected, rtol=0, atol=0)


def test_binding_again_keeps_the_gradients_that_are_bound(kit):
    model, layers = kit.adapted()
    stack = FactorStack(layers)
    model(TOKENS).square().sum().backward()
    expected = stack.grads.clone()
    layers["layers.0.q_proj"].lam.grad = None
    stack.bind_grads_()
    lam = next(g for g in stack.groups if g.role == "lam")
    assert lam.names[0] == "layers.0.q_proj"
    assert torch.equal(lam.values.grad[0], torch.zeros(3, 1))
    lam.values.grad[0] = 1
    assert (stack.grads != expected).sum() == 3


def test_writes_through_the_buffer_are_seen_by_a_pending_backward(kit):
    model, layers = kit.adapted()
    stack = FactorStack(layers)
    loss = model(TOKENS).square().sum()
    with torch.no_grad():
        stack.values.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_leaf_parameters_are_the_factors_alone(kit):
    _, layers = kit.adapted()
    stack = FactorStack(layers)
    found = {id(parameter) for parameter in stack.leaf_parameters()}
    assert found == {id(factor) for factor in factors_of(layers).values()}
    assert len(stack.leaf_parameters()) == len(found)
    assert all(
        parameter.requires_grad and parameter.is_leaf for parameter in stack.leaf_parameters()
    )


def test_cast_after_stacking(kit):
    model, layers = kit.adapted()
    stack = FactorStack(layers)
    stack.check_bound()
    model.to(torch.float64)
    assert kit.error_text(stack.check_bound) == (
        "layers.0.q_proj.p was moved or cast after it was stacked; move and cast the model before "
        "the method is put on it."
    )


def by_assignment(model, layers):
    model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True)


def by_another_stack(model, layers):
    FactorStack(layers)


def by_a_mask(model, layers):
    layers["layers.0.q_proj"].rank_mask = torch.ones(3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("replace", "what"), [(by_assignment, "p"), (by_another_stack, "p"), (by_a_mask, "rank_mask")]
)
def test_factor_or_mask_that_was_replaced(kit, replace, what):
    model, layers = kit.adapted()
    stack = FactorStack(layers)
    replace(model, layers)
    stack.bind_grads_()
    assert kit.error_text(stack.check_bound) == (
        f"layers.0.q_proj.{what} was replaced after it was stacked, by another stack or "
        "load_state_dict(assign=True); load without assign, and keep one stack."
    )


@pytest.mark.parametrize("replacement", [None, torch.zeros(3)])
def test_gradient_that_was_replaced(kit, replacement):
    _, layers = kit.adapted()
    stack = FactorStack(layers)
    layers["layers.1.v_proj"].lam.grad = replacement
    assert kit.error_text(stack.check_bound) == (
        "the gradient of layers.1.v_proj.lam was replaced during the step; do not call zero_grad "
        "between the micro-batches of a step."
    )


def test_gradient_of_a_stack_that_was_replaced(kit):
    _, layers = kit.adapted()
    stack = FactorStack(layers)
    stack.groups[1].values.grad = torch.zeros(8, 3, 1)
    assert kit.error_text(stack.check_bound).startswith("the gradient of the stack of lam was ")


def test_no_layers(kit):
    text = kit.error_text(FactorStack, {})
    assert text == "there are no layers to stack; inject adapters first."


def test_two_dtypes_or_devices(kit):
    def layers(**second):
        place = {"device": "cpu", "dtype": torch.float32}
        return {
            "first": SVDLinear(nn.Linear(4, 4), 2, 1.0, **place),
            "second": SVDLinear(nn.Linear(4, 4), 2, 1.0, **{**place, **second}),
        }

    assert kit.error_text(FactorStack, layers(dtype=torch.bfloat16)) == (
        "second.p is torch.bfloat16 on cpu, but first.p is torch.float32 on cpu; "
        "give all factors one dtype and device."
    )
    assert kit.error_text(FactorStack, layers(device="meta")) == (
        "second.p is torch.float32 on meta, but first.p is torch.float32 on cpu; "
        "give all factors one dtype and device."
    )
