"""Optimizer and learning rate of a run, refused at the start where they could not carry it out."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hyper_tune.checks import require_number
from hyper_tune.errors import UserError
from hyper_tune.torchtune.components import build, find_component
from hyper_tune.torchtune.settings import Component


def build_optimizer(component: Component, parameters: Sequence[Tensor]) -> Optimizer:
    """Build the optimizer of ``parameters``, after another one has taken a step.

    Raises:
        UserError: it cannot be built, cannot take a step as a run does, or its learning rate is no
            number.
    """
    try_optimizer(component, parameters[0])
    optimizer: Optimizer = build("optimizer", component, list(parameters))
    return optimizer


def try_optimizer(component: Component, like: Tensor) -> None:
    """Take a step on four numbers, of the dtype and device of ``like``; some refuse only then.

    Raises:
        UserError: as `build_optimizer`.
    """
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
    try:
        trial.step()
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"optimizer: {name} cannot take a step: {reason}") from error


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
