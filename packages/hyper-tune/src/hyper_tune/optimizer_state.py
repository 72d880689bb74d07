"""An optimizer's state by the names of its parameters, not by their position."""

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from hyper_tune.errors import UserError


def named_optimizer_state(
    optimizer: Optimizer, named_parameters: Iterable[tuple[str, Tensor]]
) -> dict[str, Any]:
    """Return ``{"state": {name: …}, "groups": [{…, "names": […]}]}``; tensors stay live.

    Raises:
        UserError: the optimizer has a parameter without a name.

    >>> import torch
    >>> weight = torch.zeros(2, requires_grad=True)
    >>> named_optimizer_state(torch.optim.SGD([weight], lr=0.1), [("w", weight)])["groups"][0]["lr"]
    0.1
    """
    order = list(chain(*_names(optimizer, named_parameters)))
    raw = optimizer.state_dict()
    groups = [
        {**{key: value for key, value in group.items() if key != "params"}}
        | {"names": [order[index] for index in group["params"]]}
        for group in raw["param_groups"]
    ]
    return {
        "state": {order[index]: entry for index, entry in raw["state"].items()},
        "groups": groups,
    }


def load_named_optimizer_state(
    optimizer: Optimizer,
    named_parameters: Iterable[tuple[str, Tensor]],
    saved: Mapping[str, Any],
) -> None:
    """Restore what `named_optimizer_state` returned.

    Raises:
        UserError: the saved state is of other parameters, or one has no name.
    """
    here = _names(optimizer, named_parameters)
    there = [list(group["names"]) for group in saved["groups"]]
    if here != there:
        raise UserError(
            f"the saved optimizer state is of the parameters {there}, but this run trains {here}."
        )
    index = {name: position for position, name in enumerate(chain(*here))}
    groups = [
        {key: value for key, value in group.items() if key != "names"}
        | {"params": [index[name] for name in group["names"]]}
        for group in saved["groups"]
    ]
    state = {index[name]: entry for name, entry in saved["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _names(optimizer: Optimizer, named_parameters: Iterable[tuple[str, Tensor]]) -> list[list[str]]:
    """Return the names of the optimizer's parameters, group by group."""
    names = {id(parameter): name for name, parameter in named_parameters}
    for parameter in chain(*(group["params"] for group in optimizer.param_groups)):
        if id(parameter) not in names:
            raise UserError(
                f"the optimizer has a parameter of the shape {tuple(parameter.shape)} that is not "
                f"one of {', '.join(names.values())}; give it the method's parameters alone."
            )
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
