"""What the budget counts: ranks, parameters, bytes of the export."""

import pytest
import torch

from rank_budget import CubicBudget, FixedPruning, OneShot, RankAllocator, RankedFactors
from rank_budget.costs import COSTS, ExportedBytes, total_cost
from rank_budget.scores import magnitude

WIDE, NARROW = (4, 30, 20), (4, 3, 2)


def layers(kit):
    return {"wide": kit.triplet(*WIDE), "narrow": kit.triplet(*NARROW)}


def test_costs_by_name():
    assert [cost(30, 20) for cost in COSTS.values()] == [1, 50, 200]
    assert ExportedBytes(torch.bfloat16)(30, 20) == 100
    assert [total_cost([WIDE, NARROW], cost) for cost in COSTS] == [8, 220, 880]


@pytest.mark.parametrize("cost", ["parameters", "bytes", ExportedBytes(torch.float16)])
def test_the_exported_numbers_are_within_the_budget(kit, cost):
    found = layers(kit)
    initial = total_cost([WIDE, NARROW], cost)
    budget = initial * 6 // 10
    one = COSTS[cost] if isinstance(cost, str) else cost
    allocator = RankAllocator(found, OneShot(initial, budget, at=1), cost=cost)
    done = allocator.step()
    ranks = allocator.ranks()
    live = ranks["wide"] * one(30, 20) + ranks["narrow"] * one(3, 2)
    # The last to fall was needed.
    assert live <= budget < live + one(30, 20)
    assert allocator.live_ranks == done.live == sum(ranks.values())


def test_a_wide_component_must_be_worth_its_cost(kit):
    found = layers(kit)
    with torch.no_grad():
        found["wide"].lam.fill_(9.0)  # 0.18 per parameter
        found["narrow"].lam.fill_(1.0)  # 0.2 per parameter
    schedule = OneShot(220, 119, at=1)
    allocator = RankAllocator(found, schedule, score=magnitude, cost="parameters")
    allocator.step()
    assert allocator.ranks() == {"narrow": 4, "wide": 1}


def test_the_cost_of_stacks_needs_their_widths(kit):
    lam = kit.group(["a"], 2)
    text = kit.error_text(RankAllocator, [lam], FixedPruning(2, 1, 1), cost="parameters")
    assert text == (
        "the cost of a depends on its widths, which are not known; give its stacks of P and Q in "
        "factors."
    )
    factors = [
        RankedFactors(role, ("a",), *torch.zeros(2, 1, 2, width))
        for role, width in (("p", 3), ("q", 4))
    ]
    schedule = CubicBudget(14, 7, 10)
    allocator = RankAllocator([lam], schedule, factors=factors, cost="parameters")
    for _ in range(10):
        allocator.step()
    assert allocator.ranks() == {"a": 1}


def test_unknown_costs(kit):
    found, schedule = layers(kit), FixedPruning(8, 4, 1)
    text = kit.error_text(RankAllocator, found, schedule, cost="flops")
    assert text == "cost is 'flops', expected ranks, parameters, bytes, or a function."
    text = kit.error_text(RankAllocator, found, schedule, cost=lambda out, into: 0)
    assert text == "the cost of narrow is 0, but must be a whole number above 0."


def test_a_schedule_in_another_unit(kit):
    text = kit.error_text(RankAllocator, layers(kit), FixedPruning(8, 4, 1), cost="parameters")
    assert text == (
        "the schedule starts with 8 of their cost, but the masks have 220; build it with "
        "initial=220."
    )
