"""What a low-rank layer declares as its own: factors, masks, the start's product; how it loads."""

from collections.abc import Container, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

_PER_OUTPUT = ("p", "b")
_VECTORS = ("magnitude", "scale")
START = ("start_a", "start_b")


class Factors(nn.Module):
    """The tensors of a low-rank layer beside its base; see `LowRankLinear`.

    ``load_state_dict`` of any module around the layer takes the start's product from the state, or
    drops its own, where the state has all factors of the layer.
    """

    roles: ClassVar[tuple[str, ...]] = ()
    rank: int
    in_features: int
    out_features: int
    start_a: Tensor | None
    start_b: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("start_a", None)
        self.register_buffer("start_b", None)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the factors."""
        # Whatever stands in a factor's place, as under torch.func.functional_call.
        factor: Tensor = getattr(self, self.roles[0])
        return factor.dtype

    def factors(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield each role and its parameter, in the order of ``roles``."""
        for role in self.roles:
            yield role, self.get_parameter(role)

    def owned(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what is saved of the layer by name, live: factors, masks, the start's product."""
        yield from self.factors()
        for name, buffer in self.named_buffers(recurse=False):
            if name not in self._non_persistent_buffers_set:
                yield name, buffer

    def expected_start(self, keys: Container[str], prefix: str = "") -> dict[str, Tensor | None]:
        """Return what ``start_a`` and ``start_b`` must be for a state with these keys to be loaded.

        None where the state has none; zeros where the layer has none yet. A state without all of
        the factors says nothing of the start.
        """
        held = [prefix + name in keys for name in START]
        own = self._buffers
        if not self._are_in(keys, prefix) or held[0] != held[1]:
            return {name: own[name] for name in START}
        if not all(held):
            return dict.fromkeys(START)
        like = self.get_parameter(self.roles[0]).detach()
        sizes = (self.rank, self.in_features), (self.out_features, self.rank)
        rooms = (like.new_zeros(size) for size in sizes)
        return {n: room if own[n] is None else own[n] for n, room in zip(START, rooms, strict=True)}

    def expect_(self, keys: Container[str], prefix: str = "") -> None:
        """Make the layer ready for a state with these keys."""
        for name, buffer in self.expected_start(keys, prefix).items():
            self._buffers[name] = buffer

    def _are_in(self, keys: Container[str], prefix: str) -> bool:
        return all(prefix + role in keys for role in self.roles)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.expect_(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @staticmethod
    def as_tokens(role: str, factor: Tensor) -> Tensor:
        """Return the view (rank, width) of one factor; a vector over outputs is one row.

        >>> Factors.as_tokens("p", torch.zeros(5, 2)).shape
        torch.Size([2, 5])
        """
        if role in _PER_OUTPUT:
            return factor.T
        if role in _VECTORS:
            return factor.unsqueeze(0)
        return factor.unsqueeze(-1) if role == "lam" else factor

    @staticmethod
    def from_tokens(role: str, tokens: Tensor) -> Tensor:
        """Return the factor's own shape as a view of (rank, width) tokens."""
        if role in _PER_OUTPUT:
            return tokens.T
        if role in _VECTORS:
            return tokens.squeeze(0)
        return tokens.squeeze(-1) if role == "lam" else tokens

    def tokens(self, role: str) -> Tensor:
        """Return the live view (rank, width) of one factor's values."""
        return self.as_tokens(role, self.get_parameter(role).detach())
