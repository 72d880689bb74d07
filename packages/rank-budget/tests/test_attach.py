"""On an optimizer: the loop that stays as it is, and the loop that forgets."""

import math

import pytest
import torch
from torch import nn

from rank_budget import (
    BudgetError,
    ConstantBudget,
    CubicBudget,
    FixedPruning,
    RankAllocator,
    SmoothedSensitivity,
    attach_,
    watch_,
)


def parameters(layers):
    return [factor for layer in layers.values() for factor in (layer.p, layer.lam, layer.q)]


def build(kit, *, mask=False, optimizer=torch.optim.Adam):
    layers = {name: kit.triplet(4, 5, 6, mask=mask) for name in "ab"}
    schedule = CubicBudget(8, 3, total_steps=12, warmup=2, cooldown=4)
    allocator = RankAllocator(layers, schedule, score=SmoothedSensitivity())
    return layers, allocator, optimizer(parameters(layers), lr=0.1)


def loss_of(layers, x):
    return sum(
        ((x @ layer.q.T * layer.lam) @ layer.p.T - 1).square().mean() for layer in layers.values()
    )


def test_attached_is_score_before_and_step_after(kit):
    torch.manual_seed(3)
    layers, allocator, optimizer = build(kit)
    torch.manual_seed(3)
    others, other, by_hand = build(kit)
    with attach_(allocator, optimizer):
        for step in range(12):
            x = torch.randn(
                7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step)
            )
            for mine, steps in ((layers, optimizer), (others, by_hand)):
                steps.zero_grad()
                loss_of(mine, x).backward()
            optimizer.step()
            other.score()
            by_hand.step()
            other.step()
            assert allocator.history == other.history
            for layer, name in zip(layers.values(), "ab", strict=True):
                assert not layer.lam[allocator.masks()[name].logical_not()].any()
    torch.testing.assert_close(parameters(layers), parameters(others), rtol=0, atol=0)
    assert (allocator.steps, allocator.live_ranks) == (12, 3)
    optimizer.step()
    assert allocator.steps == 12  # taken off at the end of the block


def test_an_optimizer_of_other_parameters_is_refused(kit):
    layers, allocator, _ = build(kit)
    other = torch.optim.SGD([layers["a"].lam, layers["b"].p], lr=0.1)
    assert kit.error_text(attach_, allocator, other) == (
        "the optimizer holds λ of 1 of 2 layers, but not of b; attach to the optimizer that has "
        "the layers' parameters."
    )
    assert not allocator.attached
    layers["b"].lam.requires_grad_(False)  # frozen: no optimizer has it
    with attach_(allocator, other):
        assert allocator.attached


def test_stacks_may_be_of_any_parameters(kit):
    matrices = kit.group(["a", "b"])
    allocator = RankAllocator([matrices], FixedPruning(6, 3, 1, 1))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with attach_(allocator, optimizer):
        optimizer.step()
    assert allocator.live_ranks == 5


def test_a_step_that_is_not_finite_leaves_everything_but_the_count_of_skips(kit):
    layers, allocator, optimizer = build(kit)
    attach_(allocator, optimizer)
    layers["a"].q.grad[0, 0] = math.nan
    optimizer.step()
    assert (allocator.steps, allocator.skipped, allocator.live_ranks) == (0, 1, 8)


def test_a_step_that_the_scaler_leaves_out_is_not_seen(kit):
    layers, allocator, optimizer = build(kit, optimizer=torch.optim.SGD)
    attach_(allocator, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    x = torch.ones(3, 6, dtype=torch.float64)
    for bad in (False, True, False):
        optimizer.zero_grad()
        loss = loss_of(layers, x) * (math.inf if bad else 1)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert (allocator.steps, allocator.skipped) == (2, 0)


def fused_adam(factors, lr):
    return torch.optim.Adam(factors, lr=lr, fused=True)


@pytest.mark.parametrize("score", [SmoothedSensitivity(), "sensitivity"])
def test_a_step_that_a_fused_optimizer_leaves_out_is_skipped(kit, score):
    layers = {"a": kit.triplet(4, 5, 6, mask=False)}
    allocator = RankAllocator(layers, FixedPruning(4, 2, 1, 2), score=score)
    optimizer = fused_adam(parameters(layers), lr=0.1)
    attach_(allocator, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    counts = []
    for bad in (True, False, False):
        optimizer.zero_grad()
        loss = loss_of(layers, torch.ones(3, 6, dtype=torch.float64)) * (math.inf if bad else 1)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        counts.append((allocator.steps, allocator.skipped, allocator.live_ranks))
    assert counts == [(0, 1, 4), (1, 1, 4), (2, 1, 3)]


@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("score", [SmoothedSensitivity(), "sensitivity"])
def test_a_fused_optimizer_scores_unscaled_gradients(kit, score, unscaled):
    found = []
    for scale in (1.0, 2.0**10):
        torch.manual_seed(3)
        layers = {"a": kit.triplet(4, 5, 6, mask=False)}
        allocator = RankAllocator(layers, FixedPruning(4, 2, 1, 1), score=score)
        optimizer = fused_adam(parameters(layers), lr=0.1)
        attach_(allocator, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
        optimizer.zero_grad()
        scaler.scale(loss_of(layers, torch.ones(3, 6, dtype=torch.float64))).backward()
        if unscaled:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        averages = allocator.state_dict()["score"].get("sensitivity", [])
        found.append((averages, allocator.importance()))
    assert found[0][1]["a"].max() > 0
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_an_attached_allocator_is_stepped_by_nothing_else(kit):
    _, allocator, optimizer = build(kit)
    attached = attach_(allocator, optimizer)
    optimizer.step()
    assert kit.error_text(allocator.step) == (
        "the allocator is attached to an optimizer, which steps it; leave out this call, or remove "
        "the Attachment."
    )
    assert kit.error_text(attach_, allocator, optimizer) == (
        "the allocator is attached to an optimizer already; remove that Attachment first."
    )
    assert allocator.steps == 1
    attached.remove()
    allocator.step()
    assert allocator.steps == 2
    attach_(allocator, optimizer)
    optimizer.step()
    assert allocator.steps == 3


def test_scores_are_of_unscaled_gradients(kit):
    found = []
    for scale in (1.0, 2.0**10):
        torch.manual_seed(3)
        layers, allocator, optimizer = build(kit, optimizer=torch.optim.SGD)
        attach_(allocator, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
        optimizer.zero_grad()
        scaler.scale(loss_of(layers, torch.ones(3, 6, dtype=torch.float64))).backward()
        scaler.step(optimizer)
        found.append(allocator.state_dict()["score"]["sensitivity"])
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_micro_batches_score_as_one_batch(kit, parts):
    torch.manual_seed(3)
    layers, allocator, optimizer = build(kit)
    attach_(allocator, optimizer)
    x = torch.randn(8, 6, dtype=torch.float64)
    torch.manual_seed(3)
    others, other, _ = build(kit)
    optimizer.zero_grad()
    for part in x.chunk(parts):
        (loss_of(layers, part) / parts).backward()
    for factor in parameters(others):
        factor.grad = None
    loss_of(others, x).backward()
    other.step()
    optimizer.step()
    torch.testing.assert_close(
        allocator.state_dict()["score"]["sensitivity"],
        other.state_dict()["score"]["sensitivity"],
        rtol=1e-12,
        atol=0,
    )


def test_a_step_not_called_raises_after_so_many_optimizer_steps(kit):
    _, allocator, optimizer = build(kit)
    watch_(allocator, optimizer, patience=3)
    optimizer.step()
    optimizer.step()
    allocator.step()
    for _ in range(3):
        optimizer.step()  # the first of these came after the allocator's step
    with pytest.raises(BudgetError) as caught:
        optimizer.step()
    assert str(caught.value) == (
        "the optimizer has taken 3 steps since the rank allocator's last one, which was step 1; "
        "call allocator.step() after each, or attach_ it to the optimizer."
    )


def test_watching_is_content_with_an_allocator_that_skips(kit):
    layers, allocator, optimizer = build(kit)
    watch_(allocator, optimizer, patience=1)
    layers["a"].p.grad.fill_(math.nan)
    for _ in range(3):
        allocator.step()
        optimizer.step()
    assert allocator.skipped == 3


def test_watching_ends_when_it_is_removed(kit):
    _, allocator, optimizer = build(kit)
    watch_(allocator, optimizer, patience=1).remove()
    for _ in range(3):
        optimizer.step()
    assert kit.error_text(watch_, allocator, optimizer, patience=0) == (
        "patience is 0, but must be at least 1 step."
    )


def test_a_model_of_modules_is_found_and_trained():
    class SVD(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.randn(6, 3))
            self.lam = nn.Parameter(torch.randn(3))
            self.q = nn.Parameter(torch.randn(3, 6))
            self.register_buffer("rank_mask", torch.ones(3, dtype=torch.bool))

        def forward(self, x):
            return (x @ self.q.T * (self.lam * self.rank_mask)) @ self.p.T

    from rank_budget import ranked_layers

    model = nn.Sequential(SVD(), nn.Linear(6, 6), SVD())
    layers = ranked_layers(model)
    assert list(layers) == ["0", "2"]
    allocator = RankAllocator(layers, CubicBudget(3, 1, 4).times(len(layers)))
    optimizer = torch.optim.AdamW(model.parameters())
    attach_(allocator, optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(2, 6)).square().sum().backward()
        optimizer.step()
    assert int(model[0].rank_mask.sum() + model[2].rank_mask.sum()) == 2
    assert RankAllocator(layers, ConstantBudget(2)).live_ranks == 2
    with pytest.raises(BudgetError, match="Linear has no ranked layers, expected modules with p"):
        ranked_layers(nn.Linear(2, 2))
