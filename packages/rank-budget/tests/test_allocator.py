"""When the allocator reads and prunes, what it refuses, and what it saves."""

import pytest
import torch

from rank_budget import BudgetError, ConstantBudget, FixedPruning, RankAllocator, RankedMatrices
from rank_budget.scores import SCORES, magnitude, sensitivity


def make(kit, score="sensitivity", **schedule):
    """Two groups of 2 x 3 and 1 x 2 components, and their allocator."""
    matrices = [kit.group(["a", "b"], 3), kit.group(["c"], 2)]
    options = {"initial": 8, "budget": 3, "count": 2, "interval": 2} | schedule
    return RankAllocator(matrices, FixedPruning(**options), score=score), matrices


def masks(matrices):
    return [group.rank_mask.clone() for group in matrices]


def test_scores_are_their_formulas_element_by_element():
    values, gradients = torch.randn(2, 4, 3, dtype=torch.float64)
    expected = {"sensitivity": torch.zeros(4, 3), "magnitude": torch.zeros(4, 3)}
    for i in range(4):
        for j in range(3):
            expected["sensitivity"][i, j] = abs(values[i, j].item() * gradients[i, j].item())
            expected["magnitude"][i, j] = abs(values[i, j].item())
    assert set(SCORES) == set(expected)
    for name, wanted in expected.items():
        found = SCORES[name](values, gradients)
        torch.testing.assert_close(found, wanted.double(), rtol=1e-6, atol=1e-6)
    assert (SCORES["sensitivity"], SCORES["magnitude"]) == (sensitivity, magnitude)


def test_score_reads_before_the_optimizer_and_step_prunes_after_it(kit):
    allocator, matrices = make(kit, interval=1)
    scores = torch.cat([(g.values * g.gradients).abs().flatten() for g in matrices])
    lowest = set(scores.argsort()[:2].tolist())
    allocator.score()
    for group in matrices:
        group.values.normal_()
        group.gradients.zero_()
    done = allocator.step()
    assert (done.step, done.budget, done.pruned, done.grown, done.live) == (1, 6, 2, 0, 6)
    assert done.threshold == scores.sort().values[1].item()
    flat = torch.cat([mask.flatten() for mask in masks(matrices)])
    assert {i for i, alive in enumerate(flat.tolist()) if not alive} == lowest


@pytest.mark.parametrize("name", ["sensitivity", "magnitude", "function"])
def test_score_may_be_a_name_or_a_function(kit, name):
    function = {"function": lambda values, gradients: -values - gradients, **SCORES}[name]
    allocator, matrices = make(kit, function if name == "function" else name, interval=1)
    scores = torch.cat([function(g.values, g.gradients).flatten() for g in matrices])
    allocator.score()
    allocator.step()
    flat = torch.cat([mask.flatten() for mask in masks(matrices)])
    assert torch.equal(flat.logical_not().nonzero()[:, 0], scores.argsort()[:2].sort().values)


def test_masks_are_changed_in_place_and_values_not_at_all(kit):
    allocator, matrices = make(kit, interval=1)
    before = [(g.rank_mask, g.values.clone(), g.gradients.clone()) for g in matrices]
    allocator.score()
    allocator.step()
    for group, (mask, values, gradients) in zip(matrices, before, strict=True):
        assert group.rank_mask is mask
        assert torch.equal(group.values, values)
        assert torch.equal(group.gradients, gradients)
    assert sum(int(mask.sum()) for mask, _, _ in before) == 6


def test_nan_is_pruned_last_even_after_infinity_by_name(kit):
    allocator, (first, second) = make(kit, "magnitude", interval=1, count=5)
    first.values.copy_(torch.tensor([[float("nan"), 1e30, 3.0], [2.0, 1.0, 0.0]]))
    second.values.copy_(torch.tensor([[float("nan"), 5.0]]))
    allocator.score()
    allocator.step()
    assert first.rank_mask.tolist() == [[True, True, False], [False, False, False]]
    assert second.rank_mask.tolist() == [[True, False]]


def test_equal_scores_fall_from_the_front_by_name_not_by_place(kit):
    matrices = [kit.group(["b", "a"], 2), kit.group(["B"], 2)]
    allocator = RankAllocator(matrices, FixedPruning(6, 1, 3, 1), score="magnitude")
    for group in matrices:
        group.values.fill_(1)
    allocator.score()
    allocator.step()
    assert matrices[0].rank_mask.tolist() == [[True, True], [False, True]]
    assert matrices[1].rank_mask.tolist() == [[False, False]]


def test_step_alone_scores_what_is_there(kit):
    (one, matrices), (two, others) = make(kit), make(kit)
    for mine, other in zip(matrices, others, strict=True):
        other.values.copy_(mine.values)
        other.gradients.copy_(mine.gradients)
    for _ in range(4):
        one.score()
        assert one.step() == two.step()
    assert (one.steps, two.steps, one.live_ranks) == (4, 4, 4)
    torch.testing.assert_close(masks(matrices), masks(others), rtol=0, atol=0)


def test_step_alone_leaves_out_a_step_that_is_not_finite(kit):
    allocator, matrices = make(kit, interval=1)
    before = masks(matrices)
    matrices[0].gradients[1, 1] = torch.inf
    assert allocator.step() is None
    assert (allocator.steps, allocator.skipped, allocator.live_ranks) == (0, 1, 8)
    torch.testing.assert_close(masks(matrices), before, rtol=0, atol=0)
    matrices[0].gradients[1, 1] = 1
    assert allocator.step().step == 1


def test_scores_serve_one_step(kit):
    allocator, matrices = make(kit, "magnitude", interval=1)
    allocator.score()
    allocator.step()
    best = matrices[1].values[0, matrices[1].rank_mask[0].long().argmax()]
    best.fill_(0)  # read anew, it falls first
    allocator.step()
    assert best.abs() == 0
    assert not matrices[1].rank_mask[0, int(matrices[1].values[0].abs().argmin())]


def test_scores_taken_before_loading_are_forgotten(kit):
    allocator, matrices = make(kit, "magnitude", interval=1)
    state = allocator.state_dict()
    allocator.score()
    allocator.load_state_dict(state)
    matrices[0].values.copy_(torch.tensor([[9.0, 9, 0], [0, 9, 9]]))
    matrices[1].values.fill_(9)
    allocator.score()
    allocator.step()
    assert matrices[0].rank_mask.tolist() == [[True, True, False], [False, True, True]]


def test_a_read_of_a_step_that_was_not_taken_leaves_no_trace(kit):
    allocator, _ = make(kit, interval=1)
    before = {k: v for k, v in allocator.state_dict().items() if k != "alive"}
    allocator.score()
    allocator.skip()
    after = allocator.state_dict()
    assert (before.pop("skipped"), after.pop("skipped")) == (0, 1)
    assert before.pop("history")["steps"] == after.pop("history")["steps"] == []
    assert {k: after[k] for k in before} == before


def test_budget_that_is_constant_needs_no_score(kit):
    matrices = [kit.group(["a", "b"])]
    allocator = RankAllocator(matrices, ConstantBudget(6))
    assert [allocator.step() for _ in range(5)] == [None] * 5
    assert (allocator.steps, allocator.history) == (5, [])
    assert bool(matrices[0].rank_mask.all())


@pytest.mark.parametrize("names", [["a", "b", "a"], []])
def test_names_that_are_not_unique(kit, names):
    matrices = [kit.group([name]) for name in names]
    text = kit.error_text(RankAllocator, matrices, ConstantBudget(9))
    assert text == f"matrices must have unique names, got {names}."


def test_unknown_score(kit):
    text = kit.error_text(RankAllocator, [kit.group(["a"])], ConstantBudget(3), score="norm")
    assert text == ("score is 'norm', expected sensitivity or magnitude, or a function or object.")


def test_schedule_of_another_number_of_components(kit):
    matrices = [kit.group(["a"], masks=[[True, False, True]])]
    assert kit.error_text(RankAllocator, matrices, ConstantBudget(4)) == (
        "the schedule starts with 4 components, but the masks have 2; build it with initial=2, or, "
        "to go on with a run, build the allocator before the masks are loaded."
    )
    resumed = RankAllocator(matrices, ConstantBudget(3))
    assert kit.error_text(resumed.step) == (
        "the schedule starts with 3 components, but the masks have 2; build it with initial=2, or, "
        "to go on with a run, load its state first."
    )
    allocator = RankAllocator(matrices, ConstantBudget(2))
    assert (allocator.live_ranks, allocator.total_ranks) == (2, 3)


@pytest.mark.parametrize(
    ("field", "shape"),
    [("values", (2,)), ("values", (3, 4)), ("gradients", (2, 5)), ("rank_mask", (2, 4, 1))],
)
def test_wrong_shapes(kit, field, shape):
    tensors = {"values": torch.zeros(2, 4), "gradients": torch.zeros(2, 4)}
    tensors |= {"rank_mask": torch.ones(2, 4, dtype=torch.bool)}
    tensors[field] = tensors[field].new_ones(shape)
    assert kit.error_text(RankedMatrices, ("a", "b"), **tensors) == (
        f"{field} has the shape {shape}, expected (2, rank) for the 2 names."
    )


def test_mask_that_is_not_bool(kit):
    text = kit.error_text(RankedMatrices, ("a",), *torch.ones(3, 1, 2))
    assert text == "rank_mask is torch.float32, expected torch.bool."


def test_budget_error_is_a_value_error():
    assert issubclass(BudgetError, ValueError)
