"""Who falls and who wakes up, against brute force: costs, floors, ceilings, groups, ties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rank_budget import FixedPruning, Limits, RankAllocator
from rank_budget.layout import layout_of, order_of, shares
from rank_budget.selection import grow_to_budget, prune_to_budget

SCORES = st.sampled_from([0.0, 1.0, 2.0, 3.0, math.nan, math.inf])


@st.composite
def cases(draw):
    names = draw(
        st.lists(st.sampled_from(["a.x", "a.y", "b.x", "b.y", "c"]), min_size=1, unique=True)
    )
    limits = draw(
        st.builds(
            Limits,
            floors=st.dictionaries(
                st.sampled_from(["*.x", "a.*", "c"]), st.integers(0, 2), max_size=2
            ),
            ceilings=st.dictionaries(st.sampled_from(["*.y", "*"]), st.integers(2, 3), max_size=2),
            groups=st.lists(st.sampled_from(["a.*", "*.y"]), max_size=2, unique=True),
        )
    )
    order = {name: draw(st.integers(0, 4)) for name in order_of(names, limits)}
    order[next(iter(order))] += 1
    costs = [draw(st.sampled_from([1, 1, 2, 5])) for _ in order]
    keys = [(name, i) for name, rank in order.items() for i in range(rank)]
    scores = {key: draw(SCORES) for key in keys}
    alive = {key for key in keys if draw(st.booleans())}
    spared = {key for key in keys if draw(st.sampled_from([False, False, True]))}
    budgets = {limits.group(name): draw(st.integers(0, 12)) for name in order}
    return order, dict(zip(order, costs, strict=True)), limits, scores, alive, spared, budgets


def worth(score, cost):
    return (math.inf if math.isnan(score) else score) / cost


def brute_force_prune(order, costs, limits, scores, alive, spared, budgets):
    """One after the other, the worst of its group falls, until the group fits."""
    survivors = set(alive)
    for group, budget in budgets.items():
        members = {key for key in survivors if limits.group(key[0]) == group}

        def badness(key, members=members):
            name, i = key
            floor, ceiling = limits.bounds(name, order[name])
            value = worth(scores[key], costs[name])
            better = sum(
                (worth(scores[other], costs[name]), other[1]) > (value, i)
                for other in alive
                if other[0] == name
            )
            tier = 1 + (better < floor) - (better >= ceiling)
            return (2 if key in spared else tier, value, name, i)

        for key in sorted(members, key=badness):
            if sum(costs[name] for name, _ in members) <= budget:
                break
            members.remove(key)
            survivors.remove(key)
    return survivors


def brute_force_grow(order, costs, limits, scores, alive, budgets):
    """Turn by turn, the next component of the best matrix of the group wakes up, while it fits."""
    woken = set(alive)

    def mean(name):
        live = [scores[key] for key in alive if key[0] == name]
        return worth(sum(live) / max(1, len(live)), costs[name])

    for group, budget in budgets.items():
        spent = sum(costs[name] for name, _ in alive if limits.group(name) == group)
        for turn in range(max(order.values()) + 1):
            names = [name for name in order if limits.group(name) == group]
            for name in sorted(names, key=lambda name: (-mean(name), name)):
                dead = [(name, i) for i in range(order[name]) if (name, i) not in alive]
                live = order[name] - len(dead)
                if turn < len(dead) and live + turn < limits.bounds(name, order[name])[1]:
                    spent += costs[name]
                    if spent <= budget:
                        woken.add(dead[turn])
    return woken


def flat(order, chosen):
    keys = [(name, i) for name, rank in order.items() for i in range(rank)]
    return torch.tensor([key in chosen for key in keys], dtype=torch.bool)


def run(function, order, costs, limits, scores, alive, budgets, *more):
    layout = layout_of(order, costs=list(costs.values()), limits=limits)
    values = torch.tensor(list(scores.values()), dtype=torch.float64)
    numbers = torch.tensor([budgets[group] for group in sorted(budgets)])
    before = values.clone()
    found = function(values, flat(order, alive), layout, numbers, *more)
    torch.testing.assert_close(values, before, rtol=0, atol=0, equal_nan=True)
    return found


@settings(deadline=None, max_examples=300)
@given(cases())
def test_pruning_equals_brute_force(case):
    order, costs, limits, scores, alive, spared, budgets = case
    expected = brute_force_prune(*case)
    more = (flat(order, spared),) if spared else ()
    found = run(prune_to_budget, order, costs, limits, scores, alive, budgets, *more)
    assert found.tolist() == flat(order, expected).tolist()
    assert found.dtype == torch.bool


@settings(deadline=None, max_examples=300)
@given(cases())
def test_growth_equals_brute_force(case):
    order, costs, limits, scores, alive, _, budgets = case
    # The mean of infinities is another question.
    scores = {key: score if math.isfinite(score) else 4.0 for key, score in scores.items()}
    expected = brute_force_grow(order, costs, limits, scores, alive, budgets)
    found = run(grow_to_budget, order, costs, limits, scores, alive, budgets)
    assert found.tolist() == flat(order, expected).tolist()


@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.data())
def test_shares_are_in_proportion_and_never_grow_when_the_budget_falls(parts, data):
    total = sum(parts)
    budget = data.draw(st.integers(0, total))
    found = shares(budget, parts)
    assert sum(found) == budget
    assert all(share <= part for share, part in zip(found, parts, strict=True))
    assert all(
        share >= budget * part // max(1, total) for share, part in zip(found, parts, strict=True)
    )
    if budget:
        less = shares(budget - 1, parts)
        assert all(low <= high for low, high in zip(less, found, strict=True))


def test_bounds_are_those_of_the_last_pattern_that_matches():
    limits = Limits(floors={"*": 1, "*.q": 2}, ceilings={"*.q": 3})
    assert [limits.bounds(name, 8) for name in ("0.q", "0.v")] == [(2, 3), (1, 8)]
    assert limits.bounds("0.q", 1) == (1, 1)


def allocator(kit, budget=4, **options):
    layers = {name: kit.triplet(4, 3, 3) for name in ("0.q", "0.v", "1.q", "1.v")}
    schedule = FixedPruning(16, budget, 3, 1)
    return RankAllocator(layers, schedule, **options)


def test_floors_and_ceilings_hold_at_the_end(kit):
    limits = Limits(floors={"*.v": 1}, ceilings={"*": 2})
    pruned = allocator(kit, 6, limits=limits)
    for _ in range(4):
        pruned.step()
    ranks = pruned.ranks()
    assert sum(ranks.values()) == 6
    assert max(ranks.values()) <= 2
    assert min(ranks["0.v"], ranks["1.v"]) >= 1


def test_groups_share_their_part_of_the_budget(kit):
    pruned = allocator(kit, 6, limits=Limits(groups=["*.q"]))
    for _ in range(4):
        pruned.step()
        ranks = pruned.ranks()
        halves = [sum(r for n, r in ranks.items() if n.endswith(kind)) for kind in "qv"]
        assert abs(halves[0] - halves[1]) <= 1
    assert sum(halves) == 6


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        (
            Limits(floors={"*": 2}),
            "the final budget of group 0 is 4, but its floors add up to 8 and its ceilings to 16; "
            "change the limits or the budget.",
        ),
        (
            Limits(ceilings={"*.q": 0, "*.v": 1}),
            "the final budget of group 0 is 4, but its floors add up to 0 and its ceilings to 2; "
            "change the limits or the budget.",
        ),
        (
            Limits(floors={"*": 1}, ceilings={"0.q": 0}),
            "0.q has the floor 1 above its ceiling 0.",
        ),
        (
            Limits(floors={"*.k": 1}),
            "floors has the pattern '*.k', which matches none of the 4 matrices, such as '0.q'; "
            "mend or remove it.",
        ),
        (
            Limits(groups=["mlp.*"]),
            "groups has the pattern 'mlp.*', which matches none of the 4 matrices, such as '0.q'; "
            "mend or remove it.",
        ),
    ],
)
def test_limits_that_cannot_be_met(kit, limits, text):
    assert kit.error_text(allocator, kit, limits=limits) == text


def test_bounds_below_zero(kit):
    assert kit.error_text(Limits, floors={"*": -1}) == "floors['*'] is -1, but must be 0 or more."
