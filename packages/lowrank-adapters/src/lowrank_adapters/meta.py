"""What layers compute from their bases' weights, once these are there."""

from torch import nn

from lowrank_adapters.errors import AdapterError
from lowrank_adapters.layer import LowRankLinear


def materialise_(model: nn.Module) -> None:
    """Compute what low-rank layers could not while their bases were on the meta device.

    Call it when the base's weights are there: starts from the weight, and DoRA's norms and the
    magnitudes that start as these, are set by it. Factors that were loaded or trained before it
    stay as they are.

    Raises:
        AdapterError: a layer waits whose base is still on the meta device, or is merged.

    >>> import torch
    >>> from lowrank_adapters import DoRA, inject_adapters_
    >>> with torch.device("meta"):
    ...     model = nn.Sequential(nn.Linear(4, 3))
    >>> layers = inject_adapters_(model, DoRA(rank=2, alpha=2.0))
    >>> weights = nn.Linear(4, 3).state_dict()
    >>> _ = layers["0"].base.load_state_dict(weights, assign=True)
    >>> materialise_(model)
    >>> model(torch.ones(5, 4)).shape
    torch.Size([5, 3])
    """
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            try:
                module.materialise_()
            except AdapterError as error:
                raise AdapterError(f"{name}: {error}") from error
