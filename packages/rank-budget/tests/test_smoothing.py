"""AdaLoRA's averages, scores and masks against Algorithm 1 written number by number."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rank_budget import FixedPruning, RankAllocator, RankedFactors, RankedMatrices, Triplet
from rank_budget import SmoothedSensitivity as Smoothed

# Dyadic numbers and widths: every result is exact, and many are equal.
NUMBERS = st.sampled_from([0.0, 0.5, -0.5, 1.0, -2.0])
WIDTHS = st.sampled_from([1, 2, 4])


@st.composite
def histories(draw):
    """Shapes of matrices by name, their factors and gradients at each step, and a schedule."""
    names = draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=3, unique=True))
    shapes = {n: (draw(st.integers(1, 3)), draw(WIDTHS), draw(WIDTHS)) for n in names}

    def tensor(*size):
        count = math.prod(size)
        numbers = draw(st.lists(NUMBERS, min_size=count, max_size=count))
        return torch.tensor(numbers, dtype=torch.float64).view(size)

    def factors():
        return {n: (tensor(o, r), tensor(r), tensor(r, i)) for n, (r, o, i) in shapes.items()}

    steps = [(factors(), factors()) for _ in range(draw(st.integers(1, 5)))]
    initial = sum(rank for rank, _, _ in shapes.values())
    count, interval = draw(st.integers(0, 2)), draw(st.integers(1, 2))
    schedule = FixedPruning(initial, draw(st.integers(0, initial)), count, interval)
    betas = draw(st.sampled_from([0.0, 0.5, 0.75])), draw(st.sampled_from([0.0, 0.5, 0.75]))
    return shapes, steps, schedule, betas


def start(shapes):
    layers = {}
    for name, (rank, out, into) in shapes.items():
        factors = (
            torch.zeros(size, dtype=torch.float64) for size in ((out, rank), rank, (rank, into))
        )
        layers[name] = Triplet(*factors, torch.ones(rank, dtype=torch.bool))
    return layers


def fill(layer, values, grads):
    for factor, value, grad in zip((layer.p, layer.lam, layer.q), values, grads, strict=True):
        factor.copy_(value)
        factor.grad = grad


def stacks(layers):
    """The same factors as live stacks, a group per shape, and what copies the layers into them."""
    matrices, factors, copies = [], [], []
    for role, view in (("lam", lambda t: t), ("p", lambda t: t.T), ("q", lambda t: t)):
        shapes = {}
        for name, layer in layers.items():
            shapes.setdefault(tuple(view(getattr(layer, role)).shape), []).append(name)
        for shape, names in shapes.items():
            values, grads = torch.zeros(2, len(names), *shape, dtype=torch.float64)
            if role == "lam":
                mask = torch.ones(len(names), *shape, dtype=torch.bool)
                matrices.append(RankedMatrices(tuple(names), values, grads, mask))
            else:
                factors.append(RankedFactors(role, tuple(names), values, grads))
            copies += [
                (layers[n], role, view, v, g) for n, v, g in zip(names, values, grads, strict=True)
            ]

    def copy():
        for layer, role, view, value, grad in copies:
            value.copy_(view(getattr(layer, role)))
            grad.copy_(view(getattr(layer, role).grad))

    return matrices, factors, copy


def assert_same_choice(reference, allocator, alive, scored):
    masks = allocator.masks()
    live = {(n, i) for n, mask in masks.items() for i in mask.nonzero()[:, 0].tolist()}
    assert live == alive
    for name, part in allocator.importance().items() if scored else ():
        assert part.tolist() == [reference.score(name, i) for i in range(len(part))]


def assert_same_averages(reference, found):
    """Every Ī and Ū is the twin's, to the last bit."""
    for name, roles in found.items():
        for role, pair in roles.items():
            mean, spread = (part.T if role == "p" else part for part in pair)
            for i in range(mean.shape[0]):
                keys = [(name, role, i, j) for j in range(mean[i].numel())]
                assert mean[i].reshape(-1).tolist() == [reference.mean.get(k, 0) for k in keys]
                assert spread[i].reshape(-1).tolist() == [reference.spread.get(k, 0) for k in keys]


@settings(deadline=None, max_examples=60)
@given(histories())
def test_every_average_score_and_mask_is_that_of_algorithm_1(twin, history):
    shapes, steps, schedule, betas = history
    reference = twin.Algorithm1(*betas)
    layers = start(shapes)
    matrices, factors, copy = stacks(layers)
    ours = RankAllocator(layers, schedule, score=Smoothed(*betas))
    stacked = RankAllocator(matrices, schedule, factors=factors, score=Smoothed(*betas))
    alive = {(name, i) for name, (rank, _, _) in shapes.items() for i in range(rank)}
    for step, (values, grads) in enumerate(steps, 1):
        for name, layer in layers.items():
            fill(layer, values[name], grads[name])
        copy()
        for name, layer in layers.items():
            if schedule.end is None or step <= schedule.end:
                reference.observe(
                    name, twin.rows_of(layer), twin.rows_of(layer, lambda tensor: tensor.grad)
                )
        scores = {key: reference.score(*key) for key in alive}
        alive = twin.prune(scores, alive, len(alive) - schedule.live_ranks(step))
        done = ours.step()
        stacked.score()
        assert stacked.step() == done
        assert_same_choice(reference, ours, alive, bool(done))
        assert_same_choice(reference, stacked, alive, bool(done))
        assert_same_averages(reference, ours._scorer.by_matrix())


def test_averages_of_any_numbers_are_those_of_algorithm_1(twin, kit):
    reference = twin.Algorithm1(0.85, 0.9)
    layers = {"a": kit.triplet(3, 7, 5), "b": kit.triplet(2, 5, 7, column=True)}
    allocator = RankAllocator(layers, FixedPruning(5, 1, 1, 2), score=Smoothed(0.85, 0.9))
    for _ in range(8):
        for name, layer in layers.items():
            for factor in (layer.p, layer.lam, layer.q):
                torch.nn.init.normal_(factor)
                factor.grad.normal_()
            reference.observe(
                name, twin.rows_of(layer), twin.rows_of(layer, lambda tensor: tensor.grad)
            )
        allocator.score()
        allocator.step()
        for name, part in allocator.importance().items():
            wanted = [reference.score(name, i) for i in range(len(part))]
            if allocator.steps % 2 == 0:
                torch.testing.assert_close(part, part.new_tensor(wanted), rtol=1e-12, atol=0)
    assert allocator.live_ranks == 1


@pytest.mark.parametrize("large", [2**40, 1])
@pytest.mark.parametrize("most", [1, 9, 30, 50])
def test_runs_that_a_cache_holds_change_no_bit(kit, monkeypatch, most, large):
    """Averages, scores and masks are those of one run over everything, whatever happens."""
    found = []
    for numbers in (2**40, most):
        monkeypatch.setattr("rank_budget.arena.CACHED", numbers)
        monkeypatch.setattr("rank_budget.products.LARGE", large if numbers == most else 2**40)
        torch.manual_seed(4)
        shapes = {"a": (3, 4, 5), "b": (2, 4, 5), "c": (3, 4, 2), "d": (3, 4, 5)}
        layers = {name: kit.triplet(*shape) for name, shape in shapes.items()}
        options = {"score": Smoothed(), "missing": "skip"}
        allocator = RankAllocator(layers, FixedPruning(11, 4, 2, 1), **options)
        (arena,) = allocator._scorer._arenas
        for step in range(5):
            for layer in layers.values():
                for factor in (layer.p, layer.lam, layer.q):
                    factor.grad = torch.randn_like(factor)
            if step == 1:
                layers["d"].q.grad = None
            if step == 2:
                layers["c"].p.grad[0, 0] = math.nan
            allocator.score()
            allocator.step()
            whole = {name: part.clone() for name, part in allocator.importance().items()}
            found.append((len(arena.runs), averages(allocator), whole, allocator.masks()))
    one, runs = found[:5], found[5:]
    assert {count for count, *_ in one} == {1}
    assert {count for count, *_ in runs} == {{1: 12, 9: 10, 30: 5, 50: 3}[most]}
    for before, now in zip(one, runs, strict=True):
        torch.testing.assert_close(now[1:], before[1:], rtol=0, atol=0)


def averages(allocator):
    state = allocator.state_dict()["score"]
    return [part.clone() for key in ("sensitivity", "uncertainty") for part in state[key]]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("role", ["p", "lam", "q"])
def test_a_step_that_is_not_finite_leaves_averages_untouched(kit, bad, role):
    layers = {"a": kit.triplet(3, 4, 5), "b": kit.triplet(2, 4, 5)}
    allocator = RankAllocator(layers, FixedPruning(5, 2, 1, 2), score=Smoothed())
    allocator.step()
    before = averages(allocator)
    getattr(layers["b"], role).grad.view(-1)[0] = bad
    assert allocator.step() is None
    assert (allocator.steps, allocator.skipped) == (1, 1)
    torch.testing.assert_close(averages(allocator), before, rtol=0, atol=0)
    getattr(layers["b"], role).grad.view(-1)[0] = 1
    assert allocator.step().step == 2
    assert not torch.equal(averages(allocator)[0], before[0])


def test_a_value_that_is_not_finite_is_seen_too(kit):
    layers = {"a": kit.triplet(3, 4, 5)}
    allocator = RankAllocator(layers, FixedPruning(3, 2, 1, 2), score=Smoothed())
    layers["a"].p.grad.zero_()
    with torch.no_grad():
        layers["a"].p[0, 0] = math.inf
    assert allocator.step() is None
    assert allocator.skipped == 1


def test_averages_stop_when_nothing_more_is_chosen(kit):
    layers = {"a": kit.triplet(3, 4, 5)}
    allocator = RankAllocator(layers, FixedPruning(3, 2, 1, 2), score=Smoothed())
    for _ in range(2):
        allocator.step()
    before = averages(allocator)
    with kit.Counted() as mode:
        allocator.step()
    assert not mode.operations
    torch.testing.assert_close(averages(allocator), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["beta1", "beta2"])
def test_betas_are_checked(kit, name):
    text = kit.error_text(Smoothed, **{name: 1.0})
    assert text == f"{name} is 1.0, but must be 0 or more and below 1."


def test_stacks_of_factors_must_be_there_and_fit(kit):
    lam = kit.group(["a", "b"], 2)
    schedule = FixedPruning(4, 2, 1, 1)
    assert kit.error_text(RankAllocator, [lam], schedule, score=Smoothed()) == (
        "the score reads p, but a has none; give its stack in factors."
    )
    stack = RankedFactors("p", ("a",), torch.zeros(1, 3, 4), torch.zeros(1, 3, 4))
    text = kit.error_text(RankAllocator, [lam], schedule, factors=[stack], score=Smoothed())
    assert text == "p of a has 3 components, expected 2, once."
    stack = RankedFactors("p", ("c",), torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
    text = kit.error_text(RankAllocator, [lam], schedule, factors=[stack], score=Smoothed())
    assert text == "p of c has 2 components, expected no such matrix, once."
    text = kit.error_text(RankedFactors, "x", ("c",), torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
    assert text == "role is 'x', expected 'p' or 'q'."
    text = kit.error_text(RankedFactors, "p", ("c",), torch.zeros(1, 2, 4), torch.zeros(1, 2))
    assert text == "gradients has the shape (1, 2), expected (1, rank, width) for the 1 names."
