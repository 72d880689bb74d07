"""Each deviation from the papers, where the paper leaves a choice or is not followed."""

import math

import pytest
import torch

from rank_budget import CubicBudget, FixedPruning, RankAllocator
from rank_budget.scores import sensitivity


def test_importance_is_the_sensitivity_of_the_step_by_default(kit):
    matrices = kit.group(["a", "b"])
    allocator = RankAllocator([matrices], FixedPruning(6, 0, 1, 1))
    for _ in range(6):
        # Neither an average over steps nor the magnitude: every step starts anew.
        matrices.values.normal_()
        matrices.gradients.normal_()
        scores = sensitivity(matrices.values, matrices.gradients)
        lowest = scores.masked_fill(matrices.rank_mask.logical_not(), math.inf).argmin()
        expected = matrices.rank_mask.clone()
        expected.view(-1)[lowest] = False
        allocator.score()
        allocator.step()
        assert torch.equal(matrices.rank_mask, expected)


def test_fixed_pruning_stops_at_the_budget():
    schedule = FixedPruning(initial=10, budget=3, count=4, interval=2)
    assert [schedule.live_ranks(step) for step in range(8)] == [10, 10, 6, 6, 3, 3, 3, 3]


@pytest.mark.parametrize(("total", "count"), [(1000, 10), (2000, 5), (142, 69), (10, 69)])
def test_count_is_derived_from_the_length_of_the_run(total, count):
    schedule = FixedPruning.over(initial=138, budget=69, interval=100, total_steps=total)
    assert schedule.count == count


def test_a_pruned_component_never_returns(kit):
    matrices = kit.group(["a", "b"], 2)
    allocator = RankAllocator([matrices], FixedPruning(4, 1, 1, 1))
    fallen = torch.zeros(2, 2, dtype=torch.bool)
    for _ in range(5):
        # The fallen components have by far the best scores, as if written anew.
        matrices.values.copy_(torch.rand(2, 2) + 100 * fallen)
        matrices.gradients.fill_(1)
        allocator.score()
        allocator.step()
        assert not (matrices.rank_mask & fallen).any()
        fallen |= matrices.rank_mask.logical_not()
    assert int(fallen.sum()) == 3


def published(step, *, initial, target, total, first, last, interval):
    """`RankAllocator.budget_schedule` of AdaLoRA's published code; None where it does not prune."""
    if step <= first:
        return None
    if step > total - last:
        return target
    left = 1 - (step - first) / (total - last - first)
    return int((initial - target) * left**3 + target) if step % interval == 0 else None


def test_cubic_budget_has_the_form_of_adaloras_code():
    for interval in (1, 3):
        live = 48
        cubic = CubicBudget(48, 16, 100, warmup=20, cooldown=30, interval=interval)
        for step in range(101):
            budget = published(
                step, initial=48, target=16, total=100, first=20, last=30, interval=interval
            )
            live = live if budget is None else budget
            # The published code meets the budget one step after the fall ends, if not at it.
            if step != 70:
                assert cubic.live_ranks(step) == live, (interval, step)
    assert (cubic.live_ranks(20), cubic.live_ranks(70)) == (48, 16)
