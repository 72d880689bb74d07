"""Trainer's checkpoints hold the whole state: resumed exactly, and the best one restored."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hyper_tune import UserError
from hyper_tune.errors import PERSONS_MISTAKES
from hyper_tune.hf import adapt
from hyper_tune.hf.saved import pack, unpack
from hyper_tune.method import METHODS

SAVING = {"save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize("name", ["hyperadalora", "adalora", "dylora", "hyperdora"])
def test_resumed_run_is_the_whole_run_bit_for_bit(
    hf: SimpleNamespace, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "run"
    whole = hf.train(folder, name=name, dropout=0.1, dtype=torch.float32, **SAVING)
    expected = hf.state_of(whole.adapted)
    middle = unpack(load_file(folder / "checkpoint-4" / "model.safetensors"))
    assert (middle["steps"], middle["skipped"], middle["total_steps"]) == (4, 0, 8)
    for step in (2, 6):  # before and after the budget is met
        options = {"name": name, "dropout": 0.1, "dtype": torch.float32}
        resumed = hf.train(folder, resume=folder / f"checkpoint-{step}", **options, **SAVING)
        hf.assert_same(hf.state_of(resumed.adapted), expected)
        assert len(resumed.batches) == 2 * (8 - step)
    start = hf.train(tmp_path / "other", dropout=0.1, dtype=torch.float32, name=name, seed=4)
    with pytest.raises(AssertionError):
        hf.assert_same(hf.state_of(start.adapted), expected)


def test_checkpoint_has_the_adapter_the_state_and_nothing_of_the_base(
    hf: SimpleNamespace, tmp_path: Path
) -> None:
    run = hf.train(tmp_path, save_strategy="steps", save_steps=8)
    folder = tmp_path / "checkpoint-8"
    trainers = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"}
    ours = {"adapter_config.json", "adapter_model.safetensors", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} == trainers | ours | {"trainer_state.json"}
    names = load_file(folder / "model.safetensors").keys()
    assert {name.partition(".")[0] for name in names} == {"hyper_tune"}
    adapter = load_file(folder / "adapter_model.safetensors")
    assert {name.split(".")[2] for name in adapter} == {"bert", "classifier"}
    for name, value in run.model.classifier.state_dict().items():
        assert torch.equal(adapter[f"base_model.model.classifier.{name}"], value)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["classifier"])
    assert config["r"] == max(run.adapted.method.ranks().values())


def test_best_model_has_its_ranks_its_state_and_its_figure(
    hf: SimpleNamespace, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=r"its best checkpoint is of step 2, with 29 ranks"):
        run = hf.train(
            tmp_path,
            **SAVING,
            eval_strategy="steps",
            eval_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=True,  # the loss falls, so that the first is best
        )
    state = run.trainer.state
    assert state.best_global_step == 2
    saved = unpack(load_file(tmp_path / "checkpoint-2" / "model.safetensors"))
    found = run.adapted.state_dict()
    assert (found["steps"], found["skipped"]) == (2, 0)
    left, right = pack(found), pack(saved)
    assert list(left) == list(right)
    for name, value in right.items():
        assert torch.equal(left[name], value), name
    assert run.adapted.method.live_ranks == 29
    assert run.trainer.evaluate()["eval_loss"] == state.best_metric


def test_loading_says_nothing_of_the_bases_missing_weights(
    hf: SimpleNamespace, tmp_path: Path
) -> None:
    run = hf.train(tmp_path, save_strategy="steps", save_steps=8)
    tensors = load_file(tmp_path / "checkpoint-8" / "model.safetensors")
    assert run.model.load_state_dict(tensors) == ([], [])
    whole = run.model.state_dict()
    assert run.model.load_state_dict(dict(list(whole.items())[1:]), strict=False)[0] == [
        next(iter(whole))
    ]


def test_checkpoint_of_a_run_of_another_length_is_refused(
    hf: SimpleNamespace, tmp_path: Path
) -> None:
    hf.train(tmp_path, **SAVING)
    with pytest.raises(UserError, match=r"is of a run of 8 steps, and this one has 12"):
        hf.train(tmp_path, resume=tmp_path / "checkpoint-4", max_steps=12)


def test_checkpoint_without_the_methods_state_is_refused(
    hf: SimpleNamespace, tmp_path: Path
) -> None:
    run = hf.train(tmp_path, **SAVING)
    folder = tmp_path / "checkpoint-4"
    plain = {name: value.contiguous() for name, value in hf.classifier().state_dict().items()}
    save_file(plain, folder / "model.safetensors")
    message = "Trainer resumes at step 4, but the method is at step 0; the checkpoint was not"
    with pytest.raises(UserError, match=re.escape(message)):
        hf.train(tmp_path, resume=folder)
    assert run.adapted.steps == 8


def test_state_of_another_method_is_refused_by_name(hf: SimpleNamespace, tmp_path: Path) -> None:
    adapted = adapt(hf.classifier(), hf.configure("lora"), dtype=torch.float64)
    adapted.save(tmp_path)
    other = adapt(hf.classifier(), hf.configure("adalora"), dtype=torch.float64)
    with pytest.raises(UserError, match=r"model.safetensors: the saved factors are"):
        other.load(tmp_path)


def test_state_that_is_refused_plans_nothing(hf: SimpleNamespace, tmp_path: Path) -> None:
    planned = adapt(hf.classifier(), hf.configure("adalora"), total_steps=8, dtype=torch.float64)
    state = planned.state_dict()
    state["method"]["allocator"]["budget"] += 1
    other = adapt(hf.classifier(), hf.configure("adalora"), dtype=torch.float64)
    before = {name: value.clone() for name, value in pack(other.state_dict()).items()}
    with pytest.raises(PERSONS_MISTAKES, match="live components, but the budget was"):
        other.load_state_dict(state)
    after = pack(other.state_dict())
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    other.plan_(12)
    assert other.total_steps == 12


def test_damaged_state_is_named(hf: SimpleNamespace, tmp_path: Path) -> None:
    adapted = adapt(hf.classifier(), hf.configure("lora"), dtype=torch.float64)
    with pytest.raises(UserError, match=r"model.safetensors cannot be read: "):
        adapted.load(tmp_path)
    adapted.save(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match=r"model.safetensors cannot be read: "):
        adapted.load(tmp_path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"model.safetensors cannot be read: .*is missing"):
        adapted.load(tmp_path)


@pytest.mark.parametrize("name", METHODS)
def test_packed_state_comes_back(hf: SimpleNamespace, tmp_path: Path, name: str) -> None:
    def build(seed: int) -> Any:
        torch.manual_seed(seed)
        return adapt(hf.classifier(), hf.configure(name), total_steps=8, dtype=torch.float64)

    first, second = build(1), build(2)
    first.steps, first.skipped = 3, 2
    first.save(tmp_path)
    second.load(tmp_path)
    left, right = pack(first.state_dict()), pack(second.state_dict())
    assert list(left) == list(right)
    assert all(torch.equal(left[key], right[key]) for key in left)
    for adapted in (first, second):
        adapted.write_factors_()
    assert torch.equal(first.method.stack.values, second.method.stack.values)


@pytest.mark.parametrize("name", ["hyperadalora", "adalora", "dylora", "hyperdora"])
@pytest.mark.parametrize("begun", ["forward", "backward", "steps"])
def test_a_step_under_way_is_dropped_by_loading(
    hf: SimpleNamespace, tmp_path: Path, name: str, begun: str
) -> None:
    def build(seed: int) -> Any:
        torch.manual_seed(seed)
        model = hf.classifier(seed=0)
        adapted = adapt(model, hf.configure(name), total_steps=8, dtype=torch.float64)
        adapted.optimizers(lr=hf.LR, head_lr=hf.HEAD_LR, optimizer=torch.optim.SGD)
        return adapted

    def forward(adapted: Any, row: int) -> Any:
        words = hf.rows()[row]["input_ids"].unsqueeze(0)
        return adapted.model(input_ids=words, labels=torch.tensor([row % 2]))["loss"]

    def take(adapted: Any, rows: range) -> list[float]:
        losses = []
        for row in rows:
            losses.append(forward(adapted, row))
            losses[-1].backward()
            adapted.optimizer.step()
        return [float(loss.detach()) for loss in losses]

    saved = build(1)
    take(saved, range(3))
    saved.save(tmp_path)
    fresh, busy = build(2), build(3)
    if begun == "steps":
        take(busy, range(3, 8))
    loss = forward(busy, 9)
    if begun != "forward":
        (1e3 * loss).backward()
    for adapted in (fresh, busy):
        adapted.load(tmp_path)
    hf.assert_same(hf.state_of(busy), hf.state_of(fresh))
    assert (busy.steps, busy.skipped) == (fresh.steps, fresh.skipped) == (3, 0)
    busy.export(tmp_path / "adapter")  # refused where a step with gradients is under way
    assert take(busy, range(3, 6)) == take(fresh, range(3, 6))
    hf.assert_same(hf.state_of(busy), hf.state_of(fresh))
