"""llama.cpp's adapters: plain LoRA in a GGUF file, for llama-cli's ``--lora``."""

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from lowrank_adapters.dora import DoRALinear
from lowrank_adapters.errors import AdapterError
from lowrank_adapters.exchange.padded import TransformB, check_exportable, pad, renamed, update_of
from lowrank_adapters.files import replace_file
from lowrank_adapters.layer import LowRankLinear
from lowrank_adapters.maps import LinearMap

Architecture = Literal["llama", "qwen2", "qwen3"]
_ARCHITECTURES = ("llama", "qwen2", "qwen3")


def export_gguf(
    layers: Mapping[str, LowRankLinear],
    path: str | Path,
    *,
    architecture: Architecture,
    heads: int = 0,
    key_value_heads: int = 0,
    rename: Callable[[str], str] = str,
    transform_b: TransformB = lambda _, b: b,
) -> Path:
    """Write the layers' updates as llama.cpp's LoRA, without approximation; return the file.

    The rank is the largest number of live components, as in `export_peft`'s padded form; alpha
    equals it. Tensors are float32. The name of each tensor is that of llama.cpp for the weight,
    followed by ".lora_a" or ".lora_b".

    Module names and the order of B's rows must be those of transformers; ``rename`` and
    ``transform_b`` are as in `export_peft`. llama.cpp keeps the two halves of each head of Llama's
    queries and keys interleaved, and so are the rows of their B here: ``heads`` and
    ``key_value_heads`` say how many there are. Needs the extra "gguf". A file that is there is
    replaced once the new one is on the disk.

    Raises:
        AdapterError: no layer, a method or module that llama.cpp's LoRA is not for, a name that it
            does not know, a number of heads that does not divide the rows, a value that is not
            finite, or the package gguf is missing; nothing is written.

    >>> import tempfile
    >>> from torch import nn
    >>> from lowrank_adapters import LoRA, inject_adapters_
    >>> mlp = nn.ModuleDict({"up_proj": nn.Linear(4, 3)})
    >>> block = nn.ModuleDict({"mlp": mlp})
    >>> model = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList([block])})})
    >>> layers = inject_adapters_(model, LoRA(rank=2, alpha=2.0))
    >>> export_gguf(layers, tempfile.mkdtemp() + "/lora.gguf", architecture="qwen2").name
    'lora.gguf'
    """
    gguf = _gguf()
    check_exportable(layers)
    if architecture not in _ARCHITECTURES:
        raise AdapterError(
            f"architecture is {architecture!r}, expected one of {', '.join(_ARCHITECTURES)}."
        )
    names = renamed(layers, rename)
    updates = {}
    for name, layer in layers.items():
        _check_kind(name, layer)
        a, b = update_of(name, layer, transform_b)
        if architecture == "llama":
            b = _interleaved(name, b, names[name], heads, key_value_heads)
        updates[name] = a, b
    rank = max(1, *(len(a) for a, _ in updates.values()))
    find = _name_finder(gguf, architecture, names.values())
    tensors = {}
    for name, (a, b) in updates.items():
        weight = find(name, names[name])
        tensors[f"{weight}.lora_a"], tensors[f"{weight}.lora_b"] = pad(a, b, rank)
    path = Path(path)
    replace_file(path, lambda temporary: _write(gguf, temporary, architecture, rank, tensors))
    return path


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise AdapterError(
            "the package gguf is not installed; pip install 'lowrank-adapters[gguf]'."
        ) from error
    return gguf


def _check_kind(name: str, layer: LowRankLinear) -> None:
    if isinstance(layer, DoRALinear) or not isinstance(layer.map, LinearMap):
        raise AdapterError(
            f"{name} is a {type(layer).__name__} on a {type(layer.base).__name__}, which "
            "llama.cpp's LoRA is not for; merge it, or export the linear layers alone."
        )


def _name_finder(gguf: Any, architecture: str, names: Iterable[str]) -> Callable[[str, str], str]:
    numbers = [int(number) for name in names for number in re.findall(r"(?<=\.)\d+(?=\.)", name)]
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    known = gguf.get_tensor_name_map(kinds[architecture], max(numbers, default=0) + 1)

    def find(where: str, there: str) -> str:
        found: str | None = known.get_name(f"{there}.weight", try_suffixes=(".weight",))
        if found is None:
            raise AdapterError(
                f"{where} has the name {there}, which llama.cpp's {architecture} does not know; "
                "give `rename` to the names of transformers."
            )
        return found

    return find


def _interleaved(name: str, b: Tensor, there: str, heads: int, key_value_heads: int) -> Tensor:
    """Return Llama's rows in llama.cpp's order: (2, half) of each head becomes (half, 2)."""
    kinds = {"q_proj": ("heads", heads), "k_proj": ("key_value_heads", key_value_heads)}
    kind = there.rpartition(".")[2]
    if kind not in kinds:
        return b
    what, count = kinds[kind]
    if count < 1 or b.shape[0] % (2 * count):
        raise AdapterError(
            f"{name} has {b.shape[0]} rows, which {what}={count} does not divide into pairs; give "
            f"the number of {what} in the model's config."
        )
    halves = b.reshape(count, 2, -1, b.shape[1])
    return halves.swapaxes(1, 2).reshape(b.shape)


def _write(
    gguf: Any, path: Path, architecture: str, rank: int, tensors: Mapping[str, Tensor]
) -> None:
    with closing(gguf.GGUFWriter(path, architecture)) as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.cpu().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
