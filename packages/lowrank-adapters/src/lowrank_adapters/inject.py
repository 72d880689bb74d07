"""Puts low-rank layers in the place of a model's linear maps."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from lowrank_adapters.errors import AdapterError
from lowrank_adapters.layer import LowRankLinear
from lowrank_adapters.maps import LinearMap, Map, map_of
from lowrank_adapters.targets import ALL_LINEAR, Pattern, by_module, choose

# Not part of "all-linear": a head's matrix is as wide as the vocabulary, or is trained as a whole.
_HEADS = ("output", "lm_head", "classifier", "score", "head")


class Maker(Protocol):
    """Builds a low-rank layer around a linear map, such as `LoRA` or `SVD`.

    One that is a dataclass with ``rank`` and ``alpha`` takes per-module values of these.
    """

    def build(
        self, base: nn.Module, *, device: torch.device | str, dtype: torch.dtype
    ) -> LowRankLinear:
        """Return the layer around ``base``."""


def inject_adapters_(
    model: nn.Module,
    make: Maker,
    targets: Pattern | Sequence[Pattern] = ALL_LINEAR,
    *,
    exclude: Pattern | Sequence[Pattern] = (),
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    device: torch.device | str | None = None,
    factor_dtype: torch.dtype = torch.float32,
) -> dict[str, LowRankLinear]:
    """Replace linear maps by low-rank layers around them; return these by name, in model order.

    ``targets``: "all-linear" (every linear layer but an output or classification head), or
    patterns: a whole module name, a suffix of it at a dot ("q_proj", "mlp.w1"), a glob of either
    ("layers.0.*"), or a regular expression for the whole name, compiled or after "re:".
    Convolutions and embeddings are adapted where a pattern stands for them. ``exclude``: the same.

    ``rank_pattern``, ``alpha_pattern``: by pattern, values in place of the maker's; the first
    pattern that stands for a module counts. ``device``: where the factors are made; by default
    where each base is, or the CPU for a base on the meta device. The factors' start is drawn by
    torch's global generator.

    Raises:
        AdapterError: a pattern that matches nothing (near names are listed), a rank that does not
            fit a matrix, a module that is adapted already, is used in two places, shares its
            weight, or is not called by torch's fast path of a TransformerEncoderLayer. The model is
            left as it was.

    >>> from lowrank_adapters import SVD
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> list(inject_adapters_(model, SVD(rank=2, alpha=2.0), ["2"]))
    ['2']
    """
    maps = adaptable(model)
    names = choose(list(maps), _all_linear(model, maps), targets, exclude)
    makers = _makers(make, names, rank_pattern or {}, alpha_pattern or {})
    layers = build_layers(model, makers, device=device, factor_dtype=factor_dtype)
    place_(model, layers)
    return layers


def build_layers(
    model: nn.Module,
    makers: Mapping[str, Maker],
    *,
    device: torch.device | str | None = None,
    factor_dtype: torch.dtype = torch.float32,
) -> dict[str, LowRankLinear]:
    """Return a layer around each named module; the model is left as it is until `place_`."""
    refuse_shared(model, list(makers))
    _refuse_bypassed(model, list(makers))
    layers: dict[str, LowRankLinear] = {}
    for name, make in makers.items():
        base = model.get_submodule(name)
        try:
            layer = make.build(base, device=device or _device(base), dtype=factor_dtype)
        except AdapterError as error:
            raise AdapterError(f"{name}: {error}") from error
        layers[name] = layer.train(base.training)
    return layers


def place_(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Set each named submodule of the model."""
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)


def adaptable(model: nn.Module) -> dict[str, Map | None]:
    """Return how each module that can be adapted is a linear map, by name, in model order.

    None: it is of a kind that has maps, but in a form that has none; building a layer says why.

    Raises:
        AdapterError: the model is adapted already, or is itself a linear map.
    """
    if isinstance(model, nn.Linear | LowRankLinear):
        raise AdapterError(
            f"the model is itself a {type(model).__name__}, which has no parent to replace it in; "
            "give the module that holds it."
        )
    maps: dict[str, Map | None] = {}
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            raise AdapterError(f"{name} is adapted already; inject into the plain model.")
        # A container may keep the features of the layers in it; it is not a map itself.
        if next(module.children(), None) is not None:
            continue
        try:
            maps[name] = map_of(module)
        except AdapterError:
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Embedding):
                maps[name] = None
    return maps


def _all_linear(model: nn.Module, maps: Mapping[str, Map | None]) -> list[str]:
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head is not None else None
    return [
        name
        for name, found in maps.items()
        if isinstance(found, LinearMap)
        and model.get_submodule(name) is not head
        and name.rpartition(".")[2] not in _HEADS
        and name.partition(".")[0] not in _HEADS[1:]
    ]


def _makers(
    make: Maker,
    names: Sequence[str],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
) -> dict[str, Maker]:
    own: dict[str, dict[str, float]] = {}
    for name, rank in by_module("rank_pattern", ranks, names).items():
        own[name] = {"rank": rank}
    for name, alpha in by_module("alpha_pattern", alphas, names).items():
        own.setdefault(name, {})["alpha"] = alpha
    return {name: _with(name, make, own[name]) if name in own else make for name in names}


def _with(name: str, make: Any, values: Mapping[str, float]) -> Any:
    if not dataclasses.is_dataclass(make) or isinstance(make, type):
        raise AdapterError(
            f"{type(make).__name__} is no dataclass, so that rank_pattern and alpha_pattern cannot "
            "change it; give one maker with one rank and alpha."
        )
    try:
        return dataclasses.replace(make, **values)
    except AdapterError as error:
        raise AdapterError(f"{name}: {error}") from error


def _device(base: nn.Module) -> torch.device | str:
    tensor = next(base.parameters(), next(base.buffers(), None))
    return "cpu" if tensor is None or tensor.is_meta else tensor.device


def refuse_shared(model: nn.Module, chosen: Sequence[str]) -> None:
    """Refuse modules that are used in two places or share a tensor with another.

    Raises:
        AdapterError: names both places.
    """
    places: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        first = places.setdefault(id(module), name)
        if first != name and first in chosen:
            raise AdapterError(f"{first} and {name} are one module; exclude {first}.")
    owners: dict[object, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = owners.setdefault(_memory(parameter), name)
        for shared in (name.rpartition(".")[0], first.rpartition(".")[0]):
            if first != name and shared in chosen:
                raise AdapterError(
                    f"{shared} shares its weight ({first} and {name} are one tensor); exclude it."
                )


def _refuse_bypassed(model: nn.Module, chosen: Sequence[str]) -> None:
    """Refuse what torch's fast path reads the weights of, and does not call, in evaluation.

    Raises:
        AdapterError: names the first such module.
    """
    if not torch.backends.mha.get_fastpath_enabled():
        return
    for name in chosen:
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.TransformerEncoderLayer):
            raise AdapterError(
                f"{name} is in a TransformerEncoderLayer, whose fast path reads its weight and "
                "never calls it; call torch.backends.mha.set_fastpath_enabled(False) first, or "
                "exclude it."
            )


def _memory(tensor: torch.Tensor) -> object:
    # Two parameters may be views of one tensor. What has no memory of its own is known by itself.
    if type(tensor.data) is not torch.Tensor or tensor.is_meta or not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr()


def adapted_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """Return the model's low-rank layers by name, in model order.

    >>> from lowrank_adapters import SVD
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3))
    >>> inject_adapters_(model, SVD(rank=2, alpha=2.0)) == adapted_layers(model)
    True
    """
    return {n: module for n, module in model.named_modules() if isinstance(module, LowRankLinear)}


def remove_adapters_(model: nn.Module) -> None:
    """Put each low-rank layer's base back in its place; one that is merged keeps the update.

    >>> from lowrank_adapters import SVD
    >>> model = nn.Sequential(nn.Linear(4, 3))
    >>> _ = inject_adapters_(model, SVD(rank=2, alpha=2.0))
    >>> remove_adapters_(model)
    >>> model
    Sequential(
      (0): Linear(in_features=4, out_features=3, bias=True)
    )
    """
    place_(model, {name: layer.base for name, layer in adapted_layers(model).items()})


def freeze_base_(model: nn.Module) -> None:
    """Let only the factors of low-rank layers take gradients.

    >>> from lowrank_adapters import LoRA
    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> _ = inject_adapters_(model, LoRA(rank=2, alpha=2.0))
    >>> freeze_base_(model)
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['0.a', '0.b']
    """
    model.requires_grad_(requires_grad=False)
    for layer in adapted_layers(model).values():
        for _, factor in layer.factors():
            factor.requires_grad_(True)


def inside_adapters(name: str, layers: Iterable[str]) -> str:
    """Return where a tensor of the plain model is after injection.

    >>> inside_adapters("layers.0.q_proj.weight", ["layers.0.q_proj"])
    'layers.0.q_proj.base.weight'
    """
    module, _, parameter = name.rpartition(".")
    return f"{module}.base.{parameter}" if module in layers else name
