"""Who owns the factors: what a step asks of a hypernetwork, and the identity in its place."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hyper_core import GeneratedParameters
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


class PartlyGenerated:
    """Hypernetworks write some of a layer's factors, and others are learned beside them.

    Of DoRA, for instance, the hypernetworks write A and B, and the magnitude is a parameter. Each
    part does what it does alone, in one step. Saved: what each saves; their names differ.
    """

    def __init__(self, generated: GeneratedParameters, learned: LearnedFactors) -> None:
        self.generated = generated
        self.learned = learned

    def refresh(self) -> None:
        """Write the generated factors into the leaves."""
        self.generated.refresh()

    def backward(self) -> None:
        """Carry the generated leaves' gradients into the hypernetworks' weights."""
        self.generated.backward()

    def commit(self) -> None:
        """Make the generated values the state."""
        self.generated.commit()

    def discard(self) -> None:
        """Forget the refresh."""
        self.generated.discard()

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the hypernetworks' weights, then the learned factors."""
        yield from self.generated.named_parameters()
        yield from self.learned.named_parameters()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state of both, live."""
        return {**self.generated.state_dict(), **self.learned.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            UserError: the learned factors are of another model.
            HyperError: the generated ones are.
        """
        names = self.learned.state_dict().keys()
        self.learned.load_state_dict({n: v for n, v in state_dict.items() if n in names})
        self.generated.load_state_dict({n: v for n, v in state_dict.items() if n not in names})
