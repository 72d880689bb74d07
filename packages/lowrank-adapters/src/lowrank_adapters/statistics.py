"""What starts are computed from: gradients and inputs of the base, collected over batches."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lowrank_adapters.errors import AdapterError
from lowrank_adapters.layer import LowRankLinear
from lowrank_adapters.maps import LinearMap
from lowrank_adapters.starts import Start

Batch = TypeVar("Batch")


def start_factors_(
    layers: Mapping[str, LowRankLinear],
    start: Start,
    statistics: Mapping[str, Tensor] | None = None,
) -> None:
    """Set the factors of all layers, in place, to a start; see `LowRankLinear.start_`.

    ``statistics``: for each name what the start needs: the result of `collect_gradients` or
    `collect_activations`. Where several processes train one model, do it on one and broadcast.

    Raises:
        AdapterError: a statistic is missing or does not fit; the layer is named.

    >>> from lowrank_adapters import SVD, GradientStep, inject_adapters_
    >>> model = nn.Sequential(nn.Linear(4, 3))
    >>> layers = inject_adapters_(model, SVD(rank=2, alpha=2.0))
    >>> batches = [torch.randn(8, 4) for _ in range(2)]
    >>> gradients = collect_gradients(model, layers, lambda x: model(x).square().mean(), batches)
    >>> start_factors_(layers, GradientStep(size=0.01), gradients)
    >>> layers["0"].lam.mean()
    tensor(-0.0100, grad_fn=<MeanBackward0>)
    """
    statistics = statistics or {}
    for name, layer in layers.items():
        try:
            layer.start_(start, statistics.get(name))
        except AdapterError as error:
            raise AdapterError(f"{name}: {error}") from error


def collect_gradients(
    model: nn.Module,
    layers: Mapping[str, LowRankLinear],
    loss_of: Callable[[Batch], Tensor],
    batches: Iterable[Batch],
) -> dict[str, Tensor]:
    """Return the gradients of the mean loss with respect to the base's weights, by layer.

    Shapes: each (out, in), float32 or wider. The adapters are off meanwhile; no gradient is left in
    any parameter. A weight is not read, and may be quantised. For a large model collect for some
    layers at a time: each gradient is as large as its weight.

    Raises:
        AdapterError: there is no batch, or a layer that no gradient reached.
    """
    sums: dict[str, Tensor] = {}

    def watch(name: str, layer: LowRankLinear, x: Tensor, y: Tensor) -> Tensor:
        # Where nothing before the layer learns, the graph begins here.
        if y.is_leaf:
            y.requires_grad_()
        y.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: _add(sums, name, _gradient(layer, x, gradient))
        )
        # What follows may change y in place, which no leaf bears.
        return y.clone()

    with _watching(layers, watch), _frozen(model):
        count = 0
        for batch in batches:
            with torch.enable_grad():
                loss_of(batch).backward()  # type: ignore[no-untyped-call]
            count += 1
    return _means(sums, count, layers)


@torch.no_grad()
def collect_activations(
    layers: Mapping[str, LowRankLinear],
    forward: Callable[[Batch], Any],
    batches: Iterable[Batch],
) -> dict[str, Tensor]:
    """Return the sums of x xᵀ over the inputs x of the layers, divided by the number of batches.

    Shapes: each (in, in), float32 or wider, all held at once. ``forward`` runs the model on
    a batch. The adapters are off meanwhile.

    Raises:
        AdapterError: there is no batch, or a layer that is not used or not of a linear layer.
    """
    for name, layer in layers.items():
        if not isinstance(layer.map, LinearMap):
            raise AdapterError(
                f"{name} is a {type(layer.base).__name__}, expected a linear layer; give it a "
                "start that needs no activations."
            )
    sums: dict[str, Tensor] = {}

    def watch(name: str, layer: LowRankLinear, x: Tensor, y: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
        _add(sums, name, rows.T @ rows)

    with _watching(layers, watch):
        count = 0
        for batch in batches:
            forward(batch)
            count += 1
    return _means(sums, count, layers)


def _gradient(layer: LowRankLinear, x: Tensor, gradient: Tensor) -> Tensor:
    """The map is linear in its matrix: its gradient is that of any matrix, also of zeros."""
    size = layer.out_features, layer.in_features
    wide = torch.promote_types(gradient.dtype, torch.float32)
    with torch.enable_grad():
        matrix = torch.zeros(size, dtype=gradient.dtype, device=gradient.device, requires_grad=True)
        y = layer.map.down(x.detach(), matrix)
    return torch.autograd.grad(y, matrix, gradient.to(y.dtype))[0].to(wide)


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    if name in sums:
        sums[name] += value
    else:
        sums[name] = value


def _means(sums: dict[str, Tensor], count: int, names: Iterable[str]) -> dict[str, Tensor]:
    if not count:
        raise AdapterError("there are no batches to collect from, expected at least one.")
    without = [name for name in names if name not in sums]
    if without:
        raise AdapterError(
            f"nothing reached {', '.join(without)} in {count} batches; leave them out or collect "
            "over batches that use them."
        )
    return {name: sums[name] / count for name in names}


@contextmanager
def _watching(
    layers: Mapping[str, LowRankLinear],
    watch: Callable[[str, LowRankLinear, Tensor, Tensor], Tensor | None],
) -> Iterator[None]:
    enabled = {name: layer.enabled for name, layer in layers.items()}

    def hook(name: str, layer: LowRankLinear) -> Callable[..., Tensor | None]:
        return lambda _, inputs, y: watch(name, layer, inputs[0], y)

    handles = [
        layer.base.register_forward_hook(hook(name, layer)) for name, layer in layers.items()
    ]
    try:
        for layer in layers.values():
            layer.enabled = False
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, layer in layers.items():
            layer.enabled = enabled[name]


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
