"""Context vectors: what a hypernetwork may know besides the matrices."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hyper_core.errors import HyperError

Context = Tensor | Mapping[str, Tensor] | None


def context_rows(context: Context, role: str, order: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return the features of each matrix of ``role``, in ``order``, on its device.

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
    context = context.to(order.device, dtype)
    if context.ndim == 1:
        return context.expand(len(order), -1)
    if context.ndim != 2 or len(context) != len(order):
        raise HyperError(
            f"context for {role!r} has the shape {tuple(context.shape)}, expected (features,) or "
            f"({len(order)}, features); give a row of features for each matrix."
        )
    return context.index_select(0, order)


def name_features(names: Sequence[str]) -> Tensor:
    """Return what module names tell: depth and kind of each, (matrices, 1 + kinds).

    Depth is the first number in the name, moved and scaled to mean 0 and variance 1 over the
    matrices. Kind is the name without its numbers: √kinds in the kind's column, 0 in the others,
    so that the mean square of each row's kinds is 1. float32.

    Raises:
        HyperError: there is no name, or one word in place of a list.

    >>> name_features(["layers.0.q", "layers.0.v", "layers.2.q", "layers.2.v"])[:, 0].tolist()
    [-1.0, -1.0, 1.0, 1.0]
    """
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise HyperError(
            f"names is {names!r}, expected a list of words, one for each matrix; give the modules' "
            "names."
        )
    if not names:
        raise HyperError("names is empty, expected one for each matrix; give the modules' names.")
    parts = [name.split(".") for name in names]
    depth = torch.tensor([float(next(filter(str.isdigit, part), 0)) for part in parts])
    depth = depth - depth.mean()
    spread = depth.square().mean().sqrt()
    kinds = [".".join(piece for piece in part if not piece.isdigit()) for part in parts]
    number = {kind: i for i, kind in enumerate(dict.fromkeys(kinds))}
    columns = torch.tensor([number[kind] for kind in kinds])
    kind = torch.nn.functional.one_hot(columns, len(number)) * len(number) ** 0.5
    return torch.cat([(depth / spread.clamp(min=1e-12)).unsqueeze(1), kind], dim=1)
