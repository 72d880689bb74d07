"""What Trainer drives is the method's own step: the same numbers, whatever Trainer was told."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from hyper_tune import UserError
from hyper_tune.hf import adapt
from hyper_tune.method import METHODS

GAMMA = 0.1


def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss with a tenth of each label spread over all classes, written out."""
    logs = logits - logits.exp().sum(dim=-1, keepdim=True).log()
    right = -logs[torch.arange(len(labels)), labels]
    return (0.9 * right + 0.1 * -logs.mean(dim=-1)).mean()


def doubled(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A loss of the user's own, over all items of the step."""
    summed = functional.cross_entropy(outputs["logits"], labels, reduction="sum")
    return 2 * summed / num_items_in_batch


LOSSES = {
    "plain": ({}, {}, functional.cross_entropy),
    "label smoothing": ({"label_smoothing_factor": 0.1}, {}, smoothed),
    "own loss": (
        {},
        {"compute_loss_func": doubled},
        lambda z, y: 2 * functional.cross_entropy(z, y),
    ),
}


def twin(
    hf: SimpleNamespace, name: str, batches: list[dict[str, Tensor]], loss: Any, clip: float | None
) -> tuple[Any, list[float]]:
    """Train by the method's own step alone, on the same micro-batches; return state and losses."""
    model = hf.classifier()
    torch.manual_seed(1)
    adapted = adapt(model, hf.configure(name), total_steps=hf.STEPS, dtype=torch.float64)
    adapted.optimizers(lr=hf.LR, head_lr=hf.HEAD_LR)
    inner = adapted.optimizer.inner
    torch.nn.Module.train(model)
    losses = []
    for step in range(hf.STEPS):
        for group, lr in zip(inner.param_groups, (hf.LR, hf.HEAD_LR), strict=False):
            group["lr"] = lr * (1 - step / hf.STEPS)
        pair = batches[2 * step : 2 * step + 2]
        with adapted.method.step(inner, clip):
            parts = [loss(bare(model, b["input_ids"]), b["labels"]) / 2 for b in pair]
            for part in parts:
                part.backward()
        losses.append(sum(float(part.detach()) for part in parts))
    adapted.steps = hf.STEPS
    return hf.state_of(adapted), losses


def bare(model: Any, words: Tensor) -> Tensor:
    """The logits of a model, past the hooks that begin steps."""
    logits: Tensor = model.forward(input_ids=words)["logits"]
    return logits


@pytest.mark.parametrize("name", ["hyperadalora", "adalora"])
@pytest.mark.parametrize("kind", LOSSES)
def test_steps_are_those_of_the_method_whatever_the_loss(
    hf: SimpleNamespace, tmp_path: Path, name: str, kind: str
) -> None:
    options, trainer, loss = LOSSES[kind]
    run = hf.train(tmp_path, name=name, trainer=trainer, **options)
    expected, losses = twin(hf, name, [readable(b, run) for b in run.batches], loss, 1.0)
    found = hf.state_of(run.adapted)
    assert list(found[0]) == list(expected[0])
    for key, value in expected[0].items():
        torch.testing.assert_close(found[0][key], value, rtol=1e-9, atol=1e-11, msg=key)
    logged = [row["loss"] for row in run.trainer.state.log_history if "loss" in row]
    assert logged == pytest.approx(losses, rel=1e-6)


def readable(batch: dict[str, Tensor], run: SimpleNamespace) -> dict[str, Tensor]:
    """A micro-batch with its labels, also where Trainer computes the loss and takes them out."""
    if "labels" in batch:
        return batch
    return {**batch, "labels": (batch["input_ids"][:, 0] >= 15).long()}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains(hf: SimpleNamespace, tmp_path: Path, name: str) -> None:
    run = hf.train(tmp_path, name=name)
    before = hf.classifier().state_dict()
    after = run.model.state_dict()
    base = {key.replace(".base.", "."): value for key, value in after.items()}
    for key, value in before.items():
        assert torch.equal(base[key], value) != key.startswith("classifier"), key
    rows = [row for row in run.trainer.state.log_history if "loss" in row]
    assert rows[-1]["live_ranks"] == (20 if METHODS[name].prunes else 39)
    assert (run.adapted.steps, run.adapted.skipped) == (8, 0)


def test_logs_have_the_norm_of_what_is_trained_and_clipping_is_the_methods(
    hf: SimpleNamespace, tmp_path: Path
) -> None:
    sizes = {}
    for clip in (0.0, 0.01):
        run = hf.train(tmp_path, max_grad_norm=clip, optimizer=torch.optim.SGD)
        first = next(row for row in run.trainer.state.log_history if "loss" in row)
        assert first["penalty"] > 0.1
        sizes[clip] = first["grad_norm"]
        assert run.trainer.args.max_grad_norm == clip
    assert sizes[0.0] == pytest.approx(sizes[0.01], rel=1e-12)


def test_evaluation_sees_the_next_steps_factors_and_changes_nothing(
    hf: SimpleNamespace, tmp_path: Path
) -> None:
    # Without dropout: a data loader draws from the generator that dropout draws from.
    plain = hf.train(tmp_path)
    watched = hf.train(tmp_path, eval_strategy="steps", eval_steps=1)
    hf.assert_same(hf.state_of(watched.adapted), hf.state_of(plain.adapted))
    reported = [r["eval_loss"] for r in watched.trainer.state.log_history if "eval_loss" in r]
    assert len(reported) == hf.STEPS
    plain.adapted.method.write_factors_()
    plain.model.eval()
    words = torch.stack([row["input_ids"] for row in hf.rows(8)])
    labels = torch.tensor([row["labels"] for row in hf.rows(8)])
    with torch.no_grad():
        loss = functional.cross_entropy(bare(plain.model, words), labels)
    assert reported[-1] == pytest.approx(float(loss), rel=1e-6)
    assert plain.trainer.evaluate()["eval_loss"] == reported[-1]


def test_activation_checkpointing_gives_the_same_steps(hf: SimpleNamespace, tmp_path: Path) -> None:
    plain = hf.train(tmp_path)
    checkpointed = hf.train(tmp_path, gradient_checkpointing=True)
    found, expected = hf.state_of(checkpointed.adapted)[0], hf.state_of(plain.adapted)[0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_bfloat16_keeps_factors_and_state_in_their_own_dtype(
    hf: SimpleNamespace, tmp_path: Path
) -> None:
    run = hf.train(tmp_path, dtype=torch.float32, bf16=True)
    plain = hf.train(tmp_path, dtype=torch.float32)
    tensors = hf.state_of(run.adapted)[0]
    assert {value.dtype for name, value in tensors.items() if "state_" in name} == {torch.float32}
    losses = [
        [row["loss"] for row in each.trainer.state.log_history if "loss" in row]
        for each in (run, plain)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]


def test_early_stopping_warns_of_ranks_above_the_budget(
    hf: SimpleNamespace, tmp_path: Path
) -> None:
    stop = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=10.0)
    with pytest.warns(UserWarning, match=r"ended at step 2 of 8.* with 29 ranks, above .* of 20"):
        run = hf.train(
            tmp_path,
            callbacks=(stop,),
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=False,
            metric_for_best_model="eval_loss",
        )
    assert run.trainer.state.global_step == 2


def test_a_schedule_that_prunes_nothing_is_refused_before_the_first_step(
    hf: SimpleNamespace, tmp_path: Path
) -> None:
    message = (
        "hyperadalora would prune nothing in 2 steps: method.pruning.interval is 2; lower it, or "
        "train for longer."
    )
    with (
        pytest.warns(UserWarning, match="above the budget"),
        pytest.raises(UserError, match=re.escape(message)),
    ):
        hf.train(tmp_path, max_steps=2)


def test_a_schedule_for_another_number_of_steps_is_refused_before_the_first_one(
    hf: SimpleNamespace, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"total_steps=100, but Trainer takes 8 steps, .* leave"):
        hf.train(tmp_path, total_steps=100)
    assert hf.train(tmp_path, total_steps=8).adapted.method.live_ranks == 20


class Forgetful(TrainerCallback):
    """Someone's code that takes the place of the allocator's step."""

    def __init__(self, adapted_of: Any) -> None:
        self.adapted_of = adapted_of

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["optimizer"].optimizer._adapted.method.allocator.step = lambda: None


def test_a_run_that_never_prunes_fails_at_its_end(hf: SimpleNamespace, tmp_path: Path) -> None:
    message = (
        "after 8 steps 39 ranks are alive, but the schedule leaves 20: pruning did not run; look "
        "for code that replaces the optimizer or its step."
    )
    with pytest.raises(UserError, match=re.escape(message)):
        hf.train(tmp_path, callbacks=(Forgetful(None),))


class Bypass(TrainerCallback):
    """Someone's code that steps the inner optimizer itself."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["optimizer"].optimizer.step = kwargs["optimizer"].optimizer.inner.step


def test_a_step_past_the_method_fails_at_once(hf: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"took step 1, but the method saw nothing of it"):
        hf.train(tmp_path, callbacks=(Bypass(),))


class Overflow(TrainerCallback):
    """A gradient scaler that skips the fourth step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        inner = kwargs["optimizer"].optimizer
        kwargs["optimizer"]._is_overflow = skip = state.global_step == 3
        inner.step = (lambda *_: None) if skip else type(inner).step.__get__(inner)


def test_a_step_that_trainers_scaler_skips_is_counted(hf: SimpleNamespace, tmp_path: Path) -> None:
    run = hf.train(tmp_path, callbacks=(Overflow(),))
    assert (run.adapted.steps, run.adapted.skipped) == (7, 1)


def test_trainers_own_optimizer_is_refused(hf: SimpleNamespace, tmp_path: Path) -> None:
    model = hf.classifier()
    adapted = adapt(model, hf.configure(), dtype=torch.float64)
    trainer = Trainer(
        model, hf.arguments(tmp_path), train_dataset=hf.rows(), callbacks=[adapted.callback()]
    )
    with pytest.raises(UserError, match=r"has an optimizer of its own, .*adapted.optimizers"):
        trainer.train()


class Poison(TrainerCallback):
    """Makes the head's weight infinite for a step's forward passes."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps
        self.states: list[Any] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            self.handle = model.register_forward_hook(
                lambda module, inputs, outputs: {**outputs, "loss": outputs["loss"] * torch.inf}
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step - 1 in self.steps:
            self.handle.remove()


def test_a_step_that_is_not_finite_leaves_no_trace(hf: SimpleNamespace, tmp_path: Path) -> None:
    constant = {"lr_scheduler_type": "constant", "logging_nan_inf_filter": True}
    run = hf.train(tmp_path, callbacks=(Poison(3),), max_steps=5, **constant)
    assert (run.adapted.steps, run.adapted.skipped) == (4, 1)
    assert run.trainer.state.log_history[-2]["skipped_steps"] == 1
    kept = [b for i, b in enumerate(run.batches) if i not in (6, 7)]
    model = hf.classifier()
    torch.manual_seed(1)
    adapted = adapt(model, hf.configure(), total_steps=5, dtype=torch.float64)
    adapted.optimizers(lr=hf.LR, head_lr=hf.HEAD_LR)
    for step in range(4):
        with adapted.method.step(adapted.optimizer.inner, 1.0):
            for b in kept[2 * step : 2 * step + 2]:
                loss = functional.cross_entropy(bare(model, b["input_ids"]), b["labels"]) / 2
                loss.backward()
    found, expected = hf.state_of(run.adapted)[0], hf.state_of(adapted)[0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_steps_that_are_never_finite_end_the_run(hf: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not finite in 5 steps in a row, up to step 5; lower"):
        hf.train(tmp_path, callbacks=(Poison(*range(8)),))
