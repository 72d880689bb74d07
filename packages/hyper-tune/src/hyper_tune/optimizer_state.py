"""An optimizer's state by the names of its parameters, not by their position."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from hyper_tune.errors import UserError


def named_optimizer_state(
    optimizer: Optimizer, named_parameters: Iterable[tuple[str, Tensor]]
) -> dict[str, Any]:
    """Return ``{"state": {name: …}, "groups": [{…, "names": […]}]}``; tensors stay live.

    >>> import torch
    >>> weight = torch.zeros(2, requires_grad=True)
    >>> named_optimizer_state(torch.optim.SGD([weight], lr=0.1), [("w", weight)])["groups"][0]["lr"]
    0.1
    """
    names = {id(parameter): name for name, parameter in named_parameters}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
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
        UserError: the saved state is of other parameters.
    """
    names = {id(parameter): name for name, parameter in named_parameters}
    here = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    there = [list(group["names"]) for group in saved["groups"]]
    if here != there:
        raise UserError(
            f"the saved optimizer state is of the parameters {there}, but this run trains {here}."
        )
    index = {name: position for position, name in enumerate(sum(here, []))}
    groups = [
        {key: value for key, value in group.items() if key != "names"}
        | {"params": [index[name] for name in group["names"]]}
        for group in saved["groups"]
    ]
    state = {index[name]: entry for name, entry in saved["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": groups})
