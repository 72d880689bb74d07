"""The orthogonality penalty: its twin, its closed-form gradient, and where that is added."""

import pytest
import torch

from lowrank_adapters import (
    SVD,
    FactorStack,
    LoRA,
    accumulate_orthogonality_gradient_,
    inject_adapters_,
    orthogonality_penalty,
)

FORMS = pytest.mark.parametrize("squared", [True, False])


def stacked(kit):
    """Layers of float64 off their start, and the groups that the penalty is of."""
    model = kit.Decoder()
    layers = inject_adapters_(model, SVD(rank=3, alpha=1.0), factor_dtype=torch.float64)
    kit.shaken(model)
    stack = FactorStack(layers)
    return layers, stack, [group for group in stack.groups if group.role in "pq"]


@FORMS
def test_penalty_equals_the_twin_in_value_and_gradients(twin, kit, squared):
    layers, _, groups = stacked(kit)
    stacks = [group.values.clone().requires_grad_() for group in groups]
    found = orthogonality_penalty(stacks, matrices=len(layers), squared=squared)
    pairs = [(layer.p, layer.q) for layer in layers.values()]
    expected = (twin.orthogonality if squared else twin.orthogonality_of_adalora)(pairs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)

    gradients = torch.autograd.grad(found, stacks)
    factors = [factor for pair in pairs for factor in pair]
    wanted = dict(zip(map(id, factors), torch.autograd.grad(expected, factors), strict=True))
    for group, gradient in zip(groups, gradients, strict=True):
        for index, name in enumerate(group.names):
            factor = layers[name].get_parameter(group.role)
            tokens = layers[name].as_tokens(group.role, wanted[id(factor)])
            torch.testing.assert_close(gradient[index], tokens, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weight", [0.1, -2.0])
@FORMS
def test_closed_form_is_the_gradient_by_autograd(kit, weight, squared):
    layers, stack, groups = stacked(kit)
    before = torch.randn_like(stack.grads)
    stack.grads.copy_(before)
    already = [group.values.grad.clone() for group in groups]
    stacks = [group.values.clone().requires_grad_() for group in groups]
    penalty = orthogonality_penalty(stacks, matrices=len(layers), squared=squared)
    added = torch.autograd.grad(weight * penalty, stacks)

    found = accumulate_orthogonality_gradient_(groups, weight, squared=squared)

    assert not found.requires_grad
    torch.testing.assert_close(found, penalty.detach(), rtol=1e-13, atol=0)
    for group, gradient, more in zip(groups, already, added, strict=True):
        torch.testing.assert_close(group.values.grad, gradient + more, rtol=1e-12, atol=1e-12)
    lam = next(group for group in stack.groups if group.role == "lam")
    assert (stack.grads == before).sum() == lam.values.numel()
    stack.check_bound()


def test_gradient_reaches_the_parameters_that_an_optimizer_reads(twin, kit):
    layers, _, groups = stacked(kit)
    factors = [factor for layer in layers.values() for factor in (layer.p, layer.q)]
    expected = torch.autograd.grad(
        0.5 * twin.orthogonality([(layer.p, layer.q) for layer in layers.values()]), factors
    )
    accumulate_orthogonality_gradient_(groups, 0.5)
    for factor, gradient in zip(factors, expected, strict=True):
        torch.testing.assert_close(factor.grad, gradient, rtol=1e-12, atol=1e-12)


def test_orthonormal_rows_have_no_penalty_and_no_gradient(kit):
    _, stack, groups = stacked(kit)
    for group in groups:
        rows = torch.linalg.qr(group.values.mT).Q.mT
        group.values.copy_(rows)
    assert accumulate_orthogonality_gradient_(groups, 1.0).item() < 1e-28
    assert stack.grads.abs().max() < 1e-14


@pytest.mark.parametrize("rows", [torch.eye(5)[:3], torch.zeros(3, 5)])
def test_unsquared_gradient_is_finite_where_the_norm_or_the_rows_are_zero(kit, rows):
    _, stack, groups = stacked(kit)
    for group in groups:
        group.values.copy_(torch.nn.functional.pad(rows, (0, group.values.shape[2] - 5)))
    accumulate_orthogonality_gradient_(groups, 1.0, squared=False)
    assert not stack.grads.any()


@FORMS
def test_penalty_does_not_depend_on_depth(kit, squared):
    layers, _, groups = stacked(kit)
    stacks = [group.values for group in groups]
    once = orthogonality_penalty(stacks, len(layers), squared=squared)
    twice = orthogonality_penalty([*stacks, *stacks], 2 * len(layers), squared=squared)
    torch.testing.assert_close(once, twice, rtol=1e-14, atol=0)


def test_lora_has_no_such_groups(kit):
    _, layers = kit.adapted(LoRA(rank=2, alpha=1.0))
    assert {group.role for group in FactorStack(layers).groups} == {"a", "b"}
