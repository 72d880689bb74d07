"""Properties of pruning, against the twin, for any matrices, groups, scores and schedules."""

import io
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rank_budget import FixedPruning, RankAllocator, RankedMatrices

# Few values, so that many are equal.
SCORES = st.sampled_from([0.0, 0.5, -0.5, 1.0, -2.0, math.nan, math.inf, 1e30])
STEPS = 8


@dataclass
class Case:
    """Matrices by name, σ of each step, a schedule, and orders in which matrices are grouped."""

    alive: dict[str, list[bool]]
    values: list[dict[str, list[float]]]
    schedule: FixedPruning
    orders: list[list[str]]
    cuts: list[bool]

    def allocator(self, order, *, all_alive=False):
        groups = []
        for name, cut in zip(order, self.cuts, strict=True):
            rank = len(self.alive[name])
            if not groups or cut or len(self.alive[groups[-1][0]]) != rank:
                groups.append([])
            groups[-1].append(name)
        matrices = []
        for names in groups:
            mask = torch.tensor([self.alive[name] for name in names])
            matrices.append(
                RankedMatrices(tuple(names), torch.zeros(mask.shape), torch.zeros(mask.shape), mask)
            )
        allocator = RankAllocator(matrices, self.schedule, score="magnitude")
        if all_alive:
            for group in matrices:
                group.rank_mask.fill_(True)
        return allocator, matrices

    def train(self, allocator, matrices, steps):
        """Yield, after each step, what `step` returned and the masks by name."""
        for step in steps:
            for group in matrices:
                group.values.copy_(torch.tensor([self.values[step][n] for n in group.names]))
            allocator.score()
            done = allocator.step()
            yield done, masks_of(matrices)


def masks_of(matrices):
    return {n: m.tolist() for g in matrices for n, m in zip(g.names, g.rank_mask, strict=True)}


def keys(masks):
    return {(name, i) for name, mask in masks.items() for i, alive in enumerate(mask) if alive}


@st.composite
def cases(draw):
    names = draw(
        st.lists(st.text("ab.12", min_size=1, max_size=4), min_size=1, max_size=5, unique=True)
    )
    ranks = {name: draw(st.integers(1, 4)) for name in names}

    def rows(of):
        return {n: draw(st.lists(of, min_size=r, max_size=r)) for n, r in ranks.items()}

    alive = rows(st.sampled_from([True, True, True, False]))
    alive[names[0]][0] = True
    initial = sum(sum(mask) for mask in alive.values())
    schedule = FixedPruning(
        initial=initial,
        budget=draw(st.integers(0, initial)),
        count=draw(st.integers(0, 4)),
        interval=draw(st.integers(1, 3)),
    )
    orders = [draw(st.permutations(names)) for _ in range(2)]
    cuts = draw(st.lists(st.booleans(), min_size=len(names), max_size=len(names)))
    return Case(alive, [rows(SCORES) for _ in range(STEPS)], schedule, orders, cuts)


@settings(deadline=None)
@given(cases())
def test_every_step_prunes_what_the_twin_does(twin, case):
    allocator, matrices = case.allocator(case.orders[0])
    alive = keys(case.alive)
    history = []
    for step, (done, masks) in enumerate(case.train(allocator, matrices, range(STEPS)), 1):
        scores = {
            (name, i): abs(value)
            for name, row in case.values[step - 1].items()
            for i, value in enumerate(row)
        }
        before, budget = alive, case.schedule.live_ranks(step)
        alive = twin.prune(scores, alive, len(alive) - budget)
        assert keys(masks) == alive
        assert len(alive) == budget
        assert alive <= before
        assert allocator.live_ranks == budget
        assert allocator.steps == step
        assert allocator.ranks() == {name: sum(mask) for name, mask in masks.items()}
        if alive == before:
            assert done is None
        else:
            assert (done.step, done.pruned, done.live) == (step, len(before - alive), budget)
            assert (done.budget, done.grown) == (budget, 0)
            fell = [math.inf if math.isnan(scores[k]) else scores[k] for k in before - alive]
            assert done.threshold == pytest.approx(max(fell), rel=1e-6)
            history.append(done)
    assert allocator.history == history
    assert allocator.total_ranks == sum(len(mask) for mask in case.alive.values())


@settings(deadline=None)
@given(cases())
def test_grouping_and_order_change_nothing(case):
    first, second = (
        list(case.train(*case.allocator(order), range(STEPS))) for order in case.orders
    )
    assert first == second


@settings(deadline=None)
@given(cases(), st.integers(0, STEPS))
def test_loaded_allocator_continues_as_the_uninterrupted_one(case, at):
    whole, whole_matrices = case.allocator(case.orders[0])
    expected = list(case.train(whole, whole_matrices, range(STEPS)))

    first, matrices = case.allocator(case.orders[0])
    found = list(case.train(first, matrices, range(at)))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second, matrices = case.allocator(case.orders[0], all_alive=True)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert masks_of(matrices) == (found[-1][1] if at else case.alive)
    found += case.train(second, matrices, range(at, STEPS))

    assert found == expected
    assert second.history == whole.history
    assert (second.steps, second.live_ranks) == (whole.steps, whole.live_ranks)
    assert masks_of(matrices) == masks_of(whole_matrices)
