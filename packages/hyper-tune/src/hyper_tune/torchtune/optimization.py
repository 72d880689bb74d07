"""Optimizer and learning rate of a run, refused at the start where they could not carry it out."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hyper_tune.checks import require_number
from hyper_tune.errors import UserError
from hyper_tune.torchtune.components import build, find_component, is_bug, refuse_wrong_kinds
from hyper_tune.torchtune.settings import Component

# Of an optimizer's keys, by whatever one: those that are not below 0, alone or in a list.
_NOT_NEGATIVE = ("lr", "eps", "weight_decay", "momentum")


def build_optimizer(component: Component, parameters: Sequence[Tensor]) -> Optimizer:
    """Build the optimizer of ``parameters``; see `try_optimizer` for what refuses it before.

    Raises:
        UserError: it cannot be built.
    """
    optimizer: Optimizer = build("optimizer", component, list(parameters))
    return optimizer


def try_optimizer(component: Component, like: Tensor) -> None:
    """Take a step on four numbers, of the dtype and device of ``like``; some refuse only then.

    Raises:
        UserError: a value that no optimizer has, or one that cannot be built, cannot take a step
            as a run does, or whose learning rate is no number.
        Exception: a bug of the optimizer, as it was raised.
    """
    _check_values(component)
    few = torch.zeros(2, 2, dtype=like.dtype, device=like.device, requires_grad=True)
    few.grad = torch.ones_like(few)
    name = component["_component_"]
    trial = build("optimizer", component, [few])
    if not isinstance(trial, Optimizer):
        raise UserError(f"optimizer: {name} makes no optimizer; name torch.optim.Adam, or another.")
    for group in trial.param_groups:
        if isinstance(group["lr"], Tensor):
            raise UserError(
                f"optimizer: {name} keeps its learning rate as a tensor, which checkpoints and "
                "logs here do not; name torch.optim.Adam, or another of torch's."
            )
        require_number("optimizer.lr", group["lr"], least=0)
    needed = [
        parameter.name
        for parameter in inspect.signature(trial.step).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if needed:
        raise UserError(
            f"optimizer: {name} cannot take a step: its step() needs {needed[0]!r}, which a run "
            "does not give; name torch.optim.Adam, or another."
        )
    try:
        trial.step()
    except Exception as error:
        if is_bug(error):
            error.add_note(f"while optimizer: {name} took a first step")
            raise
        reason = " ".join(str(error).split())
        raise UserError(f"optimizer: {name} cannot take a step: {reason}") from error


def _check_values(component: Component) -> None:
    refuse_wrong_kinds("optimizer", component, find_component("optimizer", component))
    for key, value in component.items():
        several = isinstance(value, list)
        for index, number in enumerate(value if several else [value]):
            field = f"optimizer.{key}[{index}]" if several else f"optimizer.{key}"
            if key in _NOT_NEGATIVE and number is not None:
                require_number(field, number, least=0)
            if key == "betas":
                require_number(field, number, least=0, below=1)


def build_scheduler(component: Component, optimizer: Optimizer, total_steps: int) -> Any:
    """Build what sets the learning rate of each of ``total_steps``.

    Raises:
        UserError: it cannot be built, or is given what the run tells it.
    """
    if "num_training_steps" in component:
        raise UserError(
            "lr_scheduler.num_training_steps is the length of the run; leave it out, and set "
            "max_steps or epochs."
        )
    if "num_warmup_steps" in component:
        warmup = component["num_warmup_steps"]
        require_number("lr_scheduler.num_warmup_steps", warmup, whole=True, least=0)
    builder = find_component("lr_scheduler", component)
    if "num_training_steps" not in inspect.signature(builder).parameters:
        raise UserError(
            f"lr_scheduler: {component['_component_']} takes no num_training_steps; name one that "
            "does, such as torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup."
        )
    return build("lr_scheduler", component, optimizer, num_training_steps=total_steps)
