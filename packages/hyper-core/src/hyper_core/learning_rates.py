"""Groups of a hypernetwork's weights for an optimizer, by role and by part."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from hyper_core.checks import is_number
from hyper_core.errors import HyperError

PARTS = ("input_projection", "body", "output_projection", "embeddings")


def part_of(name: str) -> str:
    """Return the part of a `Hypernetwork` that the weight ``name`` belongs to.

    >>> part_of("trunk.body.0.up.weight")
    'body'
    """
    if name.endswith("embedding"):
        return "embeddings"
    first = name.split(".")[0]
    by_module = {"inputs": "input_projection", "context": "input_projection"}
    return by_module.get(first, "output_projection" if first == "outputs" else "body")


def parameter_groups(
    hypernetworks: nn.ModuleDict, lr: float, parts: Mapping[str, float], roles: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Return one group per role and part that has weights: params, lr and name.

    Raises:
        HyperError: an unknown part or role, or no rate: less than zero, or not finite.
    """
    rates = {"lr": lr} | {
        f"{what}[{name!r}]": factor
        for what, given in (("parts", parts), ("roles", roles))
        for name, factor in given.items()
    }
    for what, rate in rates.items():
        if not is_number(rate) or rate < 0:
            raise HyperError(
                f"{what} is {rate!r}, expected a finite number of at least 0; correct it."
            )
    for what, given, known in (("parts", parts, PARTS), ("roles", roles, tuple(hypernetworks))):
        for name in sorted(set(given) - set(known)):
            raise HyperError(
                f"{what} names {name!r}, expected one of {', '.join(known)}; correct or drop it."
            )
    groups: dict[tuple[str, str], list[nn.Parameter]] = {}
    for role, network in hypernetworks.items():
        for name, parameter in network.named_parameters():
            groups.setdefault((role, part_of(name)), []).append(parameter)
    return [
        {
            "params": members,
            "lr": lr * parts.get(part, 1.0) * roles.get(role, 1.0),
            "name": f"{role}.{part}",
        }
        for (role, part), members in groups.items()
    ]
