"""Puts low-rank layers in the place of a model's linear layers."""

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Protocol

import torch
from torch import nn

from lowrank_adapters.errors import AdapterError
from lowrank_adapters.layer import LowRankLinear

ALL_LINEAR = "all-linear"
# The output head is not part of "all-linear": its matrix is as wide as the vocabulary.
_HEADS = ("output", "lm_head")


class Maker(Protocol):
    """Builds a low-rank layer around a linear one, such as `LoRA` or `SVD`."""

    def build(
        self, base: nn.Linear, *, device: torch.device | str, dtype: torch.dtype
    ) -> LowRankLinear:
        """Return the layer around ``base``."""


def inject_adapters_(
    model: nn.Module,
    make: Maker,
    targets: str | Sequence[str] = ALL_LINEAR,
    *,
    exclude: Sequence[str] = (),
    device: torch.device | str = "cpu",
    factor_dtype: torch.dtype = torch.float32,
) -> dict[str, LowRankLinear]:
    """Replace linear layers by low-rank ones around them; return these by name, in model order.

    ``targets``: "all-linear" (every `torch.nn.Linear` but the output head), or names: a whole
    module name, a suffix of it at a dot ("q_proj", "mlp.w1"), or a glob ("layers.0.*").
    ``exclude``: names of the same kinds. ``device``: where the factors are made; the base may be
    on the meta device. The factors' start is drawn by torch's global generator.

    Raises:
        AdapterError: a name that matches nothing (near ones are listed), a rank that does not fit
            a matrix, a layer that is adapted already or used in two places. The model is left as
            it was.

    >>> from lowrank_adapters import SVD
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> list(inject_adapters_(model, SVD(rank=2, alpha=2.0), ["2"]))
    ['2']
    """
    linears = _linears(model)
    chosen = _choose(linears, targets, exclude)
    _refuse_shared(model, chosen)
    layers: dict[str, LowRankLinear] = {}
    for name in chosen:
        try:
            layers[name] = make.build(linears[name], device=device, dtype=factor_dtype)
        except AdapterError as error:
            raise AdapterError(f"{name}: {error}") from error
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return layers


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    if isinstance(model, nn.Linear | LowRankLinear):
        raise AdapterError(
            f"the model is itself a {type(model).__name__}, which has no parent to replace it in; "
            "give the module that holds it."
        )
    adapted = [name for name, module in model.named_modules() if isinstance(module, LowRankLinear)]
    if adapted:
        raise AdapterError(f"{adapted[0]} is adapted already; inject into the plain model.")
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def _choose(
    linears: dict[str, nn.Linear], targets: str | Sequence[str], exclude: Sequence[str]
) -> list[str]:
    if targets == ALL_LINEAR:
        chosen = {name for name in linears if name.rpartition(".")[2] not in _HEADS}
    else:
        patterns = [targets] if isinstance(targets, str) else targets
        chosen = {name for pattern in patterns for name in _matching(linears, pattern)}
    for pattern in exclude:
        chosen -= set(_matching(linears, pattern))
    if not chosen:
        raise AdapterError(f"no linear layer is left to adapt; {_what_there_is(linears)}.")
    return [name for name in linears if name in chosen]


def _matching(names: Iterable[str], pattern: str) -> list[str]:
    found = [
        name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
    ]
    if not found:
        kinds = sorted({name.rpartition(".")[2] for name in names})
        near = difflib.get_close_matches(pattern.rpartition(".")[2], kinds, n=2)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise AdapterError(f"{pattern!r} matches no linear layer; {hint}{_what_there_is(names)}.")
    return found


def _what_there_is(names: Iterable[str]) -> str:
    kinds = sorted({name.rpartition(".")[2] for name in names})
    return f"the model has {', '.join(kinds)}" if kinds else "the model has none"


def _refuse_shared(model: nn.Module, chosen: Sequence[str]) -> None:
    places: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        first = places.setdefault(id(module), name)
        if first != name and first in chosen:
            raise AdapterError(f"{first} and {name} are one module; exclude {first}.")
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = owners.setdefault(id(parameter), name)
        for shared in (name.rpartition(".")[0], first.rpartition(".")[0]):
            if first != name and shared in chosen:
                raise AdapterError(
                    f"{shared} shares its weight ({first} and {name} are one tensor); exclude it."
                )


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
    for module in model.modules():
        if isinstance(module, LowRankLinear):
            for _, factor in module.factors():
                factor.requires_grad_(True)


def inside_adapters(name: str, layers: Iterable[str]) -> str:
    """Return where a tensor of the plain model is after injection.

    >>> inside_adapters("layers.0.q_proj.weight", ["layers.0.q_proj"])
    'layers.0.q_proj.base.weight'
    """
    module, _, parameter = name.rpartition(".")
    return f"{module}.base.{parameter}" if module in layers else name
