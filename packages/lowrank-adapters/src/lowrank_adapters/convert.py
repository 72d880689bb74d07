"""Every method's update as plain LoRA, exactly."""

import torch
from torch import nn

from lowrank_adapters.dora import DoRALinear
from lowrank_adapters.errors import AdapterError
from lowrank_adapters.inject import adapted_layers, place_
from lowrank_adapters.layer import LowRankLinear
from lowrank_adapters.lora import LoRA
from lowrank_adapters.merge import refuse_merged


@torch.no_grad()
def convert_to_lora_(model: nn.Module) -> dict[str, LowRankLinear]:
    """Replace each low-rank layer by a `LoRALinear` of the same update; return these by name.

    B A of the new layer is `as_lora` of the old one: AdaLoRA with its λ and mask, DyLoRA at the
    rank that it is at, any start. Its rank k counts the live components, and alpha = k, so that it
    scales by one. A layer without live components becomes its base. Nothing is approximated; the
    factors are float32 or wider, for a product of narrower ones. Dropout stays. An optimizer and a
    `FactorStack` have to be made anew.

    Raises:
        AdapterError: a layer is DoRA, which is no sum of weight and low-rank matrix; is merged; has
            a value that is not finite; or has more components than its matrix has rows or columns.
            The model is left as it was.

    >>> from lowrank_adapters import SVD, inject_adapters_
    >>> model = nn.Sequential(nn.Linear(4, 3))
    >>> layer = inject_adapters_(model, SVD(rank=3, alpha=6.0))["0"]
    >>> layer.rank_mask[0] = False
    >>> convert_to_lora_(model)
    {'0': LoRALinear(
      rank=2, alpha=2.0
      (base): Linear(in_features=4, out_features=3, bias=True)
    )}
    """
    layers = adapted_layers(model)
    refuse_merged(layers.items())
    converted: dict[str, LowRankLinear] = {}
    for name, layer in layers.items():
        try:
            new = _as_lora_layer(layer)
        except AdapterError as error:
            raise AdapterError(f"{name}: {error}") from error
        if new is not None:
            converted[name] = new
    place_(model, {name: converted.get(name, layer.base) for name, layer in layers.items()})
    return converted


def _as_lora_layer(layer: LowRankLinear) -> LowRankLinear | None:
    if isinstance(layer, DoRALinear):
        raise AdapterError(
            "it is a DoRALinear, whose magnitudes are no low-rank update; export it as DoRA, or "
            "merge it."
        )
    a, b = layer.as_lora()
    if not (a.isfinite().all() and b.isfinite().all()):
        raise AdapterError("it has factors that are not finite; load an earlier adapter.")
    rank = len(a)
    if not rank:
        return None
    make = LoRA(rank, float(rank), dropout=layer.dropout)
    new = make.build(layer.base, device=a.device, dtype=torch.promote_types(a.dtype, b.dtype))
    new.get_parameter("a").copy_(a)
    new.get_parameter("b").copy_(b)
    new.enabled = layer.enabled
    return new.train(layer.training)
