"""The figures against their definitions, and what they warn of."""

import math

import pytest
import torch
from torch import nn

from hyper_core import AttentionConfig, GeneratedParameters, diagnose
from hyper_core.diagnostics import cosine_between, effective_rank

CONFIG = AttentionConfig(hidden=8, heads=2, feed_forward=8)


def test_figures_equal_their_definitions():
    leaves = {
        "p": [torch.randn(3, 2, 5).double(), torch.randn(2, 4, 3).double()],
        "lam": [torch.randn(3, 2, 1).double()],
    }
    generated = GeneratedParameters(
        leaves, config=CONFIG, tokens={"p": "columns"}, norms={"p": 2.0}, outputs={"lam": "free"}
    )
    before = {role: [leaf.clone() for leaf in tensors] for role, tensors in leaves.items()}
    found = diagnose(generated)
    assert all(
        torch.equal(leaf, old)
        for role in leaves
        for leaf, old in zip(leaves[role], before[role], strict=True)
    )
    generated.refresh()
    changes = {
        role: sum((new - old).square().sum() for new, old in zip(leaves[role], olds, strict=True))
        for role, olds in before.items()
    }
    for role, tensors in leaves.items():
        cosines, ranks, full, tokens = [], [], [], []
        for leaf in tensors:
            for i, matrix in enumerate(leaf):
                for other in leaf[i + 1 :]:
                    norms = matrix.norm() * other.norm()
                    cosines.append(abs((matrix * other).sum() / norms))
                squares = torch.linalg.svdvals(matrix).square()
                shares = squares / squares.sum()
                ranks.append(math.exp(-sum(p * p.log() for p in shares)))
                full.append(min(matrix.shape))
                cut = matrix.T if role == "p" else matrix
                norm = 2.0 if role == "p" else 1.0
                tokens += [(token.norm() / norm).square() for token in cut]
        figures = found.roles[role]
        assert figures.cosine == pytest.approx(float(sum(cosines) / len(cosines)), rel=1e-10)
        assert figures.effective_rank == pytest.approx(sum(ranks) / len(ranks), rel=1e-10)
        assert figures.full_rank == pytest.approx(sum(full) / len(full))
        assert figures.token_norm == pytest.approx(math.sqrt(sum(tokens) / len(tokens)))
        largest = max(
            math.sqrt(sum(t.square().sum() for t in side)) for side in (tensors, before[role])
        )
        assert figures.residual == pytest.approx(math.sqrt(changes[role]) / largest)
        assert figures.update_share == pytest.approx(float(changes[role] / sum(changes.values())))


def test_equal_and_orthogonal_matrices_are_told_from_one_another():
    equal = torch.ones(4, 2, 3)
    assert cosine_between(equal).tolist() == pytest.approx([1.0] * 6)
    assert cosine_between(torch.eye(4).view(4, 2, 2)).abs().max() == 0
    assert cosine_between(torch.ones(1, 2, 3)).numel() == 0
    assert effective_rank(equal).tolist() == pytest.approx([1.0] * 4, abs=1e-5)
    assert effective_rank(torch.zeros(1, 2, 3)).tolist() == [1.0]
    tall = torch.eye(5, 3)[None]
    assert effective_rank(tall).item() == pytest.approx(3.0)


def made(start, **options):
    leaf = nn.Parameter(start)
    return GeneratedParameters({"w": [leaf]}, config=CONFIG, state="static", **options)


def test_matrices_that_are_one_are_warned_of():
    generated = made(torch.randn(1, 4, 8).expand(5, -1, -1).clone())
    with pytest.warns(UserWarning, match="absolute cosine of 1.00") as caught:
        found = diagnose(generated)
    assert found.warnings == (
        "the matrices of 'w' have a mean absolute cosine of 1.00 to one another, expected at most "
        "0.5: they collapse into one; keep the embeddings, take state='static', sharing='each' or "
        "a lower learning rate of the body.",
    )
    assert [str(w.message) for w in caught] == list(found.warnings)


def test_components_that_are_one_are_warned_of():
    with pytest.warns(UserWarning, match="effective rank of 1.00") as caught:
        diagnose(made(torch.randn(3, 1, 8).expand(-1, 5, -1).clone()))
    assert str(caught[0].message) == (
        "the matrices of 'w' have an effective rank of 1.00, expected at least 1.50 of 5: their "
        "components collapse into one; keep the embeddings, make the output 'orthonormal', or "
        "penalise what is not."
    )


@pytest.mark.parametrize("value", [1e4, float("nan"), float("inf")])
def test_values_beyond_bounds_are_warned_of(value):
    generated = made(torch.randn(2, 3, 8))
    generated.state_w_0[0, 0] = value
    with pytest.warns(UserWarning, match="times their norm, expected less than 100: the recursion"):
        diagnose(generated)


def test_a_healthy_start_and_few_numbers_are_not_warned_of(recwarn):
    diagnose(made(torch.randn(5, 4, 16)))
    diagnose(made(torch.ones(5, 4, 1), zero_start={"w"}))
    diagnose(made(torch.ones(5, 4, 1)))
    assert not list(recwarn)


def test_a_small_group_does_not_hide_the_collapse_of_a_large_one():
    equal = nn.Parameter(torch.randn(1, 4, 8).expand(5, -1, -1).clone())
    small = nn.Parameter(torch.randn(40, 2, 4))
    generated = GeneratedParameters({"w": [equal, small]}, config=CONFIG, state="static")
    with pytest.warns(UserWarning, match="absolute cosine of 1.00"):
        diagnose(generated)
