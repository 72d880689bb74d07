"""Plain LoRA of one rank, with everything folded into B, that every reader scales alike."""

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor
from torch.nn import functional

from lowrank_adapters.errors import AdapterError
from lowrank_adapters.layer import LowRankLinear
from lowrank_adapters.state import refuse_waiting

TransformB = Callable[[str, Tensor], Tensor]


def check_exportable(layers: Mapping[str, LowRankLinear]) -> None:
    """Refuse what has no values to be exported.

    Raises:
        AdapterError: there is no layer, or one is on the meta device or waits for its base.
    """
    if not layers:
        raise AdapterError("there are no layers to export; inject adapters first.")
    refuse_waiting(layers)
    for name, layer in layers.items():
        if any(factor.is_meta for _, factor in layer.factors()):
            raise AdapterError(f"{name} has factors on the meta device; load an adapter first.")


def check_finite(where: str, *tensors: Tensor) -> None:
    """Refuse tensors of a module that hold NaN or infinity.

    Raises:
        AdapterError: names the module.
    """
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise AdapterError(f"{where} has factors that are not finite; nothing was written.")


def renamed(names: Iterable[str], rename: Callable[[str], str]) -> dict[str, str]:
    """Return each name's new name.

    Raises:
        AdapterError: two names would become one.
    """
    new: dict[str, str] = {}
    for name in names:
        first = new.setdefault(rename(name), name)
        if first != name:
            raise AdapterError(
                f"rename gives {first} and {name} the one name {rename(name)}; give each module a "
                "name of its own."
            )
    return {name: there for there, name in new.items()}


def update_of(name: str, layer: LowRankLinear, transform_b: TransformB) -> tuple[Tensor, Tensor]:
    """Return A (k, in) and B (out, k) of a layer in float32, B's rows as ``transform_b`` has them.

    Raises:
        AdapterError: a value is not finite.
    """
    a, b = (factor.float() for factor in layer.as_lora())
    check_finite(name, a, b)
    return a, transform_b(name, b)


def pad(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A (rank, in) and B (out, rank) with components of zero after those that there are.

    >>> import torch
    >>> a, b = pad(torch.ones(1, 2), torch.ones(3, 1), rank=2)
    >>> a.tolist(), b.tolist()
    ([[1.0, 1.0], [0.0, 0.0]], [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    """
    padding = rank - len(a)
    return functional.pad(a, (0, 0, 0, padding)), functional.pad(b, (0, padding))
