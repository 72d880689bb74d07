"""A run that is saved, read from the disk and loaded goes on bit for bit."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hyper_tune.checkpoint import read_newest, write_checkpoint
from hyper_tune.errors import PERSONS_MISTAKES

STEPS = 9


@pytest.mark.parametrize("saved_after", [0, 2, 3, 4, 6])
def test_a_loaded_run_equals_the_uninterrupted_one(
    small: SimpleNamespace, case: str, tmp_path: Path, saved_after: int
) -> None:
    whole = small.build(case)
    expected = [whole.step(small.batches(step)) for step in range(STEPS)]

    first = small.build(case)
    found = [first.step(small.batches(step)) for step in range(saved_after)]
    write_checkpoint(tmp_path, saved_after, first.method.state_dict(first.optimizer))

    second = small.build(case, seed=1)
    for step in range(saved_after % 3 + 1):
        second.step(small.batches(100 + step))
    _, state, _ = read_newest(tmp_path)
    second.method.load_state_dict(state, second.optimizer)
    small.assert_same_state(second.state(), first.state())
    found += [second.step(small.batches(step)) for step in range(saved_after, STEPS)]

    assert found == expected
    small.assert_same_state(second.state(), whole.state())
    assert torch.equal(second.method.stack.values, whole.method.stack.values)
    assert second.method.ranks() == whole.method.ranks()
    assert [report.step for report in (r.allocation for r in expected) if report] == (
        [3, 6] if "ada" in case else []
    )


def assert_matters(small: SimpleNamespace, case: str, part: str) -> None:
    """Load a state whose part is that of another run: the steps that follow differ."""
    first, fresh = small.build(case), small.build(case, seed=1)
    for step in range(4):
        first.step(small.batches(step))
    state = copy.deepcopy(first.method.state_dict(first.optimizer))
    state[part] = copy.deepcopy(fresh.method.state_dict(fresh.optimizer))[part]
    second = small.build(case)
    second.method.load_state_dict(state, second.optimizer)
    for run in (first, second):
        for step in range(4, 7):
            run.step(small.batches(step))
    with pytest.raises(AssertionError):
        small.assert_same_state(second.state(), first.state())


@pytest.mark.parametrize("part", ["owner", "optimizer"])
def test_owner_and_optimizer_cannot_be_left_out(
    small: SimpleNamespace, case: str, part: str
) -> None:
    assert_matters(small, case, part)


@pytest.mark.parametrize("case", ["adalora", "hyperadalora static none"])
def test_the_allocator_cannot_be_left_out(small: SimpleNamespace, case: str) -> None:
    assert_matters(small, case, "allocator")


def test_the_base_is_not_saved(small: SimpleNamespace, case: str) -> None:
    run = small.build(case)
    run.step(small.batches(0))
    tensors, _ = run.state()
    bases = [p for name, p in run.model.named_parameters() if ".base." in name]
    assert len(bases) == 6
    for base in bases:
        assert not any(torch.equal(base, value) for value in tensors.values())


def test_the_state_is_live(small: SimpleNamespace, case: str) -> None:
    run = small.build(case)
    state = run.method.state_dict(run.optimizer)
    before = run.state()
    run.step(small.batches(0))
    changed = {name: value.clone() for name, value in state["owner"].items()}
    assert any(not torch.equal(changed[n], before[0][f"owner/{n}"]) for n in changed)
    assert all(torch.equal(changed[n], run.state()[0][f"owner/{n}"]) for n in changed)


def test_writing_the_factors_changes_nothing_that_training_depends_on(
    small: SimpleNamespace, case: str
) -> None:
    run, untouched = small.build(case), small.build(case)
    x = small.batches(77)[0]
    outputs = []
    for step in range(7):
        before = run.state()
        run.method.write_factors_()
        with torch.no_grad():
            outputs.append(run.model(x))
        run.method.write_factors_()
        with torch.no_grad():
            assert torch.equal(run.model(x), outputs[-1])
        small.assert_same_state(run.state(), before)
        assert run.step(small.batches(step)) == untouched.step(small.batches(step))
        small.assert_same_state(run.state(), untouched.state())
    assert len({tuple(output.flatten().tolist()) for output in outputs}) == 7


def test_the_factors_written_are_those_of_the_next_step(small: SimpleNamespace, case: str) -> None:
    run = small.build(case)
    for step in range(5):
        run.method.write_factors_()
        written = run.method.stack.values.clone()
        with run.method.step(run.optimizer, 1.0) as block:
            assert torch.equal(run.method.stack.values, written)
            for x in small.batches(step):
                block.backward(run.loss_sum(x), tokens=len(x))


def test_a_state_without_an_optimizer(small: SimpleNamespace, case: str) -> None:
    first, second = small.build(case), small.build(case, seed=1)
    for step in range(4):
        first.step(small.batches(step))
    state = first.method.state_dict()
    assert state["optimizer"] is None
    second.method.load_state_dict(state)
    tensors, plain = first.state()
    found, found_plain = second.state()
    kept = [name for name in tensors if not name.startswith("optimizer/")]
    assert len(kept) > 1
    for name in kept:
        assert torch.equal(found[name], tensors[name])
    assert found_plain["allocator"] == plain["allocator"]


@pytest.mark.parametrize("case", ["hyperlora recurrent none", "hyperadalora static none"])
def test_nothing_waits_after_the_factors_are_written(small: SimpleNamespace, case: str) -> None:
    run = small.build(case)
    run.method.write_factors_()
    for call in (run.method.owner.backward, run.method.owner.commit):
        with pytest.raises(ValueError, match="was called without a pending refresh"):
            call()


def _of_other_masks(state: dict[str, Any]) -> None:
    state["allocator"]["budget"] += 1


def _of_other_draws(state: dict[str, Any]) -> None:
    state["sampled"]["shared"] = not state["sampled"]["shared"]


def _of_other_factors(state: dict[str, Any]) -> None:
    name, value = list(state["owner"].items())[-1]
    state["owner"][name] = value.new_zeros(3, 1, 1)


def _of_fewer_factors(state: dict[str, Any]) -> None:
    del state["owner"][list(state["owner"])[-1]]


def _of_other_parameters(state: dict[str, Any]) -> None:
    state["optimizer"]["groups"][0]["names"][-1] = "another"


def _of_other_moments(state: dict[str, Any]) -> None:
    state["optimizer"]["groups"].append({"names": []})


Damage = Callable[[dict[str, Any]], None]
DAMAGE = [_of_other_factors, _of_fewer_factors, _of_other_parameters, _of_other_moments]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_state_that_is_refused_changes_nothing(
    small: SimpleNamespace, case: str, damage: Damage
) -> None:
    assert_refused(small, case, damage)


@pytest.mark.parametrize("case", ["adalora", "hyperadalora static none"])
def test_masks_that_are_refused_change_nothing(small: SimpleNamespace, case: str) -> None:
    assert_refused(small, case, _of_other_masks)


@pytest.mark.parametrize("case", ["dylora each", "hyperdylora static token_rms"])
def test_draws_that_are_refused_change_nothing(small: SimpleNamespace, case: str) -> None:
    assert_refused(small, case, _of_other_draws)


def assert_refused(small: SimpleNamespace, case: str, damage: Damage) -> None:
    """Load a damaged state of another run: what follows is as if it had not been tried."""
    other, run, untouched = (small.build(case, seed=seed) for seed in (0, 1, 1))
    for step in range(4):
        other.step(small.batches(step))
        for each in (run, untouched):
            each.step(small.batches(50 + step))
    state = copy.deepcopy(other.method.state_dict(other.optimizer))
    damage(state)
    with pytest.raises(PERSONS_MISTAKES):
        run.method.load_state_dict(state, run.optimizer)
    small.assert_same_state(run.state(), untouched.state())
    assert torch.equal(run.method.stack.values, untouched.method.stack.values)
    assert run.method.ranks() == untouched.method.ranks()
    for step in range(4, 6):
        assert run.step(small.batches(step)) == untouched.step(small.batches(step))
    small.assert_same_state(run.state(), untouched.state())
