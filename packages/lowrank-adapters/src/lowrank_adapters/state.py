"""An adapter's own tensors, by name: exact sets of keys, safetensors only."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lowrank_adapters.errors import AdapterError
from lowrank_adapters.files import read_tensors, replace_file
from lowrank_adapters.inject import adapted_layers
from lowrank_adapters.layer import LowRankLinear
from lowrank_adapters.merge import refuse_merged

FILE = "adapter.safetensors"
_FORMAT = "lowrank-adapters 1"


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that the low-rank layers declare as theirs, live, by name.

    >>> from lowrank_adapters import SVD, inject_adapters_
    >>> model = nn.Sequential(nn.Linear(4, 3))
    >>> _ = inject_adapters_(model, SVD(rank=2, alpha=2.0))
    >>> sorted(adapter_state_dict(model))
    ['0.lam', '0.p', '0.q', '0.rank_mask']
    """
    return {
        f"{name}.{key}" if name else key: tensor.detach()
        for name, layer in adapted_layers(model).items()
        for key, tensor in layer.owned()
    }


@torch.no_grad()
def load_adapter_state_dict_(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy saved tensors into the model's low-rank layers, all of them or none.

    A layer takes the product of the start that it was saved with, or loses its own where it was
    saved without one.

    Raises:
        AdapterError: keys are missing or unexpected (both are listed), a shape or kind of number
            differs, a value is not finite in the dtype here, or a layer is merged, on the meta
            device or waits for its base; the model is left as it was.
    """
    layers = adapted_layers(model)
    refuse_merged(layers.items())
    refuse_waiting(layers)
    own = adapter_state_dict(model)
    for name, layer in layers.items():
        prefix = f"{name}." if name else ""
        for key, room in layer.expected_start(state, prefix).items():
            own.pop(prefix + key, None)
            if room is not None:
                own[prefix + key] = room
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        raise AdapterError(
            f"the saved adapter does not fit: missing {missing or 'none'}, unexpected "
            f"{unexpected or 'none'}; inject the same method into the same modules first."
        )
    for name, tensor in own.items():
        check_fits(name, state[name], tensor)
    for name, layer in layers.items():
        layer.expect_(state, f"{name}." if name else "")
    for name, tensor in adapter_state_dict(model).items():
        tensor.copy_(state[name])


def refuse_waiting(layers: Mapping[str, LowRankLinear]) -> None:
    """Refuse layers that `materialise_` would compute again, over what was loaded.

    Raises:
        AdapterError: names the first one.
    """
    for name, layer in layers.items():
        if layer.awaits_factors():
            raise AdapterError(
                f"{name} waits for the weights of its base, which was on the meta device; load "
                "them and call materialise_(model) first."
            )


def check_fits(name: str, saved: Tensor, tensor: Tensor) -> None:
    """Refuse a saved tensor that cannot be copied into ``tensor`` without loss of meaning."""
    if saved.shape != tensor.shape:
        raise AdapterError(
            f"{name} is {tuple(saved.shape)} in the saved adapter, but {tuple(tensor.shape)} here; "
            "load it into the model and rank it was trained with."
        )
    if saved.is_floating_point() != tensor.is_floating_point():
        raise AdapterError(
            f"{name} is {saved.dtype} in the saved adapter, but {tensor.dtype} here; load it into "
            "the method it was trained with."
        )
    if not saved.isfinite().all():
        raise AdapterError(f"{name} is not finite in the saved adapter; take an earlier one.")
    if not saved.to(tensor.dtype).isfinite().all():
        raise AdapterError(
            f"{name} has values up to {saved.abs().max():.3g}, too large for {tensor.dtype}; "
            "inject with a wider factor_dtype."
        )
    if tensor.is_meta:
        raise AdapterError(f"{name} is on the meta device; put the factors on a real one first.")


def save_adapter(model: nn.Module, folder: str | Path) -> Path:
    """Write the adapter's tensors to ``folder/adapter.safetensors``; return the file.

    The file's metadata say of each layer its kind, the shape of its base, its rank and its scaling.
    A file that is there is replaced once the new one is on the disk.

    Raises:
        AdapterError: the model has no low-rank layer, or a tensor is not finite; a file that is
            there stays.
    """
    path = Path(folder) / FILE
    own = adapter_state_dict(model)
    if not own:
        raise AdapterError(f"there are no layers to save to {path}; inject adapters first.")
    for name, tensor in own.items():
        if not tensor.isfinite().all():
            raise AdapterError(f"{name} has values that are not finite; nothing was written.")
    # Copies: layers may share a mask, and safetensors takes no two tensors of one storage.
    state = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in own.items()}
    metadata = {"format": _FORMAT, "layers": json.dumps(_description(model))}
    replace_file(path, lambda temporary: save_file(state, temporary, metadata=metadata))
    return path


def load_adapter_(model: nn.Module, folder: str | Path) -> None:
    """Load what `save_adapter` wrote into a model with the same layers injected.

    Raises:
        AdapterError: the file is missing, cut short, not from `save_adapter`, or was saved from
            layers of another kind, base, rank or scaling; what `load_adapter_state_dict_` refuses.
            The model is left as it was.
    """
    path = Path(folder) / FILE
    state, metadata = read_tensors(path)
    if metadata.get("format") != _FORMAT:
        raise AdapterError(
            f"{path} has the format {metadata.get('format')!r}, expected {_FORMAT!r}; load a file "
            "that save_adapter wrote."
        )
    _compare(path, _description(model), metadata.get("layers", ""))
    load_adapter_state_dict_(model, state)


def _description(model: nn.Module) -> dict[str, dict[str, object]]:
    return {
        name: {
            "kind": type(layer).__name__,
            "base": [layer.out_features, layer.in_features],
            "rank": layer.rank,
            "scaling": float(layer.scaling),
        }
        for name, layer in adapted_layers(model).items()
    }


def _compare(path: Path, own: dict[str, dict[str, object]], text: str) -> None:
    """Refuse a layer that is there and here, but differs; keys say which layers are missing."""
    try:
        entries = {name: dict(entry) for name, entry in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterError(f"{path} does not say which layers it is of; save it again.") from error
    for name, expected in own.items():
        for what, value in expected.items():
            found = entries.get(name, expected).get(what)
            if found != value:
                raise AdapterError(
                    f"{name} has {what} {_shown(value)} here, but the adapter in {path} was saved "
                    f"with {_shown(found)}; load it into the model and method it was trained with."
                )


def _shown(value: object) -> object:
    return " x ".join(map(str, value)) if isinstance(value, list) else value
