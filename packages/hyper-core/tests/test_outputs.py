"""Unit vectors and polar factors against their twins."""

import pytest
import torch

from hyper_core.outputs import constrain, polar_factors, unit_vectors


def with_singular_values(values, rows, columns):
    u, _, vh = torch.linalg.svd(
        torch.randn(rows, columns, dtype=torch.float64), full_matrices=False
    )
    return (u * torch.tensor(values, dtype=torch.float64)) @ vh


@pytest.mark.parametrize("shape", [(3, 8), (8, 3), (4, 4), (1, 5), (5, 1)])
def test_polar_factor_equals_the_twin_in_values_and_gradient(twin, shape):
    x = torch.randn(6, *shape, dtype=torch.float64, requires_grad=True)
    (found,) = polar_factors([x])
    expected = torch.stack([twin.polar(matrix) for matrix in x])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(found)
    torch.testing.assert_close(
        torch.autograd.grad(found, x, cotangent),
        torch.autograd.grad(expected, x, cotangent),
        rtol=1e-9,
        atol=1e-11,
    )


def test_polar_factor_passes_gradcheck():
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: polar_factors([x])[0], (x,))


def test_orthonormal_input_is_its_own_polar_factor_and_has_a_finite_gradient():
    """Equal singular values: where the gradient of a singular value decomposition is not finite."""
    x = torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64))[0].mT[None].requires_grad_()
    (found,) = polar_factors([x])
    torch.testing.assert_close(found, x, rtol=0, atol=1e-14)
    cotangent = torch.randn_like(found)
    (gradient,) = torch.autograd.grad(found, x, cotangent)
    # The tangents of the orthonormal matrices: G - sym(G Xᵀ) X.
    inner = cotangent @ x.mT
    expected = cotangent - (inner + inner.mT) / 2 @ x
    torch.testing.assert_close(gradient, expected.detach(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_polar_factor_in_float32_is_orthonormal_at_every_scale(scale):
    x = scale * torch.randn(50, 16, 300)
    (found,) = polar_factors([x])
    torch.testing.assert_close(
        found @ found.mT, torch.eye(16).expand(50, -1, -1), rtol=0, atol=1e-5
    )


def test_polar_factor_of_nearly_dependent_rows(twin):
    x = with_singular_values([1.0, 0.3, 1e-3], 3, 9)[None]
    torch.testing.assert_close(polar_factors([x])[0][0], twin.polar(x[0]), rtol=0, atol=1e-7)


def test_dependent_rows_and_zeros_stay_finite_with_finite_gradients():
    x = torch.zeros(2, 2, 4, dtype=torch.float64)
    x[1] = 1.0
    x.requires_grad_()
    (found,) = polar_factors([x])
    assert found.isfinite().all()
    assert found[0].abs().max() == 0
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert gradient.isfinite().all()


def test_stacks_of_all_widths_and_equal_rank_share_one_iteration(twin):
    stacks = [
        torch.randn(2, 3, 5).double(),
        torch.randn(1, 7, 3).double(),
        torch.randn(2, 2, 4).double(),
    ]
    for found, stack in zip(polar_factors(stacks), stacks, strict=True):
        for one, matrix in zip(found, stack, strict=True):
            torch.testing.assert_close(one, twin.polar(matrix), rtol=0, atol=1e-12)


def test_unit_rows_equal_the_twin_and_columns_are_rows_across(twin):
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    for output, found in (
        ("unit_rows", twin.unit_rows(x)),
        ("unit_columns", twin.unit_rows(x.mT).mT),
    ):
        (got,) = constrain([x], output)
        torch.testing.assert_close(got, found, rtol=1e-13, atol=1e-14)
        cotangent = torch.randn_like(x)
        torch.testing.assert_close(
            torch.autograd.grad(got, x, cotangent),
            torch.autograd.grad(found, x, cotangent),
            rtol=1e-12,
            atol=1e-13,
        )


def test_unit_vectors_pass_gradcheck_and_free_is_the_identity():
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: unit_vectors(x, -1), (x,))
    assert constrain([x], "free") == [x]
