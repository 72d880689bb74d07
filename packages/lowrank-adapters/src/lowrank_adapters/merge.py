"""The update inside the base's weight, and the weight as it was, bit by bit."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lowrank_adapters.errors import AdapterError
from lowrank_adapters.inject import adapted_layers
from lowrank_adapters.layer import LowRankLinear
from lowrank_adapters.maps import plain_weight


@torch.no_grad()
def merge_(model: nn.Module) -> None:
    """Add each low-rank layer's update to its base's weight, in place; the layer is then its base.

    W ← W + ΔW, summed in the wider dtype and rounded once to the weight's. ``unmerge_`` restores
    W bit by bit: each layer keeps a copy of it, which doubles the memory of the adapted weights.
    The factors take no gradient while they are merged. The model's ``state_dict`` holds W + ΔW and
    the factors meanwhile: loaded into an adapted model it would add the update twice. Save it
    unmerged, or remove the adapters for good by `remove_adapters_`.

    Raises:
        AdapterError: a layer is merged already, its base is quantised, sharded or on the meta
            device, or a merged weight is not finite. The model is left as it was.

    >>> from lowrank_adapters import LoRA, inject_adapters_
    >>> model = nn.Sequential(nn.Linear(4, 3, bias=False))
    >>> layer = inject_adapters_(model, LoRA(rank=2, alpha=2.0))["0"]
    >>> _ = nn.init.ones_(layer.b)
    >>> before = layer.base.weight.clone()
    >>> merge_(model)
    >>> torch.allclose(layer.base.weight, before + layer.b @ layer.a)
    True
    >>> unmerge_(model)
    >>> torch.equal(layer.base.weight, before)
    True
    """
    layers = adapted_layers(model)
    refuse_merged(layers.items())
    try:
        for name, layer in layers.items():
            try:
                _merge(layer)
            except AdapterError as error:
                raise AdapterError(f"{name}: {error}") from error
    except BaseException:
        _restore(layers.values())
        raise


def _merge(layer: LowRankLinear) -> None:
    weight = plain_weight(layer.base)
    if weight.is_meta:
        raise AdapterError("its weight is on the meta device; load the model before merging.")
    before = weight.clone()
    layer.map.add_(layer.base, layer.delta())
    layer.unmerged = before
    if not weight.isfinite().all():
        raise AdapterError(
            "its merged weight would not be finite; load an earlier adapter, or a base with a "
            "wider dtype."
        )


@torch.no_grad()
def unmerge_(model: nn.Module) -> None:
    """Give the merged layers' bases the weights back that they had, bit by bit.

    Raises:
        AdapterError: no layer is merged.
    """
    layers = [layer for layer in adapted_layers(model).values() if layer.merged]
    if not layers:
        raise AdapterError("no layer is merged; call merge_ first.")
    _restore(layers)


def _restore(layers: Iterable[LowRankLinear]) -> None:
    for layer in layers:
        if layer.unmerged is not None:
            plain_weight(layer.base).copy_(layer.unmerged)
            layer.unmerged = None


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Merge the model's adapters for the length of a block; see `merge_`.

    Raises:
        AdapterError: what `merge_` refuses.

    >>> from lowrank_adapters import LoRA, inject_adapters_
    >>> model = nn.Sequential(nn.Linear(4, 3))
    >>> layer = inject_adapters_(model, LoRA(rank=2, alpha=2.0))["0"]
    >>> with merged(model):
    ...     layer.merged
    True
    >>> layer.merged
    False
    """
    merge_(model)
    try:
        yield
    finally:
        _restore(adapted_layers(model).values())


def refuse_merged(layers: Iterable[tuple[str, LowRankLinear]]) -> None:
    """Refuse layers whose base already contains the update.

    Raises:
        AdapterError: names the first one that is merged.
    """
    for name, layer in layers:
        if layer.merged:
            raise AdapterError(f"{name} is merged; call unmerge_(model) first.")
