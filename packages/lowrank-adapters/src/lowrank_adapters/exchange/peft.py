"""Plain LoRA in PEFT's layout, scaled alike by PEFT, vLLM, llama.cpp and diffusers."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from lowrank_adapters.errors import AdapterError
from lowrank_adapters.layer import LowRankLinear

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def export_peft(
    layers: Mapping[str, LowRankLinear],
    folder: str | Path,
    *,
    rename: Callable[[str], str] = str,
    transform_b: Callable[[str, Tensor], Tensor] = lambda _, b: b,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
) -> Path:
    """Write the layers' updates as LoRA of one rank, without approximation; return the folder.

    The rank is the largest number of live components; the other matrices are padded with zeros.
    Masks, λ and scaling are folded into B and ``lora_alpha`` equals the rank, so that every reader
    scales by one. Tensors are float32.

    ``rename``: from this model's module names to those of the exported model. ``transform_b``: may
    reorder the output rows of a module's B (out, rank), where the exported model orders them
    differently. ``task_type``: such as "CAUSAL_LM", by which PEFT chooses the model's class. An
    earlier export in ``folder`` is replaced as a whole.

    Raises:
        AdapterError: no layer, a factor that is not finite, or a ``folder`` that holds something
            else; nothing is written.

    >>> import torch
    >>> from lowrank_adapters import LoRA, inject_adapters_
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    >>> layers = inject_adapters_(model, LoRA(rank=2, alpha=2.0))
    >>> folder = export_peft(layers, tempfile.mkdtemp() + "/adapter")
    >>> sorted(path.name for path in folder.iterdir())
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    if not layers:
        raise AdapterError("there are no layers to export; inject adapters first.")
    folder = Path(folder)
    if folder.exists() and not (folder / CONFIG).is_file():
        raise AdapterError(f"{folder} exists and is no adapter; give a folder of its own.")
    updates = {name: layer.as_lora() for name, layer in layers.items()}
    rank = max(1, *(len(a) for a, _ in updates.values()))
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in updates.items():
        if not (a.isfinite().all() and b.isfinite().all()):
            raise AdapterError(f"{name} has factors that are not finite; nothing was written.")
        key = f"base_model.model.{rename(name)}"
        padding = rank - len(a)
        padded_a = functional.pad(a.float(), (0, 0, 0, padding))
        padded_b = functional.pad(transform_b(name, b.float()), (0, padding))
        tensors[f"{key}.lora_A.weight"] = padded_a.cpu().contiguous()
        tensors[f"{key}.lora_B.weight"] = padded_b.cpu().contiguous()
    config = _config([rename(name) for name in layers], rank, base_model_name_or_path, task_type)
    _write(folder, tensors, config)
    return folder


def _config(
    modules: list[str], rank: int, base: str | None, task_type: str | None
) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": modules,
        "modules_to_save": None,
    }


def _write(folder: Path, tensors: dict[str, Tensor], config: dict[str, object]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder.parent))
    try:
        save_file(tensors, temporary / TENSORS, metadata={"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        for path in (temporary / TENSORS, temporary / CONFIG, temporary):
            _sync(path)
        temporary.chmod(0o755)
        if folder.exists():
            replaced = temporary.with_name(f"{temporary.name}-replaced")
            folder.rename(replaced)
            temporary.rename(folder)
            shutil.rmtree(replaced)
        else:
            temporary.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
