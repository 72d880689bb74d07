"""Leaf tensors of equal shape, read and written as one stack."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hyper_core.errors import HyperError


@dataclass(frozen=True, eq=False)
class LeafGroup:
    """Leaves of one role with equal tokens and width, as one tensor (matrices, tokens, width).

    ``leaves``: all (matrices, tokens, width), or all (tokens, width) and then a matrix each. A
    read, a write or a gradient is one operation, however many leaves there are.
    """

    role: str
    names: tuple[str, ...]
    leaves: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(matrices, tokens, width)."""
        tokens, width = self.leaves[0].shape[-2:]
        return sum(self._matrices()), tokens, width

    @torch.no_grad()
    def values(self) -> Tensor:
        """Return a detached copy of the leaves' values."""
        return self._join(list(self.leaves))

    @torch.no_grad()
    def write_(self, values: Tensor) -> None:
        """Copy ``values`` into the leaves, in place and in their dtype."""
        parts = (
            torch.unbind(values) if self._are_matrices() else torch.split(values, self._matrices())
        )
        torch._foreach_copy_(list(self.leaves), list(parts))

    def gradients(self) -> Tensor:
        """Return the leaves' ``.grad``.

        Raises:
            HyperError: a leaf has none.
        """
        gradients = []
        for name, leaf in zip(self.names, self.leaves, strict=True):
            if leaf.grad is None:
                raise HyperError(
                    f"{name} has no gradient, expected .grad of the shape {tuple(leaf.shape)}; run "
                    "the model's backward pass after refresh(), and make sure the model reads it."
                )
            gradients.append(leaf.grad)
        return self._join(gradients)

    def versions(self) -> list[int]:
        """Return autograd's count of in-place changes of each leaf."""
        return [leaf._version for leaf in self.leaves]

    def check_unchanged(self, versions: Sequence[int]) -> None:
        """Compare with an earlier `versions`.

        Raises:
            HyperError: a leaf was changed in place since.
        """
        for name, was, now in zip(self.names, versions, self.versions(), strict=True):
            if was != now:
                raise HyperError(
                    f"{name}, or memory it shares, was changed {now - was} time(s) between "
                    "refresh() and backward(), expected none, so its gradient may be of other "
                    "values; change it before refresh() or after backward()."
                )

    def _are_matrices(self) -> bool:
        return self.leaves[0].ndim == 2

    def _matrices(self) -> list[int]:
        return [1 if leaf.ndim == 2 else leaf.shape[0] for leaf in self.leaves]

    def _join(self, parts: list[Tensor]) -> Tensor:
        return torch.stack(parts) if self._are_matrices() else torch.cat(parts)


def group_leaves(leaves: Mapping[str, Sequence[Tensor]]) -> list[LeafGroup]:
    """Group the leaves of each role by shape, in the order of first appearance.

    Raises:
        HyperError: no role, a role that cannot name a module or has no tensors, or a tensor that
            cannot be a leaf.
    """
    if not leaves:
        raise HyperError(
            "leaves has no role, expected at least one; give for example {'weight': [tensor]}."
        )
    for role, tensors in leaves.items():
        _check_role(role, tensors)
    _check_tensors([(f"{role}[{i}]", t) for role in leaves for i, t in enumerate(leaves[role])])
    groups: dict[tuple[str, int, torch.Size], list[tuple[str, Tensor]]] = {}
    for role, tensors in leaves.items():
        for position, leaf in enumerate(tensors):
            key = (role, leaf.ndim, leaf.shape[-2:])
            groups.setdefault(key, []).append((f"{role}[{position}]", leaf))
    return [
        LeafGroup(role, tuple(name for name, _ in members), tuple(leaf for _, leaf in members))
        for (role, _, _), members in groups.items()
    ]


def _check_role(role: str, tensors: Sequence[Tensor]) -> None:
    if not role.isidentifier() or hasattr(nn.ModuleDict, role):
        raise HyperError(
            f"the role {role!r} cannot name a module, expected letters, digits and '_' that are "
            "not a method of nn.ModuleDict; rename it."
        )
    if not len(tensors):
        raise HyperError(
            f"the role {role!r} has 0 tensors, expected at least one; give it some or drop it."
        )


def _check_tensors(named: Iterable[tuple[str, Tensor]]) -> None:
    seen: dict[int, str] = {}
    device: torch.device | None = None
    for name, leaf in named:
        if leaf.ndim not in (2, 3) or not leaf.numel() or not leaf.is_floating_point():
            raise HyperError(
                f"{name} is {leaf.dtype} of the shape {tuple(leaf.shape)}, expected floating-point "
                "numbers of the shape (matrices, tokens, width) or (tokens, width), none of them "
                "0; reshape or convert it."
            )
        if not leaf.is_leaf:
            raise HyperError(
                f"{name} is a result of {type(leaf.grad_fn).__name__}, expected a tensor that "
                "autograd accumulates .grad into; give the parameter itself, or a view of it made "
                "under torch.no_grad() whose .grad you set."
            )
        if id(leaf) in seen:
            raise HyperError(
                f"{name} is the same tensor as {seen[id(leaf)]}, expected each once; drop one."
            )
        seen[id(leaf)] = name
        device = device or leaf.device
        if leaf.device != device:
            raise HyperError(
                f"{name} is on {leaf.device}, expected {device} as the leaves before it; move it, "
                "or make one GeneratedParameters per device."
            )
