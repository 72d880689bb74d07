"""Averages that move in one compiled pass, against those that move pass by pass."""

import copy
import math

import pytest
import torch

from rank_budget import FixedPruning, RankAllocator, RankedFactors, RankedMatrices
from rank_budget import SmoothedSensitivity as Smoothed

SHAPES = {"a": (3, 8, 5), "b": (2, 8, 5), "c": (3, 8, 40), "d": (3, 8, 5)}
STEPS = 6


@pytest.fixture(scope="module")
def compiler():
    try:
        torch.compile(lambda values: values + 1)(torch.ones(2))
    except RuntimeError:
        pytest.skip("no C++ compiler that works")


def layers_of(kit):
    torch.manual_seed(4)
    return {name: kit.triplet(*shape) for name, shape in SHAPES.items()}


def stacks_of():
    torch.manual_seed(4)
    matrices, factors = [], []
    for rank in (2, 3):
        names = tuple(name for name, shape in SHAPES.items() if shape[0] == rank)
        lam = torch.randn(2, len(names), rank, dtype=torch.float64)
        alive = torch.ones(len(names), rank, dtype=torch.bool)
        matrices.append(RankedMatrices(names, *lam, alive))
        for role, place in (("p", 1), ("q", 2)):
            for width in sorted({SHAPES[name][place] for name in names}):
                some = tuple(name for name in names if SHAPES[name][place] == width)
                pair = torch.randn(2, len(some), rank, width, dtype=torch.float64)
                factors.append(RankedFactors(role, some, *pair))
    return matrices, factors


def allocators(kit, separate, compiled):
    """One over the same factors each time, and the gradients that a step draws anew."""
    layers, options = layers_of(kit), {}
    grads = [getattr(layer, role).grad for layer in layers.values() for role in ("p", "lam", "q")]
    if not separate:
        layers, options["factors"] = stacks_of()
        grads = [stack.gradients for stack in (*layers, *options["factors"])]
    schedule = FixedPruning(11, 5, 1, 1)
    return RankAllocator(layers, schedule, score=Smoothed(compile=compiled), **options), grads


def step(allocator, grads, number, *, damaged):
    """One step; its gradients are a function of its number."""
    generator = torch.Generator().manual_seed(number)
    for grad in grads:
        grad.normal_(generator=generator)
    if damaged:
        grads[0].view(-1)[0] = (math.nan, math.inf)[number % 2]
    allocator.score()
    done = allocator.step()
    return done, allocator.masks(), allocator.importance()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("most", [2**40, 50])
@pytest.mark.parametrize("separate", [False, True])
def test_compiled_averages_are_those_of_the_passes(kit, monkeypatch, separate, most):
    """Whatever is one run; steps that are not finite leave them untouched."""
    monkeypatch.setattr("rank_budget.arena.CACHED", most)
    pairs = [allocators(kit, separate, compiled) for compiled in (False, True)]
    for number in range(STEPS):
        found = [step(*pair, number, damaged=number in (2, 3)) for pair in pairs]
        (done, masks, scores), (same, compiled, others) = found
        torch.testing.assert_close(compiled, masks, rtol=0, atol=0)
        torch.testing.assert_close(others, scores, rtol=1e-12, atol=0)
        assert (done.step, done.pruned_components) == (same.step, same.pruned_components)
        states = [allocator.state_dict()["score"] for allocator, _ in pairs]
        for key in ("sensitivity", "uncertainty"):
            torch.testing.assert_close(states[1][key], states[0][key], rtol=1e-12, atol=0)
    assert pairs[0][0].live_ranks == 5
    assert states[0]["uncertainty"][0].abs().min() > 0


@pytest.mark.usefixtures("compiler")
def test_what_has_no_gradient_keeps_its_compiled_averages(kit):
    layers = layers_of(kit)
    schedule = FixedPruning(11, 5, 1, 1)
    allocator = RankAllocator(layers, schedule, score=Smoothed(compile=True), missing="skip")
    allocator.step()
    before = copy.deepcopy(allocator._scorer.by_matrix())
    for role in ("p", "lam", "q"):
        getattr(layers["c"], role).grad = None
    allocator.step()
    after = allocator._scorer.by_matrix()
    torch.testing.assert_close(after["c"], before["c"], rtol=0, atol=0)
    for name in "abd":
        assert not torch.equal(after[name]["p"][0], before[name]["p"][0])


@pytest.mark.usefixtures("compiler")
def test_a_state_fits_with_and_without_compilation(kit):
    pairs = [allocators(kit, False, compiled) for compiled in (True, False)]
    first, second = pairs
    for number in range(3):
        step(*first, number, damaged=False)
    second[0].load_state_dict(copy.deepcopy(first[0].state_dict()))
    for number in range(3, STEPS):
        masks = [step(*pair, number, damaged=False)[1] for pair in pairs]
        torch.testing.assert_close(*masks, rtol=0, atol=0)
    assert Smoothed(compile=True) == Smoothed()
    assert repr(Smoothed(compile=True)) == repr(Smoothed())


def test_where_nothing_can_be_compiled_it_is_said_at_the_start(kit, monkeypatch):
    def broken(*_):
        raise RuntimeError("No working C++ compiler found in a list\n\nSet TORCH_LOGS")

    monkeypatch.setattr("rank_budget.moves._compiled", lambda: broken)
    schedule = FixedPruning(11, 5, 1, 1)
    text = kit.error_text(RankAllocator, layers_of(kit), schedule, score=Smoothed(compile=True))
    assert text == (
        "compile is True, but nothing can be compiled for cpu here (No working C++ compiler found "
        "in a list); install a C++ compiler such as g++, or leave compile out."
    )
