"""Loops without Trainer: torch's own, with a gradient scaler, compiled, and accelerate's."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from hyper_tune import UserError
from hyper_tune.hf import AdaptedModel, adapt, register_


def build(hf: SimpleNamespace, **options: Any) -> AdaptedModel:
    model = hf.classifier()
    torch.manual_seed(1)
    adapted = adapt(model, hf.configure(), total_steps=hf.STEPS, dtype=torch.float64)
    adapted.optimizers(lr=hf.LR, head_lr=hf.HEAD_LR, **options)
    return adapted


def batches(hf: SimpleNamespace) -> list[dict[str, Any]]:
    loader: Any = DataLoader(hf.rows(), batch_size=2)
    return list(loader)


def plain(hf: SimpleNamespace, steps: int = 4, **options: Any) -> AdaptedModel:
    """Train as any model of torch is trained."""
    adapted = build(hf, **options)
    for batch in batches(hf)[:steps]:
        loss = adapted.model(**batch)["loss"]
        adapted.optimizer.zero_grad()
        loss.backward()
        adapted.optimizer.step()
    return adapted


def test_loop_of_torch_takes_the_methods_steps(hf: SimpleNamespace) -> None:
    found = plain(hf)
    twin = build(hf)
    for batch in batches(hf)[:4]:
        with twin.method.step(twin.optimizer.inner):
            twin.model.forward(**batch)["loss"].backward()
    hf.assert_same(hf.state_of(found), hf.state_of(twin))
    assert (found.steps, found.method.live_ranks) == (4, 20)


def test_gradients_that_were_set_to_none_are_dropped(hf: SimpleNamespace) -> None:
    expected = hf.state_of(plain(hf))
    adapted = build(hf)
    first, *_ = batches(hf)
    for batch in batches(hf)[:4]:
        (3 * adapted.model(**first)["loss"]).backward()
        adapted.model.zero_grad()
        adapted.model(**batch)["loss"].backward()
        adapted.optimizer.step()
        adapted.model.zero_grad()
    hf.assert_same(hf.state_of(adapted), expected)


def test_step_that_the_scaler_skips_commits_nothing(hf: SimpleNamespace) -> None:
    expected = hf.state_of(plain(hf))
    adapted = build(hf)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    poisoned = [*batches(hf)[:2], None, *batches(hf)[2:4]]
    for batch in poisoned:
        loss = adapted.model(**(batch or batches(hf)[0]))["loss"]
        if batch is None:
            before = hf.state_of(adapted)
            loss = loss * torch.inf
        scaler.scale(loss).backward()
        scaler.step(adapted.optimizer)
        scaler.update()
        if batch is None:
            hf.assert_same(hf.state_of(adapted), before)
        adapted.optimizer.zero_grad()
    assert scaler.get_scale() == 2.0**9
    assert (adapted.steps, adapted.skipped) == (4, 0)
    hf.assert_same(hf.state_of(adapted), expected)


def test_scaler_may_unscale_first_and_clipping_is_the_methods(hf: SimpleNamespace) -> None:
    expected = hf.state_of(plain(hf, max_grad_norm=0.1))
    adapted = build(hf, max_grad_norm=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for batch in batches(hf)[:4]:
        scaler.scale(adapted.model(**batch)["loss"]).backward()
        scaler.unscale_(adapted.optimizer)
        scaler.step(adapted.optimizer)
        scaler.update()
    hf.assert_same(hf.state_of(adapted), expected)
    with pytest.raises(AssertionError):
        hf.assert_same(expected, hf.state_of(plain(hf)))


def test_compiled_model_takes_the_same_steps(hf: SimpleNamespace) -> None:
    adapted = build(hf)
    compiled: Any = torch.compile(adapted.model, backend="eager")
    for batch in batches(hf)[:4]:
        compiled(**batch)["loss"].backward()
        adapted.optimizer.step()
    found, expected = hf.state_of(adapted)[0], hf.state_of(plain(hf))[0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def accelerated(hf: SimpleNamespace, folder: Path | None, load: bool = False) -> AdaptedModel:
    """Four steps of two micro-batches; saved after two, or loaded in place of these."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    adapted = build(hf)
    schedule = torch.optim.lr_scheduler.LinearLR(adapted.optimizer, total_iters=4)
    model, optimizer, schedule = accelerator.prepare(adapted.model, adapted.optimizer, schedule)
    register_(accelerator, adapted)
    done = 0
    if load:
        accelerator.load_state(str(folder))
        done = 4
    for number, batch in enumerate(batches(hf)[done:8], done):
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch)["loss"])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if number == 3 and folder is not None:
            accelerator.save_state(str(folder))
    return adapted


def test_loop_of_accelerate_takes_the_methods_steps(hf: SimpleNamespace) -> None:
    found = accelerated(hf, None)
    twin = build(hf)
    for step in range(4):
        for group, lr in zip(twin.optimizer.inner.param_groups, (hf.LR, hf.HEAD_LR), strict=True):
            group["lr"] = lr * (1 / 3 + (1 - 1 / 3) * step / 4)
        with twin.method.step(twin.optimizer.inner):
            for batch in batches(hf)[2 * step : 2 * step + 2]:
                (twin.model.forward(**batch)["loss"] / 2).backward()
    left, right = hf.state_of(found)[0], hf.state_of(twin)[0]
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-11)


def test_accelerates_checkpoint_holds_the_whole_state(hf: SimpleNamespace, tmp_path: Path) -> None:
    expected = hf.state_of(accelerated(hf, tmp_path))
    names = load_file(tmp_path / "model.safetensors").keys()
    assert {name.partition(".")[0] for name in names} == {"hyper_tune"}
    hf.assert_same(hf.state_of(accelerated(hf, tmp_path, load=True)), expected)


def test_step_without_a_forward_pass_is_refused(hf: SimpleNamespace) -> None:
    adapted = build(hf)
    with pytest.raises(UserError, match=r"has run no forward pass with gradients since"):
        adapted.optimizer.step()
    with torch.no_grad():
        adapted.model(**batches(hf)[0])
    with pytest.raises(UserError, match=r"has run no forward pass with gradients since"):
        adapted.optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1}, "lr is -1, but must be a number at least 0; correct it."),
        ({"lr": "1e-4"}, "lr is '1e-4', but must be a number at least 0; correct it."),
        ({"head_lr": "1"}, "head_lr is '1', but must be a number at least 0; correct it."),
        ({"betas": [0.9]}, "AdamW refuses the options betas=[0.9]: list index out of range; cor"),
        ({"weight_decy": 1}, "AdamW refuses the options weight_decy=1: AdamW.__init__() got an u"),
        ({"eps": -1}, "AdamW refuses the options eps=-1: Invalid epsilon value: -1; correct them."),
    ],
)
def test_an_optimizer_that_cannot_be_is_refused_in_one_line(
    hf: SimpleNamespace, options: dict[str, Any], message: str
) -> None:
    adapted = build(hf)
    with pytest.raises(UserError) as caught:
        adapted.optimizers(**{"lr": hf.LR, **options})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_length_of_the_run_must_be_known(hf: SimpleNamespace) -> None:
    adapted = adapt(hf.classifier(), hf.configure(), dtype=torch.float64)
    adapted.optimizers(lr=1e-3)
    with pytest.raises(UserError, match=r"hyperadalora prunes by a schedule, but the number of"):
        adapted.model(**batches(hf)[0])


def test_model_is_not_moved_or_cast_under_the_method(hf: SimpleNamespace) -> None:
    adapted = build(hf)
    assert adapted.model.to("cpu:0") is adapted.model
    assert adapted.model.to(torch.device("cpu")) is adapted.model
    message = "the model was to be moved or cast to {} with a method on it; do so before"
    with pytest.raises(UserError, match=re.escape(message.format("meta"))):
        adapted.model.to("meta")
    with pytest.raises(UserError, match=re.escape(message.format("torch.bfloat16"))):
        adapted.model.to(torch.bfloat16)


def test_groups_cannot_be_added(hf: SimpleNamespace) -> None:
    adapted = build(hf)
    with pytest.raises(UserError, match=r"name the module in modules_to_save"):
        adapted.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})


def test_options_of_the_groups_count(hf: SimpleNamespace) -> None:
    adapted = build(hf, optimizer=torch.optim.SGD, momentum=0.5)
    before = hf.state_of(adapted)[0]
    for group in adapted.optimizer.param_groups:
        group["lr"] = 0.0
    adapted.model(**batches(hf)[0])["loss"].backward()
    adapted.optimizer.step()
    after = hf.state_of(adapted)[0]
    moved = [n for n in before if not torch.equal(before[n], after[n])]
    assert not [name for name in moved if "hypernetworks" in name or "classifier" in name]
    saved = adapted.optimizer.state_dict()
    assert [group["momentum"] for group in saved["param_groups"]] == [0.5, 0.5]
    other = build(hf, optimizer=torch.optim.SGD, momentum=0.9)
    other.optimizer.load_state_dict(saved)
    assert [g["momentum"] for g in other.optimizer.inner.param_groups] == [0.5, 0.5]
    assert [g["lr"] for g in other.optimizer.param_groups] == [0.0, 0.0]
