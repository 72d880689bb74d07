"""One step of the recursion of a role: the next values of its matrices from their state."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hyper_core.checks import check_choice, is_number
from hyper_core.errors import HyperError
from hyper_core.hypernetwork import Bounds, Hypernetwork
from hyper_core.outputs import constrain
from hyper_core.roles import Role
from hyper_core.tokens import from_tokens, to_tokens

State = Literal["recurrent", "static", "damped"]


@dataclass(frozen=True)
class Recursion:
    """How the next values come from the state P_i and the hypernetwork's output H(P_i).

    "recurrent": out(H(P_i)). "damped": out((1 − ρ)·P_i + ρ·H(P_i)), ρ the ``relaxation``.
    "static": out(P_0 + H(P_0)). H reads tokens scaled to unit norm, and writes such.

    Raises:
        HyperError: an unknown state, a relaxation outside 0 to 1.

    >>> Recursion("recurrent").keeps_start
    False
    """

    state: State
    relaxation: float = 0.5

    def __post_init__(self) -> None:
        check_choice("state", self.state, ("recurrent", "static", "damped"))
        if not is_number(self.relaxation) or not 0 < self.relaxation <= 1:
            raise HyperError(
                f"relaxation is {self.relaxation!r}, expected above 0 and at most 1; 1 is the "
                "recurrent state."
            )

    @property
    def keeps_start(self) -> bool:
        """Whether the state stays P_0."""
        return self.state == "static"

    def values(
        self,
        network: Hypernetwork,
        role: Role,
        state: Sequence[Tensor],
        context: Tensor | None,
        only: Bounds | None = None,
    ) -> list[Tensor]:
        """Return the next values of each stack, (matrices, rows, columns), as ``state``.

        ``context``, ``only``: as for `Hypernetwork.forward`; ``state`` is of those matrices.
        """
        scales = [role.token_scale(*stack.shape[1:]) for stack in state]
        cut = [
            _scaled(to_tokens(stack, role.tokens), scale)
            for stack, scale in zip(state, scales, strict=True)
        ]
        with _without_autocast(cut[0].device.type):
            written = network(cut, context, only)
            after = [
                from_tokens(_scaled(part, 1 / scale), role.tokens, stack.shape[1])
                for part, scale, stack in zip(written, scales, state, strict=True)
            ]
            values = constrain(self._combined(state, after), role.output)
        return values if role.output == "free" else [_scaled(rows, role.norm) for rows in values]

    def _combined(self, state: Sequence[Tensor], after: list[Tensor]) -> list[Tensor]:
        pairs = zip(state, after, strict=True)
        if self.state == "static":
            return [start + change for start, change in pairs]
        if self.state == "damped":
            return [torch.lerp(before, output, self.relaxation) for before, output in pairs]
        return after


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else tensor * factor


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Keep a surrounding autocast from rounding the factors to the precision of activations."""
    if not torch.amp.is_autocast_available(device_type):  # such as the meta device
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
