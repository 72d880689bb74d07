"""A Hugging Face checkpoint with changed weights: read and written one file at a time."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hyper_tune.durable import TEMPORARY, publish
from hyper_tune.errors import UserError

Edit = Callable[[Tensor], Tensor]

_INDEX = "model.safetensors.index.json"
# What `AutoModelForCausalLM` and `AutoTokenizer` read besides weights, and the licence. A README
# would be about the base.
_KEPT = ("*.json", "*.txt", "*.jinja", "tokenizer.model", "*.tiktoken", "LICENSE*", "NOTICE*")


def write_merged(
    base: Path,
    files: Sequence[str],
    output: Path,
    edits: Mapping[str, Edit],
    *,
    dtype: torch.dtype | None = None,
    texts: Mapping[str, str] | None = None,
) -> Path:
    """Write ``base`` with some weights changed, as a checkpoint of its kind; return the folder.

    No more than one of the weight files is in memory at a time. Names of tensors, tied weights,
    configuration and tokenizer stay as they are.

    ``files``: the base's safetensors files. ``edits``: by tensor, what makes the new weight of the
    old one, which is given in float32, or wider if it is. ``dtype``: of the tensors that are
    written; None keeps each one's own. ``texts``: further files, by name.

    Raises:
        UserError: ``output`` exists, the disk has no room, or the base lacks a tensor that is to be
            changed; nothing is written.
    """
    _refuse(base, files, output, edits, dtype)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.parent / f"{TEMPORARY}{output.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        _copy_others(base, temporary, dtype)
        _write_weights(base, files, temporary, edits, dtype)
        for name, text in (texts or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")
        publish(temporary, output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return output


def _refuse(
    base: Path,
    files: Sequence[str],
    output: Path,
    edits: Mapping[str, Edit],
    dtype: torch.dtype | None,
) -> None:
    if output.exists():
        raise UserError(f"{output} exists; give a folder that does not.")
    names: set[str] = set()
    needed = 0
    for file in files:
        try:
            with safe_open(base / file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118
                    part = weights.get_slice(name)
                    size = _itemsize(part.get_dtype()) if dtype is None else dtype.itemsize
                    needed += size * _numel(part.get_shape())
                    names.add(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{base / file} is not a whole safetensors file: {error}.") from error
    missing = sorted(edits.keys() - names)
    if missing:
        raise UserError(
            f"{base} has no tensor {missing[0]} ({len(missing)} of {len(edits)} are missing); it "
            "is not the model that was trained."
        )
    existing = next(folder for folder in output.absolute().parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"{output} needs {needed / 2**30:.1f} GiB, but {existing} has {free / 2**30:.1f} GiB "
            "free; make room, or write it elsewhere."
        )


def _itemsize(name: str) -> int:
    bits = "".join(letter for letter in name.partition("_")[0] if letter.isdigit())
    return int(bits) // 8 if bits else 1


def _numel(shape: Sequence[int]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel


def _copy_others(base: Path, folder: Path, dtype: torch.dtype | None) -> None:
    for pattern in _KEPT:
        for path in base.glob(pattern):
            if path.is_file() and not path.name.endswith(".index.json"):
                shutil.copyfile(path, folder / path.name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if dtype is not None:
        # Older versions of transformers wrote, and read, the longer name.
        for key in {"dtype", "torch_dtype"} & config.keys() or {"dtype"}:
            config[key] = str(dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_weights(
    base: Path,
    files: Sequence[str],
    folder: Path,
    edits: Mapping[str, Edit],
    dtype: torch.dtype | None,
) -> None:
    places: dict[str, str] = {}
    total = 0
    for number, file in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        if len(files) == 1:
            name = "model.safetensors"
        with safe_open(base / file, framework="pt") as weights:
            tensors = {
                key: _edited(weights.get_tensor(key), edits.get(key), dtype)
                for key in weights.keys()  # noqa: SIM118
            }
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(files) > 1:
        index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _edited(weight: Tensor, edit: Edit | None, dtype: torch.dtype | None) -> Tensor:
    final = weight.dtype if dtype is None or not weight.is_floating_point() else dtype
    if edit is not None:
        weight = edit(weight.to(torch.promote_types(weight.dtype, torch.float32)))
    return weight.to(final).contiguous()
