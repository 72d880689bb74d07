"""Writes adapters in PEFT's layout, without approximation."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from safetensors.torch import save_file
from torch import Tensor, nn

from lowrank_adapters.dora import DoRALinear
from lowrank_adapters.errors import AdapterError
from lowrank_adapters.exchange.padded import (
    TransformB,
    check_exportable,
    check_finite,
    pad,
    renamed,
    update_of,
)
from lowrank_adapters.exchange.peft.layout import (
    ADALORA_A,
    ADALORA_B,
    ADALORA_E,
    ADALORA_EPSILON,
    CONFIG,
    MAGNITUDE,
    PREFIX,
    TENSORS,
    lora_tensors,
)
from lowrank_adapters.files import replace_folder
from lowrank_adapters.layer import LowRankLinear
from lowrank_adapters.maps import LinearMap
from lowrank_adapters.svd import SVDLinear

Form = Literal["padded", "compact", "adalora"]


def export_peft(
    layers: Mapping[str, LowRankLinear],
    folder: str | Path,
    *,
    form: Form = "padded",
    rename: Callable[[str], str] = str,
    transform_b: TransformB = lambda _, b: b,
    modules_to_save: Mapping[str, nn.Module] | None = None,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
) -> Path:
    """Write the layers' updates in PEFT's layout, without approximation; return the folder.

    ``form``: "padded", LoRA of one rank, the largest number of live components of any matrix, the
    others padded with zeros; for PEFT, and for what reads its layout with one rank and alpha for
    all. "compact", LoRA of each matrix' own number of live components, by ``rank_pattern`` and
    ``alpha_pattern``, without the matrices that have none; for PEFT. "adalora", AdaLoRA with its λ
    apart and the pruned components left out, by ``rank_pattern``; for PEFT, and for `SVDLinear`
    alone.

    In the first two forms, masks, λ and scaling are folded into B and alpha equals the rank, so
    that alpha / rank is one. `DoRALinear` is written as PEFT's DoRA, with its magnitude. Tensors
    are float32.

    ``rename``: from this model's module names to those of the exported model. ``transform_b``: may
    reorder the output rows of a module's B (out, rank), where the exported model orders them
    differently. ``modules_to_save``: modules that were trained as a whole, by their names here,
    such as a classification head. ``task_type``: such as "CAUSAL_LM", by which PEFT chooses the
    model's class. An earlier export in ``folder`` is replaced as a whole.

    Raises:
        AdapterError: no layer, one that the form cannot hold, a value that is not finite, or a
            ``folder`` that holds something else; nothing is written.

    >>> import tempfile
    >>> from lowrank_adapters import LoRA, inject_adapters_
    >>> model = nn.Sequential(nn.Linear(4, 3))
    >>> layers = inject_adapters_(model, LoRA(rank=2, alpha=2.0))
    >>> folder = export_peft(layers, tempfile.mkdtemp() + "/adapter")
    >>> sorted(path.name for path in folder.iterdir())
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    folder = Path(folder)
    check_exportable(layers)
    if folder.exists() and not (folder / CONFIG).is_file():
        raise AdapterError(f"{folder} exists and is no adapter; give a folder of its own.")
    names = renamed(layers, rename)
    modules = {names[n]: _Module(n, layer, transform_b) for n, layer in layers.items()}
    tensors, config = _form(form)(modules)
    whole, saved = _whole_modules(modules_to_save or {}, rename)
    config |= {
        "task_type": task_type,
        "base_model_name_or_path": base_model_name_or_path,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(_is_transposed(module.layer) for module in modules.values()),
        "target_modules": list(tensors),
        "modules_to_save": saved or None,
    }
    flat = {f"{n}.{part}": tensor for n, parts in tensors.items() for part, tensor in parts.items()}
    _write(folder, flat | whole, config)
    return folder


class _Module(NamedTuple):
    """A layer to be exported, with its name here."""

    where: str
    layer: LowRankLinear
    transform_b: TransformB

    def update(self) -> tuple[Tensor, Tensor]:
        return update_of(self.where, self.layer, self.transform_b)

    def turn(self, b: Tensor) -> Tensor:
        return self.transform_b(self.where, b)


Tensors = dict[str, dict[str, Tensor]]
Config = dict[str, Any]


def _form(name: str) -> Callable[[Mapping[str, _Module]], tuple[Tensors, Config]]:
    forms = {"padded": _padded, "compact": _compact, "adalora": _adalora}
    if name not in forms:
        raise AdapterError(f"form is {name!r}, expected one of {', '.join(forms)}.")
    return forms[name]


def _padded(modules: Mapping[str, _Module]) -> tuple[Tensors, Config]:
    updates = {name: module.update() for name, module in modules.items()}
    rank = max(1, *(len(a) for a, _ in updates.values()))
    tensors = {n: _lora(modules[n], *pad(a, b, rank)) for n, (a, b) in updates.items()}
    return tensors, _lora_config(modules, rank)


def _compact(modules: Mapping[str, _Module]) -> tuple[Tensors, Config]:
    updates = {name: module.update() for name, module in modules.items()}
    live = {name: (a, b) for name, (a, b) in updates.items() if len(a)}
    if not live:
        first = next(iter(updates))
        live = {first: pad(*updates[first], 1)}
    ranks = {name: len(a) for name, (a, _) in live.items()}
    config = _lora_config(modules, max(ranks.values()))
    if len(set(ranks.values())) > 1:
        # PEFT takes the first key that is a suffix of a name: the longest have to come first.
        pattern = {name: ranks[name] for name in sorted(ranks, key=len, reverse=True)}
        config |= {"rank_pattern": pattern, "alpha_pattern": pattern}
    return {name: _lora(modules[name], a, b) for name, (a, b) in live.items()}, config


def _lora(module: _Module, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    tensors = lora_tensors(module.layer.map, a, b)
    if isinstance(module.layer, DoRALinear):
        magnitude = module.layer.magnitude.detach().float()
        check_finite(module.where, magnitude)
        tensors[MAGNITUDE] = module.turn(magnitude[:, None])[:, 0]
    return tensors


def _lora_config(modules: Mapping[str, _Module], rank: int) -> Config:
    kinds = {isinstance(module.layer, DoRALinear): module.where for module in modules.values()}
    if len(kinds) > 1:
        raise AdapterError(
            f"{kinds[True]} is DoRA, but {kinds[False]} is not, and PEFT has one kind for all; "
            "export them to folders of their own."
        )
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "use_dora": True in kinds}
    return config | {"rank_pattern": {}, "alpha_pattern": {}}


def _adalora(modules: Mapping[str, _Module]) -> tuple[Tensors, Config]:
    for module in modules.values():
        _check_adalora(module.where, module.layer)
    layers = {name: module.layer for name, module in modules.items()}
    rank = max(layer.rank for layer in layers.values())
    alpha = next(iter(layers.values())).alpha
    masks = {name: _mask(layer, rank) for name, layer in layers.items()}
    pruned = not all(all(mask) for mask in masks.values())
    live = sum(sum(mask) for mask in masks.values())
    config = {
        "peft_type": "ADALORA",
        "init_r": rank,
        "target_r": max(1, round(live / len(layers))),
        "lora_alpha": alpha,
        "total_step": 1,
        "rank_pattern": {f"{n}.{ADALORA_E}": m for n, m in masks.items()} if pruned else None,
    }
    factor = (rank + ADALORA_EPSILON) / alpha
    return {name: _triplet(module, factor) for name, module in modules.items()}, config


def _check_adalora(where: str, layer: LowRankLinear) -> None:
    if not isinstance(layer, SVDLinear) or layer.start_a is not None:
        raise AdapterError(
            f"{where} is a {type(layer).__name__} that is no P diag(λ) Q alone, which AdaLoRA's "
            "form holds; export it as 'padded' or 'compact'."
        )
    if not isinstance(layer.base, nn.Conv2d) and not isinstance(layer.map, LinearMap):
        raise AdapterError(
            f"{where} is on a {type(layer.base).__name__}, which PEFT has no AdaLoRA for; "
            "export it as 'padded' or 'compact'."
        )


def _triplet(module: _Module, factor: float) -> dict[str, Tensor]:
    layer = module.layer
    live = layer.get_buffer("rank_mask")
    p, lam, q = (layer.tokens(role)[live].float() for role in ("p", "lam", "q"))
    check_finite(module.where, p, lam, q)
    return {
        ADALORA_A: q,
        ADALORA_E: lam * (layer.scaling * factor),
        ADALORA_B: module.turn(p.T),
    }


def _mask(layer: LowRankLinear, rank: int) -> list[bool]:
    mask: list[bool] = layer.get_buffer("rank_mask").tolist()
    return mask + [False] * (rank - len(mask))


def _is_transposed(layer: LowRankLinear) -> bool:
    return isinstance(layer.map, LinearMap) and layer.map.transposed


def _whole_modules(
    modules: Mapping[str, nn.Module], rename: Callable[[str], str]
) -> tuple[dict[str, Tensor], list[str]]:
    tensors = {}
    for name, module in modules.items():
        if any(isinstance(inner, LowRankLinear) for inner in module.modules()):
            raise AdapterError(
                f"{name} is to be saved whole, but has adapted layers in it; exclude them from "
                "injection, or leave it out of modules_to_save."
            )
        for key, tensor in module.state_dict().items():
            if not tensor.isfinite().all():
                raise AdapterError(f"{name}.{key} is not finite; nothing was written.")
            tensors[f"{rename(name)}.{key}"] = tensor
    return tensors, [rename(name) for name in modules]


def _write(folder: Path, tensors: Mapping[str, Tensor], config: Config) -> None:
    # Copies: safetensors takes no two tensors of one storage.
    whole = {
        f"{PREFIX}{name}": tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in tensors.items()
    }

    def write(temporary: Path) -> None:
        save_file(whole, temporary / TENSORS, metadata={"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n")

    replace_folder(folder, write)
