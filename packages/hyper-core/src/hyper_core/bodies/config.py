"""What every body's configuration offers, and the checks that they share."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import nn

from hyper_core.errors import HyperError


@runtime_checkable
class BodyConfig(Protocol):
    """A size of a body. A body of your own is a frozen dataclass with these four.

    The network that `build` makes maps (networks, matrices, tokens, ``input_width``) to
    (networks, matrices, tokens, ``output_width``), each matrix by itself, and each of
    ``networks`` networks with weights of its own, whose first dimension is ``networks``. It puts
    out unit variance at the start, and is a function of weights and input alone.

    Raises:
        HyperError: from `check_tokens`, for a batch that would not fit in memory.

    >>> from hyper_core import PRESETS
    >>> {name: config.output_width for name, config in PRESETS.items() if "small" in name}
    {'attention-small': 96, 'conv-small': 96, 'mlp-small': 32}
    """

    @property
    def input_width(self) -> int:
        """Features of a token that goes in."""

    @property
    def output_width(self) -> int:
        """Features of a token that comes out."""

    def build(self, networks: int) -> nn.Module:
        """Return that many networks of this size, stacked."""

    def check_tokens(self, matrices: int, tokens: int) -> None:
        """Raise a `HyperError` for a batch of matrices that would not fit in memory."""


def check_size(owner: object, field: str, value: Any, default: object) -> None:
    """Raise a `HyperError` unless ``value`` is a whole number of at least one.

    >>> check_size(object(), "hidden", 3, 312)
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise HyperError(
            f"{type(owner).__name__}.{field} is {value!r}, expected a whole number of at least 1; "
            f"the default is {default}."
        )


def check_sizes(owner: object, field: str, values: Any, default: object) -> None:
    """Raise a `HyperError` unless ``values`` is a sequence of sizes, as `check_size` has them.

    >>> check_sizes(object(), "widths", (3, 4), (64, 128))
    """
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise HyperError(
            f"{type(owner).__name__}.{field} is {values!r}, expected a tuple of whole numbers of "
            f"at least 1; the default is {default}."
        )
    for i, value in enumerate(values):
        check_size(owner, f"{field}[{i}]", value, default)
