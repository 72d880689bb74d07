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


@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("shape", [(2, 8), (8, 2), (4, 48), (16, 300), (64, 768)])
def test_polar_factor_in_float32_of_nearly_dependent_rows_is_bounded_and_so_is_its_gradient(
    noise, shape
):
    x = torch.randn(8, min(shape), max(shape))
    x[:, 1] = x[:, 0] + noise * torch.randn(8, max(shape))
    x = (x if shape[0] < shape[1] else x.mT.contiguous()).requires_grad_()
    (found,) = polar_factors([x])
    values = torch.linalg.svdvals(found.detach().double())
    assert values.max() < 1.001
    torch.testing.assert_close(
        values[:, :-1], torch.ones_like(values[:, :-1]), rtol=0, atol=2e-3 * min(shape) ** 0.5
    )
    cotangent = torch.randn_like(found)
    (gradient,) = torch.autograd.grad(found, x, cotangent)
    # Of (G + cI)^(-1/2) X the derivative is at most 1/√c, and c is 8ε‖G‖.
    gram = (x @ x.mT if shape[0] < shape[1] else x.mT @ x).detach()
    shift = 8 * torch.finfo(torch.float32).eps * gram.norm(dim=(-2, -1))
    bound = cotangent.norm(dim=(-2, -1)) / shift.sqrt()
    assert (gradient.norm(dim=(-2, -1)) < 1.1 * bound).all()


@pytest.mark.parametrize(("ratio", "short"), [(1e-2, 5e-3), (3e-3, 6e-2), (1e-3, 0.3)])
@pytest.mark.parametrize("rank", [2, 4, 16])
def test_polar_factor_in_float32_is_as_accurate_as_its_docstring_says(ratio, short, rank):
    values = torch.ones(rank, dtype=torch.float64)
    values[-1] = ratio * (rank - 1) ** 0.5
    x = torch.stack([with_singular_values(values.tolist(), rank, 48) for _ in range(8)])
    (found,) = polar_factors([x.float()])
    least = torch.linalg.svdvals(found.double())[:, -1]
    assert (least > 1 - short).all()
    norm = (values**2).norm()
    exact = 1 / torch.sqrt(1 + 8 * torch.finfo(torch.float32).eps * norm / values[-1] ** 2)
    torch.testing.assert_close(least, exact.expand(8), rtol=0.05, atol=0)


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
    assert gradient[0].abs().max() == 0


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
