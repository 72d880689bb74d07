"""What the allocator asks of a layer, and where it finds such layers in a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter, getitem
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from rank_budget.errors import BudgetError


@runtime_checkable
class RankedLayer(Protocol):
    """A layer with the update P diag(λ) Q, component by component.

    Shapes: p (out, rank), lam (rank,) or (rank, 1), q (rank, in). A layer may also have a
    ``rank_mask``, bool (rank,), by which its forward multiplies λ; the allocator writes it in
    place. Without one, it sets λ of what is pruned to zero.
    """

    @property
    def p(self) -> Tensor:
        """Return P (out, rank)."""

    @property
    def lam(self) -> Tensor:
        """Return λ (rank,) or (rank, 1)."""

    @property
    def q(self) -> Tensor:
        """Return Q (rank, in)."""


@dataclass
class Triplet:
    """Three tensors of your own, as a `RankedLayer`.

    >>> triplet = Triplet(torch.zeros(5, 2), torch.zeros(2), torch.zeros(2, 3))
    >>> isinstance(triplet, RankedLayer)
    True
    """

    p: Tensor
    lam: Tensor
    q: Tensor
    rank_mask: Tensor | None = None


class AdaLoraLayer:
    """The triplet of one adapter of PEFT's AdaLoRA layer: lora_B, lora_E and lora_A.

    ``key``: of the layer in the ``rank_pattern`` of ``config``, the adapter's, if it is known.
    """

    def __init__(self, module: Any, adapter: str, key: str = "", config: Any = None) -> None:
        self._key, self._config = f"{key}.lora_E", config
        self._p: nn.ParameterDict = module.lora_B
        self._lam: nn.ParameterDict = module.lora_E
        self._q: nn.ParameterDict = module.lora_A
        self._adapter = adapter

    @property
    def p(self) -> Tensor:
        """Return lora_B (out, rank)."""
        return _parameter(self._p, self._adapter)

    @p.setter
    def p(self, factor: Tensor) -> None:
        self._p[self._adapter] = factor

    @property
    def lam(self) -> Tensor:
        """Return lora_E (rank, 1)."""
        return _parameter(self._lam, self._adapter)

    @lam.setter
    def lam(self, factor: Tensor) -> None:
        self._lam[self._adapter] = factor

    @property
    def q(self) -> Tensor:
        """Return lora_A (rank, in)."""
        return _parameter(self._q, self._adapter)

    @q.setter
    def q(self, factor: Tensor) -> None:
        self._q[self._adapter] = factor

    def place(self, role: str) -> tuple[Any, str]:
        """Return in what a factor is looked up, and by what: there is what may replace it, too."""
        parameters = {"p": self._p, "lam": self._lam, "q": self._q}[role]
        held = parameters._parameters  # a look-up takes a third of a property's time
        return (held if self._adapter in held else parameters), self._adapter

    def keep(self, mask: Tensor) -> Tensor:
        """Return which components a smaller layer has: one of λ zero where nothing lives.

        PEFT loads no layer without any.
        """
        if mask.any() or not len(mask):
            return mask
        first = mask.clone()
        first[0] = True
        return first

    def record(self, mask: Tensor) -> None:
        """Write to PEFT's config what is kept, by which it loads factors of this size."""
        if self._config is None:
            return
        found = self._config.rank_pattern or {}
        pattern = {key.removesuffix(f".{self._adapter}"): kept for key, kept in found.items()}
        before = pattern.get(self._key, [])
        # A layer that was smaller already has the components that were kept then.
        kept = list(before) if sum(before) == len(mask) else [True] * len(mask)
        places = [place for place, here in enumerate(kept) if here]
        for place, here in zip(places, mask.tolist(), strict=True):
            kept[place] = here
        self._config.rank_pattern = pattern | {self._key: kept}


def reading(layers: Sequence[RankedLayer], role: str) -> Callable[[], list[Tensor]]:
    """Return what reads a factor of many layers, at every step, as fast as can be."""
    found = [layer.place(role) for layer in layers if isinstance(layer, AdaLoraLayer)]
    if len(found) < len(layers):
        return lambda: list(map(attrgetter(role), layers))
    places, keys = zip(*found, strict=True)
    return lambda: list(map(getitem, places, keys))


def _parameter(parameters: nn.ParameterDict, key: str) -> Tensor:
    """Return ``parameters[key]``, several times as fast: a step reads hundreds of them."""
    found = parameters._parameters.get(key)
    return parameters[key] if found is None else found


def ranked_layers(model: nn.Module, adapter: str = "default") -> dict[str, RankedLayer]:
    """Return the ranked layers of a model by name, in model order.

    These are modules with p, lam and q, such as an SVDLinear, and PEFT's AdaLoRA layers, of which
    ``adapter`` names the adapter. Shard the model before, if it is to be sharded.

    Raises:
        BudgetError: there is none.

    >>> layer = nn.Module()
    >>> layer.p, layer.lam, layer.q = (nn.Parameter(torch.ones(n)) for n in ((4, 2), 2, (2, 3)))
    >>> list(ranked_layers(nn.Sequential(nn.Linear(3, 3), layer)))
    ['1']
    """
    layers: dict[str, RankedLayer] = {}
    keys, config = _peft_keys(model, adapter)
    for name, module in model.named_modules():
        if all(isinstance(getattr(module, role, None), Tensor) for role in ("p", "lam", "q")):
            layers[name] = module
        elif adapter in getattr(module, "lora_E", ()):
            layers[name] = AdaLoraLayer(module, adapter, keys.get(module, ""), config)
    if not layers:
        raise BudgetError(
            f"{type(model).__name__} has no ranked layers, expected modules with p, lam and q, or "
            f"PEFT's AdaLoRA layers with the adapter {adapter!r}; put the adapters on it first."
        )
    return layers


def _peft_keys(model: Any, adapter: str) -> tuple[dict[nn.Module, str], Any]:
    """Return the names by which PEFT's config knows modules, and that config, if there is one."""
    config = (getattr(model, "peft_config", None) or {}).get(adapter)
    inner = getattr(getattr(model, "base_model", model), "model", None)
    if config is None or not isinstance(inner, nn.Module):
        return {}, None
    return {module: name for name, module in inner.named_modules()}, config


@dataclass(frozen=True)
class RankedMatrices:
    """λ of matrices of equal rank, as live views that the allocator reads and masks.

    ``values``, ``gradients``: λ and ∇λ, (matrices, rank). ``rank_mask``: bool, (matrices, rank),
    changed in place. ``names``: one per matrix, unique over all groups.
    """

    names: tuple[str, ...]
    values: Tensor
    gradients: Tensor
    rank_mask: Tensor

    def __post_init__(self) -> None:
        _check_stack(self, ("values", "gradients", "rank_mask"), "rank")
        if self.rank_mask.dtype != torch.bool:
            raise BudgetError(f"rank_mask is {self.rank_mask.dtype}, expected torch.bool.")


@dataclass(frozen=True)
class RankedFactors:
    """P or Q of matrices of equal rank and width, as live views, for scores over whole triplets.

    ``role``: "p" or "q". ``values``, ``gradients``: (matrices, rank, width), a row per component.
    ``names``: those of the matrices in `RankedMatrices`.
    """

    role: str
    names: tuple[str, ...]
    values: Tensor
    gradients: Tensor

    def __post_init__(self) -> None:
        if self.role not in ("p", "q"):
            raise BudgetError(f"role is {self.role!r}, expected 'p' or 'q'.")
        _check_stack(self, ("values", "gradients"), "rank, width")


def _check_stack(stack: Any, fields: tuple[str, ...], tail: str) -> None:
    rows, dims = len(stack.names), 2 + tail.count(",")
    for field in fields:
        shape = tuple(getattr(stack, field).shape)
        if len(shape) != dims or shape != (rows, *stack.values.shape[1:]):
            raise BudgetError(
                f"{field} has the shape {shape}, expected ({rows}, {tail}) for the {rows} names."
            )


def check_layer(name: str, layer: RankedLayer) -> None:
    """Refuse three tensors that are not a triplet, by name and shape."""
    for role in ("p", "lam", "q"):
        factor = getattr(layer, role, None)
        if not isinstance(factor, Tensor):
            has = f"a {role} of {type(factor).__name__}" if hasattr(layer, role) else f"no {role}"
            raise BudgetError(
                f"{name}, a {type(layer).__name__}, has {has}, expected the tensors p, lam and q; "
                "give a layer that has them, or Triplet(p, lam, q)."
            )
    p, lam, q = (tuple(getattr(layer, role).shape) for role in ("p", "lam", "q"))
    rank = lam[0] if lam else -1
    fits = lam in ((rank,), (rank, 1)) and len(p) == len(q) == 2 and p[1] == rank == q[0]
    if not fits:
        raise BudgetError(
            f"{name} has p {p}, lam {lam} and q {q}, expected (out, rank), (rank,) or (rank, 1), "
            "and (rank, in)."
        )
    devices = {getattr(layer, role).device for role in ("p", "lam", "q")}
    if len(devices) > 1:
        where = " and ".join(sorted(map(str, devices)))
        raise BudgetError(f"{name} has its p, lam and q on {where}, expected one device.")
    mask = getattr(layer, "rank_mask", None)
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != (rank,)):
        raise BudgetError(
            f"{name} has a rank_mask of {mask.dtype} {tuple(mask.shape)}, expected torch.bool "
            f"({rank},)."
        )
