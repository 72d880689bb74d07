"""Table 8: alignment of components, and what is compared."""

import argparse
import itertools
from pathlib import Path

import pytest
import torch

from hyper_tune import MethodConfig, assemble
from hyper_tune.errors import UserError


def literal_alignment(reference, other):
    """Try every order and all signs of p and q; return the best by the sum of cosine products."""
    rank = len(reference.lam)
    best, found = -1.0, None
    for order in itertools.permutations(range(rank)):
        parts, total = [], 0.0
        for i, j in enumerate(order):
            options = []
            for sp, sq in itertools.product((1.0, -1.0), repeat=2):
                p, q = sp * other.p[j], sq * other.q[j]
                cos_p = float(p @ reference.p[i] / (p.norm() * reference.p[i].norm()))
                cos_q = float(q @ reference.q[i] / (q.norm() * reference.q[i].norm()))
                options.append((min(cos_p, cos_q), cos_p * cos_q, p, sp * sq * other.lam[j], q))
            _, product, *chosen = max(options, key=lambda option: option[0] >= 0)
            total += product
            parts.append(chosen)
        if total > best:
            best, found = total, parts
    p, lam, q = zip(*found, strict=True)
    return torch.stack(p), torch.stack(lam), torch.stack(q)


def some_components(recipe, seed, rank=4):
    torch.manual_seed(seed)
    shapes = ((rank, 7), (rank,), (rank, 5))
    return recipe.similarity.Components(*(torch.randn(s, dtype=torch.float64) for s in shapes))


def product(parts):
    return parts.p.T @ torch.diag(parts.lam) @ parts.q


@pytest.mark.parametrize("seed", range(4))
def test_alignment_is_that_of_trying_everything(recipe, seed):
    reference, other = some_components(recipe, seed), some_components(recipe, 10 + seed)
    aligned = recipe.similarity.align(reference, other)
    p, lam, q = literal_alignment(reference, other)
    torch.testing.assert_close(aligned.p, p)
    torch.testing.assert_close(aligned.lam, lam)
    torch.testing.assert_close(aligned.q, q)
    torch.testing.assert_close(product(aligned), product(other))


def test_the_same_update_in_another_order_and_sign_is_found(recipe):
    reference = some_components(recipe, 0)
    order = [2, 0, 3, 1]
    sp, sq = torch.tensor([1.0, -1, -1, 1]), torch.tensor([-1.0, -1, 1, 1])
    other = recipe.similarity.Components(
        (reference.p * sp[:, None])[order],
        (reference.lam * sp * sq)[order],
        (reference.q * sq[:, None])[order],
    )
    torch.testing.assert_close(product(other), product(reference))
    found = recipe.similarity.similarities(reference, other)
    assert found["P"] < 0.9
    for name in ("P, aligned", "Λ, aligned", "Q, aligned", "ΔW"):
        assert found[name] == pytest.approx(1.0)


def test_components_that_one_run_has_pruned_are_left_out_of_those_in_both(recipe):
    one, other = some_components(recipe, 0), some_components(recipe, 1)
    for parts, pruned in ((one, 2), (other, 0)):
        for part in vars(parts).values():
            part[pruned] = 0
    found = recipe.similarity.similarities(one, other)
    for name, attribute in (("P", "p"), ("Q", "q")):
        mine, theirs = (
            torch.cat([getattr(parts, attribute)[i] for i in (1, 3)]) for parts in (one, other)
        )
        expected = float(mine @ theirs / (mine.norm() * theirs.norm()))
        assert found[f"{name}, in both"] == pytest.approx(expected)
    alone = recipe.similarity.Components(*(part[:1] for part in vars(one).values()))
    with pytest.raises(UserError, match="no matrix in which both runs have the same component"):
        recipe.similarity.compare({"m": alone}, {"m": pruned_only(recipe, alone)})


def pruned_only(recipe, parts):
    return recipe.similarity.Components(*(torch.zeros_like(part) for part in vars(parts).values()))


def test_components_of_a_run_are_its_update(recipe, monkeypatch):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 4)).double()
    config = MethodConfig("adalora", init_rank=3, budget=2)
    method = assemble(model, config, total_steps=300, dtype=torch.float64)
    with torch.no_grad():
        method.stack.values.copy_(torch.randn_like(method.stack.values))
        for parameter in method.parameters():
            parameter.copy_(torch.randn_like(parameter))
        for group in method.stack.groups:
            if group.rank_mask is not None:
                group.rank_mask[:, 1] = False
    opened = argparse.Namespace(method=method)
    monkeypatch.setattr("hyper_tune.torchtune.trained.open_trained", lambda run: opened)
    found = recipe.similarity.components(Path("run"))
    assert list(found) == list(method.layers)
    for name, layer in method.layers.items():
        scaled = layer.scaling * product(found[name])
        torch.testing.assert_close(scaled, layer.delta().double())
        pruned = ~layer.rank_mask
        assert int(pruned.sum()) == 1
        assert not any(part[pruned].any() for part in vars(found[name]).values())
    with pytest.raises(UserError, match="adapt different matrices"):
        recipe.similarity.compare(found, {"other": found["0"]})
