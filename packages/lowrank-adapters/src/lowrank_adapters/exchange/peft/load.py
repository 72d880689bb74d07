"""Reads adapters that PEFT saved, into layers of this package."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lowrank_adapters.dora import DoRA
from lowrank_adapters.errors import AdapterError
from lowrank_adapters.exchange.peft.config import PeftConfig, read_config
from lowrank_adapters.exchange.peft.layout import (
    ADALORA_A,
    ADALORA_B,
    ADALORA_E,
    ADALORA_EPSILON,
    CONFIG,
    MAGNITUDE,
    PARTS,
    PREFIX,
    TENSORS,
    lora_factors,
    lora_parts,
)
from lowrank_adapters.files import read_tensors
from lowrank_adapters.inject import Maker, adaptable, build_layers, place_
from lowrank_adapters.layer import LowRankLinear
from lowrank_adapters.lora import LoRA
from lowrank_adapters.maps import EmbeddingMap, Map, map_of
from lowrank_adapters.state import check_fits, refuse_waiting
from lowrank_adapters.svd import SVD

Parts = dict[str, Tensor]


def import_peft_(
    model: nn.Module,
    folder: str | Path,
    *,
    device: torch.device | str | None = None,
    factor_dtype: torch.dtype = torch.float32,
) -> dict[str, LowRankLinear]:
    """Inject the layers that a folder of PEFT is of, with its values; return them by name.

    LoRA, rsLoRA and DoRA become `LoRALinear` and `DoRALinear`; AdaLoRA becomes `SVDLinear` of its
    initial rank, of which the pruned components are masked. Modules of rank 0 stay as they are.
    ``modules_to_save``, biases and embeddings that the folder holds whole are copied into the
    model. Which modules are adapted is read from the tensors, never guessed from
    ``target_modules``. ``device``, ``factor_dtype``: as in `inject_adapters_`.

    PEFT's AdaLoRA scales by alpha / (init_r + 1e-5): alpha is that much smaller here.

    Raises:
        AdapterError: a file is missing, cut short or a pickle; the config has a kind or field that
            is not read here; a tensor has no place in the model, does not fit or is not finite;
            the model is adapted already. The model is left as it was.

    >>> import tempfile
    >>> from lowrank_adapters import export_peft, inject_adapters_
    >>> layers = inject_adapters_(nn.Sequential(nn.Linear(4, 3)), LoRA(rank=2, alpha=8.0))
    >>> folder = export_peft(layers, tempfile.mkdtemp() + "/adapter")
    >>> import_peft_(nn.Sequential(nn.Linear(4, 3)), folder)
    {'0': LoRALinear(
      rank=2, alpha=2.0
      (base): Linear(in_features=4, out_features=3, bias=True)
    )}
    """
    folder = Path(folder)
    config = read_config(folder / CONFIG)
    tensors, _ = read_tensors(folder / TENSORS)
    modules, whole = _split(tensors)
    maps = adaptable(model)
    _refuse_missing_modules(modules, maps)
    plans = _plans(model, maps, modules, config)
    targets = _places_of_whole(model, whole, config.whole)
    makers = {name: plan.make for name, plan in plans.items()}
    # The start is drawn, and overwritten: the caller's random numbers stay what they were.
    with torch.random.fork_rng(devices=[]):
        layers = build_layers(model, makers, device=device, factor_dtype=factor_dtype)
    refuse_waiting(layers)
    for name, plan in plans.items():
        _fill_(name, layers[name], plan)
    place_(model, layers)
    with torch.no_grad():
        for name, tensor in targets.items():
            tensor.copy_(whole[name])
    return layers


@dataclass(frozen=True)
class _Plan:
    """A layer to be built, and its factors; of AdaLoRA those of the components in ``mask``."""

    make: Maker
    factors: Mapping[str, Tensor]
    mask: Tensor | None = None


def _split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Parts], dict[str, Tensor]]:
    """Return the low-rank tensors by module and part, and the others by the model's own names."""
    modules: dict[str, Parts] = {}
    whole = {}
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            raise AdapterError(f"the file has {key}, expected names that begin with {PREFIX!r}.")
        name = key.removeprefix(PREFIX)
        part = next((part for part in PARTS if name.endswith(f".{part}")), None)
        if part is None:
            whole[name.replace(".base_layer.", ".")] = tensor
        else:
            modules.setdefault(name.removesuffix(f".{part}"), {})[part] = tensor
    return modules, whole


def _refuse_missing_modules(modules: Mapping[str, Parts], maps: Mapping[str, Map | None]) -> None:
    missing = [name for name in modules if name not in maps]
    if missing:
        kinds = sorted({name.rpartition(".")[2] for name in maps})
        raise AdapterError(
            f"the adapter is of modules that the model lacks: {_some(missing)}; the model has "
            f"{', '.join(kinds)}: load it into the model that it was trained on."
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def _plans(
    model: nn.Module,
    maps: Mapping[str, Map | None],
    modules: Mapping[str, Parts],
    config: PeftConfig,
) -> dict[str, _Plan]:
    plans = {}
    for name, found in maps.items():
        if name in modules:
            try:
                linear_map = found or map_of(model.get_submodule(name))
                plan = _plan(name, config, linear_map, modules[name])
            except AdapterError as error:
                raise AdapterError(f"{name}: {error}") from error
            if plan is not None:
                plans[name] = plan
    return plans


def _plan(name: str, config: PeftConfig, linear_map: Map, parts: Parts) -> _Plan | None:
    dora = config.kind == "dora"
    lora = {*lora_parts(linear_map)} | ({MAGNITUDE} if dora else set())
    expected = {ADALORA_A, ADALORA_E, ADALORA_B} if config.kind == "adalora" else lora
    if parts.keys() != expected:
        raise AdapterError(
            f"the adapter has {', '.join(sorted(parts))}, expected {', '.join(sorted(expected))} "
            f"of {config.kind} on this kind of module; save it with PEFT again."
        )
    # Indices cannot be dropped, and PEFT does not.
    dropout = 0.0 if isinstance(linear_map, EmbeddingMap) else config.dropout
    if config.kind == "adalora":
        return _adalora(name, config, parts, dropout)
    a, b = lora_factors(linear_map, parts)
    if len(a) == 0:
        return None
    alpha = config.alpha_of(name)
    make = DoRA if dora else LoRA
    factors = {"a": a, "b": b} | ({"magnitude": parts[MAGNITUDE]} if dora else {})
    return _Plan(make(len(a), alpha, rslora=config.rslora, dropout=dropout), factors)


def _adalora(name: str, config: PeftConfig, parts: Parts, dropout: float) -> _Plan:
    rank = config.initial_rank
    live = len(parts[ADALORA_E])
    found = config.masks.get(f"{name}.{ADALORA_E}")
    # As long as the tensors: init_r may be any number, and is compared before it is used.
    mask = [True] * live if found is None else found
    if (len(mask), sum(mask)) != (rank, live):
        said = "nothing of them" if found is None else f"{sum(mask)} of {len(mask)}"
        raise AdapterError(
            f"the tensors have {live} components, but init_r is {rank} and rank_pattern says "
            f"{said}; save it with PEFT again."
        )
    make = SVD(rank, config.alpha * rank / (rank + ADALORA_EPSILON), dropout=dropout)
    factors = {"q": parts[ADALORA_A], "lam": parts[ADALORA_E].flatten(), "p": parts[ADALORA_B]}
    return _Plan(make, factors, torch.tensor(mask))


@torch.no_grad()
def _fill_(name: str, layer: LowRankLinear, plan: _Plan) -> None:
    if plan.mask is not None:
        layer.get_buffer("rank_mask").copy_(plan.mask)
    for role, values in plan.factors.items():
        factor = layer.get_parameter(role).detach()
        if plan.mask is None:
            check_fits(f"{name}.{role}", values, factor)
            factor.copy_(values)
        else:
            tokens, mask = layer.as_tokens(role, factor), plan.mask.to(factor.device)
            live = layer.from_tokens(role, tokens[mask])
            check_fits(f"{name}.{role}", values, live)
            tokens[mask] = layer.as_tokens(role, values).to(factor)


def _places_of_whole(
    model: nn.Module, whole: Mapping[str, Tensor], names: tuple[str, ...]
) -> dict[str, Tensor]:
    """Return the model's tensors that those saved whole are to be copied into."""
    own = {n: p.detach() for n, p in model.named_parameters(remove_duplicate=False)}
    own |= dict(model.named_buffers(remove_duplicate=False))
    missing = [name for name in whole if name not in own]
    if missing:
        raise AdapterError(
            f"the adapter holds tensors that the model lacks: {_some(missing)}; load it into the "
            "model that it was trained on."
        )
    for name in names:
        inside = [key for key in own if f".{name}." in f".{key}"]
        if inside and not any(key in whole for key in inside):
            raise AdapterError(
                f"modules_to_save has {name}, but the adapter has no tensor of it; save it with "
                "PEFT again."
            )
    for name, tensor in whole.items():
        check_fits(name, tensor, own[name])
    return {name: own[name] for name in whole}
