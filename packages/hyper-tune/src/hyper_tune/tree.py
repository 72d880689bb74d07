"""State as named tensors and plain JSON, and back."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_TENSOR, _PAIRS = "$tensor", "$pairs"


def flatten(tree: Any) -> tuple[dict[str, Tensor], Any]:
    """Split nested dicts and lists into tensors by path and a JSON value that refers to them.

    Kept exactly: int, float, bool, None, str, and dicts with int or str keys. Tuples become lists.

    Raises:
        TypeError: a value or key of another kind; its path is named.
        ValueError: a float that is not finite; its path is named.

    >>> import torch
    >>> tensors, plain = flatten({"step": 3, "moments": [torch.zeros(2)]})
    >>> list(tensors), plain
    (['moments/0'], {'step': 3, 'moments': [{'$tensor': 'moments/0'}]})
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _flatten(tree, "", tensors)


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        while path in tensors:
            path += "'"
        tensors[path] = value
        return {_TENSOR: path}
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{path} is {value}; only finite numbers are saved.")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_flatten(item, _join(path, i), tensors) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, (int, str)):
                raise TypeError(f"{path} has the key {key!r}, which is neither int nor str.")
        items = {key: _flatten(item, _join(path, key), tensors) for key, item in value.items()}
        plain = all(isinstance(key, str) and not key.startswith("$") for key in items)
        return items if plain else {_PAIRS: [[key, item] for key, item in items.items()]}
    raise TypeError(f"{path} is a {type(value).__name__}, which a checkpoint cannot hold.")


def _join(path: str, key: object) -> str:
    part = str(key).replace("%", "%25").replace("/", "%2F")
    return f"{path}/{part}" if path else part


def unflatten(tensors: Mapping[str, Tensor], plain: Any) -> Any:
    """Rebuild what `flatten` split.

    Raises:
        KeyError: a tensor that is referred to is not there.

    >>> import torch
    >>> unflatten({"a": torch.ones(1)}, {"x": {"$tensor": "a"}, "n": {"$pairs": [[0, 1.5]]}})
    {'x': tensor([1.]), 'n': {0: 1.5}}
    """
    if isinstance(plain, list):
        return [unflatten(tensors, item) for item in plain]
    if not isinstance(plain, dict):
        return plain
    if _TENSOR in plain:
        return tensors[plain[_TENSOR]]
    if _PAIRS in plain:
        return {key: unflatten(tensors, item) for key, item in plain[_PAIRS]}
    return {key: unflatten(tensors, item) for key, item in plain.items()}
