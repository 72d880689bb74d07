"""The state of a method among the tensors of one safetensors file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hyper_tune.errors import UserError
from hyper_tune.tree import flatten, unflatten

STATE = "model.safetensors"  # the name that Trainer looks for
_TENSOR, _PLAIN = "hyper_tune.tensor.", "hyper_tune.json"


def pack(state: Any) -> dict[str, Tensor]:
    """Return nested dicts and lists as named tensors; what is no tensor is JSON in one of bytes.

    >>> sorted(pack({"step": 3, "moments": torch.zeros(2)}))
    ['hyper_tune.json', 'hyper_tune.tensor.moments']
    """
    tensors, plain = flatten(state)
    text = bytearray(json.dumps(plain, allow_nan=False).encode())
    named = {f"{_TENSOR}{name}": tensor.contiguous() for name, tensor in tensors.items()}
    return {**named, _PLAIN: torch.frombuffer(text, dtype=torch.uint8)}


def is_packed(name: str) -> bool:
    """Return whether a tensor's name is one that `pack` gives."""
    return name == _PLAIN or name.startswith(_TENSOR)


def unpack(tensors: Mapping[str, Tensor]) -> Any:
    """Return what `pack` was given; tensors of other names are passed over.

    Raises:
        ValueError: the JSON is missing or none, or a tensor is missing.

    >>> unpack(pack({"step": 3}))
    {'step': 3}
    """
    try:
        plain = json.loads(bytes(tensors[_PLAIN].tolist()))
        named = {n.removeprefix(_TENSOR): t for n, t in tensors.items() if n.startswith(_TENSOR)}
        return unflatten(named, plain)
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{error} is missing") from error


def write_state(folder: Path, state: Any) -> None:
    """Write ``model.safetensors`` into a folder, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{STATE}"
    save_file(pack(state), temporary, metadata={"format": "pt"})
    temporary.replace(folder / STATE)


def read_state(path: Path) -> Any:
    """Return what `write_state` wrote.

    Raises:
        UserError: the file is not there, damaged, or another model's.
    """
    try:
        return unpack(load_file(path))
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
