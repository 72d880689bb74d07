"""DyLoRA: nested ranks counted from 1, how a rank is drawn, and what a step may change."""

import copy

import pytest
import torch
from torch import nn

from lowrank_adapters import (
    DyLoRA,
    DyLoRALinear,
    LoRALinear,
    RankSampler,
    inject_adapters_,
    set_rank_,
)

WIDE = {"dtype": torch.float64}
EVERY_RANK = pytest.mark.parametrize("rank", [1, 2, 3, 4])


def make(**options):
    layer = DyLoRALinear(nn.Linear(6, 5, **WIDE), rank=4, alpha=3.0, **options, **WIDE)
    with torch.no_grad():
        for _, factor in layer.factors():
            factor.normal_()
    return layer


def cut(layer, rank):
    """The first components of a layer, as leaves of their own."""
    a, b = layer.a.detach()[:rank], layer.b.detach()[:, :rank]
    return a.clone().requires_grad_(), b.clone().requires_grad_()


@EVERY_RANK
@pytest.mark.parametrize("rslora", [False, True])
def test_layer_at_a_rank_equals_the_twin_of_that_rank(twin, rank, rslora):
    layer = make(rslora=rslora)
    set_rank_({"layer": layer}, rank)
    a, b = cut(layer, rank)
    scaling = 3.0 / (rank**0.5 if rslora else rank)
    x = torch.randn(2, 6, **WIDE, requires_grad=True)

    found = layer(x)
    base = layer.base
    rows = [twin.lora_linear(row, base.weight, base.bias, a, b, scaling) for row in x]
    expected = torch.stack(rows)

    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(found)
    by_x, by_a, by_b = torch.autograd.grad(found, [x, layer.a, layer.b], cotangent)
    wanted = torch.autograd.grad(expected, [x, a, b], cotangent)
    torch.testing.assert_close((by_x, by_a[:rank], by_b[:, :rank]), wanted, rtol=1e-12, atol=1e-12)
    assert not by_a[rank:].any()
    assert not by_b[:, rank:].any()


@EVERY_RANK
def test_frozen_layer_computes_the_same_and_only_the_last_component_learns(rank):
    layer, frozen = make(), make(frozen=True)
    frozen.load_state_dict(layer.state_dict())
    for one in (layer, frozen):
        set_rank_({"layer": one}, rank)
    x = torch.randn(7, 6, **WIDE)
    y, of_frozen = layer(x), frozen(x)
    torch.testing.assert_close(of_frozen, y, rtol=0, atol=0)
    cotangent = torch.randn_like(y)
    all_a, all_b = torch.autograd.grad(y, [layer.a, layer.b], cotangent)
    one_a, one_b = torch.autograd.grad(of_frozen, [frozen.a, frozen.b], cotangent)
    last = torch.arange(4) == rank - 1
    torch.testing.assert_close(one_a, all_a * last[:, None], rtol=0, atol=0)
    torch.testing.assert_close(one_b, all_b * last, rtol=0, atol=0)
    assert one_a.any()
    assert one_b.any()


@EVERY_RANK
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_as_lora_is_the_update_at_the_rank(twin, rank, dtype):
    layer = make().to(dtype)
    set_rank_({"layer": layer}, rank)
    a, b = layer.as_lora()
    assert (a.shape, b.shape) == ((rank, 6), (5, rank))
    alive = torch.arange(4) < rank
    expected = twin.update_matrix(layer.b, torch.ones(4), layer.a, alive, 3.0 / rank)
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(b.double() @ a.double(), expected, rtol=tolerance, atol=tolerance)


def test_start_is_exactly_the_base_at_every_rank():
    layer = DyLoRALinear(nn.Linear(6, 5), rank=4, alpha=3.0)
    x = torch.randn(7, 6)
    for rank in (4, 1, 3):
        set_rank_({"layer": layer}, rank)
        assert torch.equal(layer(x), layer.base(x))


def test_a_trained_prefix_does_not_change_when_longer_ranks_are_trained_frozen():
    """What frozen training is for: the model at rank 2 stays what it was."""
    layer, x = make(frozen=True), torch.randn(7, 6, **WIDE)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer.base.requires_grad_(False)
    set_rank_({"layer": layer}, 2)
    before = layer(x).detach()
    set_rank_({"layer": layer}, 3)
    wide = layer(x).detach()
    layer(x).square().sum().backward()
    optimizer.step()
    assert (layer(x) - wide).abs().max() > 1e-3
    set_rank_({"layer": layer}, 2)
    assert torch.equal(layer(x), before)


def test_rank_is_saved_in_the_mask():
    layer, other = make(), make()
    set_rank_({"layer": layer}, 3)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(7, 6, **WIDE)
    assert torch.equal(other(x), layer(x))
    assert "rank_mask" in dict(layer.owned())


def nested(blocks=3, ranks=(4, 2)):
    linears = [nn.Linear(6, 6) for _ in range(2 * blocks)]
    return {
        str(i): DyLoRALinear(base, rank=ranks[i % 2], alpha=1.0) for i, base in enumerate(linears)
    }


def live(layers):
    return {name: int(layer.rank_mask.sum()) for name, layer in layers.items()}


def test_all_layers_use_the_drawn_rank_or_all_that_they_have():
    layers = nested()
    sampler = RankSampler(layers, seed=5)
    for step in range(20):
        sampler.draw_(step)
        rank = sampler.rank_at(step)
        assert live(layers) == {name: min(rank, layer.rank) for name, layer in layers.items()}
        for layer in layers.values():
            assert layer.rank_mask[: live(layers)["0"]].all()


def test_ranks_are_counted_from_one_and_uniform():
    sampler = RankSampler(nested(), seed=1)
    counts = torch.bincount(torch.tensor([sampler.rank_at(step) for step in range(8000)]))
    assert counts[0] == 0
    assert len(counts) == 5
    # 2000 each; the deviation of a count is below 39.
    assert (counts[1:] - 2000).abs().max() < 5 * 39
    bounded = RankSampler(nested(), seed=1, lowest=2, highest=3)
    assert {bounded.rank_at(step) for step in range(50)} == {2, 3}


def test_ranks_are_a_function_of_seed_and_step_alone():
    first, second, third = (RankSampler(nested(), seed=seed) for seed in (7, 7, 8))
    torch.rand(3)
    drawn = [first.rank_at(step) for step in range(64)]
    assert [second.rank_at(step) for step in reversed(range(64))] == drawn[::-1]
    assert [third.rank_at(step) for step in range(64)] != drawn
    # Held, so that a resumed run goes on as it would have.
    assert drawn[:12] == [2, 4, 1, 1, 2, 1, 4, 2, 4, 1, 3, 3]


def test_each_layer_may_draw_its_own():
    layers = nested()
    sampler = RankSampler(layers, seed=7, lowest=2, shared=False)
    drawn = []
    for step in range(64):
        sampler.draw_(step)
        drawn.append(tuple(live(layers).values()))
        expected = {name: sampler.rank_at(step, name) for name in layers}
        assert live(layers) == {
            name: min(rank, layers[name].rank) for name, rank in expected.items()
        }
        for layer in layers.values():
            assert layer.rank_mask[: int(layer.rank_mask.sum())].all()
    ranks = [layer.rank for layer in layers.values()]
    for index, rank in enumerate(ranks):
        assert {row[index] for row in drawn} == set(range(2, rank + 1))
    assert any(len(set(row)) > 1 for row in drawn)
    # Held, so that a resumed run goes on as it would have.
    assert drawn[:4] == [
        (4, 2, 3, 2, 3, 2),
        (2, 2, 3, 2, 2, 2),
        (4, 2, 2, 2, 3, 2),
        (2, 2, 4, 2, 3, 2),
    ]
    sampler.use_(3)
    assert live(layers) == {name: min(3, layer.rank) for name, layer in layers.items()}


def test_saved_sampler_draws_the_same():
    sampler, other = RankSampler(nested(), seed=7, lowest=2), RankSampler(nested(), seed=0)
    other.load_state_dict(copy.deepcopy(sampler.state_dict()))
    assert [other.rank_at(s) for s in range(64)] == [sampler.rank_at(s) for s in range(64)]


def test_operations_of_a_draw_do_not_grow_with_the_layers(kit):
    counted = {}
    for shared in (True, False):
        for blocks in (1, 8):
            sampler = RankSampler(nested(blocks), seed=0, shared=shared)
            with kit.Counted() as mode:
                sampler.draw_(3)
                sampler.use_(2)
            counted[shared, blocks] = mode.operations
        assert counted[shared, 1] == counted[shared, 8]
    # Two for each distinct rank, in the draw and after it.
    assert counted[True, 1]["fill_"] + counted[True, 1]["zero_"] == 8


def test_masks_stay_right_when_the_model_is_copied_or_moved():
    layers = nested()
    RankSampler(layers, seed=0)
    model = copy.deepcopy(nn.ModuleDict(layers)).to(torch.float64)
    set_rank_(dict(model.items()), 1)
    assert set(live(model).values()) == {1}
    assert live(layers)["0"] == 4


def test_ranks_that_cannot_be(kit):
    layers = nested()
    assert kit.error_text(set_rank_, layers, 5) == (
        "rank is 5, expected 1 to 4, the largest of the layers."
    )
    assert kit.error_text(set_rank_, layers, 0).startswith("rank is 0, expected 1 to 4")
    plain = {"plain": LoRALinear(nn.Linear(6, 6), 2, 1.0)}
    assert kit.error_text(set_rank_, plain, 1) == (
        "no layer has nested ranks; inject DyLoRA first."
    )
    for options in ({"lowest": 0}, {"lowest": 3, "highest": 2}, {"highest": 5}):
        low, high = options.get("lowest", 1), options.get("highest", 4)
        assert kit.error_text(RankSampler, layers, seed=0, **options) == (
            f"ranks are drawn from {low} to {high}, expected bounds from 1 to 4, the largest rank "
            "of the DyLoRA layers."
        )
    sampler = RankSampler(layers, seed=3)
    before = sampler.state_dict()
    for key, value, text in [
        (
            "highest",
            5,
            "ranks are drawn from 1 to 5, expected bounds from 1 to 4, the largest rank",
        ),
        ("lowest", "1", "ranks are drawn from '1' to 4, expected bounds from 1 to 4, the largest"),
        ("seed", 2.0, "seed is 2.0, expected a whole number."),
        (
            "step",
            1,
            "the state of the RankSampler has ['highest', 'lowest', 'seed', 'shared', 'step'], e",
        ),
        ("shared", False, "the state of the RankSampler has shared False, expected True; make the"),
    ]:
        assert kit.error_text(sampler.load_state_dict, before | {key: value}).startswith(text)
        assert sampler.state_dict() == before
    assert kit.error_text(sampler.load_state_dict, {}) == (
        "the state of the RankSampler has nothing, expected ['highest', 'lowest', 'seed', "
        "'shared']; give "
        "what its state_dict returned."
    )
    assert "from 1 to 0" in kit.error_text(RankSampler, plain, seed=0)


def test_maker(kit):
    model = kit.Decoder()
    layers = inject_adapters_(model, DyLoRA(rank=3, alpha=1.0, frozen=True), ["q_proj"])
    assert {type(layer) for layer in layers.values()} == {DyLoRALinear}
    assert all(layer.frozen for layer in layers.values())
