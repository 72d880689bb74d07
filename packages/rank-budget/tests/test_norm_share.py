"""The share of a component in its matrix's update, against the update itself."""

import pytest
import torch

from rank_budget import FixedPruning, NormShare, RankAllocator, RankedFactors, RankedMatrices


def share(layer):
    """The definition: every component as a matrix, and their sum."""
    parts = [
        layer.lam.reshape(-1)[i] * torch.outer(layer.p[:, i], layer.q[i])
        for i in range(layer.p.shape[1])
    ]
    whole = torch.stack(parts).sum(0).norm()
    return torch.stack([part.norm() / whole for part in parts]).tolist()


def test_every_step_moves_the_average_by_the_share(kit):
    shapes = {"c": (3, 7, 5), "a": (2, 5, 7), "b": (3, 5, 7)}
    layers = {name: kit.triplet(*shape) for name, shape in shapes.items()}
    mean = {name: [0.0] * rank for name, (rank, _, _) in shapes.items()}
    allocator = RankAllocator(layers, FixedPruning(8, 2, 1, 1), score=NormShare(0.75))
    for _ in range(6):
        for name, layer in layers.items():
            for factor in (layer.p, layer.lam, layer.q):
                torch.nn.init.normal_(factor)
            pairs = zip(mean[name], share(layer), strict=True)
            mean[name] = [0.75 * old + 0.25 * new for old, new in pairs]
        allocator.score()
        allocator.step()
        for name, found in allocator.importance().items():
            torch.testing.assert_close(found, found.new_tensor(mean[name]), rtol=1e-12, atol=0)
    assert allocator.live_ranks == 2


def test_stacks_give_the_same_as_layers(kit):
    layers = {name: kit.triplet(2, 4, 3) for name in "ab"}
    lam, p, q = (
        torch.stack([view(getattr(layer, role).detach()) for layer in layers.values()])
        for role, view in (("lam", lambda t: t), ("p", lambda t: t.T), ("q", lambda t: t))
    )
    mask = torch.ones(2, 2, dtype=torch.bool)
    factors = [RankedFactors(role, ("a", "b"), t, t) for role, t in (("p", p), ("q", q))]
    schedule = FixedPruning(4, 2, 1, 1)
    one = RankAllocator(layers, schedule, score=NormShare())
    stack = RankedMatrices(("a", "b"), lam, lam, mask)
    two = RankAllocator([stack], schedule, factors=factors, score=NormShare())
    assert one.step() == two.step()
    torch.testing.assert_close(one.importance(), two.importance(), rtol=0, atol=0)


def test_an_update_of_zero_has_shares_of_zero_and_no_gradient_is_asked_for(kit):
    layer = kit.triplet(2, 4, 3)
    torch.nn.init.zeros_(layer.lam)
    layer.p.grad = layer.lam.grad = layer.q.grad = None
    allocator = RankAllocator({"a": layer}, FixedPruning(2, 1, 1, 1), score=NormShare())
    allocator.step()
    assert allocator.importance()["a"].tolist() == [0, 0]
    assert allocator.ranks() == {"a": 1}


def test_beta_is_checked(kit):
    with pytest.raises(ValueError, match="beta is 1, but must be 0 or more and below 1"):
        NormShare(1)
