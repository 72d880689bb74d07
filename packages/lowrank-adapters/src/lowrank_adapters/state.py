"""An adapter's own tensors, by name: exact sets of keys, safetensors only."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowrank_adapters.errors import AdapterError
from lowrank_adapters.layer import LowRankLinear

FILE = "adapter.safetensors"


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that the low-rank layers declare as theirs, live, by name.

    >>> from lowrank_adapters import SVD, inject_adapters_
    >>> model = nn.Sequential(nn.Linear(4, 3))
    >>> _ = inject_adapters_(model, SVD(rank=2, alpha=2.0))
    >>> sorted(adapter_state_dict(model))
    ['0.lam', '0.p', '0.q', '0.rank_mask']
    """
    return {
        f"{name}.{key}": tensor.detach()
        for name, layer in model.named_modules()
        if isinstance(layer, LowRankLinear)
        for key, tensor in [*layer.factors(), *layer.named_buffers(recurse=False)]
    }


@torch.no_grad()
def load_adapter_state_dict_(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy saved tensors into the model's low-rank layers, all of them or none.

    Raises:
        AdapterError: keys are missing or unexpected (both are listed), a shape differs, or a value
            is not finite; the model is left as it was.
    """
    own = adapter_state_dict(model)
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        raise AdapterError(
            f"the saved adapter does not fit: missing {missing or 'none'}, unexpected "
            f"{unexpected or 'none'}; inject the same method into the same modules first."
        )
    for name, tensor in own.items():
        if state[name].shape != tensor.shape:
            raise AdapterError(
                f"{name} is {tuple(state[name].shape)} in the saved adapter, but "
                f"{tuple(tensor.shape)} here; load it into the model and rank it was trained with."
            )
        if not state[name].isfinite().all():
            raise AdapterError(f"{name} is not finite in the saved adapter; take an earlier one.")
    for name, tensor in own.items():
        tensor.copy_(state[name])


def save_adapter(model: nn.Module, folder: str | Path) -> Path:
    """Write the adapter's tensors to ``folder/adapter.safetensors``; return the file."""
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    state = {name: tensor.contiguous() for name, tensor in adapter_state_dict(model).items()}
    save_file(state, temporary)
    temporary.replace(path)
    return path


def load_adapter_(model: nn.Module, folder: str | Path) -> None:
    """Load what `save_adapter` wrote into a model with the same layers injected.

    Raises:
        AdapterError: the file is missing, cut short, not safetensors, or does not fit.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise AdapterError(f"{path} does not exist; only {FILE} is read, never a pickle.")
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise AdapterError(f"{path} is not a whole safetensors file: {error}.") from error
    load_adapter_state_dict_(model, state)
