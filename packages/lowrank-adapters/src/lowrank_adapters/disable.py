"""The plain model, for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lowrank_adapters.inject import adapted_layers
from lowrank_adapters.merge import refuse_merged


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Let the model compute what its bases do alone, for the length of a block.

    Raises:
        AdapterError: a layer is merged, so that its base is not what it was.

    >>> from lowrank_adapters import LoRA, inject_adapters_
    >>> model = nn.Sequential(nn.Linear(4, 3))
    >>> layer = inject_adapters_(model, LoRA(rank=2, alpha=2.0))["0"]
    >>> with disable_adapters(model):
    ...     layer.enabled
    False
    """
    layers = adapted_layers(model)
    refuse_merged(layers.items())
    before = {layer: layer.enabled for layer in layers.values()}
    try:
        for layer in before:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in before.items():
            layer.enabled = enabled
