"""Context vectors: what a hypernetwork may know besides the matrices."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hyper_core.errors import HyperError
from hyper_core.leaves import LeafGroup

Context = Tensor | Mapping[str, Tensor] | None


def context_rows(context: Context, role: str, groups: Sequence[LeafGroup]) -> Tensor | None:
    """Return the features of each matrix of ``role``, in the order of its groups.

    Raises:
        HyperError: a mapping without the role, or not one row for each matrix.
    """
    if isinstance(context, Mapping):
        if role not in context:
            raise HyperError(
                f"context has the roles {', '.join(context)}, expected {role!r} among them; give "
                "features for every role."
            )
        context = context[role]
    if context is None:
        return None
    positions = [position for group in groups for position in group.positions]
    if context.ndim == 1:
        return context.expand(len(positions), -1)
    if context.ndim != 2 or len(context) != len(positions):
        raise HyperError(
            f"context for {role!r} has the shape {tuple(context.shape)}, expected (features,) or "
            f"({len(positions)}, features); give a row of features for each matrix."
        )
    if positions == sorted(positions):
        return context
    return context.index_select(0, torch.tensor(positions, device=context.device))
