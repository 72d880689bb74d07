"""What goes wrong in use, each by name."""

import copy
from warnings import simplefilter

import pytest
import torch

from rank_budget import (
    ConstantBudget,
    CubicBudget,
    FixedPruning,
    Limits,
    NormShare,
    RankAllocator,
    SmoothedSensitivity,
    Triplet,
)
from rank_budget.arena import Arena, arenas_of
from rank_budget.costs import ExportedBytes
from rank_budget.layers import AdaLoraLayer
from rank_budget.stacks import blocks_of_layers


def build(kit, names="abc", schedule=None, **options):
    layers = {name: kit.triplet(3, 4, 5) for name in names}
    schedule = schedule or FixedPruning(3 * len(layers), 3, 2, 1)
    return layers, RankAllocator(layers, schedule, **options)


SCORES = ["sensitivity", SmoothedSensitivity()]


@pytest.mark.parametrize("score", SCORES)
def test_a_module_without_a_gradient_is_named(kit, score):
    layers, allocator = build(kit, score=score)
    for name in "bc":
        layers[name].lam.grad = None
    before = allocator.masks()
    assert kit.error_text(allocator.score) == (
        "2 matrices, such as b, have no gradient at step 1; call score or step after the backward "
        "pass and before zero_grad, or give missing='skip' for modules that are frozen or unused."
    )
    torch.testing.assert_close(allocator.masks(), before, rtol=0, atol=0)


@pytest.mark.parametrize("score", SCORES)
def test_a_module_without_a_gradient_keeps_its_ranks_and_averages_if_skipped(kit, score):
    layers, allocator = build(kit, score=score, missing="skip")
    allocator.step()
    saved = allocator.state_dict()["score"]
    averages = [*saved.get("sensitivity", []), *saved.get("uncertainty", [])]
    before = [part.clone() for part in averages]
    ranks = allocator.ranks()["b"]
    for role in ("p", "lam", "q"):
        getattr(layers["b"], role).grad = None
    allocator.step()
    assert allocator.ranks()["b"] == ranks
    assert allocator.live_ranks == 5
    for old, new in zip(before, averages, strict=True):
        same = torch.zeros_like(new, dtype=torch.bool)
        for part, rank_width in zip(same.split([9, 36, 45]), (3, 12, 15), strict=True):
            part[rank_width : 2 * rank_width] = True
        assert torch.equal(new[same], old[same])
        assert not torch.equal(new[~same], old[~same])
    allocator.step()  # the budget is met, whatever is missing
    assert allocator.live_ranks == sum(allocator.ranks().values()) == 3


@pytest.mark.parametrize("score", [SmoothedSensitivity(), NormShare()])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_step_that_is_not_finite_leaves_the_averages_without_a_read(kit, score, number):
    layers, allocator = build(kit, score=score, schedule=FixedPruning(9, 3, 1, 100))
    allocator.score()
    allocator.step()
    saved = copy.deepcopy(averages_of(allocator))
    damaged = layers["b"].q.grad if isinstance(score, SmoothedSensitivity) else layers["b"].q.data
    before = damaged[0, 0].item()
    damaged[0, 0] = number
    allocator.score()
    with kit.Counted() as mode:
        allocator.step()
    assert not {"_local_scalar_dense", "tolist"} & mode.operations.keys()
    torch.testing.assert_close(averages_of(allocator), saved, rtol=0, atol=0)
    damaged[0, 0] = before
    for layer in layers.values():
        layer.lam.data[0] *= 2
    allocator.score()
    allocator.step()
    changed = zip(averages_of(allocator), saved, strict=True)
    assert all(not torch.equal(new, old) and new.isfinite().all() for new, old in changed)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_what_was_finite_a_step_ago_is_looked_at_anew(kit, number):
    """`step` alone reads a flag; `score` and `step` after it must not trust that one."""
    layers, allocator = build(kit, score=SmoothedSensitivity(), schedule=FixedPruning(9, 3, 1, 100))
    allocator.step()
    saved = copy.deepcopy(averages_of(allocator))
    layers["b"].q.grad[0, 0] = number
    allocator.score()
    allocator.step()
    torch.testing.assert_close(averages_of(allocator), saved, rtol=0, atol=0)


def averages_of(allocator):
    state = allocator.state_dict()["score"]
    return [tensor for name, part in state.items() if name != "of" for tensor in part]


def test_missing_is_checked(kit):
    text = kit.error_text(build, kit, missing="ignore")
    assert text == "missing is 'ignore', expected refuse or skip."


def test_schedule_longer_than_the_training(kit):
    schedule = FixedPruning(9, 3, 1, 100)
    assert kit.error_text(build, kit, schedule=schedule, total_steps=500) == (
        "FixedPruning(initial=9, budget=3, count=1, interval=100) meets its final budget only at "
        "step 600, but the training has 500 steps; shorten the schedule."
    )
    build(kit, schedule=schedule, total_steps=600)
    text = kit.error_text(build, kit, schedule=FixedPruning(9, 3, 0, 1), total_steps=500)
    assert "meets its final budget never, but the training has 500 steps" in text
    text = kit.error_text(build, kit, schedule=CubicBudget(9, 3, 1000), total_steps=500)
    assert text == (
        "total_steps is 500, but the schedule was made for 1000; make it with the length of the "
        "training."
    )


def test_the_number_of_steps_may_come_late(kit):
    _, allocator = build(kit, schedule=CubicBudget(9, 3, warmup=0.2, cooldown=0.4))
    assert "does not know the number of steps" in kit.error_text(allocator.step)
    allocator.set_total_steps(10)
    live = [allocator.live_ranks]
    for _ in range(10):
        allocator.step()
        live.append(allocator.live_ranks)
    known = CubicBudget(9, 3, 10, warmup=2, cooldown=4)
    assert allocator.schedule == CubicBudget(9, 3, 10, warmup=0.2, cooldown=0.4)
    assert live == [known.live_ranks(step) for step in range(11)]


def test_modules_of_rank_zero(kit):
    layers = {"empty": kit.triplet(0, 4, 5), "full": kit.triplet(3, 4, 5)}
    allocator = RankAllocator(layers, FixedPruning(3, 1, 1, 1), score=SmoothedSensitivity())
    for _ in range(2):
        allocator.step()
    assert allocator.ranks() == {"empty": 0, "full": 1}
    layers["empty"].rank_mask = None
    layers["full"].rank_mask = None
    schedule = FixedPruning(3, 1, 1, 1)
    allocator = RankAllocator(layers, schedule, limits=None, score=SmoothedSensitivity())
    allocator.step()
    assert allocator.ranks() == {"empty": 0, "full": 2}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_are_those_of_single_precision(kit, dtype):
    """A product of two numbers of 1e-4 is zero in float16."""
    layers, wide = {}, {}
    for name in "ab":
        layer = kit.triplet(3, 4, 5, dtype=torch.float32)
        small = [getattr(layer, role).detach().mul(1e-4).to(dtype) for role in ("p", "lam", "q")]
        slopes = [getattr(layer, role).grad.mul(1e-4).to(dtype) for role in ("p", "lam", "q")]
        for found, cast in ((layers, dtype), (wide, torch.float32)):
            copies = [part.to(cast) for part in small]
            for part, slope in zip(copies, slopes, strict=True):
                part.grad = slope.to(cast)
            found[name] = Triplet(*copies, layer.rank_mask.clone())
    for score in SCORES:
        one, two = (
            RankAllocator(found, FixedPruning(6, 2, 2, 1), score=score) for found in (layers, wide)
        )
        for _ in range(2):
            assert one.step() == two.step()
        torch.testing.assert_close(one.importance(), two.importance(), rtol=1e-6, atol=0)
        assert min(part.min() for part in one.importance().values()) > 0
        for layer in (*layers.values(), *wide.values()):
            layer.rank_mask.fill_(True)


def test_tensors_of_one_matrix_on_two_devices_are_refused(kit):
    layer = kit.triplet(3, 4, 5)
    layer.q = layer.q.to("meta")
    text = kit.error_text(RankAllocator, {"a": layer}, ConstantBudget(3))
    assert text == "a has its p, lam and q on cpu and meta, expected one device."


def test_factors_that_are_not_in_one_buffer_are_chosen_from_together(kit, monkeypatch):
    """As on several devices: each block has flat buffers of its own."""
    layers, whole = build(kit, score=SmoothedSensitivity())
    split = "rank_budget.smoothing.arenas_of"
    monkeypatch.setattr(split, lambda blocks: [Arena([block]) for block in blocks])
    for layer in layers.values():
        layer.rank_mask = layer.rank_mask.clone()
    parts = RankAllocator(layers, FixedPruning(9, 3, 2, 1), score=SmoothedSensitivity())
    assert len(parts.state_dict()["score"]["sensitivity"]) == 3
    for _ in range(3):
        assert parts.step() == whole.step()
        torch.testing.assert_close(parts.importance(), whole.importance(), rtol=0, atol=0)
    assert parts.live_ranks == 3


@pytest.mark.parametrize("large", [2**40, 1])
def test_what_a_frozen_module_holds_is_not_looked_at(kit, monkeypatch, large):
    monkeypatch.setattr("rank_budget.products.LARGE", large)
    layers, allocator = build(kit, score=SmoothedSensitivity(), missing="skip")
    for role in ("p", "lam", "q"):
        factor = getattr(layers["b"], role)
        factor.grad = None
        factor.data.fill_(torch.inf)
    assert allocator.step() is not None
    assert (allocator.steps, allocator.skipped) == (1, 0)


def test_factors_are_grouped_by_device(kit, monkeypatch):
    """On tensors without values, as of an accelerator, all is one run; on a CPU it need not be."""
    monkeypatch.setattr("rank_budget.arena.CACHED", 1)
    layers = {name: kit.triplet(3, 4, 5) for name in "abc"}
    layers["b"] = Triplet(*(torch.zeros(s, device="meta") for s in ((4, 3), 3, (3, 5))))
    here, there = arenas_of(blocks_of_layers(layers, ("lam", "p", "q")))
    assert [block.names for block in here.blocks] == [("a", "c")] * 3
    assert [block.names for block in there.blocks] == [("b",)] * 3
    assert (len(here.runs), len(there.runs)) == (6, 1)
    for arena, device in ((here, "cpu"), (there, "meta")):
        tensors = (arena.products, arena.runs[0].room, arena.zeros())
        assert {tensor.device.type for tensor in tensors} == {device}


def test_devices_in_any_order_are_chosen_from_together(kit, monkeypatch):
    """The matrices of one device do not follow each other where a device has several ranks."""
    ranks = {"a": 3, "b": 2, "c": 3, "d": 2}
    layers = {name: kit.triplet(rank, 4, 5) for name, rank in ranks.items()}
    schedule = FixedPruning(10, 3, 2, 1)
    whole = RankAllocator(layers, schedule, score=SmoothedSensitivity())
    for layer in layers.values():
        layer.rank_mask = layer.rank_mask.clone()

    def by_rank(blocks):
        return [Arena([block for block in blocks if block.rows == rank]) for rank in (2, 3)]

    monkeypatch.setattr("rank_budget.smoothing.arenas_of", by_rank)
    parts = RankAllocator(layers, schedule, score=SmoothedSensitivity())
    for _ in range(4):
        assert parts.step() == whole.step()
        torch.testing.assert_close(parts.importance(), whole.importance(), rtol=0, atol=0)
        torch.testing.assert_close(parts.masks(), whole.masks())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_modules_on_several_devices_are_chosen_from_together(kit):
    torch.manual_seed(0)
    here, there = ({name: kit.triplet(3, 4, 5, mask=name == "b") for name in "abc"} for _ in "12")
    for name, layer in here.items():
        for role in ("p", "lam", "q"):
            value = getattr(layer, role)
            copy = value.detach().to("cuda" if name == "b" else "cpu")
            copy.grad = value.grad.to(copy.device)
            setattr(there[name], role, copy)
    there["b"].rank_mask = here["b"].rank_mask.cuda()
    for score in SCORES:
        one, two = (
            RankAllocator(found, FixedPruning(9, 3, 2, 1), score=score) for found in (here, there)
        )
        for _ in range(3):
            one.step()
            two.step()
            torch.testing.assert_close(one.masks(), two.masks())
        assert there["b"].rank_mask.tolist() == here["b"].rank_mask.tolist()
        for layers in (here, there):
            layers["b"].rank_mask.fill_(True)


@pytest.mark.parametrize(
    ("shapes", "text"),
    [
        (((4, 2), (3,), (2, 5)), "a has p (4, 2), lam (3,) and q (2, 5), expected"),
        (((2, 4), (2,), (2, 5)), "a has p (2, 4), lam (2,) and q (2, 5), expected"),
        (((4, 2), (2, 2), (2, 5)), "a has p (4, 2), lam (2, 2) and q (2, 5), expected"),
        (((4, 2), (), (2, 5)), "a has p (4, 2), lam () and q (2, 5), expected"),
    ],
)
def test_tensors_that_are_no_triplet(kit, shapes, text):
    layer = Triplet(*(torch.zeros(shape) for shape in shapes))
    found = kit.error_text(RankAllocator, {"a": layer}, ConstantBudget(2))
    assert found == (f"{text} (out, rank), (rank,) or (rank, 1), and (rank, in).")


def test_scales_in_rows_and_columns_may_be_mixed(kit):
    layers = {name: kit.triplet(2, 3, 4, mask=False, column=name == "b") for name in "abc"}
    allocator = RankAllocator(layers, FixedPruning(6, 2, 2, 1))
    for _ in range(2):
        allocator.step()
        for name, mask in allocator.masks().items():
            assert torch.equal(layers[name].lam.reshape(-1) != 0, mask)
    assert allocator.live_ranks == 2


@pytest.mark.parametrize("mask", [torch.ones(2), torch.ones(3, dtype=torch.bool)])
def test_masks_that_do_not_fit(kit, mask):
    layer = Triplet(torch.zeros(4, 2), torch.zeros(2), torch.zeros(2, 5), mask)
    assert kit.error_text(RankAllocator, {"a": layer}, ConstantBudget(2)) == (
        f"a has a rank_mask of {mask.dtype} {tuple(mask.shape)}, expected torch.bool (2,)."
    )


def test_no_layers(kit):
    text = kit.error_text(RankAllocator, {}, ConstantBudget(2))
    assert text == "there are no layers; put the adapters on the model first."


def test_what_is_neither_layers_nor_stacks(kit):
    schedule = ConstantBudget(2)
    assert kit.error_text(RankAllocator, torch.nn.Linear(2, 2), schedule) == (
        "layers is a Linear, expected layers by name, such as ranked_layers(model) returns, or a "
        "list of RankedMatrices."
    )
    assert kit.error_text(RankAllocator, [kit.triplet(2, 3, 4)], schedule) == (
        "a stack is a Triplet, expected RankedMatrices and RankedFactors; give layers with three "
        "tensors by name, in a dict."
    )
    assert kit.error_text(RankAllocator, {"a": kit.triplet(2, 3, 4)}, schedule, score=5) == (
        "score is 5, expected sensitivity, magnitude, a function or an object."
    )


class Unfinished:
    """Some library's object that is no schedule."""

    def __repr__(self):
        return "Unfinished()"


MISTAKES = {
    "steps in quotes": (
        {"total_steps": "40"},
        "total_steps is '40', but must be a whole number.",
    ),
    "a score's class": (
        {"score": SmoothedSensitivity},
        "score is the class SmoothedSensitivity, expected an object; write "
        "SmoothedSensitivity(...).",
    ),
    "a schedule's class": (
        {"schedule": CubicBudget},
        "schedule is the class CubicBudget, expected an object; write CubicBudget(...).",
    ),
    "a number as schedule": (
        {"schedule": 6},
        "schedule is 6, expected an object with initial and live_ranks(step), such as "
        "CubicBudget(...).",
    ),
    "another schedule": (
        {"schedule": Unfinished()},
        "schedule is Unfinished(), expected an object with initial and live_ranks(step), such as "
        "CubicBudget(...).",
    ),
    "a cost's class": (
        {"cost": ExportedBytes},
        "cost is the class ExportedBytes, expected an object; write ExportedBytes(...).",
    ),
    "a number as cost": ({"cost": 3}, "cost is 3, expected ranks, parameters, bytes, or a func"),
    "limits in a dict": (
        {"limits": {"floors": {"*": 1}}},
        "limits is a dict, expected Limits(floors=..., ceilings=..., groups=...).",
    ),
    "the ranks of one matrix": (
        {"schedule": FixedPruning(3, 1, 1, 1)},
        "the schedule starts with 3 components, but the masks have 6; build it with initial=6, or, "
        "if 3 is meant for each matrix, add .times(2).",
    ),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_what_is_mistaken_for_something_else_is_said_in_a_line(kit, mistake):
    layers = {name: kit.triplet(3, 4, 5) for name in "ab"}
    options, text = MISTAKES[mistake]
    options = {"schedule": FixedPruning(6, 3, 1, 1)} | options
    assert text in kit.error_text(RankAllocator, layers, **options)


@pytest.mark.parametrize("value", ["1", 1.5, True])
def test_bounds_that_are_no_whole_numbers(kit, value):
    assert kit.error_text(Limits, floors={"*.q": value}) == (
        f"floors['*.q'] is {value!r}, but must be a whole number."
    )


def test_factors_that_are_no_tensors(kit):
    layer = kit.triplet(2, 3, 4)
    layer.lam = [1.0, 2.0]
    text = "expected the tensors p, lam and q; give a layer that has them, or Triplet(p, lam, q)."
    assert kit.error_text(RankAllocator, {"a": layer}, ConstantBudget(2)) == (
        f"a, a Triplet, has a lam of list, {text}"
    )
    assert kit.error_text(RankAllocator, {"a": torch.nn.Linear(2, 2)}, ConstantBudget(2)) == (
        f"a, a Linear, has no p, {text}"
    )


@pytest.mark.parametrize(
    ("score", "what"),
    [(lambda sigma, _: sigma.sum(), "()"), (lambda sigma, _: sigma.tolist(), "list")],
)
def test_a_score_function_that_returns_something_else(kit, score, what):
    _, allocator = build(kit, score=score)
    assert kit.error_text(allocator.step) == (
        f"the score function returned {what}, expected a tensor (3, 3), a score for each component."
    )


def test_factors_that_change_their_shape(kit):
    layers, allocator = build(kit)
    layers["b"].lam = torch.zeros(2)
    assert kit.error_text(allocator.step) == (
        "lam of b has the shape (2,), but had (3,) when the allocator was made; make a new one."
    )


@pytest.mark.parametrize("large", [2**40, 1])
@pytest.mark.parametrize(
    ("names", "role", "shape"),
    [
        ("ab", "p", (4, 1)),  # one component, which an operation would expand
        ("a", "q", (2, 5)),  # fewer rows than there is a place for
        ("a", "p", (4, 2)),  # no longer as those beside it
    ],
)
@pytest.mark.parametrize("warnings", ["ignore", "error"])
def test_factors_that_would_fit_by_chance(kit, monkeypatch, large, names, role, shape, warnings):
    simplefilter(warnings)
    monkeypatch.setattr("rank_budget.products.LARGE", large)
    layers, allocator = build(kit, "ab", score=SmoothedSensitivity())
    allocator.step()
    saved = copy.deepcopy(averages_of(allocator))
    before = tuple(getattr(layers["a"], role).shape)
    for name in names:
        factor = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        factor.grad = torch.zeros_like(factor)
        setattr(layers[name], role, factor)
    assert kit.error_text(allocator.step) == (
        f"{role} of a has the shape {shape}, but had {before} when the allocator was made; make a "
        "new one."
    )
    torch.testing.assert_close(averages_of(allocator), saved, rtol=0, atol=0)


def test_parameters_that_were_replaced_are_read(kit):
    """Not those that an AdaLoRA layer of PEFT held when the allocator was made."""
    module = torch.nn.Module()
    for name, shape in (("lora_A", (3, 5)), ("lora_B", (4, 3)), ("lora_E", (3, 1))):
        setattr(module, name, torch.nn.ParameterDict({"default": torch.zeros(shape)}))
    layer = AdaLoraLayer(module, "default")
    allocator = RankAllocator({"a": layer}, FixedPruning(3, 1, 2, 1), score=SmoothedSensitivity())
    triplet = kit.triplet(3, 4, 5, dtype=torch.float32, column=True)
    for role in ("p", "lam", "q"):
        setattr(layer, role, getattr(triplet, role))
    allocator.step()
    (alive,) = allocator.masks().values()
    assert alive.sum() == 1
    assert torch.equal(triplet.lam[:, 0] != 0, alive)
