"""Smaller factors compute the same, and the optimizer goes on as if nothing had been cut."""

import copy

import pytest
import torch
from torch import nn

from rank_budget import (
    CubicBudget,
    FixedGrowth,
    FixedPruning,
    RankAllocator,
    SmoothedSensitivity,
    attach_,
    compact_,
    droppable,
    ranked_layers,
)


class SVD(nn.Module):
    def __init__(self, rank=4, out=5, into=6):
        super().__init__()
        self.rank = rank
        self.p = nn.Parameter(torch.randn(out, rank, dtype=torch.float64))
        self.lam = nn.Parameter(torch.randn(rank, dtype=torch.float64))
        self.q = nn.Parameter(torch.randn(rank, into, dtype=torch.float64))
        self.register_buffer("rank_mask", torch.ones(rank, dtype=torch.bool))

    def forward(self, x):
        return (x @ self.q.T * (self.lam * self.rank_mask)) @ self.p.T


def step(model, optimizer, seed):
    optimizer.zero_grad()
    x = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    (model(x) - 1).square().mean().backward()
    optimizer.step()


OPTIMIZERS = [
    lambda parameters: torch.optim.Adam(parameters, lr=0.1),
    lambda parameters: torch.optim.AdamW(parameters, lr=0.1, amsgrad=True),
    lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    lambda parameters: torch.optim.SGD(parameters, lr=0.01),
]


def pruned_model(make):
    model = nn.Sequential(SVD(4, 6), SVD(3))
    optimizer = make(model.parameters())
    layers = ranked_layers(model)
    allocator = RankAllocator(layers, FixedPruning(7, 3, 2, 1))
    for seed in range(3):
        step(model, optimizer, seed)
        allocator.step()
    return model, optimizer, layers, allocator


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_training_goes_on_as_if_nothing_had_been_cut(make):
    model, optimizer, layers, allocator = pruned_model(make)
    whole = copy.deepcopy(model)
    names = dict(zip(model.parameters(), whole.parameters(), strict=True))
    other = make(whole.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    masks = allocator.masks()
    assert len(names) == 6

    compact_(layers, masks, optimizer)

    x = torch.randn(8, 6, dtype=torch.float64)
    torch.testing.assert_close(model(x), whole(x), rtol=1e-12, atol=1e-12)
    for name, layer in layers.items():
        live = int(masks[name].sum())
        assert layer.rank == live == layer.rank_mask.numel() == layer.lam.numel()
        assert layer.p.shape[1] == layer.q.shape[0] == live
        assert layer.rank_mask.all()
    in_optimizer = [p for group in optimizer.param_groups for p in group["params"]]
    assert list(map(id, in_optimizer)) == list(map(id, model.parameters()))
    for seed in range(3, 7):
        step(model, optimizer, seed)
        step(whole, other, seed)
    for (name, layer), kept in zip(layers.items(), whole, strict=True):
        mask = masks[name]
        pairs = ((layer.p, kept.p[:, mask]), (layer.lam, kept.lam[mask]), (layer.q, kept.q[mask]))
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_nothing_has_been_changed_if_the_state_cannot_be_resized(kit):
    model, _, layers, allocator = pruned_model(OPTIMIZERS[0])
    optimizer = torch.optim.Adafactor(model.parameters())
    step(model, optimizer, 9)
    before = list(model.parameters())
    text = kit.error_text(compact_, layers, allocator.masks(), optimizer)
    assert text == (
        "the optimizer's row_var of p of 0 has the shape (6, 1), expected (6, 4); use an "
        "optimizer whose state has the shape of its parameters, such as Adam."
    )
    assert list(map(id, before)) == list(map(id, model.parameters()))


def test_a_layer_without_a_mask(kit):
    _, _, layers, allocator = pruned_model(OPTIMIZERS[0])
    masks = allocator.masks()
    del masks["1"]
    assert kit.error_text(compact_, layers, masks) == "1 has no mask; give one for each layer."


def test_masks_of_another_length_change_nothing(kit):
    model, optimizer, layers, allocator = pruned_model(OPTIMIZERS[0])
    before = list(model.parameters())
    for mask, text in (
        (torch.ones(2, dtype=torch.bool), "torch.bool (2,)"),
        (torch.ones(5, dtype=torch.bool), "torch.bool (5,)"),
        (torch.ones(3), "torch.float32 (3,)"),
    ):
        masks = allocator.masks() | {"1": mask}
        assert kit.error_text(compact_, layers, masks, optimizer) == (
            f"the mask of 1 is {text}, expected torch.bool (3,); give what the allocator's masks() "
            "returned before the first compact_."
        )
    assert list(map(id, before)) == list(map(id, model.parameters()))


@pytest.mark.parametrize("column", [False, True])
def test_an_attached_allocator_lets_compacted_layers_train_on(kit, column):
    layers = {name: kit.triplet(3, 4, 5, mask=False, column=column) for name in "abc"}
    factors = [factor for layer in layers.values() for factor in (layer.p, layer.lam, layer.q)]
    optimizer = torch.optim.Adam(factors, lr=0.1)
    schedule = CubicBudget(9, 4, 3, cooldown=1)
    allocator = RankAllocator(layers, schedule, score=SmoothedSensitivity())
    attach_(allocator, optimizer)
    for _ in range(2):
        optimizer.step()
    kept = {name: layers[name] for name in "ab"}
    compact_(kept, allocator.masks(), optimizer)
    before = {}
    for name, layer in layers.items():
        layer.lam.grad = torch.ones_like(layer.lam)
        before[name] = layer.lam.detach().clone()
    optimizer.step()
    assert allocator.steps == 3
    for name, layer in layers.items():
        live = allocator.masks()[name]
        alive = torch.ones(layer.lam.shape[0], dtype=torch.bool) if name in kept else live
        assert (layer.lam[alive] != before[name][alive]).all()
        assert not layer.lam[~alive].any()


def test_layers_compacted_while_an_allocator_still_prunes_are_refused(kit):
    layers = {name: kit.triplet(3, 4, 5, mask=False) for name in "ab"}
    optimizer = torch.optim.SGD([layer.lam for layer in layers.values()])
    allocator = RankAllocator(layers, FixedPruning(6, 1, 3, 1))
    attach_(allocator, optimizer)
    optimizer.step()
    compact_(layers, allocator.masks(), optimizer)
    text = kit.error_text(optimizer.step)
    assert "when the allocator was made; make a new one." in text


def test_no_state_is_loaded_into_compacted_layers(kit):
    _, optimizer, layers, allocator = pruned_model(OPTIMIZERS[0])
    state = copy.deepcopy(allocator.state_dict())
    compact_(layers, allocator.masks(), optimizer)
    state["steps"] = 99
    text = kit.error_text(allocator.load_state_dict, state)
    assert "when the allocator was made; make a new one." in text
    assert allocator.steps == 3


def test_an_allocator_of_the_larger_factors_is_done(kit):
    model, optimizer, layers, allocator = pruned_model(OPTIMIZERS[0])
    compact_(layers, allocator.masks(), optimizer)
    live = sum(layer.rank for layer in layers.values())
    step(model, optimizer, 3)
    again = RankAllocator(layers, FixedPruning(live, 1, 2, 1))
    again.step()
    assert again.live_ranks == 1


def test_droppable_is_what_will_never_live_again(kit):
    layers = {"a": kit.triplet(3, 4, 5), "b": kit.triplet(2, 4, 5)}
    nothing = {"a": [], "b": []}
    for direction, schedule in (
        ("prune", CubicBudget(5, 2, 4, cooldown=1)),
        ("regrow", CubicBudget(5, 2, 4, cooldown=1)),
        ("grow", FixedGrowth(2, 4, 1, 2)),
    ):
        for layer in layers.values():
            layer.rank_mask.fill_(True)
            torch.nn.init.normal_(layer.lam)
        allocator = RankAllocator(layers, schedule, direction=direction)
        for number in range(1, 5):
            allocator.step()
            dead = {
                n: m.logical_not().nonzero()[:, 0].tolist() for n, m in allocator.masks().items()
            }
            certain = direction == "prune" or number >= schedule.end
            assert droppable(allocator) == (dead if certain else nothing)
        assert droppable(allocator) != nothing
