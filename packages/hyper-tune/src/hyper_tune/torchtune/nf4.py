"""A base in 4 bits: the decoder's linear layers in NF4 (QLoRA, arXiv 2305.14314), as torchao's."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torchtune.modules import TransformerDecoder

from hyper_tune.errors import UserError

# torchao speaks of extensions that nothing here uses when it is imported.
logging.getLogger("torchao").setLevel(logging.ERROR)
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4  # noqa: E402

# Numbers of a weight that share a scale, and scales that share one of their own.
BLOCK, SCALER_BLOCK = 64, 256


def quantisable(model: TransformerDecoder) -> dict[str, nn.Linear]:
    """Return the linear layers of the decoder's blocks; embeddings and output stay as they are.

    Raises:
        UserError: a weight whose numbers do not fill whole blocks; its layer is named.
    """
    found = {
        f"layers.{name}": module
        for name, module in model.layers.named_modules()
        if isinstance(module, nn.Linear)
    }
    for name, module in found.items():
        if module.weight.numel() % (BLOCK * SCALER_BLOCK):
            raise UserError(
                f"quantize_base is set, but {name} is {tuple(module.weight.shape)}, and NF4 takes "
                f"multiples of {BLOCK * SCALER_BLOCK} numbers; set quantize_base=False."
            )
    return found


def quantised(weight: Tensor) -> Tensor:
    """Return a weight (out, in) in NF4; it is multiplied in the dtype that it had."""
    nf4: Tensor = to_nf4(weight, block_size=BLOCK, scaler_block_size=SCALER_BLOCK)
    return nf4


def quantise_on_meta_(layers: Iterable[nn.Linear]) -> None:
    """Put weights on the meta device into NF4, in place: shapes and dtypes, without values."""
    of_shape: dict[torch.Size, Any] = {}
    for layer in layers:
        shape = layer.weight.shape
        if shape not in of_shape:
            of_shape[shape] = quantised(layer.weight.detach())
        # Quantising goes piece by piece, which takes long even where there is nothing to do.
        names, rest = of_shape[shape].__tensor_flatten__()
        parts = {name: torch.empty_like(getattr(of_shape[shape], name)) for name in names}
        weight = NF4Tensor.__tensor_unflatten__(parts, rest, shape, layer.weight.stride())
        layer.weight = nn.Parameter(weight, requires_grad=False)


def as_quantised(weight: Tensor, dtype: torch.dtype, order: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the numbers by which a run multiplies that has ``weight`` in NF4.

    ``weight``: (out, in) as its file has it, in whose order of rows and dtype it is returned.
    ``order``: takes rows from the model's order to the file's; blocks lie in the model's.
    """
    rows = torch.arange(len(weight), device=weight.device)
    there = order(rows.unsqueeze(1)).squeeze(1)
    back = torch.argsort(there)
    nf4 = quantised(weight[back].to(dtype))
    assert isinstance(nf4, NF4Tensor)
    numbers: Tensor = nf4.get_original_weight()[there].to(weight.dtype)
    return numbers
