"""What a process holds of a factor that FSDP2 has sharded."""

from dataclasses import dataclass
from typing import Any, TypeVar, cast

from torch import Tensor
from torch.nn import Parameter

from rank_budget.errors import BudgetError

# Of these an attribute that they lack need not be looked up, tensor by tensor.
_WHOLE = {Tensor, Parameter}
_KNOWN = _WHOLE | {type(None)}

T = TypeVar("T", bound=Tensor | None)


@dataclass(frozen=True)
class Shard:
    """A part of a factor: of its components from ``start``, or of their widths."""

    by_component: bool
    start: int
    group: Any


def local_part(tensor: Tensor) -> Tensor:
    """Return what this process holds: the tensor itself if it is not sharded."""
    if type(tensor) in _WHOLE:
        return tensor
    to_local = getattr(tensor, "to_local", None)
    local: Tensor = tensor if to_local is None else to_local()
    return local


def local_parts(tensors: list[T]) -> list[T]:
    """Return what this process holds of each of many tensors; None, of no tensor, is itself."""
    if _KNOWN.issuperset(map(type, tensors)):
        return tensors
    return [tensor if tensor is None else cast(T, local_part(tensor)) for tensor in tensors]


def shard_of(tensor: Tensor, component: int, name: str) -> Shard | None:
    """Return how a tensor is sharded; ``component`` is the dimension of the rank components.

    Raises:
        BudgetError: it is sharded in more than one dimension, or holds partial sums.
    """
    placements = getattr(tensor, "placements", None)
    if placements is None:
        return None
    sharded = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    if not sharded:
        return None
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    place = placements[sharded[0]]
    if len(sharded) > 1 or not place.is_shard():
        raise BudgetError(
            f"{name} has the placements {tuple(placements)}, expected at most one Shard; shard "
            "factors over one mesh dimension."
        )
    size, parts = tensor.shape[place.dim], mesh.size(sharded[0])
    held = -(-size // parts)
    start = min(size, mesh.get_local_rank(sharded[0]) * held)
    return Shard(place.dim == component, start, mesh.get_group(sharded[0]))
