"""A resumed allocator goes on as the uninterrupted one; a state of another is refused."""

import copy
import functools
import io
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rank_budget import (
    BudgetError,
    CubicBudget,
    FixedGrowth,
    FixedPruning,
    Limits,
    NormShare,
    RankAllocator,
    SmoothedSensitivity,
    Triplet,
)

STEPS = 8
PRUNING = CubicBudget(7, 2, total_steps=STEPS, warmup=1, cooldown=2)
CASES = {
    "prune": (PRUNING, SmoothedSensitivity()),
    "regrow": (replace(PRUNING, interval=3), SmoothedSensitivity(0.3, 0.3)),
    "grow": (FixedGrowth(2, 6, 1, 2), NormShare()),
}


def layers_of(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"b": (4, 5, 6), "a": (3, 6, 5)}
    return {
        name: Triplet(
            torch.randn(out, rank, generator=generator),
            torch.randn(rank, generator=generator),
            torch.randn(rank, into, generator=generator),
        )
        for name, (rank, out, into) in shapes.items()
    }


def make(direction, layers):
    schedule, score = CASES[direction]
    return RankAllocator(layers, schedule, score=score, direction=direction)


def assert_same_state(one, two):
    for field in ("matrices", "made_with"):
        assert one.pop(field) == two.pop(field)
    assert one["score"].pop("of", None) == two["score"].pop("of", None)
    torch.testing.assert_close(one, two, rtol=0, atol=0)


def run(allocator, layers, steps):
    seen = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for layer in layers.values():
            for factor in (layer.p, layer.lam, layer.q):
                factor.add_(torch.randn(factor.shape, generator=generator))
                factor.grad = torch.randn(factor.shape, generator=generator)
        allocator.score()
        done = allocator.step()
        masks = {name: mask.tolist() for name, mask in allocator.masks().items()}
        seen.append((done, masks, {n: layer.lam.tolist() for n, layer in layers.items()}))
    return seen


@pytest.mark.parametrize("direction", list(CASES))
@settings(deadline=None, max_examples=STEPS + 1)
@given(at=st.integers(0, STEPS))
def test_a_resumed_run_allocates_identically(direction, at):
    layers = layers_of()
    whole = make(direction, layers)
    expected = run(whole, layers, range(STEPS))

    layers = layers_of()
    first = make(direction, layers)
    found = run(first, layers, range(at))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    others = layers_of(seed=1)
    second = make(direction, others)
    run(second, others, range(3))  # loading replaces whatever was there
    for name, layer in layers.items():
        for role in ("p", "lam", "q"):
            getattr(others[name], role).copy_(getattr(layer, role))
    second.load_state_dict(torch.load(file, weights_only=True))
    found += run(second, others, range(at, STEPS))

    assert found == expected
    assert second.history == whole.history
    torch.testing.assert_close(second.importance(), whole.importance(), rtol=0, atol=0)
    assert_same_state(second.state_dict(), whole.state_dict())


def fresh(seed, masked):
    layers = layers_of(seed)
    for layer in layers.values():
        if masked:
            layer.rank_mask = torch.ones(layer.lam.shape, dtype=torch.bool)
    return layers


ORDERS = ("build model state", "build state model", "model build state")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("direction", list(CASES))
def test_model_and_state_may_be_loaded_in_any_order(direction, masked, order):
    layers = fresh(0, masked)
    whole = make(direction, layers)
    run(whole, layers, range(5))
    others = fresh(1, masked)
    roles = ("p", "lam", "q", "rank_mask") if masked else ("p", "lam", "q")
    saved = {(name, role): getattr(layers[name], role).clone() for name in "ab" for role in roles}
    found = {}
    for part in order.split():
        if part == "build":
            found["allocator"] = make(direction, others)
        elif part == "state":
            found["allocator"].load_state_dict(whole.state_dict())
        else:
            for (name, role), value in saved.items():
                getattr(others[name], role).copy_(value)
    for (name, role), value in saved.items():
        assert torch.equal(getattr(others[name], role), value), (name, role)
    again = run(found["allocator"], others, range(5, STEPS))
    assert again == run(whole, layers, range(5, STEPS))
    for name, layer in layers.items():
        for role in roles:
            assert torch.equal(getattr(others[name], role), getattr(layer, role)), (name, role)


def test_groups_share_as_before_when_masks_are_loaded_first():
    layers = fresh(0, masked=True)
    options = {"score": "magnitude", "limits": Limits(groups=["a"])}
    schedule = FixedPruning(7, 2, 1, 1)
    whole = RankAllocator(layers, schedule, **options)
    run(whole, layers, range(3))
    others = {name: replace(layer, lam=layer.lam.clone()) for name, layer in layers.items()}
    for layer in others.values():
        layer.rank_mask = layer.rank_mask.clone()
    again = RankAllocator(others, schedule, **options)
    again.load_state_dict(whole.state_dict())
    for _ in range(3):
        assert again.step() == whole.step()
        assert again.ranks() == whole.ranks()


def test_the_state_is_what_changes_the_next_step():
    layers = layers_of()
    allocator = make("prune", layers)
    run(allocator, layers, range(4))
    state = allocator.state_dict()
    assert {key: type(value) for key, value in state.items()} == {
        "steps": int,
        "skipped": int,
        "budget": int,
        "matrices": list,
        "made_with": dict,
        "alive": torch.Tensor,
        "importance": torch.Tensor,
        "score": dict,
        "history": dict,
    }
    assert state["matrices"] == [["a", 3], ["b", 4]]
    assert state["history"]["steps"] == [done.step for done in allocator.history]
    assert state["history"]["budgets"] == [done.budget for done in allocator.history]
    assert state["history"]["thresholds"].tolist() == [d.threshold for d in allocator.history]
    assert state["score"].keys() == {"of", "sensitivity", "uncertainty"}


def test_skips_are_kept_and_what_was_read_is_forgotten():
    layers = layers_of()
    one = make("prune", layers)
    run(one, layers, range(2))
    one.skip()
    others = copy.deepcopy(layers)
    two = make("prune", others)
    two.score()
    two.load_state_dict(one.state_dict())
    assert (two.steps, two.skipped) == (2, 1)
    for layer in (*layers.values(), *others.values()):
        for factor in (layer.p, layer.lam, layer.q):
            factor.grad *= 2
    one.step()
    two.step()  # reads anew, though it had read before loading
    torch.testing.assert_close(two.importance(), one.importance(), rtol=0, atol=0)
    averages = ("sensitivity", "uncertainty")
    for name in averages:
        pair = (allocator.state_dict()["score"][name] for allocator in (one, two))
        torch.testing.assert_close(*pair, rtol=0, atol=0)


def test_the_step_of_the_last_pruning_still_moves_the_averages():
    layers = layers_of()
    allocator = make("prune", layers)
    moved = []
    for step in range(STEPS):
        before = [part.clone() for part in allocator.state_dict()["score"]["sensitivity"]]
        run(allocator, layers, [step])
        after = allocator.state_dict()["score"]["sensitivity"]
        moved.append(any(not torch.equal(*pair) for pair in zip(before, after, strict=True)))
    assert moved == [step <= PRUNING.end for step in range(1, STEPS + 1)]


def test_a_loaded_state_is_a_copy():
    layers, others = layers_of(), layers_of(1)
    one, two = make("prune", layers), make("prune", others)
    run(one, layers, range(3))
    two.load_state_dict(one.state_dict())
    before = {name: mask.tolist() for name, mask in one.masks().items()}
    run(two, others, range(3, STEPS))
    assert {name: mask.tolist() for name, mask in one.masks().items()} == before
    assert len(one.history) < len(two.history)


def test_a_state_of_other_matrices_is_refused_and_changes_nothing(kit):
    layers = layers_of()
    allocator = make("prune", layers)
    run(allocator, layers, range(3))
    before = allocator.masks()
    state = make("prune", layers_of()).state_dict()
    state["matrices"] = [["a", 3], ["c", 4]]
    assert kit.error_text(allocator.load_state_dict, state) == (
        "the saved state has (name, rank) ['c', 4], but here is ['b', 4]; load it into the model "
        "that it was saved from."
    )
    state["matrices"] = [["a", 3]]
    assert "has (name, rank) None, but here is ['b', 4]" in kit.error_text(
        allocator.load_state_dict, state
    )
    state = make("prune", layers_of()).state_dict()
    state["score"]["of"][0][2] = [1, 9]
    assert "has (role, names, shape, start) ['lam', ['b'], [1, 9], 0]" in kit.error_text(
        allocator.load_state_dict, state
    )
    state = make("prune", layers_of()).state_dict()
    state["alive"] = state["alive"][:3]
    assert kit.error_text(allocator.load_state_dict, state) == (
        "the saved alive is torch.bool (3,), expected torch.bool (7,); the state is damaged."
    )
    state = make("prune", layers_of()).state_dict()
    state["alive"] = state["alive"].logical_not()
    assert kit.error_text(allocator.load_state_dict, state) == (
        "the saved masks have 0 live components, but the budget was 7; the state is damaged."
    )
    torch.testing.assert_close(allocator.masks(), before)
    assert allocator.steps == 3


MADE = {
    "schedule": (
        {"schedule": FixedPruning(7, 3, 1, 1)},
        "FixedPruning(initial=7, budget=2, count=1, interval=1)",
        "FixedPruning(initial=7, budget=3, count=1, interval=1)",
    ),
    "total": (
        {"schedule": CubicBudget(7, 2, 30)},
        "FixedPruning(initial=7, budget=2, count=1, interval=1)",
        "CubicBudget(initial=7, final=2, total_steps=30, warmup=0, cooldown=0, interval=1)",
    ),
    "score": (
        {"score": SmoothedSensitivity()},
        "sensitivity",
        "SmoothedSensitivity(beta1=0.85, beta2=0.85)",
    ),
    "share": (
        {"score": NormShare(0.5)},
        "sensitivity",
        "NormShare(beta=0.5)",
    ),
    "direction": ({"direction": "regrow"}, "prune", "regrow"),
    "limits": (
        {"limits": Limits(floors={"a": 1})},
        "Limits(floors={}, ceilings={}, groups=())",
        "Limits(floors={'a': 1}, ceilings={}, groups=())",
    ),
}


@pytest.mark.parametrize("case", list(MADE))
def test_a_state_of_an_allocator_made_otherwise_is_refused(kit, case):
    schedule = FixedPruning(7, 2, 1, 1)
    one = RankAllocator(layers_of(), schedule)
    options, before, now = MADE[case]
    two = RankAllocator(layers_of(), **{"schedule": schedule} | options)
    field = {"total": "schedule", "share": "score"}.get(case, case)
    assert kit.error_text(two.load_state_dict, one.state_dict()) == (
        f"the saved state was made with the {field} {before}, but here it is {now}; make the "
        "allocator as it was made then."
    )


def test_a_score_with_arguments_is_the_same_in_another_process():
    """Where a function lies in memory is not what it is."""

    def power(exponent):
        return functools.partial(
            lambda values, grads, by: (values * grads).abs() ** by, by=exponent
        )

    schedule = FixedPruning(7, 2, 1, 1)
    state = RankAllocator(layers_of(), schedule, score=power(2)).state_dict()
    RankAllocator(layers_of(), schedule, score=power(2)).load_state_dict(state)
    with pytest.raises(BudgetError, match=r"made with the score .* by=2\), but here it is .* by=3"):
        RankAllocator(layers_of(), schedule, score=power(3)).load_state_dict(state)


def cut(*path):
    """Take out what is at a path in a state."""

    def change(state):
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]

    return change


def put(value, *path):
    """Put a value at a path in a state."""

    def change(state):
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return change


def swap(one, other):
    def change(state):
        history = state["history"]
        history[one], history[other] = history[other], history[one]

    return change


def drop(state):
    """Leave out a change of the first allocation, as if what fell had never lived."""
    state["history"]["pruned"] = state["history"]["pruned"][1:]


FAULTS = {
    "incomplete": (cut("alive"), "the saved state lacks alive, expected what state_dict"),
    "foreign": (put(1, "model"), "the saved state has model, expected what state_dict"),
    "steps": (put("3", "steps"), "the saved steps is a str, expected a whole number, 0 or more"),
    "importance": (put([0.0], "importance"), "importance is a list of 1, expected a tensor (7,)"),
    "history": (cut("history", "thresholds"), "the saved history is a dict, expected a mapping of"),
    "budgets": (
        put([], "history", "budgets"),
        "the saved budgets is a list of 0, expected a list of 2",
    ),
    "when": (put(None, "history", "steps"), "the saved steps is a NoneType, expected a list"),
    "which": (put(None, "history", "grown"), "grown is a NoneType, expected torch.int32 (0, 2)"),
    "number": (put("7", "history", "steps", 0), "history is a str, expected a whole number"),
    "truth": (put(True, "skipped"), "the saved skipped is a bool, expected a whole number"),
    "made": (put(None, "made_with"), "the saved made_with is a NoneType, expected a mapping"),
    "matrices": (put(3, "matrices"), "(name, rank) is a int, expected a list"),
    "matrix": (put(3, "matrices", 0), "the saved state has (name, rank) 3, but here is ['a', 3]"),
    "scores": (put(None, "score"), "the saved score is a NoneType, expected a mapping"),
    "contents": (put(3, "score", "of", 1), "has (role, names, shape, start) 3, but here is"),
    "thresholds": (
        put(torch.zeros(1), "history", "thresholds"),
        "thresholds is torch.float32 (1,), expected a tensor (2,)",
    ),
    "pruned": (
        put(torch.tensor([[0, 7]], dtype=torch.int32), "history", "pruned"),
        "expected places in 2 allocations of 7 components",
    ),
    "direction": (
        swap("pruned", "grown"),
        "the saved pruned is torch.int32 (0, 2), expected the changes that led to the masks",
    ),
    "dropped": (
        drop,
        "the saved pruned is torch.int32 (3, 2), expected the changes from a start of 7",
    ),
    "averages": (
        put([torch.zeros(3)], "score", "uncertainty"),
        "the saved uncertainty is torch.float32 (3,), expected torch.float32 (84,)",
    ),
    "devices": (
        put([], "score", "sensitivity"),
        "the saved sensitivity is a list of 0, expected a list of 1",
    ),
    "average": (put(3, "score", "sensitivity"), "sensitivity is a int, expected a list of 1"),
    "score": (cut("score", "of"), "the saved score keeps sensitivity, uncertainty, but this one"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_nothing_of_a_damaged_state_is_applied(kit, fault):
    layers, others = fresh(0, masked=True), fresh(1, masked=True)
    one, two = make("prune", layers), make("prune", others)
    run(one, layers, range(3))
    run(two, others, range(2))
    before = copy.deepcopy(two.state_dict())
    masks = {name: layer.rank_mask.clone() for name, layer in others.items()}
    state = copy.deepcopy(one.state_dict())
    change, text = FAULTS[fault]
    change(state)
    assert text in kit.error_text(two.load_state_dict, state)
    assert_same_state(two.state_dict(), before)
    for name, layer in others.items():
        assert torch.equal(layer.rank_mask, masks[name])
    two.load_state_dict(one.state_dict())


def test_what_is_no_state_is_refused(kit):
    allocator = make("prune", layers_of())
    assert kit.error_text(allocator.load_state_dict, []) == (
        "the saved state is a list of 0, expected what state_dict returned; the state is damaged."
    )


@pytest.mark.parametrize("direction", list(CASES))
def test_the_history_says_which_components_fell_and_woke_up(direction):
    layers = layers_of()
    allocator = make(direction, layers)
    alive = {name: mask.tolist() for name, mask in allocator.masks().items()}
    expected = []
    for done, masks, _ in run(allocator, layers, range(STEPS)):
        if done is not None:
            pairs = {name: list(zip(alive[name], masks[name], strict=True)) for name in masks}
            expected.append(
                tuple(
                    {
                        name: found
                        for name, both in pairs.items()
                        if (found := [i for i, pair in enumerate(both) if pair == change])
                    }
                    for change in ((True, False), (False, True))
                )
            )
        alive = masks
    assert any(expected)
    assert len(expected) == len(allocator.history)
    again = make(direction, layers_of())
    again.load_state_dict(copy.deepcopy(allocator.state_dict()))
    for history in (allocator.history, again.history):
        found = [(done.pruned_components, done.grown_components) for done in history]
        assert found == expected
        counts = [tuple(sum(map(len, part.values())) for part in pair) for pair in found]
        assert counts == [(done.pruned, done.grown) for done in history]
        assert all(one.alive is two.before for one, two in pairwise(history))  # a mask, not two
    assert direction != "regrow" or all(any(pair[side] for pair in expected) for side in (0, 1))
