"""Regrowth, as AdaLoRA has it, and growth from a small rank, against step-by-step twins."""

import pytest
import torch

from rank_budget import (
    CubicBudget,
    FixedGrowth,
    Limits,
    RankAllocator,
    SmoothedSensitivity,
    Triplet,
)


def train(layers, allocator, steps, *, lr=0.05):
    """Adam on a random regression, with what the allocator says done after each step."""
    generator = torch.Generator().manual_seed(1)
    factors = [factor for layer in layers.values() for factor in (layer.p, layer.lam, layer.q)]
    optimizer = torch.optim.Adam(factors, lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.zeros(())
        for layer in layers.values():
            lam = layer.lam if layer.rank_mask is None else layer.lam * layer.rank_mask
            target = torch.randn(layer.p.shape[0], layer.q.shape[1], generator=generator)
            loss = loss + ((layer.p * lam) @ layer.q - target).square().sum()
        loss.backward()
        allocator.score()
        optimizer.step()
        yield allocator.step()


def layers_of(kit, *, mask, shapes=((4, 5, 6), (3, 6, 5))):
    return {
        f"layer{i}": kit.triplet(*shape, mask=mask, dtype=torch.float32)
        for i, shape in enumerate(shapes)
    }


def assert_scores(allocator, scores):
    found = allocator.importance()
    for (name, i), score in scores.items():
        assert found[name][i].item() == pytest.approx(score, rel=1e-4)


@pytest.mark.parametrize("mask", [True, False])
def test_regrowth_is_adaloras_rule_step_by_step(twin, kit, mask):
    layers = layers_of(kit, mask=mask)
    schedule = CubicBudget(7, 3, total_steps=30, warmup=5, cooldown=10, interval=2)
    allocator = RankAllocator(
        layers, schedule, score=SmoothedSensitivity(0.3, 0.3), direction="regrow", total_steps=30
    )
    reference = twin.Algorithm1(0.3, 0.3)
    components = {(name, i) for name, layer in layers.items() for i in range(layer.lam.shape[0])}
    alive, returned = components, set()
    read, allocator.score = allocator.score, lambda: (observe(), read())

    def observe():
        if allocator.steps + 1 < 20:
            for name, layer in layers.items():
                rows = twin.rows_of(layer), twin.rows_of(layer, lambda tensor: tensor.grad)
                reference.observe(name, *rows)

    for step, done in enumerate(train(layers, allocator, 30, lr=1.0), 1):
        assert (done is not None) == ((5 < step < 20 and step % 2 == 0) or step == 20)
        if done:
            scores = {key: reference.score(*key) for key in components}
            before = alive
            alive = twin.prune(scores, components, 7 - schedule.live_ranks(step))
            returned |= alive - before
            assert (done.pruned, done.grown) == (len(before - alive), len(alive - before))
            assert_scores(allocator, scores)
        masks = allocator.masks()
        assert {(n, i) for n, m in masks.items() for i in m.nonzero()[:, 0].tolist()} == alive
        for name, layer in layers.items():
            dead = masks[name].logical_not()
            zero = layer.lam == 0
            if (done and step < 20) or (step >= 20 and not mask):
                assert torch.equal(zero & dead, dead)
            elif step < 20:
                assert not zero.any()  # between two choices everything learns
            if mask:
                assert torch.equal(layer.rank_mask, masks[name] if step >= 20 else dead | True)
    assert returned
    assert allocator.live_ranks == 3
    assert allocator.dead_stay_dead()


def test_regrowth_needs_to_be_told_when(kit):
    class Own:
        initial = 7

        def live_ranks(self, step):
            return 7

    text = kit.error_text(RankAllocator, layers_of(kit, mask=True), Own(), direction="regrow")
    assert text == (
        "Own has no allocates(step), which regrowth asks for when to choose anew; add it, or use "
        "direction='prune'."
    )


def test_unknown_direction(kit):
    layers, schedule = layers_of(kit, mask=True), CubicBudget(7, 3, 10)
    text = kit.error_text(RankAllocator, layers, schedule, direction="up")
    assert text == "direction is 'up', expected prune or regrow or grow."


@pytest.mark.parametrize("mask", [True, False])
def test_growth_wakes_the_best_matrices_components(kit, mask):
    layers = layers_of(kit, mask=mask, shapes=((4, 5, 6), (4, 6, 5), (4, 6, 6)))
    schedule = FixedGrowth(3, 8, count=2, interval=3, warmup=2)
    allocator = RankAllocator(layers, schedule, direction="grow", score=SmoothedSensitivity())
    assert allocator.ranks() == {"layer0": 1, "layer1": 1, "layer2": 1}
    assert allocator.live_ranks == 3
    before = allocator.masks()
    for step, done in enumerate(train(layers, allocator, 12), 1):
        masks = allocator.masks()
        for name, layer in layers.items():
            live = int(masks[name].sum())
            assert torch.equal(masks[name], torch.arange(4) < live)
            assert torch.equal(masks[name] & before[name], before[name])
            if mask:
                assert torch.equal(layer.rank_mask, masks[name])
            else:
                assert not layer.lam[live:].any()
        assert sum(allocator.ranks().values()) == allocator.live_ranks == schedule.live_ranks(step)
        if done:
            worth = {
                name: (scores * before[name]).sum() / before[name].sum()
                for name, scores in allocator.importance().items()
            }
            grew = {name for name in masks if not torch.equal(masks[name], before[name])}
            best = sorted(worth, key=lambda name: (-worth[name], name))[: done.grown]
            assert grew == set(best)
            assert done.pruned == 0
        before = masks
    assert [done.step for done in allocator.history] == [3, 6, 9]
    assert allocator.live_ranks == 8


def test_growth_respects_ceilings(kit):
    layers = layers_of(kit, mask=True, shapes=((4, 5, 6), (4, 6, 5)))
    limits = Limits(ceilings={"layer0": 2})
    schedule = FixedGrowth(2, 6, count=2, interval=1)
    allocator = RankAllocator(layers, schedule, direction="grow", limits=limits)
    for _ in train(layers, allocator, 3):
        pass
    assert allocator.ranks() == {"layer0": 2, "layer1": 4}


def test_pruning_is_for_good_even_without_a_mask_and_with_momentum(kit):
    layers = layers_of(kit, mask=False)
    schedule = CubicBudget(7, 3, total_steps=12, cooldown=4)
    allocator = RankAllocator(layers, schedule, score=SmoothedSensitivity())
    fallen = {name: torch.zeros(layer.lam.shape[0]).bool() for name, layer in layers.items()}
    for _ in train(layers, allocator, 16):
        for name, mask in allocator.masks().items():
            assert not (mask & fallen[name]).any()
            fallen[name] |= mask.logical_not()
            assert not layers[name].lam[fallen[name]].any()
    assert allocator.live_ranks == 3


def test_a_start_that_is_not_the_schedules(kit):
    layers = layers_of(kit, mask=False)
    text = kit.error_text(RankAllocator, layers, CubicBudget(8, 3, 10))
    assert text == (
        "the schedule starts with 8 components, but the masks have 7; build it with initial=7."
    )
    triplet = Triplet(torch.zeros(3, 2), torch.zeros(2), torch.zeros(2, 2))
    assert RankAllocator({"a": triplet}, CubicBudget(2, 1, 4)).live_ranks == 2
