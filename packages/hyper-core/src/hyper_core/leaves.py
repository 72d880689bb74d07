"""Leaf tensors of equal shape, read and written as one stack."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from hyper_core.errors import HyperError
from hyper_core.roles import Role

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class LeafGroup:
    """Leaves of one role, shape and device, as one tensor (matrices, rows, columns).

    ``leaves``: all (matrices, rows, columns), or all (rows, columns) and then a matrix each; of
    scalars without the columns, of which the stack then has one. ``label``: role and number, as
    "p_0". ``positions``: of the group's matrices among the role's. A read, a write or a gradient is
    one operation, however many leaves there are.
    """

    role: str
    label: str
    names: tuple[str, ...]
    leaves: tuple[Tensor, ...]
    positions: tuple[int, ...]
    scalars: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(matrices, rows, columns)."""
        sizes = (*self.leaves[0].shape, 1) if self.scalars else self.leaves[0].shape
        return len(self.positions), sizes[-2], sizes[-1]

    @property
    def device(self) -> torch.device:
        """Where the leaves are."""
        return self.leaves[0].device

    @torch.no_grad()
    def values(self) -> Tensor:
        """Return the leaves' values, detached; they may share memory with a leaf."""
        return self._join(list(self.leaves))

    def check_finite(self) -> None:
        """Look at the values, which the meta device does not have.

        Raises:
            HyperError: a leaf has one that is not finite.
        """
        if self.device.type == "meta" or self.values().isfinite().all():
            return
        finite = [bool(leaf.isfinite().all()) for leaf in self.leaves]
        raise HyperError(
            f"{self.names[finite.index(False)]} has values that are not finite, expected numbers "
            "to start from; initialise it before, or name its role in zero_start."
        )

    @torch.no_grad()
    def write_(self, values: Tensor) -> None:
        """Copy ``values`` into the leaves, in place, in their dtype and on their device."""
        values = values.to(self.device)
        if self.scalars:
            values = values.squeeze(-1)
        sizes = [len(leaf) for leaf in self.leaves]
        parts = torch.unbind(values) if self._are_matrices() else torch.split(values, sizes)
        torch._foreach_copy_(list(self.leaves), list(parts))

    def gradients(self) -> Tensor:
        """Return the leaves' ``.grad``; it may share memory with one.

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

    @torch.no_grad()
    def zero_gradients_(self) -> None:
        """Set the leaves' ``.grad`` to zero in place, so that views of it stay what they are."""
        gradients = [leaf.grad for leaf in self.leaves if leaf.grad is not None]
        if gradients:
            torch._foreach_zero_(gradients)

    def marks(self) -> list[tuple[int, int]]:
        """Return autograd's count of in-place changes of each leaf, and what memory it has."""
        return [(leaf._version, leaf.untyped_storage()._cdata) for leaf in self.leaves]

    def check_unchanged(self, marks: Sequence[tuple[int, int]]) -> None:
        """Compare with earlier `marks`.

        Raises:
            HyperError: a leaf was changed in place since, or has other memory.
        """
        for name, was, now in zip(self.names, marks, self.marks(), strict=True):
            if was != now:
                times = f"changed {now[0] - was[0]} time(s)"
                raise HyperError(
                    f"{name}, or memory it shares, was "
                    f"{times if now[0] != was[0] else 'replaced through .data'} between "
                    "refresh() and backward(), expected none, so its gradient may be of other "
                    "values; change it before refresh() or after backward()."
                )

    def _are_matrices(self) -> bool:
        return self.leaves[0].ndim == (1 if self.scalars else 2)

    def _join(self, parts: list[Tensor]) -> Tensor:
        if self._are_matrices():
            stack = torch.stack(parts)
        else:
            stack = torch.cat(parts) if len(parts) > 1 else parts[0].detach()
        return stack.unsqueeze(-1) if self.scalars else stack


def group_leaves(
    leaves: Mapping[str, Sequence[Tensor]], roles: Mapping[str, Role]
) -> list[LeafGroup]:
    """Group the leaves of each role by shape and device, in the order of first appearance.

    Raises:
        HyperError: a tensor that cannot be a leaf, or start values that are not finite.
    """
    scalars = {name for name, role in roles.items() if role.tokens == "scalars"}
    _check_tensors(leaves, scalars)
    groups: list[LeafGroup] = []
    for role, tensors in leaves.items():
        one = 1 if role in scalars else 2
        members: dict[object, list[int]] = {}
        counts = [1 if leaf.ndim == one else len(leaf) for leaf in tensors]
        starts = list(accumulate(counts, initial=0))
        for i, leaf in enumerate(tensors):
            members.setdefault((leaf.ndim, leaf.shape[-one:], leaf.device), []).append(i)
        groups += [
            LeafGroup(
                role,
                f"{role}_{number}",
                tuple(f"{role}[{i}]" for i in chosen),
                tuple(tensors[i] for i in chosen),
                tuple(p for i in chosen for p in range(starts[i], starts[i + 1])),
                role in scalars,
            )
            for number, chosen in enumerate(members.values())
        ]
    for group in groups:
        if not roles[group.role].zero_start:
            group.check_finite()
    return groups


def widest_dtype(groups: Iterable[LeafGroup]) -> torch.dtype:
    """Return float32, or the leaves' dtype where one is wider."""
    dtype = torch.float32
    for leaf in (leaf for group in groups for leaf in group.leaves):
        dtype = torch.promote_types(dtype, leaf.dtype)
    return dtype


def check_roles(leaves: Mapping[str, Sequence[Tensor]]) -> None:
    """Raise a `HyperError` for no role, one that cannot name a module, or one without tensors."""
    if not isinstance(leaves, Mapping):
        raise HyperError(
            f"leaves is of type {type(leaves).__name__}, expected a mapping from roles to lists of "
            "tensors; give for example {'weight': [tensor]}."
        )
    if not leaves:
        raise HyperError(
            "leaves has no role, expected at least one; give for example {'weight': [tensor]}."
        )
    for role, tensors in leaves.items():
        if not isinstance(role, str) or not role.isidentifier() or hasattr(nn.ModuleDict(), role):
            raise HyperError(
                f"the role {role!r} cannot name a module, expected letters, digits and '_' that "
                "are not an attribute of nn.ModuleDict; rename it."
            )
        if not isinstance(tensors, Sequence | nn.ParameterList):
            raise HyperError(
                f"the role {role!r} is of type {type(tensors).__name__}, expected a list of "
                f"tensors; put {_what_to_give(tensors, 'it')} into a list."
            )
        if not len(tensors):
            raise HyperError(
                f"the role {role!r} has 0 tensors, expected at least one; give it some or drop it."
            )


def _what_to_give(value: object, otherwise: str) -> str:
    return "its parameter, such as .weight" if isinstance(value, nn.Module) else otherwise


def _check_tensors(leaves: Mapping[str, Sequence[Tensor]], scalars: set[str]) -> None:
    seen: dict[int, str] = {}
    for role, tensors in leaves.items():
        shapes = "(matrices, numbers) or (numbers,)"
        if role not in scalars:
            shapes = "(matrices, rows, columns) or (rows, columns)"
        for name, leaf in ((f"{role}[{i}]", leaf) for i, leaf in enumerate(tensors)):
            if not isinstance(leaf, Tensor):
                raise HyperError(
                    f"{name} is of type {type(leaf).__name__}, expected a tensor of the shape "
                    f"{shapes}; give {_what_to_give(leaf, 'the parameter itself')}."
                )
            dimensions = (1, 2) if role in scalars else (2, 3)
            if leaf.ndim not in dimensions or not leaf.numel() or leaf.dtype not in _DTYPES:
                raise HyperError(
                    f"{name} is {leaf.dtype} of the shape {tuple(leaf.shape)}, expected float16, "
                    f"bfloat16, float32 or float64 of the shape {shapes}, none of them 0; reshape "
                    "or convert it."
                )
            if not leaf.is_leaf:
                raise HyperError(
                    f"{name} is a result of {type(leaf.grad_fn).__name__}, expected a tensor that "
                    "autograd accumulates .grad into; give the parameter itself, or a view of it "
                    "made under torch.no_grad() whose .grad you set."
                )
            if id(leaf) in seen:
                raise HyperError(
                    f"{name} is the same tensor as {seen[id(leaf)]}, expected each once; drop one."
                )
            seen[id(leaf)] = name
