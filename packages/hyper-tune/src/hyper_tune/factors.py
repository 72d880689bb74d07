"""Who owns the factors: what a step asks of a hypernetwork, and the identity in its place."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hyper_tune.errors import UserError
from lowrank_adapters import FactorGroup


class FactorOwner(Protocol):
    """What stands behind the leaves: it writes their values and takes their gradients."""

    def refresh(self) -> None:
        """Write this step's values into the leaves."""

    def backward(self) -> None:
        """Carry the leaves' gradients to the trainable parameters."""

    def commit(self) -> None:
        """Make the leaves' values the state that the next refresh starts from."""

    def discard(self) -> None:
        """Forget the refresh; the state stays as it was."""

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        """Yield what an optimizer may train, by name."""

    def state_dict(self) -> Any:
        """Return everything that changes the next refresh."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Restore what `state_dict` returned."""


class LearnedFactors:
    """Directly learned factors: the leaves are themselves the parameters.

    The stacked views ``(matrices, rank, width)`` of a `FactorStack` are handed to the optimizer,
    which changes them in place; nothing is generated, copied or carried back.
    Saved: the values, by role and position.

    >>> import torch
    >>> from lowrank_adapters import FactorStack, LoRA, inject_adapters_
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    >>> stack = FactorStack(inject_adapters_(model, LoRA(rank=2, alpha=2.0)))
    >>> [(name, tuple(p.shape)) for name, p in LearnedFactors(stack.groups).named_parameters()]
    [('a.0', (1, 2, 4)), ('b.0', (1, 2, 3))]
    """

    def __init__(self, groups: Sequence[FactorGroup]) -> None:
        counts: dict[str, int] = {}
        self._values: dict[str, Tensor] = {}
        for group in groups:
            position = counts.setdefault(group.role, 0)
            counts[group.role] += 1
            self._values[f"{group.role}.{position}"] = group.values

    def refresh(self) -> None:
        """Do nothing: the leaves hold the parameters themselves."""

    def backward(self) -> None:
        """Do nothing: the leaves' gradients are the parameters'."""

    def commit(self) -> None:
        """Do nothing: the optimizer's update is the new state."""

    def discard(self) -> None:
        """Do nothing: an update that was not made needs no undoing."""

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the stacked values of each role."""
        yield from self._values.items()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the live values, by name."""
        return dict(self._values)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Copy saved values into the leaves.

        Raises:
            UserError: the names or shapes are those of another model.
        """
        here = {name: tuple(value.shape) for name, value in self._values.items()}
        saved = {name: tuple(value.shape) for name, value in state_dict.items()}
        if here != saved:
            raise UserError(f"the saved factors are {saved}, but this model's are {here}.")
        for name, value in self._values.items():
            value.copy_(state_dict[name])
