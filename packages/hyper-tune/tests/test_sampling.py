"""The order of the samples is a pure function of seed, epoch, step and rank."""

import hashlib
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hyper_tune.errors import UserError
from hyper_tune.sampling import batch_positions, derive_seed, sample_at, total_steps

SIZES = st.integers(1, 40)


def twin_order(dataset_size: int, seed: int, shuffle: bool, epochs: int) -> list[int]:
    """The stream of samples, one epoch after the other."""
    order = []
    for epoch in range(epochs):
        text = f"({seed}, 'order', {epoch})".encode()
        number = int(hashlib.sha256(text).hexdigest()[:16], 16) // 2
        generator = torch.Generator().manual_seed(number)
        shuffled = torch.randperm(dataset_size, generator=generator).tolist()
        order += shuffled if shuffle else list(range(dataset_size))
    return order


@settings(deadline=None)
@given(SIZES, st.integers(0, 2**40), st.booleans(), st.integers(1, 4))
def test_stream_equals_the_twin(size: int, seed: int, shuffle: bool, epochs: int) -> None:
    found = [
        sample_at(position, dataset_size=size, seed=seed, shuffle=shuffle)
        for position in range(epochs * size)
    ]
    assert found == twin_order(size, seed, shuffle, epochs)


@settings(deadline=None)
@given(SIZES, st.integers(0, 99), st.booleans(), st.integers(1, 4))
def test_each_epoch_has_every_sample_once(size: int, seed: int, shuffle: bool, epochs: int) -> None:
    for epoch in range(epochs):
        found = [
            sample_at(epoch * size + offset, dataset_size=size, seed=seed, shuffle=shuffle)
            for offset in range(size)
        ]
        assert sorted(found) == list(range(size))


def epoch(seed: int, number: int, size: int = 50) -> list[int]:
    return [
        sample_at(number * size + offset, dataset_size=size, seed=seed, shuffle=True)
        for offset in range(size)
    ]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [epoch(seed, number) for seed in (0, 1, 2) for number in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == 9
    assert list(range(50)) not in orders


def test_the_order_does_not_depend_on_what_was_asked_before() -> None:
    first = epoch(0, 0)
    state = torch.get_rng_state()
    for number in (5, 3, 4, 0):
        epoch(0, number)
    torch.manual_seed(12)
    assert epoch(0, 0) == first
    torch.set_rng_state(state)
    epoch(0, 9)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_order_stays_the_same_for_ever() -> None:
    assert derive_seed(0) == 5254295370254170289
    assert derive_seed(7, "step", 3, 1) == 3811029879883077187
    assert epoch(3, 1, size=8) == [7, 2, 5, 6, 3, 4, 1, 0]


def test_seeds_of_other_purposes_differ() -> None:
    purposes = [
        ("order", 1),
        ("order", 2),
        ("step", 1),
        ("step", 1, 0),
        ("step", 1, 1),
        ("1",),
        (1,),
    ]
    seeds = {derive_seed(seed, *purpose) for seed in (0, 1) for purpose in purposes}
    assert len(seeds) == 2 * len(purposes)
    assert all(0 <= seed < 2**63 for seed in seeds)


def flat(lists: list[list[Any]]) -> list[Any]:
    return list(itertools.chain(*lists))


def batches(step: int, batch: int, accumulation: int, world: int, rank: int) -> list[list[int]]:
    positions = batch_positions(
        step, batch_size=batch, accumulation=accumulation, world_size=world, rank=rank
    )
    return [
        [sample_at(p, dataset_size=11, seed=5, shuffle=True) for p in part] for part in positions
    ]


@settings(deadline=None)
@given(st.integers(0, 20), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_batches_equal_the_stream_cut_in_pieces(
    step: int, batch: int, accumulation: int, world: int
) -> None:
    size = batch * accumulation * world
    epochs = ((step + 1) * size) // 11 + 1
    stream = twin_order(11, 5, shuffle=True, epochs=epochs)[step * size : (step + 1) * size]
    found: list[int] = []
    by_rank = [batches(step, batch, accumulation, world, rank) for rank in range(world)]
    for micro_batch in range(accumulation):
        for rank in range(world):
            assert len(by_rank[rank]) == accumulation
            assert len(by_rank[rank][micro_batch]) == batch
            found += by_rank[rank][micro_batch]
    assert found == stream


@pytest.mark.parametrize(
    "split", [(1, 1, 4), (1, 2, 2), (2, 1, 2), (4, 1, 1), (1, 4, 1), (2, 2, 1)]
)
def test_every_split_of_a_global_batch_has_the_same_samples(split: tuple[int, int, int]) -> None:
    for step in range(8):
        (whole,) = batches(step, 4, 1, 1, 0)
        batch, accumulation, world = split
        parts = [batches(step, batch, accumulation, world, rank) for rank in range(world)]
        assert sorted(flat(flat(parts))) == sorted(whole)


def test_the_tail_of_a_run_is_the_run_from_there() -> None:
    whole = [batches(step, 2, 2, 1, 0) for step in range(9)]
    assert [batches(step, 2, 2, 1, 0) for step in range(4, 9)] == whole[4:]
    assert flat(flat(whole)) == twin_order(11, 5, shuffle=True, epochs=4)[:36]


@settings(deadline=None)
@given(SIZES, st.integers(1, 9), st.integers(1, 5), st.none() | st.integers(1, 30))
def test_steps_are_the_whole_batches(
    size: int, global_batch: int, epochs: int, max_steps: int | None
) -> None:
    steps = 0
    while (steps + 1) * global_batch <= epochs * size:
        steps += 1
    if steps:
        expected = steps if max_steps is None or steps < max_steps else max_steps
        assert total_steps(size, global_batch, epochs, max_steps) == expected
    else:
        with pytest.raises(UserError, match="fewer than one step takes"):
            total_steps(size, global_batch, epochs, max_steps)


def test_too_few_samples_are_refused_with_the_remedy() -> None:
    with pytest.raises(UserError) as caught:
        total_steps(3, 8, epochs=2, max_steps=None)
    assert str(caught.value) == (
        "2 epoch(s) of 3 samples are fewer than one step takes (8); lower batch_size or "
        "gradient_accumulation_steps, or raise epochs."
    )


def test_a_stream_needs_its_number_of_steps() -> None:
    assert total_steps(None, 8, epochs=3, max_steps=5) == 5
    with pytest.raises(UserError) as caught:
        total_steps(None, 8, epochs=3, max_steps=None)
    assert str(caught.value) == (
        "dataset is a stream, whose end is not known before; set max_steps."
    )
