"""All factors of a model in one flat buffer, seen as stacks of equal shape."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank_adapters.errors import AdapterError
from lowrank_adapters.layer import LowRankLinear


@dataclass(frozen=True)
class FactorGroup:
    """The factors of one role, rank and width.

    ``values``: (matrices, rank, width), a view of the stack's values, whose ``.grad`` is the same
    view of its gradients. ``rank_mask``: (matrices, rank), bool, live, for the role "lam"; None
    for the others.
    """

    role: str
    names: tuple[str, ...]
    values: Tensor
    rank_mask: Tensor | None


@dataclass(frozen=True)
class _Bound:
    """A tensor that a backward pass or an optimizer reads, and the gradient it must have."""

    where: str
    tensor: Tensor
    grad: Tensor
    address: int


@dataclass(frozen=True)
class _Held:
    """A tensor that a layer must still have by its name."""

    where: str
    tensors: Mapping[str, Tensor | None]
    name: str
    tensor: Tensor


class FactorStack:
    """One flat buffer of values and one of gradients under all factors of ``layers``.

    Each layer's parameter becomes a view of ``values``, and its ``.grad`` a view of ``grads``, so
    that a backward pass adds straight into the flat gradient: one reduction over ranks serves all
    factors, and whatever works on stacked tensors needs no loop over matrices. Numbers do not
    change. In-place writes through any view are seen by autograd's version counter.

    ``values``, ``grads``: (numel,). ``groups``: by role, rank and width, in model order.

    Raises:
        AdapterError: no layer, or factors of more than one dtype or device.

    >>> from lowrank_adapters import LoRA, inject_adapters_
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    >>> stack = FactorStack(inject_adapters_(model, LoRA(rank=2, alpha=2.0)))
    >>> [(group.role, tuple(group.values.shape)) for group in stack.groups]
    [('a', (1, 2, 4)), ('b', (2, 2, 3)), ('a', (1, 2, 3))]
    """

    def __init__(self, layers: Mapping[str, LowRankLinear]) -> None:
        shapes = _shapes(layers)
        first = _common_dtype_and_device(layers)
        total = sum(len(names) * rank * width for (_, rank, width), names in shapes.items())
        self.values = torch.zeros(total, dtype=first.dtype, device=first.device)
        self.grads = torch.zeros_like(self.values)
        self._bound: list[_Bound] = []
        self._held: list[_Held] = []
        groups, start = [], 0
        for (role, rank, width), names in shapes.items():
            size = (len(names), rank, width)
            end = start + len(names) * rank * width
            values = self.values[start:end].view(size)
            grads = self.grads[start:end].view(size)
            groups.append(self._stack(role, names, layers, values, grads))
            start = end
        self.groups = tuple(groups)
        self.bind_grads_()

    def _stack(
        self,
        role: str,
        names: list[str],
        layers: Mapping[str, LowRankLinear],
        values: Tensor,
        grads: Tensor,
    ) -> FactorGroup:
        mask = None
        if role == "lam":
            mask = torch.stack([layers[name].get_buffer("rank_mask") for name in names])
        for index, name in enumerate(names):
            layer = layers[name]
            values[index].copy_(layer.tokens(role))
            parameter = nn.Parameter(layer.from_tokens(role, values[index]))
            setattr(layer, role, parameter)
            self._held.append(_Held(name, layer._parameters, role, parameter))
            self._bind(f"{name}.{role}", parameter, layer.from_tokens(role, grads[index]))
            if mask is not None:
                layer.register_buffer("rank_mask", mask[index])
                self._held.append(_Held(name, layer._buffers, "rank_mask", layer.rank_mask))
        self._bind(f"the stack of {role}", values, grads)
        return FactorGroup(role, tuple(names), values, mask)

    def _bind(self, where: str, tensor: Tensor, grad: Tensor) -> None:
        self._bound.append(_Bound(where, tensor, grad, tensor.data_ptr()))

    def leaf_parameters(self) -> list[nn.Parameter]:
        """Return the layers' parameters, such as FSDP2's ``ignored_params``."""
        return [bound.tensor for bound in self._bound if isinstance(bound.tensor, nn.Parameter)]

    def bind_grads_(self) -> None:
        """Attach the gradient views again where ``.grad`` was set to None, as ``zero_grad`` does.

        A view that was detached is zeroed: None means no gradient.
        """
        for bound in self._bound:
            if bound.tensor.grad is None:
                bound.grad.zero_()
                bound.tensor.grad = bound.grad

    def check_bound(self) -> None:
        """Refuse what is no longer a view of the buffers; reads no device.

        Raises:
            AdapterError: names the first factor or mask that went its own way.
        """
        for held in self._held:
            if held.tensors.get(held.name) is not held.tensor:
                raise AdapterError(
                    f"{held.where}.{held.name} was replaced after it was stacked, by another stack "
                    "or load_state_dict(assign=True); load without assign, and keep one stack."
                )
        for bound in self._bound:
            grad = bound.tensor.grad
            if bound.tensor.data_ptr() != bound.address:
                raise AdapterError(
                    f"{bound.where} was moved or cast after it was stacked; move and cast the "
                    "model before the method is put on it."
                )
            if grad is None or grad.data_ptr() != bound.grad.data_ptr():
                raise AdapterError(
                    f"the gradient of {bound.where} was replaced during the step; do not call "
                    "zero_grad between the micro-batches of a step."
                )

    def zero_grads_(self) -> None:
        """Set all gradients to zero, in one operation."""
        self.grads.zero_()


def _shapes(layers: Mapping[str, LowRankLinear]) -> dict[tuple[str, int, int], list[str]]:
    if not layers:
        raise AdapterError("there are no layers to stack; inject adapters first.")
    shapes: dict[tuple[str, int, int], list[str]] = {}
    for name, layer in layers.items():
        for role in layer.roles:
            rank, width = layer.tokens(role).shape
            shapes.setdefault((role, rank, width), []).append(name)
    return shapes


def _common_dtype_and_device(layers: Mapping[str, LowRankLinear]) -> Tensor:
    factors = [(f"{n}.{r}", factor) for n, layer in layers.items() for r, factor in layer.factors()]
    first_name, first = factors[0]
    for name, factor in factors:
        if (factor.dtype, factor.device) != (first.dtype, first.device):
            raise AdapterError(
                f"{name} is {factor.dtype} on {factor.device}, but {first_name} is {first.dtype} "
                f"on {first.device}; give all factors one dtype and device."
            )
    return first
